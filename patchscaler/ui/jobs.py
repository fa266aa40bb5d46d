"""Long work off the event loop: one job at a time, and none that outlives its reader by more than a step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
_END = object()
POLL_SECONDS = 0.2  # how soon a reader sees that it was stopped


class Jobs:
    """Runs generators in one thread of its own.

    Gradio frees the slot of a cancelled handler at once, while a plain handler's thread would keep running; with one
    thread here, a job that follows a cancelled one waits until that has noticed.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")

    async def stream(
        self, job: Callable[[], Generator[Item, None, None]], stopped: Event | None = None
    ) -> AsyncIterator[Item]:
        """Yield what `job()` yields, until it ends or `stopped` is set.

        Then, and when this iterator is closed or its task cancelled, the job stops at its next item.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue = asyncio.Queue()
        stopped = stopped or Event()

        def work() -> None:
            last = _END
            try:
                if not stopped.is_set():
                    with closing(job()) as running:
                        for item in running:
                            if stopped.is_set():
                                break
                            loop.call_soon_threadsafe(items.put_nowait, item)
            except BaseException as error:  # SystemExit and its like must not end the thread or reach the event loop
                last = error
            if not stopped.is_set():
                loop.call_soon_threadsafe(items.put_nowait, last)

        # ZeroGPU finds the visitor's request, whose quota it uses, in the context.
        self._thread.submit(copy_context().run, work)
        try:
            while not stopped.is_set():
                try:
                    item = await asyncio.wait_for(items.get(), POLL_SECONDS)
                except asyncio.TimeoutError:  # a long step, or a job that waits for its turn
                    continue
                if item is _END:
                    break
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, BaseException):
                    raise RuntimeError(f"the job ended with {type(item).__name__}") from item
                yield item
        finally:
            stopped.set()
