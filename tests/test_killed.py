"""Processes that are killed while they work: nothing is half-written, and the next one is healthy."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from corpus import encoded, noise
from PIL import Image
from service import SLOW, file_data

from patchscaler.__main__ import main
from patchscaler.loading import CheckpointError, write_checksums

ROOT = Path(__file__).parent.parent
PATIENCE = 120


@pytest.fixture(scope="module")
def weights(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_pipeline.save_pretrained(folder)
    write_checksums(folder)
    return folder


def wait_for(true, process: subprocess.Popen) -> None:
    ends = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.002)


@pytest.mark.slow
def test_a_command_that_is_ended_while_it_writes_leaves_whole_files_only(weights, tmp_path):
    for name, side in (("a", 8), ("c", 400)):
        Image.fromarray(noise(side, side)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "patchscaler", "upscale", *(str(tmp_path / f"{name}.png") for name in "abc")]
    options = ["--weights", str(weights), "--start", "1,1,1", "--steps", "1,1,1", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def end(how: signal.Signals) -> None:
        out = tmp_path / how.name
        process = subprocess.Popen([*command, "-o", str(out), *options], cwd=ROOT, **pipes)
        wait_for((out / "a.png").exists, process)
        wait_for(lambda: is_writing(out), process)
        process.send_signal(how)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == (130 if how == signal.SIGTERM else -how)
        assert [path.name for path in out.glob("*.png")] == ["a.png"]  # it went on past the bad file
        assert "b.png: not a readable" in errors and "Traceback" not in errors

    with ThreadPoolExecutor(2) as both:
        list(both.map(end, (signal.SIGKILL, signal.SIGTERM)))
    assert os.listdir(tmp_path / "SIGTERM") == ["a.png"]  # there was time to tidy up


def is_writing(out: Path) -> bool:
    with suppress(FileNotFoundError):
        return any(path.stat().st_size for path in out.glob(".*.tmp"))
    return False


class Server:
    """app.py in a process of its own."""

    def __init__(self, weights: Path, port: int, uploads: Path, log: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        settings = {
            "PATCHSCALER_WEIGHTS": str(weights),
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(uploads),
        }
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output
            )
        wait_for(self.answers, self.process)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health").status_code == 200
        except httpx.TransportError:
            return False

    def start_a_long_run(self) -> None:
        files = {"files": ("photo.png", encoded(Image.fromarray(noise(300, 300)), "PNG"))}
        path = httpx.post(f"{self.address}/gradio_api/upload", files=files).json()[0]
        data = [file_data(path), SLOW.gamma1, SLOW.gamma2, SLOW.start, SLOW.steps, 0, True]
        httpx.post(f"{self.address}/gradio_api/call/upscale", json={"data": data}).raise_for_status()
        wait_for(lambda: httpx.get(f"{self.address}/health").json()["worker"]["running_seconds"], self.process)
        time.sleep(0.5)


@pytest.mark.slow
def test_a_server_that_is_ended_in_a_run_starts_again_healthy(weights, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uploads, log = tmp_path / "uploads", tmp_path / "log.txt"
    server = Server(weights, port, uploads, log)
    server.start_a_long_run()
    server.process.kill()
    server.process.wait(PATIENCE)

    examples = {path.parent for path in uploads.rglob("*") if path.name in os.listdir(ROOT / "examples")}
    left = [path for path in uploads.iterdir() if path not in examples]
    assert left and examples
    for path in (*uploads.rglob("*"), *uploads.iterdir()):
        os.utime(path, (1, 1))
    server = Server(weights, port, uploads, log)
    wait_for(lambda: not any(path.exists() for path in left), server.process)
    assert all(path.exists() for path in examples)  # of this process too
    server.start_a_long_run()
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 0 and time.monotonic() - began < 15
    assert "Traceback" not in log.read_text()


def test_altered_weights_are_refused_with_the_files_name_by_command_and_page(weights, tmp_path, monkeypatch, capsys):
    file = weights / "grm" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    try:
        for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            file.write_bytes(data)
            arguments = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--weights", str(weights)]
            with pytest.raises(SystemExit, match="2"):
                main(arguments)
            assert f"{file} was altered or cut off" in capsys.readouterr().err
            monkeypatch.setenv("PATCHSCALER_WEIGHTS", str(weights))
            with pytest.raises(CheckpointError, match="grm/diffusion_pytorch_model.safetensors was altered or cut off"):
                runpy.run_path(str(ROOT / "app.py"))
    finally:
        file.write_bytes(whole)
    assert not list((tmp_path / "out").iterdir())
