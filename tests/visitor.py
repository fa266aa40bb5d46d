"""What a visitor does, as calls of the page's handlers, and what the page then shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from patchscaler.ui.closeup import Closeups
from patchscaler.ui.run import Runner
from patchscaler.ui.state import PageState, Settings, Shown, View


def settings(
    image: dict | None,
    dials: tuple,
    shown: Shown | None = None,
    by_hand: dict | None = None,
    color_fix: bool = True,
    batch: Any = None,
    session: str = "visitor",
) -> Settings:
    """Everything that the page's events are given."""
    page = PageState((image or {}).get("path"), shown, by_hand or {})
    return Settings.of(session, page, image, color_fix, batch, *dials)


def closeups(runner: Runner) -> Closeups:
    return Closeups(runner.cache, runner.networks.prior_images)


def run(runner: Runner, image: dict | None, dials: tuple, uniform: bool = False, **others: Any) -> list[View]:
    """All views of a run, each with what the page holds of the final picture then, as "shown"."""
    return collected(lambda now: runner.run(now, uniform), settings(image, dials, **others))


def collected(
    event: Callable[[Settings], AsyncIterator[View]], now: Settings, then: Callable[[View], None] = lambda view: None
) -> list[View]:
    """All views of an event, each with what the page holds then; `then` is called after each."""

    async def collect() -> list[View]:
        views = []
        async for view in event(now):
            views.append({**view, "shown": now.page.shown})
            then(view)
        return views

    return asyncio.run(collect())


def last(views: list[View], name: str) -> Any:
    """What the page shows there in the end."""
    return next(view[name] for view in reversed(views) if name in view)


def moved(runner: Runner, image: dict | None, shown: Shown | None, dials: tuple, place: int = 0) -> View:
    return runner.tuner.dial_moved(settings(image, dials, shown), place)


def click(
    runner: Runner, image: dict, shown: Shown | None, dials: tuple, at: tuple, mode: str = "inspect", **others: Any
) -> tuple[View, PageState]:
    """A click on the Qmap: what is shown, and what the page then holds."""
    now = settings(image, dials, shown, **others)
    return runner.tuner.clicked(now, at, mode), now.page
