"""A running page and its API as hostile or clumsy clients meet them: plain HTTP, without Gradio's own client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client.utils import apply_diff

from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.ui.events import RUN
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.page import build_page, launch_settings
from patchscaler.ui.state import DIALS, dials_of

QUICK = SamplingPlan(0.9, 0.1, (1, 1, 1), (1, 1, 1))
SLOW = SamplingPlan(0.9, 0.1, (1000, 1000, 1000), (50, 50, 50))
PATIENCE = 60  # seconds


@dataclass
class Watch:
    """A pipeline, and how many of its long calls are at work at once: now, and at most so far."""

    pipeline: PatchScalerPipeline
    running: int = 0
    most: int = 0
    steps: int = 0
    fault: Any = None  # called at every step
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1

    def analyze(self, *args: Any, **options: Any) -> Any:
        with self.counted():
            return self.pipeline.analyze(*args, **options)

    def refine(self, *args: Any, **options: Any) -> Iterator[Any]:
        with self.counted():
            for event in self.pipeline.refine(*args, **options):
                self.steps += 1
                if self.fault:
                    self.fault()
                yield event


@contextmanager
def serving(pipeline: PatchScalerPipeline, uploads: Path) -> Iterator[Service]:
    """A Service with a folder of its own for what it is sent and makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        service = Service(pipeline)
        yield service
        service.close()


class Service:
    """One page on a port of 127.0.0.1, in this process."""

    def __init__(self, pipeline: PatchScalerPipeline) -> None:
        self.watch = Watch(pipeline)
        self.jobs = Jobs()
        self.page = build_page(self.watch, self.jobs)
        settings = launch_settings(self.jobs)
        _, self.address, _ = self.page.launch(prevent_thread_lock=True, quiet=True, **settings)
        self.web = httpx.Client(base_url=self.address, timeout=PATIENCE)
        self.functions = {fn.fn.__name__: fn for fn in self.page.fns.values() if hasattr(fn.fn, "__name__")}

    def close(self) -> None:
        self.jobs.close()
        self.web.close()
        self.page.close(verbose=False)

    def post(self, path: str, body: Any) -> httpx.Response:
        """JSON as Python writes it, NaN included, which httpx and strict clients refuse to send."""
        headers = {"content-type": "application/json"}
        return self.web.post(f"/gradio_api/{path}", content=json.dumps(body), headers=headers)

    def health(self) -> dict:
        answer = self.web.get("/health")
        return {"code": answer.status_code, **answer.json()}

    def upload(self, name: str, data: bytes) -> dict:
        """A file as the page's file data."""
        answer = self.web.post("/gradio_api/upload", files={"files": (name, data)})
        assert answer.status_code == 200, answer.text
        return file_data(answer.json()[0])

    def inputs(self, name: str, image: Any, dials: tuple = (*dials_of(QUICK), 0), **given: Any) -> list:
        """What the browser sends for an event: `given` by element, and for the others what a new page shows."""
        given = {"input": image, **dict(zip(DIALS, dials)), **given}
        values = [(component.elem_id, component.value) for component in self.functions[name].inputs]
        return [given.get(element, None if element is None else value) for element, value in values]

    def join(self, session: str, *args: Any, **given: Any) -> httpx.Response:
        """Press Run as the browser does, without waiting for anything."""
        data = self.inputs("run", *args, **given)
        body = {"data": data, "fn_index": self.functions["run"]._id, "session_hash": session}
        return self.post("queue/join", body)

    def messages(self, session: str) -> Iterator[dict]:
        """What the page is told about a session's events, until all of them are over."""
        with self.web.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] == "close_stream":
                        return

    def run(self, session: str, *args: Any, **given: Any) -> dict:
        """Press Run and wait. Gives what the page shows in the end by its element, and any `error`."""
        answer = self.join(session, *args, **given)
        assert answer.status_code == 200, answer.text
        values, shown = None, {}
        for message in self.messages(session):
            output = message.get("output") or {}
            if message["msg"] == "process_generating":  # the first has all, the others what changed
                changed = zip(values, output["data"]) if values else ()
                values = [apply_diff(value, edits) for value, edits in changed] or output["data"]
                shown |= {name: value for name, value in zip(RUN, values) if not _skipped(value)}
            if message["msg"] == "process_completed" and not message["success"]:
                shown["error"] = str(output.get("error"))
        return shown

    def begin(self, endpoint: str = "upscale", **arguments: Any) -> httpx.Response:
        """A call of the API, as users of curl make it. What is not given is the endpoint's default."""
        return self.post(f"call/v2/{endpoint}", arguments)

    def call(self, image: Any, plan: SamplingPlan = QUICK, endpoint: str = "upscale", **arguments: Any) -> Any:
        """The endpoint's list of outputs, or the text of an error."""
        answer = self.begin(endpoint, **{"image": image, **asdict(plan), **arguments})
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text}"
        with self.web.stream("GET", f"/gradio_api/call/v2/{endpoint}/{answer.json()['event_id']}") as stream:
            for line in stream.iter_lines():
                if line.startswith("event:"):
                    kind = line.split()[1]
                if line.startswith("data:") and kind in ("complete", "error"):
                    content = json.loads(line[5:])
                    return content if kind == "complete" else f"{(content or {}).get('title')}: {content}"
        raise AssertionError("the stream ended without a result")

    def light(self, name: str, session: str, *args: Any, **given: Any) -> httpx.Response:
        """An event that bypasses the queue, by its handler's name."""
        data = self.inputs(name, *args, **given)
        return self.post("run/predict", {"data": data, "fn_index": self.functions[name]._id, "session_hash": session})


def file_data(path: str, **fields: Any) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **fields}


def _skipped(value: Any) -> bool:
    return isinstance(value, dict) and not value.keys() - {"__type__", "props"}
