"""Long work off the event loop: one job at a time unless on ZeroGPU, and none that outlives its reader or its deadline
by more than a step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from threading import Event, Lock
from typing import TypeVar

from gradio.context import LocalContext

from patchscaler.cancellation import cancellable
from patchscaler.limits import limit_from_environment

log = logging.getLogger(__name__)

Item = TypeVar("Item")
_END = object()
POLL_SECONDS = 0.2  # how soon a reader sees that it was stopped
RUN_SECONDS = 900  # unless PATCHSCALER_MAX_RUN_SECONDS says something else
WAITING = 64  # jobs; more than Gradio's queue lets through, which forgets those that were cancelled
STUCK_SECONDS = 60  # past its deadline, until a job counts as one that nothing but a restart will end


class JobError(RuntimeError):
    """A job that was not begun or not finished, for a reason that a visitor may read."""


class Jobs:
    """Runs generators in threads of its own: one, unless the device is another's to share out, as on ZeroGPU.

    Gradio frees the slot of a cancelled handler at once, while a plain handler's thread would keep running; with one
    thread here, a job that follows a cancelled one waits until that has noticed. `seconds` is the longest that a
    job may work; waiting for its turn does not count.
    """

    def __init__(self, threads: int = 1) -> None:
        self.seconds = limit_from_environment("PATCHSCALER_MAX_RUN_SECONDS", RUN_SECONDS)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pipeline")
        self._lock = Lock()
        self._waiting = 0
        self._working: dict[int, float] = {}  # when the jobs at work began, by time.monotonic()
        self._closed = Event()

    async def stream(
        self, job: Callable[[], Generator[Item, None, None]], stopped: Event | None = None
    ) -> AsyncIterator[Item]:
        """Yield what `job()` yields, until it ends or `stopped` is set.

        Then, and when this iterator is closed or its task cancelled, the job stops at its next item. The same with
        JobError past the deadline (even in the midst of a step), when the visitor has left, or the server closes.
        JobError at once if too many jobs wait already.
        """
        loop = asyncio.get_running_loop()
        items: asyncio.Queue = asyncio.Queue()
        stopped = stopped or Event()
        ended = Event()  # for the job: its reader is gone, stopped or not
        began: list[float] = []  # when the job's turn came
        gone = _visitor_gone()

        def check() -> None:
            if stopped.is_set() or ended.is_set():
                raise JobError("It was stopped.")
            self._check(began)

        def work() -> None:
            with self._lock:
                self._waiting -= 1
                began.append(time.monotonic())
                self._working[id(began)] = began[0]
            last = _END
            try:
                check()
                with cancellable(check), closing(job()) as running:
                    for item in running:
                        check()
                        loop.call_soon_threadsafe(items.put_nowait, item)
            except BaseException as error:  # SystemExit and its like must not end the thread or reach the event loop
                last = error
            finally:
                with self._lock:
                    del self._working[id(began)]
            if not (stopped.is_set() or ended.is_set()):
                loop.call_soon_threadsafe(items.put_nowait, last)
            last = None  # an error holds this frame, and the two would keep each other

        with self._lock:
            if self._waiting >= WAITING:
                raise JobError(f"{self._waiting} jobs wait already; the limit is {WAITING}. Try again later.")
            self._waiting += 1
        # ZeroGPU finds the visitor's request, whose quota it uses, in the context.
        self._threads.submit(copy_context().run, work)
        try:
            while not stopped.is_set():
                if gone():
                    raise JobError("The visitor has left.")
                try:
                    item = await asyncio.wait_for(items.get(), POLL_SECONDS)
                except asyncio.TimeoutError:  # a long step, or a job that waits for its turn
                    self._check(began)
                    continue
                if item is _END:
                    break
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, BaseException):
                    raise RuntimeError(f"the job ended with {type(item).__name__}") from item
                yield item
        finally:
            item = None  # as `last` above
            ended.set()

    def state(self) -> dict[str, bool | int | float | None]:
        """Whether jobs get done, how long the oldest at work has been (None: none is), and how many wait."""
        with self._lock:
            began = min(self._working.values(), default=None)
        running = None if began is None else time.monotonic() - began
        stuck = running is not None and running > self.seconds + STUCK_SECONDS
        return {
            "alive": not stuck and not self._closed.is_set(),
            "running_seconds": running and round(running, 1),
            "waiting": self._waiting,
        }

    def close(self) -> None:
        """Let jobs at work stop at their next item, and the waiting ones never begin."""
        self._closed.set()

    def _check(self, began: list[float]) -> None:
        if self._closed.is_set():
            raise JobError("The server is closing.")
        if began and time.monotonic() - began[0] > self.seconds:
            limit = f"the limit is {self.seconds:g} seconds"
            raise JobError(f"It took too long; {limit}. Try a smaller image or fewer steps.")


class StopEvents:
    """Visitors' means to stop what goes on for them, by their session: all of one kind of work."""

    def __init__(self) -> None:
        self._events: dict[str | None, list[Event]] = {}

    @contextmanager
    def of(self, session: str | None) -> Iterator[Event]:
        """While the work goes on: the event for `Jobs.stream`."""
        event = Event()
        self._events.setdefault(session, []).append(event)
        try:
            yield event
        finally:
            self._events[session].remove(event)
            if not self._events[session]:
                del self._events[session]

    def stop(self, session: str | None) -> None:
        """Have the visitor's work, if there is any, stop at its next item."""
        for event in self._events.get(session, ()):
            event.set()

    def __contains__(self, session: str | None) -> bool:
        return session in self._events


def _visitor_gone() -> Callable[[], bool]:
    """Tells whether the visitor for whom this task works has left.

    Gradio notes that on the event in its queue, and looks there only when a generator yields: too late for one that
    waits, and never for an endpoint that gives back one value. It names the task by the event.
    """
    blocks, task = LocalContext.blocks.get(None), asyncio.current_task()
    name = task.get_name() if task else ""
    event = None
    if blocks is not None and "<gradio-sep>" in name:
        event = blocks._queue.event_ids_to_events.get(name.rpartition("<gradio-sep>")[2])
    return lambda: event is not None and not event.alive
