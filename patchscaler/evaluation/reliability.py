"""Does the confidence tell where the restoration is wrong? Patch confidence against true error, in bins.

N patches.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from torch import Tensor

from patchscaler.patches import PatchGrid
from patchscaler.plan import SamplingPlan

BINS = 10


def patch_errors(image: Tensor, truth: Tensor, grid: PatchGrid) -> Tensor:
    """Mean squared error in the pixels of each patch: two images 3xHxW -> N in the grid's order.

    H and W may be less than the grid's, as they are for an output that was padded to whole patches.
    """
    error = (image - truth).square().mean(0)  # HxW
    return torch.stack([patch.pixels(error).mean() for patch in grid.patches])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors of N, in [-1, 1]; NaN if one is constant. ModuleNotFoundError without scipy."""
    from scipy.stats import spearmanr  # of the extra `eval`

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def reliability_bins(confidence: Tensor, errors: Tensor) -> list[dict[str, float]]:
    """N patches in order of confidence, cut into BINS bins of equal size, or into N if these are fewer.

    Each has the number of its patches, their lowest, mean and highest confidence, and their mean squared error.
    """
    order = confidence.argsort()
    bins = []
    for members in order.tensor_split(min(BINS, len(order))):
        own = confidence[members].double()
        bins.append({
            "patches": len(members),
            "lowest": own.min().item(),
            "confidence": own.mean().item(),
            "highest": own.max().item(),
            "squared_error": errors[members].double().mean().item(),
        })  # fmt: skip
    return bins


def write_reliability(confidence: Tensor, errors: Tensor, plan: SamplingPlan, out: Path) -> None:
    """Write `reliability.csv` and `reliability.png` into `out`.

    Args:
        confidence: N in [0, 1], of the patches of all images.
        errors: N, squared error of the coarse image in the pixels of each, in units of images in [-1, 1].
        plan: its gammas are drawn.
    """
    bins = reliability_bins(confidence, errors)
    with open(out / "reliability.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, bins[0])
        writer.writeheader()
        writer.writerows(bins)
    _plot(confidence, errors, bins, plan, out / "reliability.png")


def _plot(confidence: Tensor, errors: Tensor, bins: list[dict], plan: SamplingPlan, path: Path) -> None:
    from matplotlib.figure import Figure  # here, because `upscale` starts without it

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="patch confidence",
        ylabel="squared error of the coarse patch",
        title=f"{len(confidence)} patches",
    )
    axes.scatter(confidence, errors, s=6, color="#94a3b8", alpha=0.5, linewidths=0, label="patches")
    means = [[each[key] for each in bins] for key in ("confidence", "squared_error")]
    axes.plot(*means, "o-", color="#0a9396", label="mean of each tenth" if len(bins) == BINS else "mean")
    for name, gamma in (("γ₂", plan.gamma2), ("γ₁", plan.gamma1)):
        axes.axvline(gamma, color="#c2185b", linewidth=0.8, linestyle="--")
        axes.annotate(name, (gamma, 1), (3, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
    if torch.all(errors > 0):
        axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
