"""How the page is served: limits, closed routes, deleting what is old, and the endpoint `/health`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchscaler.images import Limits
from patchscaler.ui.jobs import Jobs
from patchscaler.version import __version__

log = logging.getLogger(__name__)

SWEEP_SECONDS, KEPT_SECONDS = 600, 3600  # how often, and what is older goes
FORGET_SECONDS = 2
UNREAD = 32  # sessions whose messages are kept for those who fetch them later
FLOOD = 500  # messages of one session; a page's run has about two hundred


@asynccontextmanager
async def sweeping(app: Any) -> AsyncIterator[None]:
    """While the server runs, delete what it no longer needs, and the files of a killed server.

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
    """Drop what Gradio keeps in memory of events that are over. On the event loop only."""
    forget_components(app)
    forget_messages(app.get_blocks()._queue)


def forget_components(app: Any) -> None:
    """Drop, of all sessions, rebuilt components under numbers of their own and the values that deep links would
    restore.

    Gradio rebuilds each output that an event updates or skips, puts it in the place of the old one, and lists it under
    its own number too, for as long as the session lasts: some 40 kB for every move of a dial.
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
    """Drop results that are never fetched, except those of the newest sessions, and the entries of sessions without
    any.

    Gradio keeps the messages of 2,000 sessions, and every call of the API has a session of its own. A page's messages
    tell what changed since the one before, so none is taken from a run or from a slow reader unless it is a flood.
    """
    for newer, (session, messages) in enumerate(reversed(list(queue.pending_messages_per_session.items()))):
        events = queue.pending_event_ids_session.get(session, ())
        over = not any(event in queue.event_ids_to_events for event in events)
        if messages._getters:  # a client is reading
            continue
        while messages.qsize() > FLOOD:
            messages.get_nowait()
        if over and newer >= UNREAD:
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
        with suppress(FileNotFoundError):  # it is gone already
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


MAX_JSON = 1_000_000  # bytes; a page with a thousand patches set by hand sends some 10 kB
MAX_FILES = 16  # in one upload
KEPT_FREE = 500_000_000  # bytes of disk that uploads and results must leave
BODY_SECONDS = 30  # without a byte of a body that is not whole
# Gradio would fetch any public address for any client, take screen recordings and call methods of components.
# Each link of its deep_link is a folder of files.
CLOSED = re.compile(
    r"/gradio_api/(proxy=|file[=/]+\w+:|process_recording|component_server|deep_link|stream/|dev/|vibe)", re.I
)
OWN = re.compile(r"https?://[^?#]*/gradio_api/file=([^?#]+)", re.I)  # the address of an upload or result
BOUNDARY = re.compile(rb'multipart/form-data;.*boundary="?([^";,]+)', re.I)


class Doorkeeper:
    """Middleware that answers

    403 for routes that the page does not use and for addresses in place of uploads, 413 for bodies over the limit,
    408 for those that do not go on, 507 for whatever may write files when the disk is full, 400 for what Gradio
    cannot make sense of (there it ends as a traceback).
    """

    def __init__(self, app: ASGIApp, max_upload: int) -> None:
        self.app = app
        self.max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif CLOSED.match(scope["path"]):
            await refusal(403, "not allowed")(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._pass(scope, receive, send)
        elif shutil.disk_usage(upload_folder()).free < KEPT_FREE:
            await refusal(507, "the server's disk is full; try again later")(scope, receive, send)
        elif scope["path"].rstrip("/") == "/gradio_api/upload":
            await self._upload(scope, receive, send)
        else:
            await self._message(scope, receive, send)

    async def _message(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Everything but uploads is small, and read whole."""
        try:
            counted = Counted(receive, MAX_JSON)
            body = b"".join([chunk async for chunk in counted])
        except Refused as error:
            await refusal(error.status, str(error))(scope, receive, send)
            return
        with suppress(ValueError, RecursionError):  # Gradio says what is wrong with that
            data = json.loads(body)
            if _names_an_address(data):
                data = _with_paths(data)
                body = json.dumps(data).encode()
            if _names_an_address(data):
                await refusal(403, "images are uploaded, not fetched from addresses")(scope, receive, send)
                return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return unread.pop() if unread else await receive()

        await self._pass(scope, replayed, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:  # an unknown endpoint, event or session; what handlers raise stays in Gradio
            log.warning("%r: %r", scope["path"][:200], error)
            if not answered:  # or it is cut off
                await refusal(400, "the page has no answer to this request")(scope, receive, send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        boundary = BOUNDARY.match(headers.get(b"content-type", b""))
        counted = Counted(receive, self.max_upload, boundary and b"--" + boundary[1])
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            if counted.error is None or answered:  # what becomes of half a body is not told
                answered = True
                await send(message)

        with suppress(Refused):
            counted.expect(headers.get(b"content-length", b""))
            await self.app(scope, counted.receive, sending)
        if counted.error and not answered:
            await refusal(counted.error.status, str(counted.error))(scope, receive, send)


class Refused(Exception):
    """A body over a limit, which the message names; `status` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Counted:
    """The body of a request as it comes in, which may have no length in its header: its bytes and parts."""

    def __init__(self, receive: Receive, limit: int, delimiter: bytes | None = None) -> None:
        self.error: Refused | None = None
        self._receive = receive
        self._limit = limit
        self._delimiter = delimiter
        self._size = self._parts = 0
        self._tail = b""
        self._whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self.receive()
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def receive(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), None if self._whole else BODY_SECONDS)
        except asyncio.TimeoutError:
            self._refuse(f"nothing came in for {BODY_SECONDS} seconds", 408)
        self._whole = not message.get("more_body", False)
        chunk = message.get("body", b"")
        self._size += len(chunk)
        self._check(self._size)
        if self._delimiter:
            seen = self._tail + chunk
            self._parts += seen.count(self._delimiter)
            self._tail = seen[1 - len(self._delimiter) :]
            if self._parts > MAX_FILES + 1:  # one more ends the body
                self._refuse(f"too many files at once; the limit is {MAX_FILES}")
        return message

    def expect(self, length: bytes) -> None:
        """Refuse at once what the header says will be too long."""
        self._check(int(length) if length.isdigit() else 0)

    def _check(self, size: int) -> None:
        if size > self._limit:
            self._refuse(f"the request is too large; the limit is {self._limit:,} bytes")

    def _refuse(self, reason: str, status: int = 413) -> None:
        self.error = Refused(status, reason)
        raise self.error


def _names_an_address(data: Any) -> bool:
    """Whether the JSON has a file that Gradio would fetch: from anywhere in public, into memory, of any size."""
    if isinstance(data, dict):
        path = data.get("path")
        return isinstance(path, str) and is_http_url_like(path) or any(map(_names_an_address, data.values()))
    return isinstance(data, list) and any(map(_names_an_address, data))


def _with_paths(data: Any) -> Any:
    """The JSON with the paths of uploads and results in place of their addresses, by which MCP clients know them.

    No matter at which host: nothing is fetched, and Gradio looks at every path.
    """
    if isinstance(data, dict):
        data = {key: _with_paths(value) for key, value in data.items()}
        own = OWN.fullmatch(path) if isinstance(path := data.get("path"), str) else None
        return {**data, "path": unquote(own[1])} if own else data
    return [_with_paths(value) for value in data] if isinstance(data, list) else data


def refusal(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"Connection": "close"})


def launch_settings(jobs: Jobs) -> dict[str, Any]:
    """What `launch` is given for safety's sake. New ones for every launch: Gradio writes into them."""
    largest = Limits.from_environment().file_bytes
    return {
        "max_file_size": largest,
        "allowed_paths": [],
        "show_error": False,
        "enable_monitoring": False,
        "strict_cors": True,
        "ssr_mode": False,
        "mcp_server": mcp_wanted(),
        "run_history": False,
        "state_session_capacity": 200,
        "app_kwargs": {
            "middleware": [Middleware(Doorkeeper, max_upload=largest + MAX_JSON)],
            "routes": [Route("/health", health_endpoint(jobs))],
            "lifespan": sweeping,
            "openapi_url": None,
        },
    }


def mcp_wanted() -> bool:
    """Whether GRADIO_MCP_SERVER asks for the API as tools for language models, by the Model Context Protocol.

    SystemExit if a package is missing for that: Gradio would only print it, and serve the page without the tools.
    """
    if os.environ.get("GRADIO_MCP_SERVER", "").lower() not in ("true", "1"):
        return False
    if find_spec("mcp") is None:
        raise SystemExit("GRADIO_MCP_SERVER is set, but the package mcp is missing: pip install 'gradio[mcp]==6.31.*'")
    return True


def health_endpoint(jobs: Jobs) -> Callable:
    async def health(request: Request) -> JSONResponse:
        """For a supervisor: 200, or 503 when only a restart helps. Runs no network and waits for none."""
        worker = jobs.state()
        queued = len(request.app.get_blocks()._queue)
        content = {
            "status": "ok" if worker["alive"] else "stuck",
            "version": __version__,
            "worker": worker,
            "queued": queued,  # runs that Gradio has not let through to the worker yet
        }
        return JSONResponse(content, 200 if worker["alive"] else 503)

    return health
