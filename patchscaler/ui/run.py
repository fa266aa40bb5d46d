"""Run, Stop and a new image: what the networks do for a visitor, and what the page shows of it as it goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

import gradio as gr

from patchscaler.device import batch_for
from patchscaler.images import Picture, read_picture, to_pil
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Analysis, Partial, Progress, Restored, Result
from patchscaler.ui import closeup, export, html
from patchscaler.ui.html import explain, visible_error
from patchscaler.ui.jobs import Jobs, StopEvents
from patchscaler.ui.networks import Calibration, Call, Networks, RunRequest, zero_gpu
from patchscaler.ui.state import CachedAnalysis, PageState, SessionCache, Settings, Shown, View, flag_of
from patchscaler.ui.tune import Tuner

Update = View | tuple[Shown, View]  # what to show, and if the final picture is in it, how that was made
LOOK_SECONDS = 5  # an image whose analysis is expected to take longer waits for Run


class Runner:
    """Runs for the page and the API over one pipeline, and what they share: the session cache and the calibration."""

    def __init__(
        self,
        pipeline: PatchScalerPipeline,
        jobs: Jobs | None = None,
        cache: SessionCache | None = None,
        gpu_on_demand: bool = True,
    ) -> None:
        """`gpu_on_demand`: on ZeroGPU, every run asks for a GPU; not so for a pipeline on the CPU."""
        self.pipeline = pipeline
        self.jobs = jobs or Jobs()
        self.cache = cache or SessionCache()
        self.calibration = Calibration(batch_for(pipeline._execution_device))
        self.tuner = Tuner(self.cache, self.calibration)
        self.networks = Networks(pipeline, self.calibration, gpu_on_demand)
        self.examples: Sequence[str] = ()  # files that run as they are chosen
        self._runs, self._looks = StopEvents(), StopEvents()

    # Events of the page

    async def run(self, now: Settings, uniform: Any) -> AsyncIterator[View]:
        """Analyze if the image is new, then refine. Yields what to show as soon as it is there.

        A stopped run says so itself, last of all: what another event said could be overtaken by a view on its way.
        """
        async with aclosing(self._with_errors(now, self._run(now, uniform))) as views:
            async for view in views:
                yield view

    async def _run(self, now: Settings, uniform: Any) -> AsyncIterator[View]:
        request, uniform = now.request(), flag_of("uniform", uniform)
        if not request.source:
            raise visible_error("No image", html.NO_IMAGE)
        with self._runs.of(now.session) as stop:
            now.page.source = request.source
            yield {"status": html.status("Waiting for the pipeline…"), "stop": gr.update(interactive=True)}
            shown = None
            async for event in self.jobs.stream(lambda: self._views(request, uniform=uniform), stop):
                match event:
                    case Shown() as shown, view:
                        if now.page.source == request.source:
                            now.page.shown = shown
                        yield view
                    case view:
                        yield view
            if shown is None or not shown.complete or shown.uniform is None and uniform:
                yield {"status": html.status(_stopped(shown))}

    async def look(self, now: Settings) -> AsyncIterator[View]:
        """Analyze an image as it comes in, so that its groups and what a run costs are known; run an example."""
        async with aclosing(self._with_errors(now, self._look(now))) as views:
            async for view in views:
                yield view

    async def _look(self, now: Settings) -> AsyncIterator[View]:
        now.page.source = now.source
        if now.source is None or now.page.shown:
            return
        if now.source in self.examples:
            async for view in self._run(now, False):
                yield view
            return
        request = now.request()
        with self._looks.of(now.session) as stop:
            async for view in self.jobs.stream(lambda: self._looked(request), stop):
                if now.session in self._runs:  # a run that waits, or goes on already, has the status line
                    view.pop("status", None)
                yield view
            if now.session not in self._runs and not stop.is_set():
                yield {"status": html.status("Press Run.")}

    async def _with_errors(self, now: Settings, views: AsyncGenerator[View, None]) -> AsyncIterator[View]:
        """The views, and last why there are no more if that is an error: Gradio calls no `then` after one."""
        try:
            async with aclosing(views):
                async for view in views:
                    yield view
        except Exception as error:
            visible = explain(error)
            if now.session not in self._runs:  # else status and Stop are those of a run that waits or goes on
                status = html.status(f"{visible.title}: {visible.message}")
                yield {"status": status, "stop": gr.update(interactive=False)}
            raise visible from error

    def stop(self, now: Settings) -> None:
        """Have the visitor's run stop at its next step."""
        self._runs.stop(now.session)

    def new_image(self, now: Settings) -> View:
        """Stop the run and empty the page when another image comes in, or none.

        An image that was made here restores its own settings.
        """
        if now.source == now.page.source:  # the one that the page opened with
            return {}
        for stops in (self._runs, self._looks):
            stops.stop(now.session)
        now.page.empty(now.source)
        return emptied(now.source) | (export.restored(now.source) if now.source else {})

    def settle(self, now: Settings) -> View:
        """After a run or a look: nothing is left to stop but a later run.

        The page is emptied again if the last pictures came in behind another image.
        """
        stop = {"stop": gr.update(interactive=now.session in self._runs)}
        if now.page.source == now.source:
            return stop
        now.page.empty(now.source)
        return {**emptied(now.source), **stop}

    # Jobs: generators for the thread that works. Nothing here is called on the event loop.

    def events(
        self, request: RunRequest, picture: Picture | None = None
    ) -> Iterator[CachedAnalysis | Progress | Partial | Result]:
        """The image's CachedAnalysis, Progress of each step, Partial pictures, and last the Result.

        `picture` is the request's, where it is decoded already. Else it is decoded here: a bad one is refused before
        any device is asked for.
        """
        known, earlier = self.cache.get(request.source), None
        if known:
            yield known
            if not request.refine:
                return
            start = _refinement_input(known)
            earlier = self.cache.sampled(request.session, request.source) if request.live else None
        else:
            start = read_picture(request.source) if picture is None else picture
        for event in self.networks.run(request, start, earlier):
            match event:
                case Analysis():
                    event = CachedAnalysis(event, self.networks.draw_priors)
                    self.cache.put(request.source, event)
                case Partial() | Result() if request.live:
                    self.cache.keep(request.session, request.source, event.sampled)
            yield event

    def first_run(self, source: str) -> tuple[View, PageState]:
        """Run an example with the paper's plan, for the page to open with: what it shows and holds.

        Later runs are expected to take as long.
        """
        request = RunRequest(source, SamplingPlan.paper(), 0, {})
        for _ in self.networks.run(request, read_picture(source)):  # a process is slow at what it does first
            pass
        view = emptied(source)
        for event in self._views(request):
            match event:
                case Shown() as shown, update:
                    view |= update
                case update:
                    view |= update
        self.cache.open_with(source)
        known = self.cache.get(source)
        sides = closeup.LEFT, closeup.RIGHT
        center = closeup.middle(known.analysis.grid.patches[int(known.analysis.patch_confidence.argmin())])
        view |= {
            **self.tuner.grouped(known, request),
            "compare": closeup.pair(known, shown, sides),
            "zoom": closeup.zoomed(known, shown, sides, closeup.ZOOM, center),
            "note": "<p>An example is shown. Upload a photograph, or choose another example, to see its result.</p>",
        }
        return view, PageState(source, shown, center=center, opened=True)

    def _looked(self, request: RunRequest) -> Iterator[View]:
        """What can be said of an image before any run. Its groups too, unless that takes long."""
        picture = None
        if self.cache.get(request.source) is None:
            picture = read_picture(request.source)
            height, width = SCALE * picture.height, SCALE * picture.width
            count = len(PatchGrid.covering(height, width, self.pipeline.transformer.config.size))
            yield {"cost": html.unknown_cost(request.plan, count, width, height)}
            expected = self.calibration.analysis_seconds(height * width)
            if zero_gpu() or expected is None or expected > LOOK_SECONDS:
                return
        yield from self._views(replace(request, refine=False), picture)

    def _views(self, request: RunRequest, picture: Picture | None = None, uniform: bool = False) -> Iterator[Update]:
        """What the page shows of `events`, and with each final picture how it was made."""
        began = time.perf_counter()
        reused = self.cache.get(request.source) is not None
        calls, pictures = Counter(), 1  # of the network, by group; and what is decoded
        if not reused:
            yield {"status": html.status("Restoring the whole image…")}
        for event in self.events(request, picture):
            match event:
                case CachedAnalysis() as known:
                    coarse = export.save_preview(to_pil(Picture(known.analysis.coarse)), "coarse")
                    view = {"coarse": coarse, **self.tuner.grouped(known, request)}
                    if not reused:
                        self.calibration.learn_analysis(known.pixels, sum(known.analysis.seconds.values()))
                        view["status"] = html.status("Drawing the texture priors…")
                    yield view
                    yield {"priors": export.save_preview(known.priors, "priors")}
                    sampling = time.perf_counter()
                case Progress():
                    calls[event.group] += 1
                    yield {"status": html.step(event, time.perf_counter() - sampling)}
                case Partial():
                    pictures += 1
                    path = export.save_preview(to_pil(event.picture), "partial")
                    report = {"plan": asdict(request.plan), "seed": request.seed}
                    shown = Shown(request, event.sampled.start, event.sampled.steps, path, report)
                    stale = html.unfinished(shown.refined, len(shown.start))
                    yield shown, {"final": path, "stale": stale}
                case Result() as result:
                    path = export.save_final(result, request.source)
                    shown = Shown(request, result.sampled.start, result.sampled.steps, path, result.report())
                    self._learn(known, result, calls, pictures)
                    settings = html.describe(request.plan, request.seed)
                    done = (
                        f"Done in {time.perf_counter() - began:.1f} s with {settings}. "
                        f"{int(result.rendered.sum())} of {len(result.rendered)} patches were rendered anew."
                    )
                    yield shown, {
                        "final": path,
                        "timing": html.timing(result, reused),
                        "status": html.status(" ".join([done, *result.picture.notes])),
                        "stale": "",
                        "baseline": "",
                        "difference": gr.update(value=None, visible=False),
                    }
        if uniform:
            yield from self._baseline(request, known, result, shown, done)

    def _baseline(
        self, request: RunRequest, known: CachedAnalysis, result: Result, shown: Shown, done: str
    ) -> Iterator[Update]:
        """What the page shows of uniform sampling, after the result: what it costs more and how it looks different."""
        began, calls = time.perf_counter(), Counter()
        uniform = replace(request, plan=SamplingPlan.uniform(), by_hand={}, live=False)
        earlier = self.cache.sampled(request.session, request.source, uniform=True)
        if earlier is None or earlier.seed != request.seed:
            earlier = result.sampled
        for event in self.networks.run(uniform, _refinement_input(known), earlier):
            if isinstance(event, Progress):
                calls[event.group] += 1
                yield {"status": html.step(event, time.perf_counter() - began, uniform=True)}
        self.cache.keep(request.session, request.source, event.sampled, uniform=True)
        self._learn(known, event, calls, pictures=1)
        costs = []
        for run in (result, event):  # by rates, since either may have taken patches over
            work, _ = self.calibration.work(replace(request, plan=run.plan), run.assignment)
            costs.append((work.evaluations, self.calibration.seconds(work, pixels=0)))
        difference = export.save_preview(closeup.difference(result.picture.rgb, event.picture.rgb), "difference")
        yield replace(shown, uniform=export.save_final(event, request.source, "uniform")), {
            "status": html.status(f"{done} The baseline is done too."),
            "baseline": html.baseline(*zip(*costs)),
            "difference": gr.update(value=difference, visible=True),
        }

    def _learn(self, known: CachedAnalysis, result: Result, calls: Counter[int], pictures: int) -> None:
        """Have the calibration learn from a run's seconds of the device, with its calls of the network by group.

        What a visitor waited for the device, or a picture for the disk, is none of it.
        """
        groups = [Call(calls[place], each.evaluations, each.seconds) for place, each in enumerate(result.groups)]
        before = sum(known.analysis.seconds.values()) + result.seconds["refine"]
        rest = max(0.0, sum(result.seconds.values()) - before)
        self.calibration.learn(groups, known.pixels, rest, pictures)


def emptied(source: str | None) -> View:
    """The page for another image, or for none, before its run."""
    return {
        **dict.fromkeys(("coarse", "qmap", "priors", "final", "compare", "zoom")),
        **dict.fromkeys(("cost", "stale", "histogram", "baseline", "facts", "inspected", "note"), ""),
        "legend": html.legend(),
        "timing": html.NO_TIMING,
        "difference": gr.update(value=None, visible=False),
        "inspector": html.NO_PATCH,
        "status": html.status("Press Run." if source else html.NO_IMAGE),
        "run": gr.update(interactive=source is not None),
    }


def _refinement_input(known: CachedAnalysis) -> Restored:
    """What refinement is given: to another process only what it needs is sent."""
    return known.analysis.restored() if zero_gpu() else known.analysis


def _stopped(shown: Shown | None) -> str:
    if shown is None:
        return "Stopped before any group was finished. Press Run to start again."
    if shown.complete:
        return "Stopped. The picture is finished, the uniform baseline is not."
    return f"Stopped: {shown.refined} of {len(shown.start)} patches are refined. Press Run to render the others."
