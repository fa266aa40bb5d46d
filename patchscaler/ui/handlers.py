"""What happens when a visitor does something: the work behind the page's events."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from html import unescape
from threading import Event
from typing import Any

import gradio as gr

from patchscaler.grouping import GROUPS, PRESETS, SamplingPlan
from patchscaler.images import Picture, to_pil
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import compare, fragments, takehome
from patchscaler.ui.budget import thresholds_within
from patchscaler.ui.dials import dials_of, hold_order, in_range, plan_of, preset_of, seed_of
from patchscaler.ui.errors import explain, visible_error
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.runs import Order, Runs
from patchscaler.ui.views import SKIP, ByHand, DialView, RunView, Shown, emptied, grouping, stale

MAX_BATCH = 256  # patches at once


class Handlers(Runs):
    """The events of one page over one pipeline.

    The page's `preprocess` is off: values arrive as the browser sent them, an image as Gradio's file data, since
    Gradio's own decoding loses alpha and 16-bit grey and answers bad files with an error that says nothing.
    """

    def __init__(self, pipeline: PatchScalerPipeline, jobs: Jobs | None = None) -> None:
        super().__init__(pipeline)
        self.jobs = jobs or Jobs()
        self._stops: dict[str | None, Event] = {}  # by the visitor's session

    async def run(
        self,
        request: gr.Request,
        image: dict | None,
        by_hand: ByHand,
        color_fix: bool,
        batch_size: Any,
        uniform: bool,
        *dials: Any,
    ) -> AsyncIterator[RunView]:
        """Analyze if the image is new, then refine. Yields what to show as soon as it is there.

        A stopped run says so itself, last of all: what another event said could be overtaken by a view on its way.
        """
        source, plan, seed = _request(image, dials)
        order = Order(source, plan, seed, by_hand, color_fix, _batch_size(batch_size), uniform)
        stop = self._stops[request.session_hash] = Event()
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
            yield RunView(status=fragments.status(f"{visible.title}: {unescape(visible.message)}"))
            raise visible from error
        finally:
            if self._stops.get(request.session_hash) is stop:
                del self._stops[request.session_hash]

    def stop(self, request: gr.Request) -> None:
        """Have the visitor's run stop at its next step."""
        if request.session_hash in self._stops:
            self._stops[request.session_hash].set()

    def new_image(self, request: gr.Request, image: dict | None) -> RunView:
        """Stop the run and empty the page when another image comes in, or none."""
        self.stop(request)
        return emptied(image)

    def settle(self, image: dict | None, source: str | None) -> RunView:
        """After a run: empty the page again if the run's last pictures came in behind another image."""
        return RunView() if source == (image or {}).get("path") else emptied(image)

    def dial_moved(
        self, moved: int, image: dict | None, shown: Shown | None, by_hand: ByHand, color_fix: bool, *dials: Any
    ) -> tuple:
        """Hold the dials' order and group anew. No network runs. `moved` is the dial's place; 8 is the seed."""
        if not in_range(dials[:8]):
            return DialView(stale=SKIP).flat()
        held = hold_order(dials[:8], moved)
        updates = tuple(SKIP if new == old else new for new, old in zip(held, dials[:8]))
        view = self._regroup(image, shown, by_hand, color_fix, held, dials[8])
        return view._replace(dials=updates, preset=preset_of(plan_of(held))).flat()

    def preset_chosen(
        self, preset: str, image: dict | None, shown: Shown | None, by_hand: ByHand, color_fix: bool, *dials: Any
    ) -> tuple:
        """Set the dials to the preset's plan; `custom` leaves them where they are."""
        values = dials_of(PRESETS[preset]) if preset in PRESETS else dials[:8]
        return self._regroup(image, shown, by_hand, color_fix, values, dials[8])._replace(dials=values).flat()

    def regrouped(
        self, image: dict | None, shown: Shown | None, by_hand: ByHand, color_fix: bool, *dials: Any
    ) -> tuple:
        """Bring groups, cost and the stale mark up to the settings."""
        return self._regroup(image, shown, by_hand, color_fix, dials[:8], dials[8]).flat()

    def refresh(self, *settings: Any) -> tuple:
        """After a run: the same for what moved while it went on; and nothing is left to stop."""
        return *self.regrouped(*settings), gr.update(interactive=False)

    def reset_by_hand(self, image: dict | None, shown: Shown | None, color_fix: bool, *dials: Any) -> tuple:
        """Give every patch the group of its confidence again."""
        return {}, *self.regrouped(image, shown, {}, color_fix, *dials)

    def clicked(
        self,
        event: gr.SelectData,
        mode: str,
        image: dict | None,
        shown: Shown | None,
        by_hand: ByHand,
        color_fix: bool,
        *dials: Any,
    ) -> tuple:
        """A click on the Qmap: inspect the patch there, or first put it into the group that `mode` names.

        Gives the inspector, the patch's index, the place in the picture, the groups set by hand, and a DialView.
        """
        source = (image or {}).get("path")
        study = self.studies.get(source)
        if study is None or not in_range(dials[:8]):
            return (SKIP,) * 4 + DialView(stale=SKIP).flat()
        center = compare.clicked(study, event.index, "qmap")
        index = study.analysis.grid.nearest(*center).index
        view = DialView(stale=SKIP)
        if mode in GROUPS:
            by_hand = {**by_hand, index: GROUPS.index(mode)}
            view = self._regroup(image, shown, by_hand, color_fix, dials[:8], dials[8])
        facts = compare.patch_facts(study, shown, index, plan_of(dials[:8]), by_hand)
        return facts, (source, index), center, by_hand, *view.flat()

    async def inspected(self, patch: tuple[str, int] | None) -> str:
        """The priors of a clicked patch. Their decoding waits for its turn behind the runs."""
        study = self.studies.get(patch[0]) if patch else None
        if study is None:
            return ""
        index, priors = patch[1], study.analysis.priors
        if index not in study.prior_images:
            async for images in self.jobs.stream(lambda: self.networks.run(priors.values[index])):
                study.prior_images[index] = [to_pil(Picture(values)) for values in images]
        return fragments.priors(study.prior_images[index], priors.similarities[index].tolist())

    def compared(self, image: dict | None, shown: Shown | None, left: str, right: str) -> Any:
        """Two whole pictures for the slider."""
        study = self.studies.get((image or {}).get("path"))
        return compare.pair(study, shown, (left, right)) if study else None

    def zoomed(self, image: dict | None, shown: Shown | None, left: str, right: str, zoom: str, center: Any) -> Any:
        """The same crop of both."""
        study = self.studies.get((image or {}).get("path"))
        return compare.zoomed(study, shown, (left, right), zoom, center) if study else None

    @staticmethod
    def centered(event: gr.SelectData) -> Any:
        """The place of a click on a panel that shows the picture in its full size."""
        return event.index

    @staticmethod
    def new_seed() -> int:
        return secrets.randbelow(2**31)

    def budget_known(self, image: dict | None, by_hand: ByHand, *dials: Any) -> Any:
        """The budget's slider from the cheapest run to the dearest, once it is known what a run takes."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or not in_range(dials[:8]):
            return SKIP
        plan, confidence = plan_of(dials[:8]), study.analysis.patch_confidence
        pixels, count = study.analysis.coarse[0].numel(), len(confidence)
        ends = [self.calibration.seconds(count * plan.steps[group], pixels) for group in (0, 2)]
        if None in ends:
            return SKIP
        return gr.update(minimum=round(ends[0], 1), maximum=round(ends[1] + 0.1, 1), interactive=True)

    def budget_set(
        self,
        seconds: Any,
        image: dict | None,
        shown: Shown | None,
        by_hand: ByHand,
        color_fix: bool,
        *dials: Any,
    ) -> tuple:
        """Move both thresholds so that a run of all patches is expected to take at most so many seconds."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or not in_range(dials[:8]) or not isinstance(seconds, (int, float)):
            return DialView(stale=SKIP).flat()
        analysis = study.analysis
        evaluations = self.calibration.evaluations(seconds, analysis.coarse[0].numel())
        if evaluations is None:
            return DialView(stale=SKIP).flat()
        gammas = thresholds_within(analysis.patch_confidence, plan_of(dials[:8]), evaluations, by_hand)
        values = (*gammas, *dials[2:8])
        view = self._regroup(image, shown, by_hand, color_fix, values, dials[8])
        return view._replace(dials=values, preset=preset_of(plan_of(values))).flat()

    def packed(self, image: dict | None, shown: Shown | None) -> Any:
        """The ZIP of all stages of the final picture."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or shown is None or not shown.final.is_file():
            raise visible_error("Nothing to pack", "Run first: there is no final picture, or it is too old.")
        return gr.update(value=str(takehome.stages_zip(study, shown)), visible=True)

    @staticmethod
    def linked(query: str) -> tuple:
        """Preset and dials from the page's address."""
        dials = takehome.restored(query or "")
        return (SKIP,) * 10 if dials is None else (preset_of(plan_of(dials[:8])), *dials)

    def seams(self, image: dict | None, on: bool) -> str:
        """The borders of all patches, over every panel that shows the whole picture."""
        study = self.studies.get((image or {}).get("path"))
        if study is None or not on:
            return ""
        height, width = study.analysis.coarse.shape[-2:]
        return fragments.seams(study.analysis.grid, width, height)

    def _regroup(
        self, image: dict | None, shown: Shown | None, by_hand: ByHand, color_fix: bool, dials: Any, seed: Any
    ) -> DialView:
        source = (image or {}).get("path")
        study = self.studies.get(source)
        if study is None:
            return DialView()
        if not in_range(dials):
            return DialView(stale=SKIP)
        plan = plan_of(dials)
        return DialView(
            **grouping(study, plan, seed, by_hand, self.calibration),
            stale=stale(study.analysis, shown, source, plan, seed, by_hand, color_fix),
        )


def _stopped(shown: Shown | None) -> str:
    if shown is None:
        return "Stopped before any group was finished. Press Run to start again."
    if shown.complete:
        return "Stopped. The picture is finished, the uniform baseline is not."
    refined = int((shown.start > 0).sum())
    return f"Stopped: {refined} of {len(shown.start)} patches are refined. Press Run to render the others."


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


def _batch_size(value: Any) -> int:
    """Patches at once, from the page's field."""
    if not isinstance(value, (int, float)) or not 1 <= value <= MAX_BATCH or value != int(value):
        raise visible_error(
            "These settings do not work", f"patch batch {value!r} is not a whole number from 1 to {MAX_BATCH}"
        )
    return int(value)
