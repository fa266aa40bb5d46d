"""Does the confidence tell where the restoration is wrong? Patch confidence against true error, in bins.

N patches.
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from patchscaler.evaluation.components import spearman
from patchscaler.plan import SamplingPlan

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Patches of like confidence: how many, their lowest, mean and highest confidence, their mean squared error."""

    patches: int
    lowest: float
    confidence: float
    highest: float
    squared_error: float


def reliability_bins(confidence: Tensor, errors: Tensor) -> list[Bin]:
    """N patches in order of confidence, cut into BINS bins of equal size, or into N if these are fewer."""
    order = confidence.argsort()
    bins = []
    for members in order.tensor_split(min(BINS, len(order))):
        own = confidence[members].double()
        error = errors[members].double().mean().item()
        bins.append(Bin(len(members), own.min().item(), own.mean().item(), own.max().item(), error))
    return bins


def write_reliability(confidence: Tensor, errors: Tensor, plan: SamplingPlan, out: Path) -> float:
    """Write `reliability.csv` and `reliability.png` into `out`.

    Args:
        confidence: N in [0, 1], of the patches of all images.
        errors: N, squared error of the coarse image in the pixels of each, in units of images in [-1, 1].
        plan: its gammas are drawn.

    Returns:
        Spearman's rank correlation of confidence and negative error: 1 if a surer patch is never a worse one.
    """
    bins = reliability_bins(confidence, errors)
    with open(out / "reliability.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Bin)])
        writer.writeheader()
        writer.writerows(asdict(each) for each in bins)
    correlation = spearman(confidence, -errors)
    _plot(confidence, errors, bins, plan, correlation, out / "reliability.png")
    return correlation


def _plot(confidence: Tensor, errors: Tensor, bins: list[Bin], plan: SamplingPlan, correlation: float, path: Path):
    from matplotlib.figure import Figure  # here, because `upscale` starts without it

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="patch confidence",
        ylabel="squared error of the coarse patch",
        title=f"{len(confidence)} patches, Spearman with negative error {correlation:.3f}",
    )
    axes.scatter(confidence, errors, s=6, color="#94a3b8", alpha=0.5, linewidths=0, label="patches")
    means = [each.confidence for each in bins], [each.squared_error for each in bins]
    axes.plot(*means, "o-", color="#0a9396", label="mean of each tenth" if len(bins) == BINS else "mean")
    for name, gamma in (("γ₂", plan.gamma2), ("γ₁", plan.gamma1)):
        axes.axvline(gamma, color="#c2185b", linewidth=0.8, linestyle="--")
        axes.annotate(name, (gamma, 1), (3, -12), xycoords=("data", "axes fraction"), textcoords="offset points")
    if torch.all(errors > 0):
        axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)
