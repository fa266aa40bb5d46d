"""Which event of the page calls what."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from functools import partial
from html import unescape
from typing import Any

import gradio as gr

from patchscaler.images import Picture, to_pil
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import closeup, export, html
from patchscaler.ui.batch import Batch, BatchView
from patchscaler.ui.html import explain, visible_error
from patchscaler.ui.jobs import Jobs, Stops
from patchscaler.ui.run import DialView, RunView, emptied
from patchscaler.ui.state import (
    SKIP,
    Settings,
    Shown,
    checked_batch,
    checked_choice,
    checked_flag,
    checked_plan,
    checked_source,
    plan_of,
    preset_of,
    whole_pictures,
)
from patchscaler.ui.tune import Tuning
from patchscaler.ui.zerogpu import Order


class Handlers(Tuning):
    """The events of one page over one pipeline.

    The page's `preprocess` is off: values arrive as the browser sent them, an image as Gradio's file data, since
    Gradio's own decoding loses alpha and 16-bit grey and answers bad files with an error that says nothing.
    """

    def __init__(self, pipeline: PatchScalerPipeline, jobs: Jobs | None = None) -> None:
        super().__init__(pipeline)
        self.jobs = jobs or Jobs()
        self._runs, self._looks = Stops(), Stops()

    async def run(self, request: gr.Request, uniform: bool, *settings: Any) -> AsyncIterator[RunView]:
        """Analyze if the image is new, then refine. Yields what to show as soon as it is there.

        A stopped run says so itself, last of all: what another event said could be overtaken by a view on its way.
        """
        now = Settings.of(*settings)
        source, (plan, seed) = checked_source(now.image), checked_plan(now.dials, now.seed)
        color_fix, uniform = checked_flag("color_fix", now.color_fix), checked_flag("uniform", uniform)
        order = Order(source, plan, seed, now.by_hand, color_fix, checked_batch(now.batch), uniform)
        with self._runs.of(request.session_hash) as stop:
            waiting = html.status("Waiting for the pipeline…")
            yield RunView(status=waiting, source=source, stop=gr.update(interactive=True))
            done, shown = False, None
            try:
                async for view in self.jobs.stream(lambda: self._views(order), stop):
                    if view.shown is not SKIP:
                        shown = view.shown
                        done = shown.complete
                    yield view
                if not done or shown.uniform is None and uniform:
                    yield RunView(status=html.status(_stopped(shown)))
            except Exception as error:
                visible = explain(error)
                yield RunView(status=_failed(visible))
                raise visible from error

    async def look(self, request: gr.Request, *settings: Any) -> AsyncIterator[RunView]:
        """Analyze an image as it comes in, so that its groups and what a run costs are known before the run."""
        now = Settings.of(*settings)
        yield RunView(source=now.source)
        if now.source is None or not now.usable:
            return
        order = Order(now.source, now.plan, now.seed, now.by_hand, now.color_fix, now.batch_size)
        with self._looks.of(request.session_hash) as stop:
            try:
                async for view in self.jobs.stream(lambda: self.looked(order), stop):
                    # A run that waits, or goes on already, has the status line.
                    yield view._replace(status=SKIP) if request.session_hash in self._runs else view
                if request.session_hash not in self._runs and not stop.is_set():
                    yield RunView(status=html.status("Press Run."))
            except Exception as error:
                visible = explain(error)
                yield RunView(status=_failed(visible))
                raise visible from error

    def stop(self, request: gr.Request) -> None:
        """Have the visitor's run stop at its next step."""
        self._runs.stop(request.session_hash)

    def new_image(self, request: gr.Request, image: dict | None) -> tuple:
        """Stop the run and empty the page when another image comes in, or none.

        Gives a RunView, and preset, dials, seed and colour fix: an image that the page once made restores its own.
        """
        for stops in (self._runs, self._looks):
            stops.stop(request.session_hash)
        source = (image or {}).get("path")
        found = export.made_with(source) if source else None
        if found is None:
            return *emptied(image), *(SKIP,) * 11
        view = emptied(image)._replace(note=f"<p>{found.said}</p>")
        if found.dials is None:
            return *view, *(SKIP,) * 11
        return *view, preset_of(plan_of(found.dials)), *found.dials, found.seed, found.color_fix

    def settle(self, image: dict | None, source: str | None) -> RunView:
        """After a run: empty the page again if the run's last pictures came in behind another image."""
        return RunView() if source == (image or {}).get("path") else emptied(image)

    def refresh(self, request: gr.Request, *settings: Any) -> tuple:
        """After a run: the same for what moved while it went on; and nothing is left to stop but a later run."""
        return *self.regrouped(*settings), gr.update(interactive=request.session_hash in self._runs)

    async def inspected(self, patch: tuple[str, int] | None) -> str:
        """The priors of a clicked patch. Their decoding waits for its turn behind the runs."""
        study = self.studies.get(patch[0]) if patch else None
        if study is None:
            return ""
        index, priors = patch[1], study.analysis.priors
        if index not in study.prior_images:
            async for images in self.jobs.stream(lambda: self.networks.run(priors.values[index])):
                study.prior_images[index] = [to_pil(Picture(values)) for values in images]
        coarse = closeup.patch_coarse(study, index)
        return html.priors(coarse, study.prior_images[index], priors.similarities[index].tolist())

    @whole_pictures()
    def compared(self, image: dict | None, shown: Shown | None, left: str, right: str) -> Any:
        """Two whole pictures for the slider."""
        sides = checked_choice("left", left, closeup.SIDES), checked_choice("right", right, closeup.SIDES)
        study = self.studies.get((image or {}).get("path"))
        return closeup.pair(study, shown, sides) if study else None

    @whole_pictures()
    def zoomed(self, image: dict | None, shown: Shown | None, left: str, right: str, zoom: str, center: Any) -> Any:
        """The same crop of both."""
        sides = checked_choice("left", left, closeup.SIDES), checked_choice("right", right, closeup.SIDES)
        zoom = checked_choice("zoom", zoom, closeup.ZOOMS)
        study = self.studies.get((image or {}).get("path"))
        return closeup.zoomed(study, shown, sides, zoom, center) if study else None

    @staticmethod
    def centered(event: gr.SelectData) -> Any:
        """The place of a click on a panel that shows the picture in its full size."""
        return event.index

    @staticmethod
    def new_seed() -> int:
        return secrets.randbelow(2**31)

    @whole_pictures()
    def packed(self, image: dict | None, shown: Shown | None) -> Any:
        """The ZIP of all stages of the final picture."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or shown is None or not shown.final.is_file():
            raise visible_error("Nothing to pack", "Run first: there is no final picture, or it is too old.")
        return gr.update(value=str(export.stages_zip(study, shown)), visible=True)

    @staticmethod
    def linked(query: Any) -> tuple:
        """Preset, dials, seed, colour fix, baseline and patch batch from the page's address."""
        link = export.restored(query if isinstance(query, str) else "")
        return (SKIP,) * 13 if link is None else (preset_of(plan_of(link.dials)), *link.dials, *link[1:])

    def seams(self, image: dict | None, on: bool) -> str:
        """The borders of all patches, over every panel that shows the whole picture."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or not on:
            return ""
        height, width = study.analysis.coarse.shape[-2:]
        return html.seams(study.analysis.grid, width, height)


def _failed(error: gr.Error) -> str:
    return html.status(f"{error.title}: {unescape(error.message)}")


def _stopped(shown: Shown | None) -> str:
    if shown is None:
        return "Stopped before any group was finished. Press Run to start again."
    if shown.complete:
        return "Stopped. The picture is finished, the uniform baseline is not."
    refined = int((shown.start > 0).sum())
    return f"Stopped: {refined} of {len(shown.start)} patches are refined. Press Run to render the others."


WAITING = 16  # runs that may wait their turn: `Jobs` lets one work at a time
# Answered beside the queue, so that a full one never freezes the dials, and the last value of a drag counts.
LIVE: dict[str, Any] = {
    "queue": False,
    "preprocess": False,
    "trigger_mode": "always_last",
    "show_progress": "hidden",
    "api_visibility": "private",
}
QUEUED: dict[str, Any] = {
    "preprocess": False,
    "show_progress": "hidden",  # the status line tells more, and the panel shows what is finished
    "concurrency_id": "pipeline",
    "concurrency_limit": WAITING,
    "api_visibility": "private",
}


def wire(handlers: Handlers, page: dict[str, Any], tab: dict[str, Any]) -> None:
    """`page` has the controls and the outputs, and `tab` the parts of the tab for several images, by name."""
    image, shown, dials = page["image"], page["shown"], page["dials"]
    settings = [image, shown, page["by_hand"], page["color_fix"], page["batch"], *dials]
    run_outputs = [page[name] for name in RunView._fields]
    dial_outputs = [*dials[:8], *(page[name] for name in DialView._fields[1:])]
    sides = [image, shown, page["left"], page["right"]]
    zoomed = [*sides, page["factor"], page["center"]]

    # Runs.
    running = page["run"].click(handlers.run, [page["uniform"], *settings], run_outputs, **QUEUED)
    restored = [page["preset"], *dials, page["color_fix"]]
    emptied = image.change(handlers.new_image, image, [*run_outputs, *restored], **LIVE)
    looking = emptied.then(handlers.look, settings, run_outputs, **QUEUED)
    page["stop"].click(handlers.stop, None, None, **LIVE)
    ended = []  # events that follow each, when the page is up to date again
    for event, refresh, outputs in (
        (running, handlers.refresh, [*dial_outputs, page["stop"]]),
        (looking, handlers.regrouped, dial_outputs),  # a run may go on already, so this leaves Stop alone
    ):
        settled = event.then(handlers.settle, [image, page["source"]], run_outputs, **LIVE)
        ended.append(settled.then(refresh, settings, outputs, **LIVE).then)

    # Dials.
    for place, dial in enumerate(dials):
        dial.input(partial(handlers.dial_moved, place), settings, dial_outputs, **LIVE)
    page["preset"].input(handlers.preset_chosen, [page["preset"], *settings], dial_outputs, **LIVE)
    page["color_fix"].input(handlers.regrouped, settings, dial_outputs, **LIVE)
    page["batch"].input(handlers.regrouped, settings, dial_outputs, **LIVE)
    rolled = page["dice"].click(handlers.new_seed, None, dials[8], **LIVE)
    rolled.then(handlers.regrouped, settings, dial_outputs, **LIVE)
    for event in ended:
        event(handlers.budget_known, settings, page["budget"], **LIVE)
    page["budget"].input(handlers.budget_set, [page["budget"], *settings], dial_outputs, **LIVE)

    # Patches by hand, and one patch closely.
    names = ("facts", "inspector", "patch", "center", "by_hand", "number")
    picked_outputs = [*(page[name] for name in names), *dial_outputs]
    for event, handler, first in (
        (page["qmap"].select, handlers.clicked, []),
        (page["number"].input, handlers.numbered, [page["number"]]),
    ):
        picked = event(handler, [*first, page["mode"], *settings], picked_outputs, **LIVE)
        picked.then(handlers.inspected, page["patch"], page["inspected"], **LIVE)
        picked.then(handlers.zoomed, zoomed, page["zoom"], **LIVE)
    stroke = [page["stroke"], page["mode"], *settings]
    drawn = "(_, ...others) => [window.patchscalerStroke, ...others]"
    page["stroke"].click(handlers.brushed, stroke, [page["by_hand"], *dial_outputs], js=drawn, **LIVE)
    page["reset"].click(handlers.reset_by_hand, settings, [page["by_hand"], *dial_outputs], **LIVE)

    # Looking closely.
    for event in (*ended, page["left"].input, page["right"].input):
        event(handlers.compared, sides, page["compare"], **LIVE)
        event(handlers.zoomed, zoomed, page["zoom"], **LIVE)
    page["factor"].input(handlers.zoomed, zoomed, page["zoom"], **LIVE)
    for panel in ("coarse", "final"):
        moved = page[panel].select(handlers.centered, None, page["center"], **LIVE)
        moved.then(handlers.zoomed, zoomed, page["zoom"], **LIVE)
    for event in (*ended, page["seams"].input):
        event(handlers.seams, [image, page["seams"]], page["grid"], **LIVE)

    # What to take home.
    page["pack"].click(handlers.packed, [image, shown], page["zip"], **LIVE)
    linked = [*dials, page["color_fix"], page["uniform"], page["batch"]]
    for component in linked:
        component.change(None, linked, None, js=export.LINK, **LIVE)

    # Several images.
    batch = Batch(handlers)
    batch_outputs = [tab[name] for name in BatchView._fields]
    tab["run"].click(batch.run_all, [tab["files"], *settings], batch_outputs, **QUEUED)
    tab["stop"].click(batch.stop_all, None, None, **LIVE)
