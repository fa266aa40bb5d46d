"""What a run does, and what the page shows of it as it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image

from patchscaler.devices import most_at_once
from patchscaler.figures import qmap_overlay
from patchscaler.grouping import GROUPS, SamplingPlan, assign, times_and_steps
from patchscaler.images import Picture, read_picture, to_pil
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.records import Analysis, Partial, Progress, Restored, Result, Sampled
from patchscaler.ui import closeup, html
from patchscaler.ui.export import coarse_preview, save_final, save_preview
from patchscaler.ui.state import SKIP, ByHand, Shown, Studies, Study
from patchscaler.ui.zerogpu import Baseline, Calibration, Call, Networks, Order, work, zero_gpu


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
        legend=html.legend(),
        cost="",
        stale="",
        histogram="",
        timing=html.NO_TIMING,
        baseline="",
        difference=gr.update(value=None, visible=False),
        facts="",
        inspector=html.NO_PATCH,
        inspected="",
        compare=None,
        zoom=None,
        status=html.status("Press Run." if image else html.NO_IMAGE),
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
        "legend": html.legend(counts),
        "cost": html.cost(plan, counts, width, height, todo.anew, todo.evaluations, expected),
        "histogram": html.histogram(analysis.patch_confidence, assignment, plan),
    }


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
        return html.unfinished(int((shown.start > 0).sum()), len(start))
    if not changed and (shown.plan, shown.seed, shown.color_fix) == (plan, seed, color_fix):
        return ""
    return html.stale(shown.plan, shown.seed, changed, len(start), shown.color_fix != color_fix)


LOOK_SECONDS = 5  # an image whose analysis is expected to take longer waits for Run


class Runs:
    """Generators for the one thread that works: nothing here is called on the event loop."""

    def __init__(self, pipeline: PatchScalerPipeline) -> None:
        self.pipeline = pipeline
        self.studies = Studies()
        self.calibration = Calibration(most_at_once(pipeline._execution_device))
        self.networks = Networks(pipeline, self.calibration)

    def events(
        self, order: Order, picture: Picture | None = None
    ) -> Iterator[Analysis | Study | Progress | Partial | Result | Baseline]:
        """Analysis if it is a new one, Study, Progress of each step, Partial pictures, Result; then the baseline's.

        `picture` is the order's, where it is decoded already.
        """
        study = self.studies.get(order.source)
        earlier = (study.sampled, study.uniform) if study and order.live else ()
        if study:
            yield study
            if not order.refine:
                return
        known = picture
        if study:  # to ZeroGPU only what is needed is sent
            known = study.analysis.restored() if zero_gpu() else study.analysis
        for event in self.fresh_events(order, known, *earlier):
            if isinstance(event, Analysis):
                analysis = event
            elif isinstance(event, Image.Image):
                event = study = Study(analysis, event)
                self.studies.put(order.source, study)
            elif isinstance(event, (Partial, Result)):
                study.sampled = event.sampled
            elif isinstance(event, Baseline) and isinstance(event.event, Result):
                study.uniform = event.event.sampled
            yield event

    def fresh_events(
        self, order: Order, known: Picture | Restored | None = None, *earlier: Sampled | None
    ) -> Iterator[Any]:
        """The same, with the sheet of priors in place of the Study: nothing is kept, and only what is given reused."""
        # A picture is decoded here: a bad one is refused before any device is asked for.
        return self.networks.run(order, read_picture(order.source) if known is None else known, *earlier)

    def looked(self, order: Order) -> Iterator[RunView]:
        """What can be said of an image before any run. Its groups too, unless that takes long."""
        picture = None
        if self.studies.get(order.source) is None:
            picture = read_picture(order.source)
            height, width = SCALE * picture.height, SCALE * picture.width
            count = len(PatchGrid.covering(height, width, self.pipeline.transformer.config.size))
            yield RunView(cost=html.unknown_cost(order.plan, count, width, height))
            expected = self.calibration.analysis_seconds(height * width)
            if zero_gpu() or expected is None or expected > LOOK_SECONDS:
                return
        yield from self._views(replace(order, refine=False), picture)

    def warmed_up(self) -> Iterator[None]:
        """Run everything on noise, and again to learn what it takes: a process is slow at what it does first."""
        noise = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
        picture, plan = Picture(noise), SamplingPlan(0.9, 0.5, (100, 200, 300), (2, 3, 4))
        count = len(PatchGrid.covering(SCALE * 96, SCALE * 128, self.pipeline.transformer.config.size))
        # Groups of different sizes, which tell the cost of a call from that of a patch in it.
        order = Order("noise", plan, 0, {index: 0 if index < 2 else 1 if index < 8 else 2 for index in range(count)})
        for known in (False, True):
            began = time.perf_counter()
            for event in self.networks.here(order, picture):
                if isinstance(event, Image.Image):
                    analysed = time.perf_counter()
                elif isinstance(event, (Partial, Result)):
                    save_preview(to_pil(event.picture), "noise")
                    result = event
                yield None
            if known:
                self.calibration.learn_analysis(SCALE**2 * picture.rgb[0].numel(), analysed - began)
                self._learn(order, result, time.perf_counter() - analysed)

    def _baseline(self, order: Order, result: Result, uniform: Result) -> dict[str, Any]:
        """What uniform sampling costs more and looks other: views of both."""
        costs = []
        for run in (result, uniform):
            at_once = order.batch_size or self.calibration.at_once
            todo = work(None, run.plan, run.seed, run.assignment, at_once)
            # By rates, since either may have taken patches over.
            costs.append((todo.evaluations, self.calibration.seconds(todo.evaluations, 0, todo.calls)))
        image = closeup.difference(result.picture.rgb, uniform.picture.rgb)
        return {
            "baseline": html.baseline(*zip(*costs)),
            "difference": gr.update(value=save_preview(image, "difference"), visible=True),
        }

    def _learn(self, order: Order, result: Result, seconds: float, partial: bool = True) -> None:
        """Have the calibration learn from a run that took so long after the analysis; `partial`: a picture a group."""
        groups = []
        for group in result.groups:
            batches = -(-group.evaluations // group.steps // (order.batch_size or self.calibration.at_once))
            groups.append(Call(batches * group.steps, group.evaluations, group.seconds))
        rest = max(0.0, seconds - sum(group.seconds for group in groups))
        pictures = max(1, sum(group.calls > 0 for group in groups)) if partial else 1
        self.calibration.learn(groups, result.picture.rgb[0].numel(), rest, pictures)

    def _views(self, order: Order, picture: Picture | None = None) -> Iterator[RunView]:
        began = time.perf_counter()
        plan, seed, by_hand = order.plan, order.seed, order.by_hand
        reused = self.studies.get(order.source) is not None
        shown, result, done = None, None, ""
        if not reused:
            yield RunView(status=html.status("Restoring the whole image…"))
        for event in self.events(order, picture):
            uniform = isinstance(event, Baseline)
            event = event.event if uniform else event
            if isinstance(event, Analysis):
                # The overlay before any run is known: what a run costs is said when there is a Study to keep.
                fresh = grouping(Study(event, None), plan, seed, by_hand, self.calibration, order.batch_size)
                status = html.status("Drawing the texture priors…")
                yield RunView(coarse=coarse_preview(event), **fresh, status=status)
            elif isinstance(event, Study):
                again = {}
                if reused:
                    again = grouping(event, plan, seed, by_hand, self.calibration, order.batch_size)
                    again["coarse"] = coarse_preview(event.analysis)
                else:
                    self.calibration.learn_analysis(event.analysis.coarse[0].numel(), time.perf_counter() - began)
                yield RunView(**again, priors=save_preview(event.priors, "priors"))
                sampling = time.perf_counter()
            elif isinstance(event, Progress):
                left = (time.perf_counter() - sampling) / event.done * (event.total - event.done)
                status = html.status(html.step(event, left, uniform), event.done, event.total)
                yield RunView(status=status)
            elif isinstance(event, Partial):
                path = save_preview(to_pil(event.picture), "partial")
                sampled = event.sampled
                report = {"plan": asdict(plan), "seed": seed}
                shown = _shown(order, sampled, path, report)
                yield RunView(
                    final=path,
                    shown=shown,
                    stale=html.unfinished(int((sampled.start > 0).sum()), len(sampled.start)),
                )
            elif uniform:
                shown = shown._replace(uniform=save_final(event, order.source, "uniform", order.color_fix))
                self._learn(order, event, time.perf_counter() - sampling, partial=False)
                status = html.status(f"{done} The baseline is done too.")
                yield RunView(**self._baseline(order, result, event), shown=shown, status=status)
            else:
                result = event
                path = save_final(result, order.source, color_fix=order.color_fix)
                shown = _shown(order, result.sampled, path, result.report())
                now = time.perf_counter()
                self._learn(order, result, now - sampling)
                anew, count = int(result.rendered.sum()), len(result.rendered)
                done = (
                    f"Done in {now - began:.1f} s with {html.describe(plan, seed)}. "
                    f"{anew} of {count} patches were rendered anew."
                )
                yield RunView(
                    final=path,
                    timing=html.timing(result, reused),
                    status=html.status(" ".join([done, *result.picture.notes])),
                    stale="",
                    shown=shown,
                    baseline="",
                    difference=gr.update(value=None, visible=False),
                )
                sampling = time.perf_counter()  # of the baseline


def _shown(order: Order, sampled: Sampled, final: Path, report: dict) -> Shown:
    made = (sampled.start, sampled.steps, final, order.by_hand, report)
    return Shown(order.source, order.plan, order.seed, order.color_fix, *made)
