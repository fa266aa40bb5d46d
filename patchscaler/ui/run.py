"""Run, Stop and a new image: what the networks do for a visitor, and what the page shows of it as it goes on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from threading import Event
from typing import Any

import gradio as gr

from patchscaler.device import most_at_once
from patchscaler.images import Picture, read_picture, to_pil
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Analysis, Partial, Progress, Restored, Result
from patchscaler.ui import closeup, export, html
from patchscaler.ui.html import explain, visible_error
from patchscaler.ui.jobs import Jobs, Stops
from patchscaler.ui.networks import Baseline, Calibration, Call, Networks, Order, Rendered, work, zero_gpu
from patchscaler.ui.state import Known, PageState, SessionCache, Settings, Shown, View, flag_of
from patchscaler.ui.tune import grouped

LOOK_SECONDS = 5  # an image whose analysis is expected to take longer waits for Run


@dataclass(frozen=True)
class Update:
    """What a run gives the page; `shown` goes with a new final picture."""

    view: View
    shown: Shown | None = None


class Runner:
    """Runs for the page and the API over one pipeline, and what they share: the session cache and the calibration."""

    def __init__(self, pipeline: PatchScalerPipeline, jobs: Jobs | None = None, lent: bool = True) -> None:
        """`lent`: on ZeroGPU, the pipeline is on a device that is asked for."""
        self.pipeline = pipeline
        self.jobs = jobs or Jobs()
        self.cache = SessionCache()
        self.calibration = Calibration(most_at_once(pipeline._execution_device))
        self.networks = Networks(pipeline, self.calibration, lent)
        self.examples: Sequence[str] = ()  # files that run as they are chosen
        self._runs, self._looks = Stops(), Stops()

    # Events of the page

    async def run(self, now: Settings, uniform: Any) -> AsyncIterator[View]:
        """Analyze if the image is new, then refine. Yields what to show as soon as it is there.

        A stopped run says so itself, last of all: what another event said could be overtaken by a view on its way.
        """
        order = replace(now.order(), uniform=flag_of("uniform", uniform))
        if not order.source:
            raise visible_error("No image", html.NO_IMAGE)
        with self._runs.of(now.session) as stop:
            now.page.source = order.source
            yield {"status": html.status("Waiting for the pipeline…"), "stop": gr.update(interactive=True)}
            shown = None
            async for update in self._stream(lambda: self._updates(order), stop):
                if update.shown:
                    shown = update.shown
                    if now.page.source == order.source:
                        now.page.shown = shown
                yield update.view
            if shown is None or not shown.complete or shown.uniform is None and uniform:
                yield {"status": html.status(_stopped(shown))}

    async def look(self, now: Settings) -> AsyncIterator[View]:
        """Analyze an image as it comes in, so that its groups and what a run costs are known; run an example."""
        now.page.source = now.source
        if now.source is None or now.page.shown:
            return
        if now.source in self.examples:
            async for view in self.run(now, False):
                yield view
            return
        order = now.order()
        with self._looks.of(now.session) as stop:
            async for update in self._stream(lambda: self._looked(order), stop):
                # A run that waits, or goes on already, has the status line.
                running = now.session in self._runs
                yield {name: value for name, value in update.view.items() if name != "status" or not running}
            if now.session not in self._runs and not stop.is_set():
                yield {"status": html.status("Press Run.")}

    async def _stream(self, job: Callable[[], Iterator[Update]], stop: Event) -> AsyncIterator[Update]:
        """A job's updates, of which the last says why it failed if it did."""
        try:
            async for update in self.jobs.stream(job, stop):
                yield update
        except Exception as error:
            visible = explain(error)
            yield Update({"status": html.status(f"{visible.title}: {visible.message}")})
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
        self, order: Order, picture: Picture | None = None
    ) -> Iterator[Analysis | Known | Progress | Partial | Result | Baseline]:
        """Analysis if it is a new one, Known, Progress of each step, Partial pictures, Result; then the baseline's.

        `picture` is the order's, where it is decoded already.
        """
        known, keep = self.cache.get(order.source), partial(self.cache.keep, order.session, order.source)
        rendered = self.cache.rendered(order.session, order.source) if known and order.live else None
        start = picture
        if known:
            yield known
            if not order.refine:
                return
            start = known.analysis.restored() if zero_gpu() else known.analysis  # there only what is needed is sent
        for event in self.fresh_events(order, start, rendered):
            match event:
                case Analysis():
                    yield event
                    event = Known(event, self.networks.draw_priors(event))
                    self.cache.put(order.source, event)
                case Partial() | Result() if order.live:
                    keep(sampled=event.sampled)
                case Baseline(Result() as uniform):
                    keep(uniform=uniform.sampled)
            yield event

    def fresh_events(
        self, order: Order, start: Picture | Restored | None = None, rendered: Rendered | None = None
    ) -> Iterator[Analysis | Progress | Partial | Result | Baseline]:
        """The same without Known: nothing is kept, and only what is given reused."""
        # A picture is decoded here: a bad one is refused before any device is asked for.
        return self.networks.run(order, read_picture(order.source) if start is None else start, rendered)

    def first_run(self, source: str) -> tuple[View, PageState]:
        """Run an example with the paper's plan, for the page to open with: what it shows and holds.

        Later runs are expected to take as long.
        """
        order = Order(source, SamplingPlan.paper(), 0, {})
        for _ in self.fresh_events(order):  # a process is slow at what it does first
            pass
        view = emptied(source)
        for update in self._updates(order):
            view |= update.view
        self.cache.open_with(source)
        shown, known = update.shown, self.cache.get(source)
        sides = closeup.SIDES[0], closeup.SIDES[2]
        center = closeup.middle(known.analysis.grid.patches[int(known.analysis.patch_confidence.argmin())])
        view |= {
            **grouped(known, order, self.cache, self.calibration),
            "compare": closeup.pair(known, shown, sides),
            "zoom": closeup.zoomed(known, shown, sides, closeup.ZOOMS[1], center),
            "note": "<p>An example is shown. Upload a photograph, or choose another example, to see its result.</p>",
        }
        return view, PageState(source, shown, center=center, opened=True)

    def _looked(self, order: Order) -> Iterator[Update]:
        """What can be said of an image before any run. Its groups too, unless that takes long."""
        picture = None
        if self.cache.get(order.source) is None:
            picture = read_picture(order.source)
            height, width = SCALE * picture.height, SCALE * picture.width
            count = len(PatchGrid.covering(height, width, self.pipeline.transformer.config.size))
            yield Update({"cost": html.unknown_cost(order.plan, count, width, height)})
            expected = self.calibration.analysis_seconds(height * width)
            if zero_gpu() or expected is None or expected > LOOK_SECONDS:
                return
        yield from self._updates(replace(order, refine=False), picture)

    def _updates(self, order: Order, picture: Picture | None = None) -> Iterator[Update]:
        began = time.perf_counter()
        plan, seed = order.plan, order.seed
        reused = self.cache.get(order.source) is not None
        shown, result, done = None, None, ""
        groups = partial(grouped, order=order, cache=self.cache, calibration=self.calibration)
        if not reused:
            yield Update({"status": html.status("Restoring the whole image…")})
        for event in self.events(order, picture):
            match event:
                case Analysis():
                    # The overlay before any run is known: what a run costs is said when there is a result to keep.
                    coarse = export.coarse_preview(event)
                    status = html.status("Drawing the texture priors…")
                    yield Update({"coarse": coarse, **groups(Known(event, None)), "status": status})
                case Known():
                    again = {}
                    analysis = event.analysis
                    if reused:
                        again = {"coarse": export.coarse_preview(analysis), **groups(event)}
                    else:
                        self.calibration.learn_analysis(analysis.coarse[0].numel(), sum(analysis.seconds.values()))
                    yield Update({**again, "priors": export.save_preview(event.priors, "priors")})
                    sampling = time.perf_counter()
                case Progress() | Baseline(Progress()):
                    uniform = isinstance(event, Baseline)
                    step = event.event if uniform else event
                    left = (time.perf_counter() - sampling) / step.done * (step.total - step.done)
                    yield Update({"status": html.status(html.step(step, left, uniform), step.done, step.total)})
                case Partial():
                    path = export.save_preview(to_pil(event.picture), "partial")
                    report = {"plan": asdict(plan), "seed": seed}
                    shown = Shown(order, event.sampled.start, event.sampled.steps, path, report)
                    yield Update({"final": path, "stale": html.unfinished(shown.refined, len(shown.start))}, shown)
                case Result():
                    result = event
                    path = export.save_final(result, order.source)
                    shown = Shown(order, result.sampled.start, result.sampled.steps, path, result.report())
                    self._learn(order, result, analysis)
                    anew, count = int(result.rendered.sum()), len(result.rendered)
                    done = (
                        f"Done in {time.perf_counter() - began:.1f} s with {html.describe(plan, seed)}. "
                        f"{anew} of {count} patches were rendered anew."
                    )
                    view = {
                        "final": path,
                        "timing": html.timing(result, reused),
                        "status": html.status(" ".join([done, *result.picture.notes])),
                        "stale": "",
                        "baseline": "",
                        "difference": gr.update(value=None, visible=False),
                    }
                    yield Update(view, shown)
                    sampling = time.perf_counter()  # of the baseline
                case Baseline(Result() as uniform):
                    path = export.save_final(uniform, order.source, "uniform")
                    self._learn(order, uniform, analysis, partial=False)
                    status = html.status(f"{done} The baseline is done too.")
                    view = {**self._baseline(order, result, uniform), "status": status}
                    yield Update(view, replace(shown, uniform=path))

    def _baseline(self, order: Order, result: Result, uniform: Result) -> View:
        """What uniform sampling costs more and how it looks different."""
        costs = []
        for run in (result, uniform):
            at_once = order.batch_size or self.calibration.at_once
            todo = work(None, run.plan, run.seed, run.assignment, at_once)
            # By rates, since either may have taken patches over.
            costs.append((todo.evaluations, self.calibration.seconds(todo.evaluations, 0, todo.calls)))
        image = closeup.difference(result.picture.rgb, uniform.picture.rgb)
        return {
            "baseline": html.baseline(*zip(*costs)),
            "difference": gr.update(value=export.save_preview(image, "difference"), visible=True),
        }

    def _learn(self, order: Order, result: Result, analysis: Analysis, partial: bool = True) -> None:
        """Have the calibration learn from a run's seconds of the device; `partial`: a picture was made of each group.

        What a visitor waited for the device, or a picture for the disk, is none of it.
        """
        groups = []
        for group in result.groups:
            batches = -(-group.evaluations // group.steps // (order.batch_size or self.calibration.at_once))
            groups.append(Call(batches * group.steps, group.evaluations, group.seconds))
        before = sum(analysis.seconds.values()) + result.seconds["refine"]
        rest = max(0.0, sum(result.seconds.values()) - before)
        pictures = max(1, sum(group.calls > 0 for group in groups)) if partial else 1
        self.calibration.learn(groups, result.picture.rgb[0].numel(), rest, pictures)


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


def _stopped(shown: Shown | None) -> str:
    if shown is None:
        return "Stopped before any group was finished. Press Run to start again."
    if shown.complete:
        return "Stopped. The picture is finished, the uniform baseline is not."
    return f"Stopped: {shown.refined} of {len(shown.start)} patches are refined. Press Run to render the others."
