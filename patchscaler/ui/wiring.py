"""Which event of the page calls which handler."""

from __future__ import annotations

from functools import partial
from typing import Any

from patchscaler.ui import takehome
from patchscaler.ui.batch import Batch, BatchView
from patchscaler.ui.handlers import Handlers
from patchscaler.ui.views import DialView, RunView

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
        component.change(None, linked, None, js=takehome.LINK, **LIVE)

    # Several images.
    batch = Batch(handlers)
    batch_outputs = [tab[name] for name in BatchView._fields]
    tab["run"].click(batch.run_all, [tab["files"], *settings], batch_outputs, **QUEUED)
    tab["stop"].click(batch.stop_all, None, None, **LIVE)
