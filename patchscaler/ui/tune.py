"""What happens when a visitor turns a dial, paints groups by hand or sets a budget: new groups at once, no network."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from patchscaler.plan import GROUPS, PRESETS, SamplingPlan, assign, times_and_steps
from patchscaler.ui import closeup, export, html
from patchscaler.ui.networks import Calibration, RunRequest, Work
from patchscaler.ui.state import (
    CUSTOM,
    DIALS,
    GAMMA_STEP,
    INSPECT,
    RANGES,
    ByHand,
    CachedAnalysis,
    SessionCache,
    Settings,
    View,
    choice_of,
    dials_of,
    enforce_order,
    in_range,
    plan_of,
    preset_of,
    whole_pictures,
)

MODES = (INSPECT, *GROUPS)
MAX_STROKE = 1000  # points of a stroke that are looked at
MOST = 0.95  # share of the evaluations that fit, which is enough if thresholds nearer to the present ones have it


class Tuner:
    """Events of the dials, the brush, the budget and clicks on the Qmap."""

    def __init__(self, cache: SessionCache, calibration: Calibration) -> None:
        self.cache = cache
        self.calibration = calibration

    def dial_moved(self, now: Settings, moved: int) -> View:
        """Keep the dials in order and regroup. `moved` is the dial's place."""
        if not in_range(now.dials):
            return {}
        return self._set(now, tuple(enforce_order(now.dials, moved)))

    def dial_left(self, now: Settings, moved: int) -> View:
        """Clamp what was typed beyond the dial's range and regroup.

        Gradio clamps it too when the field is left, but tells only of the value before.
        """
        value, (low, high, _) = now.dials[moved], RANGES[moved]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or low <= value <= high:
            return {}
        clamped = (*now.dials[:moved], min(max(value, low), high), *now.dials[moved + 1 :])
        return self._set(now, tuple(enforce_order(clamped, moved))) if in_range(clamped) else {}

    def preset_chosen(self, now: Settings, preset: str) -> View:
        """Set the dials to the preset's plan; `custom` leaves them where they are."""
        if choice_of("preset", preset, (*PRESETS, CUSTOM)) == CUSTOM:
            return self.regrouped(now)
        return self._set(now, dials_of(PRESETS[preset]))

    def regrouped(self, now: Settings) -> View:
        """Bring groups, cost and the stale mark up to the settings."""
        known = self.cache.get(now.source)
        if known is None:
            return {"stale": ""}
        if now.plan is None:
            return {}
        by_hand, batch_size, session = now.page.by_hand, now.batch_size, now.session
        request = RunRequest(now.source, now.plan, now.seed, by_hand, batch_size=batch_size, session=session)
        return {**self.grouped(known, request), "stale": stale(known, now)}

    def grouped(self, known: CachedAnalysis, request: RunRequest) -> View:
        """Overlay, legend, histogram, and what the requested run would cost now."""
        analysis, plan = known.analysis, request.plan
        assignment = assign(analysis.patch_confidence, plan, request.by_hand)
        counts = assignment.bincount(minlength=len(GROUPS)).tolist()
        height, width = analysis.coarse.shape[-2:]
        earlier = self.cache.sampled(request.session, request.source)
        work, to_sample = self.calibration.work(request, assignment, earlier)
        expected = self.calibration.seconds(work, known.pixels)
        return {
            "qmap": export.save_preview(known.overlay(assignment, request.by_hand), "qmap"),
            "legend": html.legend(counts),
            "cost": html.cost(plan, counts, width, height, to_sample, work.evaluations, expected),
            "histogram": html.histogram(analysis.patch_confidence, assignment, plan),
        }

    def new_seed(self, now: Settings) -> View:
        seed = secrets.randbelow(2**31)
        return {"seed": seed, **self.regrouped(replace(now, seed=seed))}

    def _set(self, now: Settings, dials: tuple[float, ...]) -> View:
        """The view after the dials have been set to these, of which only those that changed are sent."""
        changed = {name: new for name, new, old in zip(DIALS, dials, now.dials) if new != old}
        return {**changed, "preset": preset_of(plan_of(dials)), **self.regrouped(replace(now, dials=dials))}

    # By hand

    def reset_by_hand(self, now: Settings) -> View:
        """Give every patch the group of its confidence again."""
        now.page.by_hand = {}
        return self.regrouped(now)

    def clicked(self, now: Settings, at: tuple[float, float], mode: str) -> View:
        """A click on the Qmap: look at the patch there, or first put it into the group that `mode` names."""
        choice_of("mode", mode, MODES)
        known = self.cache.get(now.source)
        if known is None:
            return {}
        center = closeup.clicked(known, at)
        return self._select_patch(known, known.analysis.grid.nearest(*center).index, center, mode, now)

    def numbered(self, now: Settings, index: Any, mode: str) -> View:
        """The same for a patch by its number, for those who do not click."""
        choice_of("mode", mode, MODES)
        known = self.cache.get(now.source)
        if known is None or not isinstance(index, (int, float)):
            return {}
        if not 0 <= index < len(known.analysis.grid):
            return {"facts": html.no_such_patch(index, len(known.analysis.grid))}
        patch = known.analysis.grid.patches[int(index)]
        return self._select_patch(known, patch.index, closeup.middle(patch), mode, now)

    def brushed(self, now: Settings, stroke: str, mode: str) -> View:
        """A stroke over the Qmap, as JSON [[x, y], ...] in shares of its width and height: patches under it change.

        The page sends a stroke again and again as it grows, so a lost event loses nothing.
        """
        choice_of("mode", mode, MODES)
        known = self.cache.get(now.source)
        points = _points(stroke)
        if known is None or mode == INSPECT or not points:
            return {}
        by_hand = {**now.page.by_hand, **dict.fromkeys(closeup.touched(known, points), GROUPS.index(mode))}
        if by_hand == now.page.by_hand:
            return {}
        now.page.by_hand = by_hand
        return self.regrouped(now)

    @whole_pictures()
    def _select_patch(
        self, known: CachedAnalysis, index: int, center: tuple[float, float], mode: str, now: Settings
    ) -> View:
        if now.plan is None:
            return {}
        page, view = now.page, {}
        page.patch, page.center = index, center
        if mode in GROUPS:
            page.by_hand = {**page.by_hand, index: GROUPS.index(mode)}
            view = self.regrouped(now)
        facts, pictures = closeup.patch_views(known, page.shown, index, now.plan, page.by_hand)
        return {**view, "facts": facts, "inspector": pictures, "number": index}

    # Time budget

    def budget_known(self, now: Settings) -> View:
        """The budget's slider from the cheapest run to the most expensive, once it is known what a run takes."""
        known = self.cache.get(now.source)
        if known is None or now.plan is None:
            return {}
        count = len(known.analysis.grid)
        ends = self._seconds(known, now, torch.tensor([[count, 0], [0, 0], [0, count]]))
        if ends is None:
            return {}
        low, high = sorted(ends.tolist())
        groups = assign(known.analysis.patch_confidence, now.plan, now.page.by_hand).bincount(minlength=len(GROUPS))
        value = self._seconds(known, now, groups).item()
        low, high, value = floor(100 * min(low, value)) / 100, ceil(100 * max(high, value)) / 100, round(value, 2)
        return {"budget": gr.update(minimum=low, maximum=high, value=value, interactive=True)}

    def budget_set(self, now: Settings, seconds: Any) -> View:
        """Move both thresholds so that a run of all patches is expected to take at most these seconds."""
        known = self.cache.get(now.source)
        if known is None or now.plan is None or not isinstance(seconds, (int, float)):
            return {}
        gammas = thresholds_within(
            known.analysis.patch_confidence,
            now.plan,
            lambda counts: self._seconds(known, now, counts),
            seconds,
            now.page.by_hand,
        )
        return {} if gammas is None else self._set(now, (*gammas, *now.dials[2:]))

    def _seconds(self, known: CachedAnalysis, now: Settings, counts: Tensor) -> Tensor | None:
        """Expected seconds of full runs for the patches in each group: 3×... -> ..., or None before any run.

        With a picture for every group, even an empty one.
        """
        steps = counts.new_tensor(now.plan.steps).view(-1, *[1] * (counts.dim() - 1))
        calls = steps * -(-counts // (now.batch_size or self.calibration.at_once))
        return self.calibration.seconds(Work((steps * counts).sum(0), calls.sum(0), len(GROUPS)), known.pixels)


def stale(known: CachedAnalysis, now: Settings) -> str:
    """What to say about a final picture that is unfinished, or not the one that these settings give."""
    shown = now.page.shown
    if shown is None or shown.request.source != now.source:
        return ""
    if not shown.complete:
        return html.unfinished(shown.refined, len(shown.start))
    made = shown.request
    start, steps = times_and_steps(now.plan, assign(known.analysis.patch_confidence, now.plan, now.page.by_hand))
    other = (shown.start != start) | (shown.steps != steps)
    changed = int(other.sum()) if now.seed == made.seed else len(start)
    if not changed and (made.plan, made.seed, made.color_fix) == (now.plan, now.seed, now.color_fix):
        return ""
    return html.stale(made.plan, made.seed, changed, len(start), made.color_fix != now.color_fix)


def thresholds_within(
    confidence: Tensor,
    plan: SamplingPlan,
    cost: Callable[[Tensor], Tensor | None],
    budget: float,
    by_hand: ByHand,
) -> tuple[float, float] | None:
    """γ₁ and γ₂ under which a run of all patches costs at most `budget`.

    Of the thresholds on the dials' grid with nearly the most network evaluations for it, those nearest to the
    plan's. If no thresholds are cheap enough, the cheapest. `confidence` N; `cost` turns the patches in each
    group, 3x..., into costs ...; None if it does.
    """
    free = torch.ones(len(confidence), dtype=torch.bool)
    free[list(by_hand)] = False
    fixed = torch.tensor([list(by_hand.values()).count(group) for group in range(3)])
    grid = [round(k * GAMMA_STEP, 2) for k in range(round(1 / GAMMA_STEP) + 1)]  # M
    below = torch.tensor([int((confidence[free] <= gamma).sum()) for gamma in grid])  # M, patches up to γ
    up1, up2 = below[:, None].expand(-1, len(grid)), below[None, :].expand(len(grid), -1)  # γ₁ in rows, γ₂ in columns
    counts = torch.stack([int(free.sum()) - up1, up1 - up2, up2]) + fixed[:, None, None]  # 3×M×M
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


def _points(stroke: str) -> list[tuple[float, float]]:
    """The points of a stroke; none for anything that is not one."""
    try:
        points = json.loads(stroke)[-MAX_STROKE:]
        return [(float(x), float(y)) for x, y in points if 0 <= x <= 1 and 0 <= y <= 1]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return []
