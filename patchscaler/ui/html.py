"""The page's HTML: its small pieces, its charts, and its errors. Every text from outside is escaped here."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from patchscaler.figures import GROUP_COLORS
from patchscaler.images import ImageError
from patchscaler.patches import PatchGrid
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.results import NotFiniteError, Progress, Result
from patchscaler.ui.jobs import JobError

NO_IMAGE = "Upload an image or choose an example, then press Run."
NO_PATCH = '<p class="quiet">After a run, click a patch on the Qmap overlay to see what the method knows of it.</p>'
NO_TIMING = '<p class="quiet">The seconds of every group and stage appear here after a run.</p>'
STAGES = (
    ("encode", "Encode"),
    ("restore", "Restore (GRM)"),
    ("retrieve", "Retrieve priors"),
    ("refine", "Refine"),
    ("decode", "Decode"),
    ("color", "Colour fix"),
)


def status(text: str, done: int = 0, total: int = 0) -> str:
    bar = f'<progress aria-label="Network evaluations" value="{done}" max="{total}"></progress>' if total else ""
    return f"<p>{escape(text)}</p>{bar}"


def step(progress: Progress, left: float, uniform: bool = False) -> str:
    """What a progress event says, for the status line; `left` is in seconds."""
    group = "Uniform baseline" if uniform else GROUPS[progress.group].capitalize()
    done = f"step {progress.step} of {progress.steps}, {_patches(progress.patches)}"
    return f"{group}: {done}, about {left:.0f} s left"


def legend(counts: Sequence[int] = ()) -> str:
    """The groups' colours, with the patches in each once they are known."""
    entries = []
    for i, name in enumerate(GROUPS):
        count = f" <b>{counts[i]}</b>" if counts else ""
        entries.append(f'<li data-group="{name}">{_swatch(i)}{name.capitalize()}{count}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def cost(
    plan: SamplingPlan,
    counts: Sequence[int],
    width: int,
    height: int,
    anew: int,
    evaluations: int,
    seconds: float | None,
) -> str:
    """What `plan` costs, against every patch at T 1000, N 20, and what a run would do now.

    `anew` patches with `evaluations` are not known from the last run; `seconds` is None before any run.
    """
    total = plan.evaluations(counts)
    share = total / SamplingPlan.uniform().evaluations(counts)
    expected = "" if seconds is None else f", about <b>{seconds:.1f} s</b> on this device"
    return (
        f"<p>{width} × {height} pixels, {_patches(sum(counts))}, <b>{total:,}</b> network evaluations: "
        f"{share:.0%} of uniform sampling. Run renders {anew:,} of {_patches(sum(counts))} anew: "
        f"{evaluations:,} evaluations{expected}.</p>"
    )


def unknown_cost(plan: SamplingPlan, patches: int, width: int, height: int) -> str:
    """What a run costs while it is not known how many patches each group has."""
    least, most = (n * patches for n in (plan.steps[0], plan.steps[-1]))
    return (
        f"<p>{width} × {height} pixels, {_patches(patches)}: {least:,} to {most:,} network evaluations, by the groups "
        "that the restoration will find. Run starts with it.</p>"
    )


def stale(made_with: SamplingPlan, seed: int, changed: int, patches: int, colors: bool) -> str:
    """Says that the final picture belongs to an older plan; `colors`: to the other setting of the colour fix."""
    also = " The colour fix was set the other way." if colors else ""
    return (
        f'<p class="stale">The final picture was made with an older plan: {escape(describe(made_with, seed))}. '
        f"With the dials as they are, {changed} of {_patches(patches)} would change.{also}</p>"
    )


def unfinished(refined: int, patches: int) -> str:
    """Says that the final picture is one of a stopped run, or of one that goes on."""
    return (
        f'<p class="stale">The final picture is partial: {refined} of {_patches(patches)} are refined, '
        "the others are coarse.</p>"
    )


def patch(
    index: int,
    box: tuple[int, int, int, int],
    confidence: float,
    group: int,
    plan: SamplingPlan,
    by_hand: bool,
) -> str:
    """A patch's facts in a line; `box` is its left, top, right and bottom pixel."""
    hand = ", set by hand" if by_hand else ""
    return (
        f"<p><b>Patch {index}</b>, pixels {box[0]}, {box[1]} to {box[2]}, {box[3]}: "
        f"confidence <b>{confidence:.3f}</b>, "
        f"{_swatch(group)}{GROUPS[group]}{hand}, T {plan.start[group]}, N {plan.steps[group]}</p>"
    )


def pictures(labelled: Sequence[tuple[str, Image.Image]]) -> str:
    """Pictures side by side, of a patch before and after."""
    return f'<div class="patches">{"".join(_figure(picture, label) for label, picture in labelled)}</div>'


def priors(coarse: Image.Image, pictures: Sequence[Image.Image], similarities: Sequence[float]) -> str:
    """A patch's y0 and the texture priors that were retrieved for it, best first."""
    figures = _figure(coarse, "y₀: the coarse patch") + "".join(
        _figure(picture, f"Prior {place}, similarity {similarity:.3f}")
        for place, (picture, similarity) in enumerate(zip(pictures, similarities), start=1)
    )
    return f'<div class="patches priors">{figures}</div>'


def baseline(evaluations: tuple[int, int], seconds: tuple[float, float]) -> str:
    """What the plan saves: evaluations and seconds of sampling, each of the plan and of uniform sampling."""
    fewer, sooner = evaluations[1] - evaluations[0], seconds[1] - seconds[0]
    return (
        f"<p>Uniform sampling (T 1000, N 20) needs <b>{evaluations[1]:,}</b> network evaluations and "
        f"<b>{seconds[1]:.2f} s</b> of sampling, this plan {evaluations[0]:,} and {seconds[0]:.2f} s. "
        f"Saved: <b>{fewer:,}</b> evaluations ({fewer / evaluations[1]:.0%}) and <b>{sooner:.2f} s</b>. "
        "Seconds are by what calls of the network take on this device.</p>"
    )


def seams(grid: PatchGrid, width: int, height: int) -> str:
    """A style that draws all patch borders over the panels: no picture is changed, and none is sent again."""
    rows, columns = grid.borders()
    path = "".join([f"M{x} 0V{height}" for x in columns] + [f"M0 {y}H{width}" for y in rows])
    places = ":is(#coarse, #qmap, #final, #compare) :is(.image-frame, .slider-wrap, .wrap)::after"
    return _drawn(places, path, width, height, max(width, height) / 500)


def picked(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """A style that frames the inspected patch on the Qmap."""
    left, top, right, bottom = box
    path = f"M{left} {top}H{right}V{bottom}H{left}Z"
    return _drawn("#qmap .image-frame::before", path, width, height, max(width, height) / 100)


def _drawn(places: str, path: str, width: int, height: int, line: float) -> str:
    """A style that draws a path, in the picture's pixels, over the pictures at `places`."""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<path d="{path}" fill="none" stroke="white" stroke-width="{line:.1f}" stroke-opacity=".8"/>'
        f'<path d="{path}" fill="none" stroke="black" stroke-width="{line / 2:.1f}" stroke-opacity=".8"/></svg>'
    )
    address = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return (
        f'<style>{places} {{ content: ""; position: absolute; inset: 0; pointer-events: none; '
        f"background: url({address}) center / contain no-repeat; }}</style>"
    )


def describe(plan: SamplingPlan, seed: int) -> str:
    start, steps = ("/".join(map(str, values)) for values in (plan.start, plan.steps))
    return f"γ {plan.gamma1:.2f}/{plan.gamma2:.2f}, T {start}, N {steps}, seed {seed}"


class GroupCost(NamedTuple):
    """What a group costs under a plan, whether its patches were sampled in this run or taken over."""

    name: str
    patches: int
    start: int
    steps: int
    seconds: float
    reused: int  # patches

    @property
    def evaluations(self) -> int:
        return self.patches * self.steps


def costs(result: Result) -> list[GroupCost]:
    """By group. The seconds of patches that were taken over are those of the run in which they were sampled."""
    groups = []
    for index, group in enumerate(result.groups):
        members = result.assignment == index
        seconds, reused = result.sampled.seconds[members].sum().item(), int((members & ~result.rendered).sum())
        groups.append(GroupCost(group.name, group.patches, group.start, group.steps, seconds, reused))
    return groups


def timing(result: Result, reused: bool) -> str:
    """Bar and tables: each group's cost, and the seconds of every stage. `reused`: the analysis is an earlier one."""
    groups = costs(result)
    taken_over = result.sampled.seconds[~result.rendered].sum().item()
    seconds = {**result.seconds, "refine": result.seconds["refine"] + taken_over}
    sampling = sum(group.seconds for group in groups)
    rows = "".join(
        f'<tr><th scope="row">{_swatch(i)}{group.name.capitalize()}</th><td>{group.patches}</td><td>{group.start}</td>'
        f"<td>{group.steps}</td><td>{group.evaluations:,}</td>"
        f"<td>{group.seconds:.2f}{_taken_over(group.reused, group.patches)}</td>"
        f"<td>{_per_step(group.seconds, group.evaluations)}</td></tr>"
        for i, group in enumerate(groups)
    )
    patches, evaluations = (sum(getattr(group, name) for group in groups) for name in ("patches", "evaluations"))
    notes = dict.fromkeys(("encode", "restore", "retrieve"), _quiet("reused")) if reused else {}
    notes["decode"] = _quiet("coarse reused") if reused else ""
    notes["refine"] = _taken_over(sum(group.reused for group in groups), patches)
    stages = "".join(
        f'<tr><th scope="row">{label}</th><td>{seconds[name]:.2f}{notes.get(name, "")}</td></tr>'
        for name, label in STAGES
    )
    return (
        f"{time_bar(groups, seconds)}"
        '<div class="tables"><table class="groups"><caption>Groups</caption><thead><tr>'
        '<th scope="col">Group</th><th scope="col">Patches</th><th scope="col">T</th><th scope="col">N</th>'
        '<th scope="col">Evaluations</th><th scope="col">Seconds</th>'
        '<th scope="col">ms per patch-step</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><th scope="row">All</th><td>{patches}</td><td></td><td></td>'
        f"<td>{evaluations:,}</td><td>{sampling:.2f}</td>"
        f"<td>{_per_step(sampling, evaluations)}</td></tr></tfoot></table>"
        '<table class="stages"><caption>Stages</caption><thead><tr><th scope="col">Stage</th>'
        f'<th scope="col">Seconds</th></tr></thead><tbody>{stages}</tbody></table></div>'
    )


def _figure(picture: Image.Image, label: str) -> str:
    """An image within the HTML itself: it needs no file, and is exact."""
    data = io.BytesIO()
    picture.save(data, "PNG", compress_level=1)
    source = base64.b64encode(data.getvalue()).decode()
    label = escape(label)
    return f'<figure><img src="data:image/png;base64,{source}" alt="{label}"><figcaption>{label}</figcaption></figure>'


def _per_step(seconds: float, evaluations: int) -> str:
    """Milliseconds per evaluation of one patch; an empty group has none."""
    return f"{1000 * seconds / evaluations:.1f}" if evaluations else "–"


def _taken_over(reused: int, patches: int) -> str:
    """The mark on seconds of an earlier run."""
    if not reused:
        return ""
    return _quiet("reused" if reused == patches else f"{reused} of {patches} reused")


def _quiet(note: str) -> str:
    return f' <span class="quiet">{note}</span>'


def _swatch(group: int) -> str:
    return f'<span class="swatch" style="background:{GROUP_COLORS[group]}"></span>'


def _patches(count: int) -> str:
    return f"{count:,} patch" if count == 1 else f"{count:,} patches"


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


def time_bar(groups: Sequence[GroupCost], seconds: dict[str, float]) -> str:
    """One bar for all seconds of a run, in the order of the work; `seconds` are those of the stages."""
    parts = []
    for name, label in STAGES:
        if name == "refine":
            parts += [(group.name.capitalize(), group.seconds, color) for group, color in zip(groups, GROUP_COLORS)]
        else:
            parts.append((label, seconds[name], STAGE_COLORS[name]))
    total = sum(took for _, took, _ in parts)
    bars, keys, x = "", "", 0.0
    for label, took, color in parts:
        width = 100 * took / total
        bars += _rectangle(x, 0, width, 10, color, f'data-part="{escape(label)}"', f"{label}: {took:.2f} s")
        swatch = f'<span class="swatch" style="background:{color}"></span>'
        keys += f"<li>{swatch}{escape(label)} <b>{took:.2f}&nbsp;s</b></li>"
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


log = logging.getLogger(__name__)

MOST_TEXT = 400  # letters


def explain(error: Exception) -> gr.Error:
    """The error a visitor sees: Gradio passes on no other text than that of its own error."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, ImageError):
        return visible_error("This image was refused", str(error))
    if isinstance(error, JobError):
        return visible_error("The run was not finished", str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return visible_error("Out of memory", "There is not enough memory for this image. Try a smaller one.")
    log.error("a run failed", exc_info=error)
    if isinstance(error, NotFiniteError):
        return visible_error("The run failed", "The networks gave values that are NaN or infinite. Try another seed.")
    return visible_error("The run failed", f"{type(error).__name__}; the server's log has the details.")


def visible_error(title: str, text: str) -> gr.Error:
    """Gradio shows both as HTML."""
    return gr.Error(escape(shortened(text)), title=escape(title), print_exception=False)


def shortened(text: str) -> str:
    """A message may name a value of any length, as it was sent."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
