"""Does the confidence tell where the restoration is wrong? Patch confidence against true error.

N patches.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from patchscaler.evaluation.outputs import PNG_TEXT
from patchscaler.patches import PatchGrid
from patchscaler.plan import SamplingPlan

BINS = 10


def patch_errors(image: Tensor, truth: Tensor, grid: PatchGrid) -> Tensor:
    """Mean squared error in the pixels of each patch: two images 3×H×W → N in the grid's order.

    H and W may be less than the grid's, as they are for an output that was padded to whole patches.
    """
    error = (image - truth).square().mean(0)  # H×W
    return torch.stack([patch.pixels(error).mean() for patch in grid.patches])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors of N, in [-1, 1]; NaN if one is constant. ModuleNotFoundError without scipy."""
    from scipy.stats import spearmanr  # of the extra `eval`

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def draw_reliability(confidence: Tensor, errors: Tensor, plan: SamplingPlan, path: Path) -> None:
    """Plot every patch, and the means of BINS bins of equally many patches of like confidence, or of each if they are
    fewer.

    Args:
        confidence: N in [0, 1], of the patches of all images.
        errors: N, squared error of the coarse image in the pixels of each, in units of images in [-1, 1].
        plan: its gammas are drawn.
    """
    from matplotlib.figure import Figure  # here, because `upscale` starts without it

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="patch confidence",
        ylabel="squared error of the coarse patch",
        title=f"{len(confidence)} patches",
    )
    axes.scatter(confidence, errors, s=6, color="#94a3b8", alpha=0.5, linewidths=0, label="patches")
    bins = confidence.argsort().tensor_split(min(BINS, len(confidence)))
    means = [[values[members].mean().item() for members in bins] for values in (confidence, errors)]
    axes.plot(*means, "o-", color="#0a9396", label="mean of each tenth" if len(bins) == BINS else "mean")
    for name, gamma in (("γ₂", plan.gamma2), ("γ₁", plan.gamma1)):
        axes.axvline(gamma, color="#c2185b", linewidth=0.8, linestyle="--")
        axes.annotate(name, (gamma, 1), (3, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
    if torch.all(errors > 0):
        axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120, metadata=PNG_TEXT)
