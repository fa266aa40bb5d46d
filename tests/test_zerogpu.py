"""What runs on a ZeroGPU Space: in another process, for as many seconds as were asked for."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import gradio as gr
import pytest
import torch
from PIL import Image
from visitor import closeups, last, run, settings

from patchscaler.images import Picture, read_picture, write_png
from patchscaler.patches import PatchGrid
from patchscaler.plan import SamplingPlan
from patchscaler.results import Analysis, Partial, Progress, Result
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.networks import (
    MAX_GPU_SECONDS,
    START_SECONDS,
    Calibration,
    Call,
    Networks,
    RunRequest,
)

ROOT = Path(__file__).parent.parent
PLAN = SamplingPlan(0.95, 0.75, (100, 200, 300), (1, 2, 3))


@pytest.fixture
def networks(tiny_pipeline):
    return Networks(tiny_pipeline, Calibration())


def test_every_argument_and_event_of_a_run_pickles(networks, picture):
    def there(*arguments):
        """The events as they come out of another process."""
        arguments = pickle.loads(pickle.dumps(arguments))
        return [pickle.loads(pickle.dumps(event)) for event in networks.here(*arguments)]

    request = RunRequest("", PLAN, 7, {0: 0, 1: 1})
    analysis, *events = there(request, picture)
    assert isinstance(analysis, Analysis)
    assert {type(event) for event in events} == {Progress, Partial, Result}
    result = events[-1]
    *_, plain = networks.here(request, picture)
    assert torch.equal(result.picture.rgb, plain.picture.rgb) and json.dumps(result.report())
    # The second run, of what the first one left.
    (again,) = there(request, analysis.restored(), result.sampled)
    assert torch.equal(again.picture.rgb, result.picture.rgb) and not again.rendered.any()


def test_errors_are_made_visible_before_they_leave(networks, picture, monkeypatch):
    monkeypatch.setattr(networks._pipeline, "analyze", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(gr.Error) as caught:
        list(networks.here(RunRequest("", PLAN, 7, {}), picture))
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert (arrived.title, arrived.message) == (caught.value.title, caught.value.message)
    assert arrived.title == "Out of memory"


def test_a_patchs_priors_are_drawn_on_the_cpu_and_as_the_pipeline_draws_them(networks, picture, tiny_pipeline):
    """In the page's own process: on ZeroGPU a click asks for no device."""
    priors = tiny_pipeline.analyze(picture).priors
    images = networks.prior_images(priors.indices[4])
    assert torch.equal(images, tiny_pipeline.prior_images(priors.indices[4])) and images.shape == (3, 3, 128, 128)


# Seconds


def test_seconds_follow_from_the_groups_and_only_from_what_is_new(networks, picture, tiny_pipeline):
    networks._calibration.learn([Call(1, 10, 1.0), Call(1, 20, 2.0)], 1000, 0.02, 2)  # 0.1 s a patch, 10 µs a pixel
    analysis = tiny_pipeline.analyze(picture)
    known, pixels = analysis.restored(), 16 * 64 * 80
    rest = 2 * pixels * 1e-5  # for each picture: one of every group that is sampled
    request = RunRequest("", PLAN, 7, {index: 2 for index in range(4)} | {index: 0 for index in range(4, 9)})
    assert networks.seconds(request, known) == pytest.approx(START_SECONDS + 2 * rest + 2 * 0.1 * (4 * 3 + 5), abs=1)
    *_, result = tiny_pipeline.refine(known, PLAN, 7, by_hand=request.by_hand)
    longer = replace(request, plan=replace(PLAN, steps=(1, 2, 20)))
    assert networks.seconds(request, known, result.sampled) == pytest.approx(START_SECONDS + rest, abs=1)
    more = networks.seconds(longer, known, result.sampled)
    assert more == pytest.approx(START_SECONDS + rest + 2 * 0.1 * 4 * 20, abs=1)
    uniform = networks.seconds(replace(request, plan=SamplingPlan.uniform(), live=False), known, result.sampled)
    assert uniform == pytest.approx(START_SECONDS + rest + 2 * 0.1 * 9 * 20, abs=1)


def test_seconds_count_calls_of_the_network_and_a_picture_for_every_group(networks, picture, tiny_pipeline):
    networks._calibration.learn([Call(1, 10, 1.5), Call(1, 20, 2.5)], 1000, 0.2, 2)  # 0.5 s a call, 0.1 ms a pixel
    networks._calibration.learn([], 1000, 0.1)
    known, pixels = tiny_pipeline.analyze(picture).restored(), 16 * 64 * 80
    request = RunRequest("", PLAN, 7, dict.fromkeys(range(4), 2) | dict.fromkeys(range(4, 9), 0), batch_size=2)
    calls, evaluations = 3 * 2 + 1 * 3, 3 * 4 + 5  # hard ones in two batches, simple ones in three
    expected = 0.5 * calls + 0.1 * evaluations + 2 * pixels * 1e-4
    assert networks.seconds(request, known) == pytest.approx(START_SECONDS + 2 * expected, abs=1)
    # Before the analysis: all nine hard, and a call and a picture for the groups that may be there.
    networks._calibration.learn_analysis(pixels, 3.0)
    expected = 3.0 + 0.5 * (3 * 5 + 1 + 2) + 0.1 * 27 + 3 * pixels * 1e-4
    asked = min(MAX_GPU_SECONDS, START_SECONDS + 2 * expected)
    assert networks.seconds(request, picture) == pytest.approx(asked, abs=1)


def test_before_the_analysis_all_patches_count_as_hard(networks, picture, tiny_pipeline):
    networks._calibration.learn([Call(1, 10, 1.0), Call(1, 20, 2.0)], 1000, 0.0)
    request = RunRequest("", PLAN, 7, {})
    assert len(PatchGrid.covering(256, 320)) == len(tiny_pipeline.analyze(picture).grid) == 9
    assert networks.seconds(request, picture) == pytest.approx(START_SECONDS + 2 * 0.1 * 9 * 3, abs=1)
    networks._calibration.learn_analysis(1000, 0.0)
    assert networks.seconds(replace(request, refine=False), picture) == START_SECONDS


@pytest.mark.parametrize("side", [1, 16, 128, 512, 2000])
def test_seconds_are_whole_and_never_above_the_limit(networks, side):
    large = Picture(torch.zeros(1).expand(3, side, side))
    asked = [networks.seconds(RunRequest("", plan, 0, {}), large) for plan in (PLAN, SamplingPlan.uniform())]
    assert all(type(value) is int and START_SECONDS < value <= MAX_GPU_SECONDS for value in asked)
    assert asked[0] <= asked[1]


def test_the_first_estimate_is_within_three_times_that_of_measured_runs(networks, tiny_pipeline):
    """So that a visitor with a small quota is not refused the first run. Rates from those of half an H100 down to a
    fifth of one."""
    plan = SamplingPlan.paper()
    for side in (128, 256, 512):
        picture = Picture(torch.zeros(3, side, side))
        first = Networks(tiny_pipeline, Calibration()).seconds(RunRequest("", plan, 0, {}), picture)
        for evaluation, pixel in ((2e-5, 2e-8), (2e-4, 2e-7)):
            learned = Networks(tiny_pipeline, calibration := Calibration())
            calibration.learn([Call(8, 800, 800 * evaluation), Call(8, 80, 80 * evaluation)], 10**6, pixel * 10**6)
            calibration.learn_analysis(10**6, pixel * 10**6)
            later = learned.seconds(RunRequest("", plan, 0, {}), picture)
            assert later / 3 <= first <= 3 * later, (side, evaluation, first, later)


def test_a_wait_for_a_device_holds_up_nobody_and_is_not_learned(runner, image, dials):
    """On ZeroGPU: one visitor waits for a device, another's run goes through meanwhile."""
    waiting, granted = threading.Event(), threading.Event()
    runner.jobs = Jobs(threads=2)
    here = runner.networks.run

    def run_for(request, *arguments):
        if request.session == "first":
            waiting.set()
            assert granted.wait(60)
        yield from here(request, *arguments)

    runner.networks.run = run_for

    async def both():
        first = asyncio.create_task(all_views("first"))
        await asyncio.to_thread(waiting.wait, 60)
        began = time.perf_counter()
        second = await asyncio.wait_for(all_views("second"), 60)
        took = time.perf_counter() - began
        assert not first.done() and "Done in" in last(second, "status")
        await asyncio.sleep(3 * took)  # a long wait, measured in runs
        granted.set()
        assert "Done in" in last(await first, "status")
        return took

    async def all_views(session):
        return [view async for view in runner.run(settings(image, dials, session=session), False)]

    took = asyncio.run(both())
    pixels = runner.cache.get(image["path"]).analysis.coarse[0].numel()
    assert runner.calibration.analysis_seconds(pixels) < 2 * took


def test_a_click_on_a_patch_asks_for_no_device(runner, image, dials):
    run(runner, image, dials)
    runner.networks.run = None
    now = settings(image, dials)
    now.page.patch = 4
    with runner.jobs._lock:  # no job can be admitted
        assert closeups(runner).inspected(now)["inspected"].count("<img") == 1 + 3


# The real `spaces` package: its wrapper, its fork and its queues


CHILD = """
import sys
import torch
if torch.version.cuda is None:  # what `spaces` takes hold of, and PyTorch for CPUs lacks
    torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "12.8", lambda: None, bool
import spaces
from spaces.zero import client, torch as emulation, wrappers
wrappers.torch.init = lambda uuid: None  # there is no GPU, so the weights stay where they are
wrappers.torch.move = lambda callback=None: None
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
from patchscaler.loading import load_pipeline
from patchscaler.plan import SamplingPlan
from patchscaler.images import write_png
from patchscaler.results import Result
from patchscaler.analysis_file import fingerprint
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.networks import RunRequest
from patchscaler.ui.page import build_page
from patchscaler.ui.run import Runner

weights, image, output = sys.argv[1:]
# Module level, as in app.py: ZeroGPU's CUDA takes the weights before there is a device.
on_cuda = load_pipeline(weights)
build_page(on_cuda, Jobs())
same = fingerprint(on_cuda) == fingerprint(load_pipeline(weights, device="cpu", dtype=on_cuda.dtype))
print({str(parameter.device) for parameter in on_cuda.transformer.parameters()}, same, emulation.pack() > 0)

runner = Runner(load_pipeline(weights, device="cpu", dtype=torch.float32))
client.startup_report()
request = RunRequest(image, SamplingPlan(0.95, 0.75, (100, 200, 300), (1, 2, 3)), 7, {0: 0, 1: 1})
for run in range(2):
    events = list(runner.events(request))
    print(" ".join(dict.fromkeys(type(event).__name__ for event in events)))
result = next(event for event in events if isinstance(event, Result))
write_png(result.picture, output)
stopped = runner.events(RunRequest(image, SamplingPlan.uniform(), 8, {}))
next(stopped), next(stopped)
stopped.close()
"""


@pytest.mark.slow
def test_a_run_through_zerogpu_is_the_run(tiny_pipeline, picture, tmp_path):
    requests = []

    class Scheduler(BaseHTTPRequestHandler):
        """Grants every request for the device at once."""

        def do_POST(self):
            requests.append(urlparse(self.path))
            body = b'{"idle": true, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    tiny_pipeline.save_pretrained(tmp_path / "weights")
    image, output = write_png(picture, tmp_path / "image.png"), tmp_path / "output.png"
    with ThreadingHTTPServer(("127.0.0.1", 0), Scheduler) as scheduler:
        threading.Thread(target=scheduler.serve_forever, daemon=True).start()
        settings = {
            "SPACES_ZERO_GPU": "true",
            "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{scheduler.server_port}",
            "ZEROGPU_OFFLOAD_DIR": str(tmp_path / "packed"),
            "PYTHONPATH": str(ROOT),
        }
        arguments = [tmp_path / "weights", image, output]
        run = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments],
            env={**os.environ, **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        scheduler.shutdown()
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stdout.splitlines() if "DEBUG" not in line]
    assert said[0] == "{'cuda:0'} True True"
    assert said[1:] == ["CachedAnalysis Progress Partial Result", "CachedAnalysis Result"]
    tasks = [parse_qs(request.query) for request in requests if request.path == "/schedule"]
    assert len(tasks) == 3 and len({task["taskId"][0] for task in tasks}) == 1
    assert all(START_SECONDS <= int(task["durationSeconds"][0]) <= MAX_GPU_SECONDS for task in tasks)
    assert [request.path for request in requests].count("/allow") == 1  # one process for all
    *_, plain = tiny_pipeline.refine(tiny_pipeline.analyze(read_picture(image)), PLAN, 7, by_hand={0: 0, 1: 1})
    expected = write_png(plain.picture, tmp_path / "expected.png")
    with Image.open(output) as ours, Image.open(expected) as theirs:
        assert ours.tobytes() == theirs.tobytes()
