"""What the page's events give back, and the files behind the pictures in it."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from patchscaler.figures import qmap_overlay
from patchscaler.images import Picture, to_pil, write_png
from patchscaler.plan import GROUPS, SamplingPlan, assign, times_and_steps
from patchscaler.results import Analysis, Result, Sampled
from patchscaler.ui import charts, fragments
from patchscaler.ui.calibration import Calibration
from patchscaler.ui.studies import Study

SKIP = gr.skip()
ByHand = dict[int, int]  # patch -> group


class Shown(NamedTuple):
    """How the final picture on a visitor's page was made, and its file."""

    source: str
    plan: SamplingPlan
    seed: int
    color_fix: bool
    start: Tensor  # LongTensor N, T of each patch; 0 where it is still the coarse one
    steps: Tensor  # LongTensor N
    final: Path
    by_hand: ByHand
    report: dict  # of the run, or only its plan and seed while that is not finished
    uniform: Path | None = None

    @property
    def complete(self) -> bool:
        return bool((self.start > 0).all())


class RunView(NamedTuple):
    """The outputs of a run, in the order in which the page lists them."""

    coarse: Any = SKIP
    qmap: Any = SKIP
    priors: Any = SKIP
    final: Any = SKIP
    legend: Any = SKIP
    cost: Any = SKIP
    stale: Any = SKIP
    histogram: Any = SKIP
    timing: Any = SKIP
    baseline: Any = SKIP
    difference: Any = SKIP
    facts: Any = SKIP
    inspector: Any = SKIP
    inspected: Any = SKIP
    compare: Any = SKIP
    zoom: Any = SKIP
    status: Any = SKIP
    shown: Any = SKIP
    source: Any = SKIP  # the image whose pictures the panels show
    by_hand: Any = SKIP
    run: Any = SKIP
    stop: Any = SKIP
    note: Any = SKIP


class DialView(NamedTuple):
    """The outputs of a moved dial, in the order in which the page lists them."""

    dials: Any = (SKIP,) * 8
    preset: Any = SKIP
    qmap: Any = SKIP
    legend: Any = SKIP
    cost: Any = SKIP
    stale: Any = ""
    histogram: Any = SKIP

    def flat(self) -> tuple:
        return (*self.dials, *self[1:])


def emptied(image: dict | None) -> RunView:
    """The page for another image, or for none, before its run."""
    return RunView(
        *(None,) * 4,
        legend=fragments.legend(),
        cost="",
        stale="",
        histogram="",
        timing=fragments.NO_TIMING,
        baseline="",
        difference=gr.update(value=None, visible=False),
        facts="",
        inspector=fragments.NO_PATCH,
        inspected="",
        compare=None,
        zoom=None,
        status=fragments.status("Press Run." if image else fragments.NO_IMAGE),
        shown=None,
        source=(image or {}).get("path"),
        by_hand={},
        run=gr.update(interactive=image is not None),
        note="",
    )


def grouping(
    study: Study, plan: SamplingPlan, seed: Any, by_hand: ByHand, calibration: Calibration, batch_size: int | None
) -> dict[str, Any]:
    """Overlay, legend, histogram and cost under `plan`, by their places in the views. No network runs."""
    analysis = study.analysis
    assignment = assign(analysis.patch_confidence, plan, by_hand)
    counts = assignment.bincount(minlength=len(GROUPS)).tolist()
    height, width = analysis.coarse.shape[-2:]
    overlay = qmap_overlay(analysis.coarse, analysis.grid, assignment, by_hand=by_hand, grey=study.grey)
    todo = work(study.sampled, plan, seed, assignment, batch_size or calibration.at_once)
    expected = calibration.seconds(todo.evaluations, height * width, todo.calls, todo.pictures)
    return {
        "qmap": save_preview(overlay, "qmap"),
        "legend": fragments.legend(counts),
        "cost": fragments.cost(plan, counts, width, height, todo.anew, todo.evaluations, expected),
        "histogram": charts.histogram(analysis.patch_confidence, assignment, plan),
    }


class Work(NamedTuple):
    """What a run would do: patches sampled anew, their network evaluations, in how many calls, pictures decoded."""

    anew: int
    evaluations: int
    calls: int
    pictures: int


def work(earlier: Sampled | None, plan: SamplingPlan, seed: Any, assignment: Tensor, batch_size: int) -> Work:
    """What a run of `plan` has to do after `earlier`."""
    start, steps = times_and_steps(plan, assignment)
    anew = torch.ones(len(steps), dtype=torch.bool) if earlier is None else earlier.differs(start, steps, seed)
    groups = assignment[anew].bincount(minlength=len(GROUPS)).tolist()
    calls = sum(n * -(-count // batch_size) for n, count in zip(plan.steps, groups))
    return Work(sum(groups), int(steps[anew].sum()), calls, max(1, sum(count > 0 for count in groups)))


def stale(
    analysis: Analysis,
    shown: Shown | None,
    source: str,
    plan: SamplingPlan,
    seed: Any,
    by_hand: ByHand,
    color_fix: bool,
) -> str:
    """What to say about a final picture that is unfinished, or not the one that these settings give."""
    if shown is None or shown.source != source:
        return ""
    start, steps = times_and_steps(plan, assign(analysis.patch_confidence, plan, by_hand))
    made = Sampled(start, shown.start, shown.steps, shown.seed)  # only asked which patches differ
    changed = int(made.differs(start, steps, seed).sum())
    if not shown.complete:
        return fragments.unfinished(int((shown.start > 0).sum()), len(start))
    if not changed and (shown.plan, shown.seed, shown.color_fix) == (plan, seed, color_fix):
        return ""
    return fragments.stale(shown.plan, shown.seed, changed, len(start), shown.color_fix != color_fix)


def coarse_preview(analysis: Analysis) -> Path:
    return save_preview(to_pil(Picture(analysis.coarse)), "coarse")


def save_preview(image: Image.Image, name: str) -> Path:
    """A JPEG: for looking at, and far quicker to make than a PNG."""
    path = new_folder() / f"{name}.jpg"
    image.convert("RGB").save(path, quality=92, subsampling=0)
    return path


def save_final(result: Result, source: str, name: str = "x4", color_fix: bool = True) -> Path:
    """The lossless PNG, made once, with its plan and seed inside, and with what is not as usual."""
    text = result.png_text() if color_fix else {**result.png_text(), "color_fix": "off"}
    return write_png(result.picture, new_folder() / f"{stem(source)}_{name}.png", text)


def stem(source: str) -> str:
    """The image's name without anything that a file name should not have."""
    return re.sub(r"[^\w.-]+", "_", Path(source).stem)[:80] or "image"


def new_folder() -> Path:
    """A folder that Gradio serves from, and empties after a while."""
    folder = Path(get_upload_folder()) / secrets.token_hex(20)
    folder.mkdir(parents=True)
    return folder
