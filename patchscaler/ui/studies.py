"""What is known about an image, and the few images for which that is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

from PIL import Image

from patchscaler.figures import grey_preview
from patchscaler.results import Analysis, Sampled
from patchscaler.ui.errors import visible_error

KEPT_PIXELS = 32_000_000  # of output, over all kept studies: about 2 GB
WAIT_SECONDS = 20
_whole = Lock()


@dataclass(eq=False)
class Study:
    """An image's analysis, the sheet of its texture priors, and what later runs need not do again.

    Refined patches depend on the image, (T, N) and the seed only, so whoever asks may take over anybody's.
    """

    analysis: Analysis
    priors: Image.Image
    sampled: Sampled | None = None  # of the latest run, finished or stopped
    uniform: Sampled | None = None  # of the latest uniform baseline
    prior_images: dict[int, list[Image.Image]] = field(default_factory=dict)  # of inspected patches

    @cached_property
    def grey(self) -> Image.Image:
        """The ground of the Qmap's overlay, drawn once and not for every move of a dial."""
        return grey_preview(self.analysis.coarse)


class Studies:
    """The latest studies by file, so that a changed plan or seed needs no second analysis.

    Uploads and examples lie under names made from their content, so the file's path is the key.
    """

    def __init__(self, kept_pixels: int = KEPT_PIXELS) -> None:
        self._kept_pixels = kept_pixels
        self._studies: OrderedDict[str, Study] = OrderedDict()
        self._lock = Lock()

    def get(self, source: str | None) -> Study | None:
        with self._lock:
            if source in self._studies:
                self._studies.move_to_end(source)
            return self._studies.get(source)

    def put(self, source: str, study: Study) -> None:
        """Keep `study`, and drop the oldest others beyond the limit."""
        with self._lock:
            self._studies[source] = study
            while len(self._studies) > 1 and sum(map(_pixels, self._studies.values())) > self._kept_pixels:
                self._studies.popitem(last=False)


def _pixels(study: Study) -> int:
    return study.analysis.coarse[0].numel()


@contextmanager
def whole_pictures() -> Iterator[None]:
    """For light events that hold whole pictures, which may take a GB or two: one works at a time, and the others wait.

    gr.Error after WAIT_SECONDS, or those that wait would keep the dials' threads.
    """
    if not _whole.acquire(timeout=WAIT_SECONDS):
        raise visible_error("The server is busy", "Others look at large pictures closely. Try again in a moment.")
    try:
        yield
    finally:
        _whole.release()
