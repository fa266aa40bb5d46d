"""The page's HTML: its small pieces, its charts, and its errors. Every text from outside is escaped here."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from patchscaler.analysis_file import AnalysisFileError
from patchscaler.figures import GROUP_COLORS
from patchscaler.images import ImageError
from patchscaler.patches import PatchGrid
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.results import NotFiniteError, Progress, Result
from patchscaler.ui.jobs import JobError

NO_IMAGE = "Upload an image or choose an example, then press Run."
NO_PATCH = '<p class="quiet">After a run, click a patch on the Qmap overlay to see what the method knows of it.</p>'
NO_SIDE = '<p class="quiet">One of the two is not there: Final comes with a run, Uniform with the uniform baseline.</p>'
NO_TIMING = '<p class="quiet">The seconds of every group and stage appear here after a run.</p>'
# Label and colour, in the order of the work. In the bar refinement has the groups' colours.
STAGE_LABELS = {
    "encode": ("Encode", "#5b6b7a"),
    "restore": ("Restore (GRM)", "#7d8fa3"),
    "retrieve": ("Retrieve priors", "#a3b1bf"),
    "refine": ("Refine", ""),
    "decode": ("Decode", "#8a6fb0"),
    "color": ("Colour fix", "#b9a3d6"),
}
BAD_LINK = "<p>The settings in this page's address are not valid, so none was applied.</p>"
BINS = 50  # of the histogram
MAX_ERROR_TEXT = 400  # characters of an error
log = logging.getLogger(__name__)


def status(text: str, done: float = 0, total: int = 0) -> str:
    bar = f'<progress aria-label="Network evaluations" value="{done:g}" max="{total}"></progress>' if total else ""
    return f"<p>{escape(text)}</p>{bar}"


def step(progress: Progress, spent: float, uniform: bool = False) -> str:
    """The status line at a step of sampling, which has taken `spent` seconds up to now."""
    group = "Uniform baseline" if uniform else GROUPS[progress.group].capitalize()
    left = spent / progress.done * (progress.total - progress.done)
    text = f"{group}: step {progress.step} of {progress.steps}, {_patches(progress.patches)}, about {left:.0f} s left"
    return status(text, progress.done, progress.total)


def legend(counts: Sequence[int] = ()) -> str:
    """The groups' colours, with the patches in each once they are known."""
    entries = []
    for i, name in enumerate(GROUPS):
        count = f" <b>{counts[i]}</b>" if counts else ""
        entries.append(f'<li data-group="{name}">{_swatch(GROUP_COLORS[i])}{name.capitalize()}{count}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def cost(
    plan: SamplingPlan,
    counts: Sequence[int],
    width: int,
    height: int,
    to_sample: int,
    evaluations: int,
    seconds: float | None,
) -> str:
    """What `plan` costs, against every patch at T 1000, N 20, and what a run would do now.

    `to_sample` patches with `evaluations` are not known from the last run; `seconds` is None before any run.
    """
    total = plan.evaluations(counts)
    share = total / SamplingPlan.uniform().evaluations(counts)
    expected = "" if seconds is None else f", about <b>{seconds:.1f} s</b> on this device"
    return (
        f"<p>{width} × {height} pixels, {_patches(sum(counts))}, <b>{total:,}</b> network evaluations: "
        f"{share:.0%} of uniform sampling. Run renders {to_sample:,} of {_patches(sum(counts))} anew: "
        f"{evaluations:,} evaluations{expected}.</p>"
    )


def unknown_cost(plan: SamplingPlan, patches: int, width: int, height: int) -> str:
    """What a run costs while it is not known how many patches each group has."""
    least, most = (n * patches for n in (plan.steps[0], plan.steps[-1]))
    evaluations = f"{most:,} network evaluations" if least == most else (
        f"{least:,} to {most:,} network evaluations, by the groups that the restoration will find"
    )
    return f"<p>{width} × {height} pixels, {_patches(patches)}: {evaluations}. Run starts with the restoration.</p>"


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
        f"{_swatch(GROUP_COLORS[group])}{GROUPS[group]}{hand}, T {plan.start[group]}, N {plan.steps[group]}</p>"
    )


def no_such_patch(index: float, patches: int) -> str:
    return f"<p>There is no patch {index:g}: there are {_patches(patches)}, 0 to {patches - 1}.</p>"


def figures(labelled: Sequence[tuple[str, Image.Image]], kind: str = "") -> str:
    """Pictures side by side with their labels, within the HTML itself: they need no files, and are exact."""
    entries = ""
    for label, picture in labelled:
        data = io.BytesIO()
        picture.save(data, "PNG", compress_level=1)
        source, label = base64.b64encode(data.getvalue()).decode(), escape(label)
        image = f'<img src="data:image/png;base64,{source}" alt="{label}">'
        entries += f"<figure>{image}<figcaption>{label}</figcaption></figure>"
    return f'<div class="patches {kind}">{entries}</div>'


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


def patch_frame(box: tuple[int, int, int, int], width: int, height: int) -> str:
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


def timing(result: Result, reused: bool) -> str:
    """Bar and tables: each group's cost, and the seconds of every stage. `reused`: the analysis is an earlier one.

    The seconds of patches that were taken over are those of the run in which they were sampled.
    """
    took = result.sampled.seconds  # N
    groups, sampling = [], []
    for index, group in enumerate(result.groups):
        members = result.assignment == index
        seconds, again = took[members].sum().item(), int((members & ~result.rendered).sum())
        name, evaluations = group.name.capitalize(), group.patches * group.steps
        spent = f"{seconds:.2f}{_reused(again, group.patches)}"
        facts = (group.patches, group.start, group.steps, f"{evaluations:,}", spent, _per_step(seconds, evaluations))
        groups.append((_swatch(GROUP_COLORS[index]) + name, *facts))
        sampling.append((name, seconds, GROUP_COLORS[index]))
    patches, evaluations = len(took), result.plan.evaluations([group.patches for group in result.groups])
    spent = sum(seconds for _, seconds, _ in sampling)
    all_groups = ("All", patches, "", "", f"{evaluations:,}", f"{spent:.2f}", _per_step(spent, evaluations))

    stages = {**result.seconds, "refine": result.seconds["refine"] + took[~result.rendered].sum().item()}
    notes = {"refine": _reused(int((~result.rendered).sum()), patches)}
    if reused:
        notes |= dict.fromkeys(("encode", "restore", "retrieve"), _quiet("reused"))
        notes["decode"] = _quiet("coarse reused")
    parts = []
    for name, (label, color) in STAGE_LABELS.items():
        parts += sampling if name == "refine" else [(label, stages[name], color)]
    columns = ("Group", "Patches", "T", "N", "Evaluations", "Seconds", "ms per patch-step")
    rows = [(label, f"{stages[name]:.2f}{notes.get(name, '')}") for name, (label, _) in STAGE_LABELS.items()]
    tables = _table("Groups", columns, groups, all_groups) + _table("Stages", ("Stage", "Seconds"), rows)
    return f'{_time_bar(parts)}<div class="tables">{tables}</div>'


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], foot: Sequence[Any] | None = None) -> str:
    """Cells are HTML or numbers; the first of each row is its name."""

    def row(cells: Sequence[Any]) -> str:
        return f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>'

    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    below = f"<tfoot>{row(foot)}</tfoot>" if foot else ""
    return (
        f'<table class="{name.lower()}"><caption>{name}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(map(row, rows))}</tbody>{below}</table>"
    )


def _time_bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar for all seconds of a run: label, seconds and colour of each part."""
    total = sum(seconds for _, seconds, _ in parts)
    bar, keys = "", ""
    for label, seconds, color in parts:
        width = f"width: {100 * seconds / total:.2f}%"
        bar += f'<span title="{label}: {seconds:.2f} s" style="{width}; background: {color}"></span>'
        keys += f"<li>{_swatch(color)}{label} <b>{seconds:.2f}&nbsp;s</b></li>"
    return (
        f'<figure class="chart"><figcaption>{total:.2f} seconds of work</figcaption><div class="bar" role="img" '
        f'aria-label="Seconds of every stage, as in the tables">{bar}</div><ul class="legend">{keys}</ul></figure>'
    )


def _per_step(seconds: float, evaluations: int) -> str:
    """Milliseconds per evaluation of one patch; an empty group has none."""
    return f"{1000 * seconds / evaluations:.1f}" if evaluations else "–"


def _reused(reused: int, patches: int) -> str:
    """The mark on seconds of an earlier run."""
    if not reused:
        return ""
    return _quiet("reused" if reused == patches else f"{reused} of {patches} reused")


def _quiet(note: str) -> str:
    return f' <span class="quiet">{note}</span>'


def histogram(confidence: Tensor, assignment: Tensor, plan: SamplingPlan) -> str:
    """How many patches have which confidence (N in [0, 1]), by group, and where the thresholds lie.

    Bars are drawn in bins and patches and stretched to the page's width; texts are the page's own.
    """
    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    counts = torch.stack([bins[assignment == group].bincount(minlength=BINS) for group in range(len(GROUPS))])
    tops = counts.cumsum(0)  # 3×BINS, the groups stacked
    highest = int(tops[-1].max())
    bars = "".join(
        f'<rect data-group="{GROUPS[group]}" fill="{GROUP_COLORS[group]}" x="{place + 0.1:.1f}" width="0.8" '
        f'y="{highest - tops[group, place]}" height="{counts[group, place]}"/>'
        for group, place in counts.nonzero().tolist()
    )
    marks = "".join(
        f'<span class="threshold {name} {"before" if value > 0.5 else ""}" style="left: {100 * value:.1f}%">'
        f"{sign} {value:.2f}</span>"
        for name, sign, value in (("gamma2", "γ₂", plan.gamma2), ("gamma1", "γ₁", plan.gamma1))
    )
    low, high = confidence.min().item(), confidence.max().item()
    label = (
        f"Histogram of patch confidence, from {low:.2f} to {high:.2f}; thresholds {plan.gamma1:.2f}, {plan.gamma2:.2f}"
    )
    axis = "".join(f"<span>{value}</span>" for value in ("0", "0.25", "0.5", "0.75", "1"))
    return (
        '<figure class="chart"><figcaption>Confidence of the patches</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {BINS} {highest}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{bars}</svg>{marks}</div><p class="axis">{axis}</p>'
        '<p class="axis"><span>uncertain</span><span>sure</span></p></figure>'
    )


def _swatch(color: str) -> str:
    return f'<span class="swatch" style="background: {color}"></span>'


def _patches(count: int) -> str:
    return f"{count:,} patch" if count == 1 else f"{count:,} patches"


class SettingsError(ValueError):
    """Settings of a visitor or client that are not valid; the message names the value and the limit."""


@contextmanager
def explained() -> Iterator[None]:
    """Errors of this block as `explain` makes them: their text is plain."""
    try:
        yield
    except Exception as error:
        raise explain(error) from error


def explain(error: Exception) -> gr.Error:
    """The error a visitor sees: Gradio passes on no other text than that of its own error."""
    if isinstance(error, gr.Error):
        return error
    for kind, title in TITLES.items():
        if isinstance(error, kind):
            return visible_error(title, str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return visible_error("Out of memory", "There is not enough memory for this image. Try a smaller one.")
    log.error("a run failed", exc_info=error)
    if isinstance(error, NotFiniteError):
        return visible_error("The run failed", "The networks gave values that are NaN or infinite. Try another seed.")
    return visible_error("The run failed", f"{type(error).__name__}; the server's log has the details.")


# Errors whose own text a visitor may read.
TITLES = {
    SettingsError: "These settings do not work",
    ImageError: "This image was refused",
    AnalysisFileError: "This analysis was refused",
    JobError: "The run was not finished",
}


def visible_error(title: str, text: str) -> gr.Error:
    short = text if len(text) <= MAX_ERROR_TEXT else f"{text[:MAX_ERROR_TEXT]}…"  # it may name a value of any length
    return gr.Error(short, title=title, print_exception=False)
