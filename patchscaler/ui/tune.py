"""What happens when a visitor turns something: new groups at once, and no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil, floor
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from patchscaler.grouping import GROUPS, PRESETS, SamplingPlan, assign
from patchscaler.ui import closeup
from patchscaler.ui.run import DialView, Runs, grouping, stale
from patchscaler.ui.state import (
    CUSTOM,
    GAMMA_STEP,
    INSPECT,
    SKIP,
    ByHand,
    Settings,
    Study,
    checked_choice,
    dials_of,
    hold_order,
    in_range,
    plan_of,
    preset_of,
    whole_pictures,
)

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


MAX_STROKE = 1000  # points of a stroke that are looked at


class Tuning(Runs):
    """Events of the dials, the brush, the budget and clicks on the Qmap.

    Each takes what is special to it and then the page's settings, in the order of `Settings.of`.
    """

    def dial_moved(self, moved: int, *settings: Any) -> tuple:
        """Hold the dials' order and group anew. `moved` is the dial's place; 8 is the seed."""
        now = Settings.of(*settings)
        if not in_range(now.dials):
            return DialView(stale=SKIP).flat()
        held = tuple(hold_order(now.dials, moved))
        updates = tuple(SKIP if new == old else new for new, old in zip(held, now.dials))
        return self._regroup(now._replace(dials=held))._replace(dials=updates, preset=preset_of(plan_of(held))).flat()

    def preset_chosen(self, preset: str, *settings: Any) -> tuple:
        """Set the dials to the preset's plan; `custom` leaves them where they are."""
        now = Settings.of(*settings)
        preset = checked_choice("preset", preset, (*PRESETS, CUSTOM))
        values = dials_of(PRESETS[preset]) if preset in PRESETS else now.dials
        return self._regroup(now._replace(dials=values))._replace(dials=values).flat()

    def regrouped(self, *settings: Any) -> tuple:
        """Bring groups, cost and the stale mark up to the settings."""
        return self._regroup(Settings.of(*settings)).flat()

    # By hand

    def reset_by_hand(self, *settings: Any) -> tuple:
        """Give every patch the group of its confidence again."""
        return {}, *self._regroup(Settings.of(*settings)._replace(by_hand={})).flat()

    def clicked(self, event: gr.SelectData, mode: str, *settings: Any) -> tuple:
        """A click on the Qmap: look at the patch there, or first put it into the group that `mode` names.

        Gives the patch's facts, its pictures, its index, the place in the picture, the groups set by hand, and a
        DialView.
        """
        now = Settings.of(*settings)
        checked_choice("mode", mode, (INSPECT, *GROUPS))
        study = self.studies.get(now.source)
        if study is None:
            return (SKIP,) * 6 + DialView(stale=SKIP).flat()
        center = closeup.clicked(study, event.index)
        return self._picked(study, study.analysis.grid.nearest(*center).index, center, mode, now)

    def numbered(self, index: Any, mode: str, *settings: Any) -> tuple:
        """The same for a patch by its number, for those who do not click."""
        now = Settings.of(*settings)
        checked_choice("mode", mode, (INSPECT, *GROUPS))
        study = self.studies.get(now.source)
        if study is None or not isinstance(index, (int, float)) or not 0 <= index < len(study.analysis.grid):
            return (SKIP,) * 6 + DialView(stale=SKIP).flat()
        patch = study.analysis.grid.patches[int(index)]
        return self._picked(study, patch.index, closeup.middle(patch), mode, now)

    def brushed(self, stroke: str, mode: str, *settings: Any) -> tuple:
        """A stroke over the Qmap, as JSON [[x, y], ...] in shares of its width and height: patches under it change.

        The page sends a stroke again and again as it grows, so a lost event loses nothing.
        """
        now = Settings.of(*settings)
        checked_choice("mode", mode, (INSPECT, *GROUPS))
        study = self.studies.get(now.source)
        points = _points(stroke)
        if study is None or mode == INSPECT or not points:
            return SKIP, *DialView(stale=SKIP).flat()
        by_hand = {**now.by_hand, **dict.fromkeys(closeup.touched(study, points), GROUPS.index(mode))}
        if by_hand == now.by_hand:
            return SKIP, *DialView(stale=SKIP).flat()
        return by_hand, *self._regroup(now._replace(by_hand=by_hand)).flat()

    @whole_pictures()
    def _picked(self, study: Study, index: int, center: tuple[float, float], mode: str, now: Settings) -> tuple:
        view, by_hand = DialView(stale=SKIP), now.by_hand
        if not now.usable:
            return (SKIP,) * 6 + view.flat()
        if mode in GROUPS:
            by_hand = {**by_hand, index: GROUPS.index(mode)}
            view = self._regroup(now._replace(by_hand=by_hand))
        facts, pictures = closeup.patch_views(study, now.shown, index, now.plan, by_hand)
        return facts, pictures, (now.source, index), center, by_hand, index, *view.flat()

    # Time budget

    def budget_known(self, *settings: Any) -> Any:
        """The budget's slider from the cheapest run to the dearest, once it is known what a run takes."""
        now = Settings.of(*settings)
        study = self.studies.get(now.source)
        if study is None or not now.usable:
            return SKIP
        count = len(study.analysis.grid)
        ends = self._seconds(study, now, torch.tensor([[count, 0], [0, 0], [0, count]]))
        if ends is None:
            return SKIP
        low, high = sorted(ends.tolist())
        groups = assign(study.analysis.patch_confidence, now.plan, now.by_hand).bincount(minlength=len(GROUPS))
        value = self._seconds(study, now, groups).item()
        low, high, value = floor(100 * min(low, value)) / 100, ceil(100 * max(high, value)) / 100, round(value, 2)
        return gr.update(minimum=low, maximum=high, value=value, interactive=True)

    def budget_set(self, seconds: Any, *settings: Any) -> tuple:
        """Move both thresholds so that a run of all patches is expected to take at most so many seconds."""
        now = Settings.of(*settings)
        study = self.studies.get(now.source)
        if study is None or not now.usable or not isinstance(seconds, (int, float)):
            return DialView(stale=SKIP).flat()
        confidence = study.analysis.patch_confidence
        gammas = thresholds_within(
            confidence, now.plan, lambda counts: self._seconds(study, now, counts), seconds, now.by_hand
        )
        if gammas is None:
            return DialView(stale=SKIP).flat()
        values = (*gammas, *now.dials[2:])
        view = self._regroup(now._replace(dials=values))
        return view._replace(dials=values, preset=preset_of(plan_of(values))).flat()

    def _seconds(self, study: Study, now: Settings, counts: torch.Tensor) -> torch.Tensor | None:
        """Expected seconds of full runs with so many patches in each group: 3x... -> ..., or None before any run.

        With a picture for every group, even an empty one.
        """
        steps = counts.new_tensor(now.plan.steps).view(-1, *[1] * (counts.dim() - 1))
        calls = steps * -(-counts // (now.batch_size or self.calibration.at_once))
        pixels = study.analysis.coarse[0].numel()
        return self.calibration.seconds((steps * counts).sum(0), pixels, calls.sum(0), len(GROUPS))

    def _regroup(self, now: Settings) -> DialView:
        study = self.studies.get(now.source)
        if study is None:
            return DialView()
        if not now.usable:
            return DialView(stale=SKIP)
        return DialView(
            **grouping(study, now.plan, now.seed, now.by_hand, self.calibration, now.batch_size),
            stale=stale(study.analysis, now.shown, now.source, now.plan, now.seed, now.by_hand, now.color_fix),
        )


def _points(stroke: str) -> list[tuple[float, float]]:
    """The points of a stroke; none for anything that is not one."""
    try:
        points = json.loads(stroke)[-MAX_STROKE:]
        return [(float(x), float(y)) for x, y in points if 0 <= x <= 1 and 0 <= y <= 1]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return []
