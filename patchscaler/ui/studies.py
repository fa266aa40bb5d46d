"""What is known about an image before any diffusion step, and the few images for which that is kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from PIL import Image

from patchscaler.pipeline import Analysis

KEPT_PIXELS = 32_000_000  # of output, over all kept analyses: about 1.5 GB


@dataclass(frozen=True)
class Study:
    """An image's analysis and the sheet of its texture priors."""

    analysis: Analysis
    priors: Image.Image


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
