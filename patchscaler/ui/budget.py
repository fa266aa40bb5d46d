"""Thresholds for a time budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchscaler.plan import SamplingPlan
from patchscaler.ui.dials import GAMMA_STEP
from patchscaler.ui.views import ByHand

MOST = 0.95  # share of the evaluations that fit, which is enough if thresholds nearer to the present ones have it


def thresholds_within(
    confidence: Tensor,
    plan: SamplingPlan,
    cost: Callable[[Tensor], Tensor | None],
    budget: float,
    by_hand: ByHand | None = None,
) -> tuple[float, float] | None:
    """γ₁ and γ₂ under which a run of all patches costs at most ``budget``.

    Of the thresholds on the dials' grid with nearly the most network evaluations for it, those nearest to the
    plan's. If no thresholds are cheap enough, the cheapest. ``confidence`` N; ``cost`` turns the patches in each
    group, 3x..., into costs ...; None if it does.
    """
    by_hand = by_hand or {}
    free = torch.ones(len(confidence), dtype=torch.bool)
    free[list(by_hand)] = False
    fixed = torch.tensor([list(by_hand.values()).count(group) for group in range(3)])
    grid = [round(k * GAMMA_STEP, 2) for k in range(round(1 / GAMMA_STEP) + 1)]  # M
    below = torch.tensor([int((confidence[free] <= gamma).sum()) for gamma in grid])  # M, patches up to γ
    up1, up2 = below[:, None].expand(-1, len(grid)), below[None, :].expand(len(grid), -1)  # γ₁ in rows, γ₂ in columns
    counts = torch.stack([int(free.sum()) - up1, up1 - up2, up2]) + fixed[:, None, None]  # 3xMxM
    costs = cost(counts)
    if costs is None:
        return None
    gammas = torch.tensor(grid, dtype=torch.float64)
    ordered = gammas[:, None] > gammas[None, :]
    fits = ordered & (costs <= budget)
    if not fits.any():
        fits = ordered & (costs == costs[ordered].min())
    evaluations = (torch.tensor(plan.steps)[:, None, None] * counts).sum(0)
    fits &= evaluations >= MOST * evaluations[fits].max()
    distance = (gammas[:, None] - plan.gamma1).abs() + (gammas[None, :] - plan.gamma2).abs()
    place = int(torch.where(fits, distance, torch.inf).argmin())
    return grid[place // len(grid)], grid[place % len(grid)]
