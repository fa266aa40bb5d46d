"""Nothing piles up: uploads and results older than an hour, a killed server's leavings, what sessions drag along."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

log = logging.getLogger(__name__)

SWEEP_SECONDS, KEPT_SECONDS = 600, 3600  # how often, and what is older goes
FORGET_SECONDS = 2
UNREAD = 32  # sessions whose messages are kept for those who fetch them later
FLOOD = 500  # messages of one session; a page's run has about two hundred


@asynccontextmanager
async def sweeping(app: Any) -> AsyncIterator[None]:
    """While the server runs, delete what it no longer needs, a killed server's leavings too.

    Gradio's own `delete_cache` forgets what it has made when its process ends, and never deletes folders.
    """

    async def sweep_files() -> None:
        kept = [path for block in app.get_blocks().blocks.values() for path in block.keep_in_cache]
        await asyncio.to_thread(sweep, upload_folder(), KEPT_SECONDS, kept)

    async def forget_events() -> None:
        forget(app)

    async def now_and_then(work: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            try:
                await work()
            except Exception:  # the next time may be better
                log.exception("could not tidy up")
            await asyncio.sleep(seconds)

    each = ((sweep_files, SWEEP_SECONDS), (forget_events, FORGET_SECONDS))
    tasks = [asyncio.create_task(now_and_then(work, seconds)) for work, seconds in each]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def forget(app: Any) -> None:
    """Let go of what Gradio keeps in memory of events that are over. On the event loop only."""
    forget_components(app)
    forget_messages(app.get_blocks()._queue)


def forget_components(app: Any) -> None:
    """Of all sessions: rebuilt components under numbers of their own, and the values that deep links would restore.

    Gradio builds each output anew that an event updates or skips, puts that in the place of the old one, and lists it
    under its own number too, for as long as the session lasts: some 40 kB for every move of a dial.
    """
    page = app.get_blocks()
    live = list(page.blocks.values())
    for session in app.state_holder.session_data.values():
        session.config_values.clear()  # only /deep_link reads them; the doorkeeper keeps that closed
        listed = session.blocks_config.blocks
        for number in listed.keys() - page.blocks.keys():
            del listed[number]
        live += listed.values()
    used = {id(getattr(block, "temp_files", None)) for block in live}
    page.temp_file_sets[1:] = [files for files in page.temp_file_sets[1:] if files or id(files) in used]


def forget_messages(queue: Any) -> None:
    """Results that nobody fetches, but for those of the newest sessions, and the names of sessions that have none.

    Gradio keeps the messages of 2,000 sessions, and every call of the API has a session of its own. A page's messages
    tell what changed since the one before, so none is taken from a run or from a slow reader unless it is a flood.
    """
    unread = 0
    for session, messages in reversed(list(queue.pending_messages_per_session.items())):
        events = queue.pending_event_ids_session.get(session, ())
        over = not any(event in queue.event_ids_to_events for event in events)
        if messages._getters:  # somebody reads
            continue
        while messages.qsize() > FLOOD:
            messages.get_nowait()
        unread += not messages.empty()
        if over and (messages.empty() or unread > UNREAD):
            del queue.pending_messages_per_session[session]
    for session in queue.pending_event_ids_session.keys() - queue.pending_messages_per_session.keys():
        del queue.pending_event_ids_session[session]


def sweep(folder: Path, seconds: float, kept: Collection[str] = ()) -> None:
    """Delete the files and folders right in `folder` that have been as they are for so long, but for those of `kept`.

    `kept` are paths of files, such as the page's examples.
    """
    keep = {parent for path in kept for parent in (Path(path), *Path(path).parents)}
    for entry in folder.iterdir():
        if entry in keep:
            continue
        with suppress(FileNotFoundError):  # somebody else was quicker
            newest = max(path.lstat().st_mtime for path in (entry, *(entry.iterdir() if entry.is_dir() else ())))
            if time.time() - newest > seconds:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()


def upload_folder() -> Path:
    """Where Gradio puts uploads and results; made if it is not there."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder
