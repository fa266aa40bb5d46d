"""What happens when a visitor does something: the work behind the page's events and the API's one endpoint."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from html import escape, unescape
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import gradio as gr
import spaces
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from patchscaler.figures import qmap_overlay
from patchscaler.grouping import GROUPS, PRESETS, SamplingPlan, assign
from patchscaler.images import ImageError, Picture, read_picture, to_pil, write_png
from patchscaler.pipeline import Analysis, PatchScalerPipeline, Progress, Result
from patchscaler.ui import fragments
from patchscaler.ui.dials import dials_of, hold_order, in_range, plan_of, preset_of, seed_of
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.studies import Studies, Study

SKIP = gr.skip()
STOPPED = "Stopped. Press Run to start again."
GPU_SECONDS = 120  # the longest that one run may hold a ZeroGPU device
log = logging.getLogger(__name__)


class Shown(NamedTuple):
    """How the final picture on a visitor's page was made."""

    source: str
    plan: SamplingPlan
    seed: int
    assignment: Tensor


class RunView(NamedTuple):
    """The outputs of a run, in the order in which the page lists them."""

    coarse: Any = SKIP
    qmap: Any = SKIP
    priors: Any = SKIP
    final: Any = SKIP
    legend: Any = SKIP
    cost: Any = SKIP
    stale: Any = SKIP
    timing: Any = SKIP
    status: Any = SKIP
    shown: Any = SKIP
    source: Any = SKIP  # the image whose pictures the panels show
    run: Any = SKIP
    stop: Any = SKIP


class DialView(NamedTuple):
    """The outputs of a moved dial, in the order in which the page lists them."""

    dials: Any = (SKIP,) * 8
    preset: Any = SKIP
    qmap: Any = SKIP
    legend: Any = SKIP
    cost: Any = SKIP
    stale: Any = ""

    def flat(self) -> tuple:
        return (*self.dials, *self[1:])


class Handlers:
    """The events of one page over one pipeline.

    The page's `preprocess` is off: values arrive as the browser sent them, an image as Gradio's file data, since
    Gradio's own decoding loses alpha and 16-bit grey and answers bad files with an error that says nothing.
    """

    def __init__(self, pipeline: PatchScalerPipeline) -> None:
        self.pipeline = pipeline
        self.studies = Studies()
        self.jobs = Jobs()
        self._stops: dict[str | None, Event] = {}  # by the visitor's session
        self._work = spaces.GPU(self._networks, duration=GPU_SECONDS)  # off ZeroGPU: the same function

    async def run(self, request: gr.Request, image: dict | None, *dials: Any) -> AsyncIterator[RunView]:
        """Analyze if the image is new, then refine. Yields what to show as soon as it is there.

        A stopped run says so itself, last of all: what another event said could be overtaken by a view on its way.
        """
        source, plan, seed = _request(image, dials)
        stop = self._stops[request.session_hash] = Event()
        waiting = fragments.status("Waiting for the pipeline…")
        yield RunView(status=waiting, source=source, stop=gr.update(interactive=True))
        done = False
        try:
            async for view in self.jobs.stream(lambda: self._views(source, plan, seed), stop):
                done = view.shown is not SKIP
                yield view
            if not done:
                yield RunView(status=fragments.status(STOPPED))
        except Exception as error:
            visible = explain(error)
            yield RunView(status=fragments.status(f"{visible.title}: {unescape(visible.message)}"))
            raise visible from error
        finally:
            if self._stops.get(request.session_hash) is stop:
                del self._stops[request.session_hash]

    async def upscale(self, source: str, plan: SamplingPlan, seed: int) -> tuple[Path, dict]:
        """The lossless PNG of a whole run, and its report."""
        try:
            async for saved in self.jobs.stream(lambda: self._saved(source, plan, seed)):
                last = saved
            return last
        except Exception as error:
            raise explain(error) from error

    def stop(self, request: gr.Request) -> None:
        """Have the visitor's run stop at its next step."""
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    def new_image(self, request: gr.Request, image: dict | None) -> RunView:
        """Stop the run and empty the page when another image comes in, or none."""
        self.stop(request)
        return _emptied(image)

    def settle(self, image: dict | None, source: str | None) -> RunView:
        """After a run: empty the page again if the run's last pictures came in behind another image."""
        return RunView() if source == (image or {}).get("path") else _emptied(image)

    def dial_moved(self, moved: int, image: dict | None, shown: Shown | None, *dials: Any) -> tuple:
        """Hold the dials' order and group anew. No network runs. `moved` is the dial's place; 8 is the seed."""
        if not in_range(dials[:8]):
            return DialView(stale=SKIP).flat()
        held = hold_order(dials[:8], moved)
        updates = tuple(SKIP if new == old else new for new, old in zip(held, dials[:8]))
        view = self._regroup(image, shown, held, dials[8])
        return view._replace(dials=updates, preset=preset_of(plan_of(held))).flat()

    def preset_chosen(self, preset: str, image: dict | None, shown: Shown | None, *dials: Any) -> tuple:
        """Set the dials to the preset's plan; `custom` leaves them where they are."""
        values = dials_of(PRESETS[preset]) if preset in PRESETS else dials[:8]
        return self._regroup(image, shown, values, dials[8])._replace(dials=values).flat()

    def refresh(self, image: dict | None, shown: Shown | None, *dials: Any) -> tuple:
        """Bring groups, cost and the stale mark up to the dials, which may have moved while a run went on."""
        return *self._regroup(image, shown, dials[:8], dials[8]).flat(), gr.update(interactive=False)

    def _regroup(self, image: dict | None, shown: Shown | None, dials: Any, seed: Any) -> DialView:
        source = (image or {}).get("path")
        study = self.studies.get(source)
        if study is None:
            return DialView()
        if not in_range(dials):
            return DialView(stale=SKIP)
        plan = plan_of(dials)
        return DialView(**_grouping(study.analysis, plan), stale=_stale(study.analysis, shown, source, plan, seed))

    def _networks(self, source: str, analysis: Analysis | None, plan: SamplingPlan, seed: int) -> Iterator[Any]:
        """All that needs the device. On ZeroGPU this runs in another process: what goes in and out is pickled."""
        if analysis is None:
            analysis = self.pipeline.analyze(read_picture(source))
            yield analysis
            yield self.pipeline.draw_priors(analysis)
        yield from self.pipeline.refine(analysis, plan, seed=seed)

    def _events(self, source: str, plan: SamplingPlan, seed: int) -> Iterator[Analysis | Study | Progress | Result]:
        """Analysis if it is a new one, Study, Progress of each step, Result."""
        study = self.studies.get(source)
        analysis = study.analysis if study else None
        if study:
            yield study
        for event in self._work(source, analysis, plan, seed):
            if isinstance(event, Analysis):
                analysis = event
            elif isinstance(event, Image.Image):
                event = Study(analysis, event)
                self.studies.put(source, event)
            yield event

    def _saved(self, source: str, plan: SamplingPlan, seed: int) -> Iterator[tuple[Path, dict] | None]:
        """None for each event, so that the job can be stopped there, and last the saved picture and its report."""
        for event in self._events(source, plan, seed):
            yield (_save_final(event, source), event.report()) if isinstance(event, Result) else None

    def _views(self, source: str, plan: SamplingPlan, seed: int) -> Iterator[RunView]:
        began = time.perf_counter()
        reused = self.studies.get(source) is not None
        if not reused:
            yield RunView(status=fragments.status("Restoring the whole image…"))
        for event in self._events(source, plan, seed):
            if isinstance(event, Analysis):
                yield RunView(**_analysis_view(event, plan), status=fragments.status("Drawing the texture priors…"))
            elif isinstance(event, Study):
                again = _analysis_view(event.analysis, plan) if reused else {}
                yield RunView(**again, priors=_save_preview(event.priors, "priors"))
            elif isinstance(event, Progress):
                yield RunView(status=fragments.status(fragments.step(event), event.done, event.total))
            else:
                done = f"Done in {time.perf_counter() - began:.1f} s with {fragments.describe(plan, seed)}."
                yield RunView(
                    final=_save_final(event, source),
                    timing=fragments.timing(event, reused),
                    status=fragments.status(" ".join([done, *event.picture.notes])),
                    stale="",
                    shown=Shown(source, plan, seed, event.assignment.cpu()),
                )


def _emptied(image: dict | None) -> RunView:
    return RunView(
        *(None,) * 4,
        legend=fragments.legend(),
        cost="",
        stale="",
        timing=fragments.NO_TIMING,
        status=fragments.status("Press Run." if image else fragments.NO_IMAGE),
        shown=None,
        source=(image or {}).get("path"),
        run=gr.update(interactive=image is not None),
    )


def explain(error: Exception) -> gr.Error:
    """The error a visitor sees: Gradio hands on no other text than that of its own error."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, ImageError):
        return visible_error("This image was refused", str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return visible_error("Out of memory", "There is not enough memory for this image. Try a smaller one.")
    log.error("a run failed", exc_info=error)
    return visible_error("The run failed", f"{type(error).__name__}; the server's log has the details.")


def visible_error(title: str, text: str) -> gr.Error:
    """Gradio shows both as HTML."""
    return gr.Error(escape(text), title=escape(title), print_exception=False)


def checked_plan(dials: Any, seed: Any) -> tuple[SamplingPlan, int]:
    """The plan and the seed, or a gr.Error that says which value is wrong."""
    try:
        return plan_of(dials), seed_of(seed)
    except ValueError as error:
        raise visible_error("These settings do not work", str(error)) from error


def _request(image: dict | None, dials: tuple) -> tuple[str, SamplingPlan, int]:
    source = (image or {}).get("path")
    if not source:
        raise visible_error("No image", fragments.NO_IMAGE)
    return source, *checked_plan(dials[:8], dials[8])


def _grouping(analysis: Analysis, plan: SamplingPlan) -> dict[str, Any]:
    """Overlay, legend and cost under `plan`."""
    assignment = assign(analysis.patch_confidence, plan)
    counts = assignment.bincount(minlength=len(GROUPS)).tolist()
    height, width = analysis.coarse.shape[-2:]
    overlay = qmap_overlay(analysis.coarse, analysis.grid, assignment)
    return {
        "qmap": _save_preview(overlay, "qmap"),
        "legend": fragments.legend(counts),
        "cost": fragments.cost(plan, counts, width, height),
    }


def _analysis_view(analysis: Analysis, plan: SamplingPlan) -> dict[str, Any]:
    return {"coarse": _save_preview(to_pil(Picture(analysis.coarse)), "coarse"), **_grouping(analysis, plan)}


def _stale(analysis: Analysis, shown: Shown | None, source: str, plan: SamplingPlan, seed: Any) -> str:
    if shown is None or shown.source != source or (shown.plan, shown.seed) == (plan, seed):
        return ""
    old, new = shown.assignment.tolist(), assign(analysis.patch_confidence, plan).tolist()
    changed = sum(
        shown.seed != seed or (shown.plan.start[a], shown.plan.steps[a]) != (plan.start[b], plan.steps[b])
        for a, b in zip(old, new)
    )
    return fragments.stale(shown.plan, shown.seed, changed, len(new))


def _save_preview(image: Image.Image, name: str) -> Path:
    """A JPEG: for looking at, and far quicker to make than a PNG."""
    path = _new_folder() / f"{name}.jpg"
    image.save(path, quality=92, subsampling=0)
    return path


def _save_final(result: Result, source: str) -> Path:
    """The lossless PNG, made once, with its plan and seed inside."""
    stem = re.sub(r"[^\w.-]+", "_", Path(source).stem)[:80] or "image"
    return write_png(result.picture, _new_folder() / f"{stem}_x4.png", result.png_text())


def _new_folder() -> Path:
    """A folder that Gradio serves from, and empties after a while."""
    folder = Path(get_upload_folder()) / secrets.token_hex(20)
    folder.mkdir(parents=True)
    return folder
