"""What a visitor does, as calls of the page's handlers, and what the page then shows."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from patchscaler.ui.events import Handlers
from patchscaler.ui.run import DialView, RunView
from patchscaler.ui.state import SKIP

VISITOR = gr.Request(session_hash="visitor")


def settings(
    image: dict | None,
    dials: tuple,
    shown: Any = None,
    by_hand: dict | None = None,
    color_fix: bool = True,
    batch: Any = None,
) -> tuple:
    """Everything that the page's events are given, in its order."""
    return image, shown, by_hand or {}, color_fix, batch, *dials


def run(handlers: Handlers, image: dict | None, dials: tuple, uniform: bool = False, **others: Any) -> list[RunView]:
    """All views of a run."""

    async def collect() -> list[RunView]:
        return [view async for view in handlers.run(VISITOR, uniform, *settings(image, dials, **others))]

    return asyncio.run(collect())


def last(views: list, name: str) -> Any:
    """What the page shows there in the end."""
    return next(value for view in reversed(views) if (value := getattr(view, name)) is not SKIP)


def dial_view(values: tuple) -> dict[str, Any]:
    """The outputs of a moved dial by name."""
    return dict(zip(DialView._fields, (values[:8], *values[8:])))


def moved(handlers: Handlers, image: dict | None, shown: Any, dials: tuple, place: int = 0) -> dict[str, Any]:
    return dial_view(handlers.dial_moved(place, *settings(image, dials, shown)))


PICKED = ("facts", "inspector", "patch", "center", "by_hand", "number")


def click(
    handlers: Handlers, image: dict, shown: Any, dials: tuple, at: tuple, mode: str = "inspect", **others: Any
) -> dict[str, Any]:
    """A click on the Qmap: its outputs by name, and under "view" those of a moved dial."""
    event = gr.SelectData(None, {"index": at, "value": None})
    values = handlers.clicked(event, mode, *settings(image, dials, shown, **others))
    return {**dict(zip(PICKED, values)), "view": dial_view(values[len(PICKED) :])}
