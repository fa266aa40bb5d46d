"""What is refused before Gradio sees it: closed doors, bodies over the limit, files that nobody uploaded."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from gradio_client.utils import is_http_url_like
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchscaler.ui.sweeping import upload_folder

log = logging.getLogger(__name__)

MAX_JSON = 1_000_000  # bytes; a page with a thousand patches set by hand sends some 10 kB
MAX_FILES = 16  # in one upload
KEPT_FREE = 500_000_000  # bytes of disk that uploads and results must leave
BODY_SECONDS = 30  # without a byte of a body that is not whole
# Gradio would fetch any public address for anybody, take screen recordings and call methods of components.
# Each link of its deep_link is a folder of files.
CLOSED = re.compile(
    r"/gradio_api/(proxy=|file[=/]+\w+:|process_recording|component_server|deep_link|stream/|dev/|vibe)", re.I
)
OWN = re.compile(r"https?://[^?#]*/gradio_api/file=([^?#]+)", re.I)  # the address of an upload or result
BOUNDARY = re.compile(rb'multipart/form-data;.*boundary="?([^";,]+)', re.I)


class Doorkeeper:
    """Middleware that answers

    403 for doors that the page does not use and for addresses in place of uploads, 413 for bodies over the limit,
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
