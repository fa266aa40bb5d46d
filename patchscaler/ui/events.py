"""What calls what: every event of the page, in one place.

A handler is given the Settings, after these the values of the components named in `own`, and gives what to show by the
names of components, of which any in `outputs` may be left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from inspect import isasyncgenfunction
from typing import Any

import gradio as gr
from gradio.events import Dependency

from patchscaler.ui import export
from patchscaler.ui.batch import Batch
from patchscaler.ui.closeup import Closeups
from patchscaler.ui.html import explain
from patchscaler.ui.run import Runner
from patchscaler.ui.state import DIALS, Settings, View

WAITING = 16  # runs that may wait their turn: `Jobs` lets one work at a time, except on ZeroGPU
SETTINGS = ("state", "input", "color-fix", "batch", *DIALS)  # in the order of `Settings.of`
GROUPING = ("qmap", "legend", "cost", "stale", "histogram")
TUNED = (*DIALS, "preset", *GROUPING)
PICTURES = ("coarse", "priors", "final", "timing", "baseline", "difference", "compare", "zoom")
PATCH = ("facts", "inspector", "inspected")
RUN = (*PICTURES, *GROUPING, *PATCH, "status", "run", "stop", "note")
BATCH = ("batch-status", "outcomes", "gallery", "batch-zip", "stop-all")
LINK = (*DIALS, "color-fix", "uniform", "batch")

# Answered outside the queue, so that a full one never freezes the dials, and the last value of a drag counts.
LIVE: dict[str, Any] = {
    "queue": False,
    "preprocess": False,
    "trigger_mode": "always_last",
    "show_progress": "hidden",
    "api_visibility": "private",
}
# Runs of the page and calls of the API wait together.
HEAVY: dict[str, Any] = {"concurrency_id": "pipeline", "concurrency_limit": WAITING}
QUEUED: dict[str, Any] = {
    **HEAVY,
    "preprocess": False,
    "show_progress": "hidden",  # the status line tells more, and the panel shows what is finished
    "api_visibility": "private",
}


def connect(blocks: gr.Blocks, page: dict[str, Any], runner: Runner) -> None:
    """Connect the components of `page`, by name, with what they call."""
    tuner = runner.tuner
    closeups = Closeups(runner.cache, runner.networks.prior_images)
    batch = Batch(runner)

    def on(
        event: Callable,
        handler: Callable,
        outputs: Sequence[str] = (),
        own: Sequence[str] = (),
        how: dict[str, Any] = LIVE,
        js: str | None = None,
        at: bool = False,
    ) -> Dependency:
        """`js` gives the inputs in place of the browser; `at`: the handler is given the place of a click first."""
        call = _called(handler, page, len(own), at)
        inputs = [page[name] for name in (*own, *SETTINGS)]
        return event(call, inputs, [page[name] for name in outputs], js=js, **how)

    # Runs, and what follows when they are over and the page is up to date again.
    running = on(page["run"].click, runner.run, RUN, own=["uniform"], how=QUEUED)
    on(page["stop"].click, runner.stop)
    emptied = on(page["input"].change, runner.new_image, (*RUN, *DIALS, "preset", "color-fix"))
    looking = on(emptied.then, runner.look, RUN, how=QUEUED)
    for event in (running, looking):
        settled = on(event.then, runner.settle, RUN)
        regrouped = on(settled.then, tuner.regrouped, TUNED)
        on(regrouped.then, tuner.budget_known, ["budget"])
        on(regrouped.then, closeups.compared, ["compare", "no-side"], own=["left", "right"])
        on(regrouped.then, closeups.zoomed, ["zoom"], own=["left", "right", "factor"])
        on(regrouped.then, closeups.seams, ["grid"], own=["seams"])

    # Dials.
    for place, name in enumerate(DIALS):
        on(page[name].input, partial(tuner.dial_moved, moved=place), TUNED)
        if name != "seed":
            on(page[name].release, partial(tuner.dial_left, moved=place), TUNED)
    on(page["preset"].input, tuner.preset_chosen, TUNED, own=["preset"])
    on(page["color-fix"].input, tuner.regrouped, TUNED)
    on(page["batch"].input, tuner.regrouped, TUNED)
    on(page["dice"].click, tuner.new_seed, TUNED)
    on(page["budget"].input, tuner.budget_set, TUNED, own=["budget"])

    # Patches by hand, and one patch closely.
    picking = ("facts", "inspector", "number", *TUNED)
    for selected in (
        on(page["qmap"].select, tuner.clicked, picking, own=["mode"], at=True),
        on(page["number"].input, tuner.numbered, picking, own=["number", "mode"]),
    ):
        on(selected.then, closeups.inspected, ["inspected"])
        on(selected.then, closeups.zoomed, ["zoom"], own=["left", "right", "factor"])
    stroke = "(_, ...others) => [window.patchscalerStroke, ...others]"
    on(page["stroke"].click, tuner.brushed, TUNED, own=["stroke", "mode"], js=stroke)
    on(page["reset"].click, tuner.reset_by_hand, TUNED)

    # Looking closely.
    for side in ("left", "right"):
        on(page[side].input, closeups.compared, ["compare", "no-side"], own=["left", "right"])
        on(page[side].input, closeups.zoomed, ["zoom"], own=["left", "right", "factor"])
    on(page["factor"].input, closeups.zoomed, ["zoom"], own=["left", "right", "factor"])
    for panel in ("coarse", "final"):
        moved = on(page[panel].select, closeups.centered, at=True)
        on(moved.then, closeups.zoomed, ["zoom"], own=["left", "right", "factor"])
    on(page["seams"].input, closeups.seams, ["grid"], own=["seams"])

    # Export, and links that restore the settings.
    on(page["pack"].click, partial(export.packed, runner.cache), ["zip"])
    for name in LINK:
        page[name].change(None, [page[name] for name in LINK], None, js=export.LINK, **LIVE)
    query = "(_, ...others) => [window.location.search, ...others]"
    linked = on(blocks.load, export.linked, (*LINK, "preset", "note"), own=["query"], js=query)
    regrouped = on(linked.then, tuner.regrouped, TUNED)
    on(regrouped.then, tuner.budget_known, ["budget"])

    # Several images.
    on(page["run-all"].click, batch.run_all, BATCH, own=["files"], how=QUEUED)
    on(page["stop-all"].click, batch.stop_all)


def _called(handler: Callable, page: dict[str, Any], own: int, at: bool) -> Callable:
    """`handler` as Gradio calls it: with the request, `own` values and the settings, and giving values by component."""

    def settings(request: gr.Request, values: Sequence[Any]) -> Settings:
        return Settings.of(request.session_hash, *values[own:])

    def by_component(view: View | None) -> Any:
        if view is None:  # of a handler without outputs
            return None
        return {page[name]: value for name, value in view.items()} or gr.skip()

    async def stream(request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        view = None
        with _errors_as_html():
            async for view in handler(settings(request, values), *values[:own]):
                yield by_component(view)
        if view is None:  # Gradio takes the end of a generator that gave nothing for None in every output
            yield gr.skip()

    def select(event: gr.SelectData, request: gr.Request, *values: Any) -> Any:
        with _errors_as_html():
            return by_component(handler(settings(request, values), event.index, *values[:own]))

    def call(request: gr.Request, *values: Any) -> Any:
        with _errors_as_html():
            return by_component(handler(settings(request, values), *values[:own]))

    wrapped = stream if isasyncgenfunction(handler) else select if at else call
    wrapped.__name__ = getattr(handler, "__name__", None) or handler.func.__name__
    return wrapped


@contextmanager
def _errors_as_html() -> Iterator[None]:
    """Errors of this block as the page shows them: with the title in the text, as Gradio's toasts show no other."""
    try:
        yield
    except Exception as error:
        plain = explain(error)
        raise gr.Error(escape(f"{plain.title}: {plain.message}"), print_exception=False) from error
