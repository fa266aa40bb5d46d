"""What a run does, and what the page shows of it as it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import spaces
from PIL import Image
from torch import Tensor

from patchscaler.grouping import SamplingPlan
from patchscaler.images import read_picture, to_pil
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.records import Analysis, Partial, Progress, Result, Sampled
from patchscaler.ui import compare, fragments
from patchscaler.ui.calibration import Calibration
from patchscaler.ui.studies import Studies, Study
from patchscaler.ui.views import ByHand, RunView, Shown, coarse_preview, grouping, save_final, save_preview

GPU_SECONDS = 120  # the longest that one run may hold a ZeroGPU device


@dataclass(frozen=True)
class Order:
    """What a run is to do."""

    source: str
    plan: SamplingPlan
    seed: int
    by_hand: ByHand
    color_fix: bool = True
    batch_size: int = 64
    uniform: bool = False  # also render the baseline
    live: bool = True  # for the page: take over what is known, and give the picture after every group


class Baseline(NamedTuple):
    """An event of the uniform baseline's run, which follows the plan's."""

    event: Any


class Runs:
    """Generators for the one thread that works: nothing here is called on the event loop."""

    def __init__(self, pipeline: PatchScalerPipeline) -> None:
        self.pipeline = pipeline
        self.studies = Studies()
        self.calibration = Calibration()
        self._work = spaces.GPU(self._networks, duration=GPU_SECONDS)  # off ZeroGPU: the same function

    def _networks(
        self,
        order: Order | Tensor,
        analysis: Analysis | None = None,
        earlier: Sampled | None = None,
        uniform: Sampled | None = None,
    ) -> Iterator[Any]:
        """All that needs the device. On ZeroGPU this runs in another process: what goes in and out is pickled.

        `earlier` and `uniform` are patches of the last runs of the plan and of the baseline. For a Tensor, the
        latents of priors, it gives their images.
        """
        if isinstance(order, Tensor):
            yield self.pipeline.decode_priors(order)
            return
        if analysis is None:
            analysis = self.pipeline.analyze(read_picture(order.source), order.batch_size)
            yield analysis
            yield self.pipeline.draw_priors(analysis)
        common = {"seed": order.seed, "batch_size": order.batch_size, "color_fix": order.color_fix}
        for event in self.pipeline.refine(
            analysis, order.plan, **common, by_hand=order.by_hand, earlier=earlier, partial=order.live
        ):
            yield event
        if order.uniform:
            known = event.sampled if uniform is None or uniform.seed != order.seed else uniform
            for event in self.pipeline.refine(analysis, SamplingPlan.uniform(), **common, earlier=known):
                yield Baseline(event)

    def _events(self, order: Order) -> Iterator[Analysis | Study | Progress | Partial | Result | Baseline]:
        """Analysis if it is a new one, Study, Progress of each step, Partial pictures, Result; then the baseline's."""
        study = self.studies.get(order.source)
        analysis = study.analysis if study else None
        known = (study.sampled, study.uniform) if study and order.live else ()
        if study:
            yield study
        for event in self._work(order, analysis, *known):
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

    def _saved(self, order: Order) -> Iterator[tuple[Path, dict] | None]:
        """None for each event, so that the job can be stopped there, and last the saved picture and its report."""
        for event in self._events(order):
            yield (save_final(event, order.source), event.report()) if isinstance(event, Result) else None

    def _views(self, order: Order) -> Iterator[RunView]:
        began = time.perf_counter()
        plan, seed, by_hand = order.plan, order.seed, order.by_hand
        reused = self.studies.get(order.source) is not None
        shown, result = None, None
        if not reused:
            yield RunView(status=fragments.status("Restoring the whole image…"))
        for event in self._events(order):
            uniform = isinstance(event, Baseline)
            event = event.event if uniform else event
            if isinstance(event, Analysis):
                # The overlay before any run is known: what a run costs is said when there is a Study to keep.
                fresh = grouping(Study(event, None), plan, seed, by_hand, self.calibration)
                status = fragments.status("Drawing the texture priors…")
                yield RunView(coarse=coarse_preview(event), **fresh, status=status)
            elif isinstance(event, Study):
                again = {}
                if reused:
                    again = grouping(event, plan, seed, by_hand, self.calibration)
                    again["coarse"] = coarse_preview(event.analysis)
                yield RunView(**again, priors=save_preview(event.priors, "priors"))
                sampling = time.perf_counter()
            elif isinstance(event, Progress):
                left = (time.perf_counter() - sampling) / event.done * (event.total - event.done)
                status = fragments.status(fragments.step(event, left, uniform), event.done, event.total)
                yield RunView(status=status)
            elif isinstance(event, Partial):
                path = save_preview(to_pil(event.picture), "partial")
                sampled = event.sampled
                report = {"plan": asdict(plan), "seed": seed}
                shown = _shown(order, sampled, path, report)
                yield RunView(
                    final=path,
                    shown=shown,
                    stale=fragments.unfinished(int((sampled.start > 0).sum()), len(sampled.start)),
                )
            elif uniform:
                shown = shown._replace(uniform=save_final(event, order.source, "uniform"))
                yield RunView(**_baseline(result, event), shown=shown, status=fragments.status("Done, with baseline."))
            else:
                result = event
                path = save_final(result, order.source)
                shown = _shown(order, result.sampled, path, result.report())
                now = time.perf_counter()
                at_work = sum(group.seconds for group in result.groups)
                evaluations = sum(group.evaluations for group in result.groups)
                pixels = result.picture.rgb[0].numel()
                self.calibration.learn(evaluations, at_work, pixels, max(0.0, now - sampling - at_work))
                anew, count = int(result.rendered.sum()), len(result.rendered)
                done = (
                    f"Done in {now - began:.1f} s with {fragments.describe(plan, seed)}. "
                    f"{anew} of {count} patches were rendered anew."
                )
                yield RunView(
                    final=path,
                    timing=fragments.timing(result, reused),
                    status=fragments.status(" ".join([done, *result.picture.notes])),
                    stale="",
                    shown=shown,
                    baseline="",
                    difference=gr.update(value=None, visible=False),
                )
                sampling = time.perf_counter()  # of the baseline


def _shown(order: Order, sampled: Sampled, final: Path, report: dict) -> Shown:
    made = (sampled.start, sampled.steps, final, order.by_hand, report)
    return Shown(order.source, order.plan, order.seed, order.color_fix, *made)


def _baseline(result: Result, uniform: Result) -> dict[str, Any]:
    """What uniform sampling costs more and looks other: views of both."""
    groups = [group for run in (result, uniform) for group in run.groups if group.evaluations]
    each = sum(group.seconds for group in groups) / max(1, sum(group.evaluations for group in groups))
    evaluations = int(result.sampled.steps.sum()), int(uniform.sampled.steps.sum())
    image = compare.difference(result.picture.rgb, uniform.picture.rgb)
    return {
        "baseline": fragments.baseline(evaluations, (evaluations[0] * each, evaluations[1] * each)),
        "difference": gr.update(value=save_preview(image, "difference"), visible=True),
    }
