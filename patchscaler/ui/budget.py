"""Thresholds for a time budget."""

from __future__ import annotations

import torch
from torch import Tensor

from patchscaler.grouping import SamplingPlan
from patchscaler.ui.dials import GAMMA_STEP
from patchscaler.ui.views import ByHand

SPENT = 0.95  # share of the budget that is spent if thresholds nearer to the present ones do so


def thresholds_within(
    confidence: Tensor, plan: SamplingPlan, evaluations: float, by_hand: ByHand | None = None
) -> tuple[float, float]:
    """γ₁ and γ₂ under which a run of all patches needs at most so many network evaluations.

    Of the thresholds on the dials' grid that spend nearly all of the budget, those nearest to the plan's. If no
    thresholds are cheap enough, the cheapest. ``confidence`` N; patches set by hand cost what they cost.
    """
    by_hand = by_hand or {}
    free = torch.ones(len(confidence), dtype=torch.bool)
    free[list(by_hand)] = False
    fixed = sum(plan.steps[group] for group in by_hand.values())
    grid = [round(k * GAMMA_STEP, 2) for k in range(round(1 / GAMMA_STEP) + 1)]  # M
    below = torch.tensor([int((confidence[free] <= gamma).sum()) for gamma in grid])  # M, patches up to γ
    simple, medium, hard = plan.steps
    # The cost splits into a part of each threshold: a patch up to γ₁ is at least medium, one up to γ₂ hard.
    cost = (medium - simple) * below[:, None] + (hard - medium) * below[None, :] + simple * int(free.sum()) + fixed
    gammas = torch.tensor(grid, dtype=torch.float64)
    ordered = gammas[:, None] > gammas[None, :]  # γ₁ in rows, γ₂ in columns
    fits = ordered & (cost <= evaluations)
    if not fits.any():
        fits = ordered & (cost == cost[ordered].min())
    fits &= cost >= SPENT * cost[fits].max()
    distance = (gammas[:, None] - plan.gamma1).abs() + (gammas[None, :] - plan.gamma2).abs()
    place = int(torch.where(fits, distance, torch.inf).argmin())
    return grid[place // len(grid)], grid[place % len(grid)]
