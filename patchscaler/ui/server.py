"""How the page is served: limits, closed routes, deleting what is old, and the endpoint `/health`."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like
from starlette.exceptions import HTTPException
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

    async def tidy() -> None:
        swept = -math.inf
        while True:
            try:
                if time.monotonic() - swept > SWEEP_SECONDS:
                    swept = time.monotonic()
                    kept = [path for block in app.get_blocks().blocks.values() for path in block.keep_in_cache]
                    await asyncio.to_thread(sweep, upload_folder(), KEPT_SECONDS, kept)
                forget_components(app)
                forget_messages(app.get_blocks()._queue)
            except Exception:  # the next time may be better
                log.exception("could not tidy up")
            await asyncio.sleep(FORGET_SECONDS)

    task = asyncio.create_task(tidy())
    try:
        yield
    finally:
        task.cancel()


def forget_components(app: Any) -> None:
    """Drop, of all sessions, rebuilt components under numbers of their own and the values that deep links would
    restore. On the event loop only, as the next.

    Gradio rebuilds each output that an event updates or skips, puts it in the place of the old one, and lists it under
    its own number too, for as long as the session lasts: some 40 kB for every move of a dial.
    """
    page = app.get_blocks()
    live = list(page.blocks.values())
    for session in app.state_holder.session_data.values():
        session.config_values.clear()  # only /deep_link reads them; the request filter keeps that closed
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


class RequestFilter:
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
            return await self.app(scope, receive, send)
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            return await self.app(scope, await self._admitted(scope, receive), sending)
        except HTTPException as error:
            refusal = error
        except Exception as error:  # an unknown endpoint, event or session; what handlers raise stays in Gradio
            log.warning("%r: %r", scope["path"][:200], error)
            refusal = _refusal(400, "the page has no answer to this request")
        if not answered:  # or it is cut off
            answer = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
            await answer(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive) -> Receive:
        """From where Gradio gets the body. HTTPException, here or as the body comes in, for what is refused."""
        if CLOSED.match(scope["path"]):
            raise _refusal(403, "not allowed")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        if shutil.disk_usage(upload_folder()).free < KEPT_FREE:
            raise _refusal(507, "the server's disk is full; try again later")
        if scope["path"].rstrip("/") == "/gradio_api/upload":
            boundary = BOUNDARY.match(dict(scope["headers"]).get(b"content-type", b""))
            return Body(receive, self.max_upload, boundary and b"--" + boundary[1]).receive
        # Everything but uploads is small, and read whole.
        body = await Body(receive, MAX_JSON).whole()
        with suppress(ValueError, RecursionError):  # Gradio says what is wrong with that
            body = json.dumps(json.loads(body, object_hook=_without_address)).encode()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return unread.pop() if unread else await receive()

        return replayed


class Body:
    """The body of a request as it comes in, which may have no length in its header: its bytes and parts."""

    def __init__(self, receive: Receive, limit: int, delimiter: bytes | None = None) -> None:
        self._receive = receive
        self._limit = limit
        self._delimiter = delimiter
        self._size = self._parts = 0
        self._tail = b""
        self._ended = False

    async def whole(self) -> bytes:
        body = b""
        while not self._ended:
            body += (await self.receive()).get("body", b"")
        return body

    async def receive(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), None if self._ended else BODY_SECONDS)
        except asyncio.TimeoutError:
            raise _refusal(408, f"nothing came in for {BODY_SECONDS} seconds") from None
        self._ended = not message.get("more_body", False)
        chunk = message.get("body", b"")
        self._size += len(chunk)
        if self._size > self._limit:
            raise _refusal(413, f"the request is too large; the limit is {self._limit:,} bytes")
        if self._delimiter:
            seen = self._tail + chunk
            self._parts += seen.count(self._delimiter)
            self._tail = seen[1 - len(self._delimiter) :]
            if self._parts > MAX_FILES + 1:  # one more ends the body
                raise _refusal(413, f"too many files at once; the limit is {MAX_FILES}")
        return message


def _without_address(file: dict) -> dict:
    """An object of a message: Gradio would fetch a file's address, from anywhere in public, of any size, into memory.

    MCP clients know uploads and results by their addresses: these become paths, whatever the host, since nothing is
    fetched and Gradio looks at every path.
    """
    path = file.get("path")
    if own := OWN.fullmatch(path) if isinstance(path, str) else None:
        path = unquote(own[1])
        file = {**file, "path": path}
    if isinstance(path, str) and is_http_url_like(path):
        raise _refusal(403, "images are uploaded, not fetched from addresses")
    return file


def _refusal(status: int, detail: str) -> HTTPException:
    return HTTPException(status, detail, {"Connection": "close"})


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
            "middleware": [Middleware(RequestFilter, max_upload=largest + MAX_JSON)],
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
