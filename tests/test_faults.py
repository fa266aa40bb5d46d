"""Many visitors at once, visitors who leave, and faults during a run: one pipeline, which goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from conftest import make_tiny_pipeline
from corpus import encoded, noise
from PIL import Image
from service import QUICK, SLOW, Service, serving

from patchscaler.cancellation import check_cancelled
from patchscaler.plan import SamplingPlan
from patchscaler.ui import jobs as jobs_module
from patchscaler.ui.events import WAITING
from patchscaler.ui.state import dials_of

pytestmark = pytest.mark.slow  # a real server and crowds of visitors

QUICK_DIALS, SLOW_DIALS = (*dials_of(QUICK), 7), (*dials_of(SLOW), 7)
SLOW_CALL = {**asdict(SLOW), "seed": 7}


@pytest.fixture(scope="module")
def service(tiny_pipeline, tmp_path_factory):
    with serving(tiny_pipeline, tmp_path_factory.mktemp("uploads")) as service:
        yield service


@pytest.fixture
def image(service):
    """A picture that the page has not seen yet."""
    service.watch.fault, service.watch.most = None, 0
    image.count = getattr(image, "count", 0) + 1
    picture = Image.fromarray(noise(40, 40))
    picture.putpixel((0, 0), (image.count, 0, 0))
    yield service.upload("photo.png", encoded(picture, "PNG"))
    service.watch.fault = None
    wait_until(lambda: service.jobs.state()["running_seconds"] is None and not service.jobs.state()["waiting"])
    wait_until(lambda: service.watch.running == 0 and not any(service.page._queue.active_jobs))
    assert service.health()["status"] == "ok" and service.watch.running == 0


def wait_until(true, seconds: float = 30) -> float:
    """Seconds until it was true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


def slowly(seconds: float):
    return lambda: time.sleep(seconds)


@contextmanager
def blocked(service: Service) -> Iterator[threading.Event]:
    """Runs that stop at their first step until the event is set, or the block left."""
    gate = threading.Event()
    service.watch.fault = gate.wait
    try:
        yield gate
    finally:
        gate.set()


def file_of(service: Service, file: dict) -> bytes:
    return service.web.get(f"/gradio_api/file={file['path']}").content


def test_eight_users_at_once_get_what_each_would_get_alone(service, image):
    """By page and API, identical bits."""
    plan = SamplingPlan(0.9, 0.1, (100, 200, 300), (2, 3, 4))

    def user(number: int, seed: int = 7) -> bytes:
        if number % 2:
            return file_of(service, service.call(image, plan, seed=seed)[0])
        return file_of(service, service.run(f"user {number}", image, (*dials_of(plan), seed))["final"])

    with ThreadPoolExecutor(8) as users:
        together = list(users.map(user, range(8)))
    assert service.watch.most == 1
    assert set(together) == {user(0), user(1)} and len(set(together)) == 1
    assert user(1, seed=8) != together[0]


def test_a_hundred_runs_are_joined_and_cancelled(service, image):
    service.watch.fault = slowly(0.05)
    run = service.functions["run"]._id
    for number in range(100):
        session = f"leaver {number}"
        answer = service.join(session, image, SLOW_DIALS)
        assert answer.status_code == 200, answer.text
        if number % 10 == 0:  # some have begun
            time.sleep(0.1)
        body = {"session_hash": session, "fn_index": run, "event_id": answer.json()["event_id"]}
        assert service.post("cancel", body).json() == {"success": True}
    steps = service.watch.steps
    service.join("stayer", image, SLOW_DIALS)
    for message in service.messages("stayer"):
        if "step 1 of" in str(message.get("output")):
            break
    assert service.watch.steps - steps < 40  # of the 50 in a group: nobody's run went on before the stayer's
    assert service.watch.most == 1
    assert sum(thread.name.startswith("pipeline") for thread in threading.enumerate()) <= 2  # another test's may linger
    wait_until(lambda: service.watch.running == 0)  # the stayer has left too


@pytest.mark.parametrize("by", ["page", "api"])
def test_a_visitor_who_leaves_stops_the_run(service, image, by):
    """The run stops within a step."""
    service.watch.fault = slowly(0.25)
    began = service.watch.steps
    if by == "page":
        service.join("leaver", image, SLOW_DIALS)
        address, parameters = "/gradio_api/queue/data", {"session_hash": "leaver"}
    else:
        answer = service.begin(image=image, **SLOW_CALL)
        address, parameters = f"/gradio_api/call/v2/upscale/{answer.json()['event_id']}", {}
    with service.web.stream("GET", address, params=parameters):
        wait_until(lambda: service.watch.steps >= began + 2)
        seen = service.watch.steps
    wait_until(lambda: service.watch.running == 0, 3)
    assert service.watch.steps <= seen + 2  # the one it was at, and one for the word to get through
    service.watch.fault = None
    stopped = service.watch.steps
    assert isinstance(service.call(image), list)
    assert service.watch.steps - stopped <= sum(QUICK.steps) + 1  # its own steps and its result


def test_a_visitor_who_leaves_while_waiting_never_gets_a_turn(service, image):
    with blocked(service):
        service.join("first", image, QUICK_DIALS)
        event = service.begin(image=image, **SLOW_CALL).json()["event_id"]
        with service.web.stream("GET", f"/gradio_api/call/v2/upscale/{event}"):
            wait_until(lambda: service.jobs.state()["waiting"] == 1)
        time.sleep(0.5)
        began = service.watch.steps
    wait_until(lambda: service.jobs.state()["waiting"] == 0)
    wait_until(lambda: service.watch.running == 0)
    assert service.watch.steps - began <= sum(QUICK.steps)


def test_a_large_picture_is_given_up_between_its_tiles(service, image, monkeypatch):
    """There are no steps yet while a picture is analysed."""
    asked = []

    def slowly_asked() -> None:
        asked.append(time.sleep(0.1))
        check_cancelled()

    monkeypatch.setattr("patchscaler.tiles.check_cancelled", slowly_asked)
    monkeypatch.setattr("patchscaler.pipeline.TILE", 4)  # cells: 25 tiles in each of three stages
    event = service.begin(image=image).json()["event_id"]
    with service.web.stream("GET", f"/gradio_api/call/v2/upscale/{event}"):
        wait_until(lambda: len(asked) > 2)
    left = len(asked)
    wait_until(lambda: service.watch.running == 0)
    assert len(asked) <= left + 8


def test_a_full_queue_says_so_and_the_dials_still_answer(service, image):
    service.run("mover", image, QUICK_DIALS)
    with blocked(service):
        accepted = 0
        while (answer := service.join(f"crowd {accepted}", image, QUICK_DIALS)).status_code == 200:
            accepted += 1
            assert accepted <= 2 * WAITING + 1
            time.sleep(0.02)
        assert answer.status_code == 503 and f"Queue is full. Max size is {WAITING}" in answer.text
        assert service.call(image).startswith("503")
        health = service.health()
        assert health["status"] == "ok" and health["queued"] == WAITING
        assert health["worker"]["waiting"] == WAITING - 1 and health["worker"]["running_seconds"] > 0
        for moved in range(5):
            answer = service.light("regrouped", "mover", image, (0.9, moved / 10, *QUICK_DIALS[2:]))
            assert answer.status_code == 200
        assert service.health()["queued"] == WAITING  # answered while the queue was still full
    assert accepted >= WAITING
    wait_until(lambda: service.health()["queued"] == 0)


def test_small_jobs_cannot_pile_up_without_end(service, image, monkeypatch):
    """As they could without Gradio's queue."""
    monkeypatch.setattr(jobs_module, "WAITING", 2)
    with blocked(service):
        for number in range(3):
            service.join(f"small {number}", image, QUICK_DIALS)
            wait_until(lambda: service.jobs.state()["running_seconds"] is not None)
        wait_until(lambda: service.jobs.state()["waiting"] == 2)
        assert "2 jobs wait already; the limit is 2" in service.run("too many", image, QUICK_DIALS)["error"]
        assert "2 jobs wait already" in service.call(image)


def test_memory_that_runs_out_costs_time_or_ends_with_advice(service, image, memory_for):
    """By page and API. Tiles and a real lack of memory: test_tiles.py. The command line: test_cli.py."""
    expected = file_of(service, service.call(image, QUICK, seed=7)[0])
    sizes = memory_for(2)
    called = file_of(service, service.call(image, QUICK, seed=7)[0])
    shown = file_of(service, service.run("short", image, QUICK_DIALS)["final"])
    assert called == shown == expected and max(sizes) > 2 >= min(sizes)
    memory_for(0)
    for text in (service.run("none", image, (*QUICK_DIALS[:8], 8))["error"], service.call(image, QUICK, seed=8)):
        assert "not enough memory" in text and "smaller" in text
    memory_for(10**6)
    assert file_of(service, service.call(image, QUICK, seed=7)[0]) == expected
    assert "final" in service.run("none", image, (*QUICK_DIALS[:8], 8))


@pytest.mark.parametrize("fault", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError, OSError])
def test_no_fault_in_the_worker_ends_the_server(service, image, fault):

    def fail():
        raise fault

    service.watch.fault = fail
    for text in (service.run(f"{fault}", image, QUICK_DIALS)["error"], service.call(image)):
        assert "log has the details" in text or "memory" in text
    service.watch.fault = None
    assert isinstance(service.call(image), list) and "final" in service.run("after", image, QUICK_DIALS)


def test_a_run_past_its_deadline_is_an_error_and_no_zombie(service, image, monkeypatch):
    monkeypatch.setattr(service.jobs, "seconds", 0.5)
    service.watch.fault = slowly(0.1)
    for text in (service.run("late", image, SLOW_DIALS)["error"], service.call(image, SLOW)):
        assert "It took too long; the limit is 0.5 seconds." in text
    assert wait_until(lambda: service.watch.running == 0) < 3
    service.watch.fault = None
    assert isinstance(service.call(image), list)


def test_the_deadline_does_not_wait_for_a_step_and_health_tells_a_stuck_worker(service, image, monkeypatch):
    monkeypatch.setattr(jobs_module, "STUCK_SECONDS", 0.3)
    before = service.watch.steps
    with blocked(service), ThreadPoolExecutor(1) as visitor:
        run = visitor.submit(service.run, "stuck", image, QUICK_DIALS)
        wait_until(lambda: service.watch.steps > before)
        monkeypatch.setattr(service.jobs, "seconds", 0.3)
        assert "It took too long" in run.result(5)["error"]
        wait_until(lambda: service.health()["code"] == 503)
        assert service.health()["status"] == "stuck" and not service.health()["worker"]["alive"]
    wait_until(lambda: service.health()["code"] == 200)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "soon"])
def test_a_bad_deadline_is_named(monkeypatch, text):
    monkeypatch.setenv("PATCHSCALER_MAX_RUN_SECONDS", text)
    with pytest.raises(ValueError, match="PATCHSCALER_MAX_RUN_SECONDS"):
        jobs_module.Jobs()
    monkeypatch.setenv("PATCHSCALER_MAX_RUN_SECONDS", "77")
    assert jobs_module.Jobs().seconds == 77


@pytest.mark.parametrize(("part", "value"), [("grm", torch.nan), ("transformer", torch.inf), ("vae", torch.nan)])
def test_values_that_are_not_finite_are_an_error_and_never_a_picture(part, value, image, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    pipeline = make_tiny_pipeline()
    with torch.no_grad():
        for parameter in getattr(pipeline, part).parameters():
            parameter.view(-1)[0] = value
    sick = Service(pipeline)
    try:
        image = sick.upload("photo.png", encoded(Image.fromarray(noise(20, 20)), "PNG"))
        shown = sick.run("sick", image, QUICK_DIALS)
        assert "NaN or infinite" in shown["error"] and "final" not in shown
        assert "NaN or infinite" in sick.call(image)
        assert not list(tmp_path.rglob("*_x4.png"))
    finally:
        sick.close()
