"""What happens when a visitor does something: the work behind the page's events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from html import unescape
from typing import Any

import gradio as gr

from patchscaler.images import Picture, to_pil
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import compare, fragments, takehome
from patchscaler.ui.dials import plan_of, preset_of
from patchscaler.ui.errors import explain, visible_error
from patchscaler.ui.gpu import Order
from patchscaler.ui.jobs import Jobs, Stops
from patchscaler.ui.settings import (
    Settings,
    checked_batch,
    checked_choice,
    checked_flag,
    checked_plan,
    checked_source,
)
from patchscaler.ui.studies import whole_pictures
from patchscaler.ui.tuning import Tuning
from patchscaler.ui.views import SKIP, RunView, Shown, emptied


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
            waiting = fragments.status("Waiting for the pipeline…")
            yield RunView(status=waiting, source=source, stop=gr.update(interactive=True))
            done, shown = False, None
            try:
                async for view in self.jobs.stream(lambda: self._views(order), stop):
                    if view.shown is not SKIP:
                        shown = view.shown
                        done = shown.complete
                    yield view
                if not done or shown.uniform is None and uniform:
                    yield RunView(status=fragments.status(_stopped(shown)))
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
                    yield RunView(status=fragments.status("Press Run."))
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
        found = takehome.made_with(source) if source else None
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
        coarse = compare.patch_coarse(study, index)
        return fragments.priors(coarse, study.prior_images[index], priors.similarities[index].tolist())

    @whole_pictures()
    def compared(self, image: dict | None, shown: Shown | None, left: str, right: str) -> Any:
        """Two whole pictures for the slider."""
        sides = checked_choice("left", left, compare.SIDES), checked_choice("right", right, compare.SIDES)
        study = self.studies.get((image or {}).get("path"))
        return compare.pair(study, shown, sides) if study else None

    @whole_pictures()
    def zoomed(self, image: dict | None, shown: Shown | None, left: str, right: str, zoom: str, center: Any) -> Any:
        """The same crop of both."""
        sides = checked_choice("left", left, compare.SIDES), checked_choice("right", right, compare.SIDES)
        zoom = checked_choice("zoom", zoom, compare.ZOOMS)
        study = self.studies.get((image or {}).get("path"))
        return compare.zoomed(study, shown, sides, zoom, center) if study else None

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
        return gr.update(value=str(takehome.stages_zip(study, shown)), visible=True)

    @staticmethod
    def linked(query: Any) -> tuple:
        """Preset, dials, seed, colour fix, baseline and patch batch from the page's address."""
        link = takehome.restored(query if isinstance(query, str) else "")
        return (SKIP,) * 13 if link is None else (preset_of(plan_of(link.dials)), *link.dials, *link[1:])

    def seams(self, image: dict | None, on: bool) -> str:
        """The borders of all patches, over every panel that shows the whole picture."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or not on:
            return ""
        height, width = study.analysis.coarse.shape[-2:]
        return fragments.seams(study.analysis.grid, width, height)


def _failed(error: gr.Error) -> str:
    return fragments.status(f"{error.title}: {unescape(error.message)}")


def _stopped(shown: Shown | None) -> str:
    if shown is None:
        return "Stopped before any group was finished. Press Run to start again."
    if shown.complete:
        return "Stopped. The picture is finished, the uniform baseline is not."
    refined = int((shown.start > 0).sum())
    return f"Stopped: {refined} of {len(shown.start)} patches are refined. Press Run to render the others."
