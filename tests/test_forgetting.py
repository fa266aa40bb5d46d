"""What a server keeps of events that are over, and what many visitors at once may take."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from corpus import encoded, noise
from PIL import Image
from service import Service, file_data, serving

from patchscaler.plan import SamplingPlan
from patchscaler.ui import server, state
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.state import dials_of

SOAK = Path(__file__).parent / "load" / "soak.py"
DIALS = (*dials_of(SamplingPlan(0.9, 0.1, (50, 50, 50), (1, 1, 1))), 0)  # all within the dials' ranges


@pytest.fixture(scope="module")
def service(tiny_pipeline, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "FORGET_SECONDS", 0.1)
        with serving(tiny_pipeline, tmp_path_factory.mktemp("uploads")) as service:
            yield service


@pytest.fixture(scope="module")
def image(service):
    return service.upload("a photo.png", encoded(Image.fromarray(noise(14, 18)), "PNG"))


def wait_until(true) -> None:
    ends = time.monotonic() + 30
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def posted(service: Service, path: str, body: dict):
    """The answer, once the queue has room."""
    wait_until(lambda: len(service.page._queue) < service.page._queue.max_size)
    answer = service.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer


def called(service: Service, endpoint: str, **arguments) -> str:
    """The raw response to a call of the API."""
    event = service.begin(endpoint, **arguments).json()["event_id"]
    return service.web.get(f"/gradio_api/call/v2/{endpoint}/{event}").text


def test_files_and_folders_of_more_than_an_hour_are_deleted(tmp_path):
    ages = {"old/upload.png": 3700, "old result.png": 3700, "new/upload.png": 3500, "example/cat.png": 9000}
    for name, age in ages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"pixels")
        for path in (tmp_path / name, *(tmp_path / name).parents[: name.count("/")]):
            os.utime(path, (time.time() - age,) * 2)
    server.sweep(tmp_path, server.KEPT_SECONDS, kept=[str(tmp_path / "example" / "cat.png")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["example", "new"]


def test_the_pages_upload_limit_follows_the_environment(monkeypatch):
    assert server.launch_settings(Jobs())["max_file_size"] == 20 * 2**20
    monkeypatch.setenv("PATCHSCALER_MAX_FILE_BYTES", "5000000")
    settings = server.launch_settings(Jobs())
    assert settings["max_file_size"] == 5_000_000
    assert settings["app_kwargs"]["middleware"][0].kwargs["max_upload"] == 6_000_000


@pytest.mark.slow
def test_moved_dials_leave_no_components_behind_and_the_session_goes_on(service, image):
    shown = service.run("mover", image, DIALS)
    page = service.page
    session = page.app.state_holder.session_data["mover"]
    sets = len(page.temp_file_sets)
    for moved in range(20):
        answer = service.light("regrouped", "mover", image, (0.9, moved / 100, *DIALS[2:]))
        assert "Run renders 0 of" in str(answer.json()["data"])
    wait_until(lambda: session.blocks_config.blocks.keys() <= page.blocks.keys() and not session.config_values)
    assert len(page.temp_file_sets) <= sets + 20
    # What the visitor had set and what was shown is there, and the page answers as before.
    assert "0 of" in (again := service.run("mover", image, DIALS))["status"]
    assert service.web.get(f"/gradio_api/file={again['final']['path']}").status_code == 200
    assert again["final"]["orig_name"] == shown["final"]["orig_name"]
    assert service.light("packed", "mover", image).json()["data"][0]["value"]["path"].endswith(".zip")


@pytest.mark.slow
def test_results_that_nobody_fetches_do_not_pile_up(service, monkeypatch):
    queue, events = service.page._queue, []
    for _ in range(3 * server.UNREAD):
        events.append(posted(service, "call/v2/regroup", {"confidence": [0.5] * 1000}).json()["event_id"])
    wait_until(lambda: len(queue.pending_messages_per_session) <= server.UNREAD)
    assert queue.pending_event_ids_session.keys() == queue.pending_messages_per_session.keys()
    assert "event: complete" in service.web.get(f"/gradio_api/call/v2/regroup/{events[-1]}").text  # the newest stay
    monkeypatch.setattr(server, "FLOOD", 20)
    for _ in range(3 * server.FLOOD):  # of one session too
        body = {"data": [None, [0.5]], "session_hash": "one", "fn_index": service.functions["regroup"]._id}
        posted(service, "queue/join", body)
    wait_until(lambda: queue.pending_messages_per_session["one"].qsize() <= server.FLOOD)


def test_a_reader_between_two_messages_keeps_its_queue():
    """It is empty then, and its event is over: without the queue the stream would be cut off."""
    sessions = [str(number) for number in range(server.UNREAD + 5)]
    queue = SimpleNamespace(
        pending_messages_per_session={session: asyncio.Queue() for session in sessions},
        pending_event_ids_session={session: {f"event {session}"} for session in sessions},
        event_ids_to_events={},
    )
    server.forget_messages(queue)
    assert list(queue.pending_messages_per_session) == sessions[5:]
    assert list(queue.pending_event_ids_session) == sessions[5:]


def test_whole_pictures_are_handled_one_at_a_time(monkeypatch):
    running, most = [], []

    @state.whole_pictures()
    def handler():
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    threads = [threading.Thread(target=handler) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    monkeypatch.setattr(state, "WAIT_SECONDS", 0.05)
    with state.whole_pictures(), pytest.raises(gr.Error, match="Try again"):
        handler()
    handler()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compared", "zoomed", "packed", "numbered", "regroup"])
def test_those_that_hold_whole_pictures_wait_for_each_other(service, image, monkeypatch, name):
    service.run("closer", image, DIALS)
    monkeypatch.setattr(state, "WAIT_SECONDS", 0.05)
    analysis = re.search(r'[^"]+\.safetensors', called(service, "analyze", image=image))[0]

    def ask() -> str:
        if name == "regroup":
            return called(service, "regroup", analysis=file_data(analysis))
        return service.light(name, "closer", image, number=0).text

    with state.whole_pictures():
        assert "Try again in a moment" in ask()
    assert "Try again in a moment" not in ask()


@pytest.mark.slow
def test_a_short_soak(weights, capsys):
    """The long form: python tests/load/soak.py."""
    arguments = ["--weights", str(weights), "--clients", "4", "--light", "200", "--heavy", "8"]
    code = runpy.run_path(str(SOAK))["main"](arguments)
    said = capsys.readouterr().out
    assert code == 0 and "0 errors, 0 tracebacks" in said, said
    assert float(re.search(r"([-\d.]+) MB more\ndisk", said)[1]) < 60
