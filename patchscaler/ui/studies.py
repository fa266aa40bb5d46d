"""What is known about an image before any diffusion step, and the few images for which that is kept."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import torch
from PIL import Image

from patchscaler.figures import LATENT_PIXELS, priors_sheet
from patchscaler.pipeline import Analysis, PatchScalerPipeline

KEPT_PIXELS = 32_000_000  # of output, over all kept analyses: about 1.5 GB
SHEET_ROWS = 4  # patches on the sheet of priors
SHEET_PRIORS = 4  # priors beside each


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


def draw_priors(pipeline: PatchScalerPipeline, analysis: Analysis) -> Image.Image:
    """Retrieved priors of a few patches, from the least to the most confident."""
    order = analysis.patch_confidence.argsort().tolist()
    last = len(order) - 1
    rows = [order[round(last * i / (SHEET_ROWS - 1))] for i in range(SHEET_ROWS)] if last >= SHEET_ROWS else order
    side = analysis.grid.size * LATENT_PIXELS
    queries = []
    for index in rows:
        patch = analysis.grid.patches[index]
        top, left = patch.top * LATENT_PIXELS, patch.left * LATENT_PIXELS
        queries.append(analysis.coarse[:, top : top + side, left : left + side])
    values = analysis.priors.values[rows, :SHEET_PRIORS]  # N K C V V
    with torch.inference_mode():
        pictures = pipeline.decode_priors(values.flatten(0, 1)).unflatten(0, values.shape[:2])
    return priors_sheet(pictures, analysis.priors.similarities[rows, :SHEET_PRIORS], queries)


def _pixels(study: Study) -> int:
    return study.analysis.coarse[0].numel()
