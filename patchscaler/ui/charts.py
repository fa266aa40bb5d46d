"""Charts as inline SVG: they need no library, and take their text colour from the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from patchscaler.figures import GROUP_COLORS
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.results import Result

BINS = 50
STAGE_COLORS = {
    "encode": "#5b6b7a",
    "restore": "#7d8fa3",
    "retrieve": "#a3b1bf",
    "decode": "#8a6fb0",
    "color": "#b9a3d6",
}
_WIDTH, _HEIGHT, _FOOT = 600, 190, 46  # of the histogram, in SVG units


def histogram(confidence: Tensor, assignment: Tensor, plan: SamplingPlan) -> str:
    """How many patches have which confidence (N in [0, 1]), by group, and where the thresholds lie."""
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    counts = [bins[assignment == group].bincount(minlength=BINS).tolist() for group in range(len(GROUPS))]
    highest = max(map(sum, zip(*counts)))
    step, room = _WIDTH / BINS, _HEIGHT - _FOOT - 44
    bars = []
    for place in range(BINS):
        bottom = _HEIGHT - _FOOT
        for group, color in enumerate(GROUP_COLORS):
            height = room * counts[group][place] / highest
            bottom -= height
            if height:
                x, width = place * step + 1, step - 2
                bars.append(_rectangle(x, bottom, width, height, color, f'data-group="{GROUPS[group]}"'))
    marks = ""
    # γ₂'s name stands left of its line and γ₁'s right of it, unless the edge is too near; then γ₁'s is lower.
    for name, value, y in (("γ₂", plan.gamma2, 16), ("γ₁", plan.gamma1, 16 if plan.gamma1 < 0.85 else 38)):
        before = value > (0.15 if name == "γ₂" else 0.85)
        x, anchor = value * _WIDTH, "end" if before else "start"
        marks += (
            f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{_HEIGHT - _FOOT}"/>'
            f'<text x="{x + (-4 if before else 4):.1f}" y="{y}" text-anchor="{anchor}">'
            f"{name} {value:.2f}</text>"
        )
    axis = "".join(
        f'<text x="{value * _WIDTH:.0f}" y="{_HEIGHT - 26}" text-anchor="{anchor}">{value:g}</text>'
        for value, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end"))
    )
    low, high = confidence.min().item(), confidence.max().item()
    label = (
        f"Histogram of patch confidence, from {low:.2f} to {high:.2f}; thresholds {plan.gamma1:.2f}, {plan.gamma2:.2f}"
    )
    return (
        f'<figure class="chart"><figcaption>Confidence of the patches</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(bars)}'
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_HEIGHT - _FOOT}" y2="{_HEIGHT - _FOOT}"/>{axis}{marks}'
        f'<text x="0" y="{_HEIGHT - 5}">uncertain</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 5}" text-anchor="end">sure</text></svg></figure>'
    )


def time_bar(result: Result, stages: Sequence[tuple[str, str]]) -> str:
    """One bar for all seconds of a run, in the order of the work; ``stages`` are names and labels."""
    parts = []
    for name, label in stages:
        if name == "refine":
            parts += [(g.name.capitalize(), g.seconds, color) for g, color in zip(result.groups, GROUP_COLORS)]
        else:
            parts.append((label, result.seconds[name], STAGE_COLORS[name]))
    total = sum(seconds for _, seconds, _ in parts)
    bars, keys, x = "", "", 0.0
    for label, seconds, color in parts:
        width = 100 * seconds / total
        bars += _rectangle(x, 0, width, 10, color, f'data-part="{escape(label)}"', f"{label}: {seconds:.2f} s")
        swatch = f'<span class="swatch" style="background:{color}"></span>'
        keys += f"<li>{swatch}{escape(label)} <b>{seconds:.2f}&nbsp;s</b></li>"
        x += width
    return (
        f'<figure class="chart"><figcaption>{total:.2f} seconds of work</figcaption>'
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="Seconds of every stage, as in the tables">{bars}</svg><ul class="legend">{keys}</ul></figure>'
    )


def _rectangle(x: float, y: float, width: float, height: float, color: str, more: str = "", title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{color}" {more}>{inside}</rect>'
    )
