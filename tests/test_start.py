"""`python app.py` behind proxies that cannot be used."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
PATIENCE = 180  # seconds


@pytest.mark.slow
def test_the_page_starts_and_answers_behind_proxies(weights, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    proxies = {
        "ALL_PROXY": "socks5://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",  # nothing listens there
        "https_proxy": "socks://127.0.0.1:9",  # as desktops write it, and httpx does not know it
        "NO_PROXY": "example.com",
    }
    settings = {
        "PATCHSCALER_WEIGHTS": str(weights),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(tmp_path / "uploads"),
        "PYTHONUNBUFFERED": "1",
    }
    surroundings = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    surroundings.pop("GRADIO_ANALYTICS_ENABLED", None)
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=ROOT,
            env={**surroundings, **settings, **proxies},
            stdout=output,
            stderr=output,
        )
    try:
        ends = time.monotonic() + PATIENCE
        while "public link" not in log.read_text():  # printed after Gradio has asked the page itself
            assert process.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        with httpx.Client(trust_env=False) as client:
            assert client.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
            assert client.get(f"http://127.0.0.1:{port}/").status_code == 200
            assert client.get(f"http://127.0.0.1:{port}/config").json()["analytics_enabled"] is False
    finally:
        process.terminate()
        process.wait(PATIENCE)
    said = log.read_text()
    assert "https_proxy is not used: socks is none of http, https" in said and "Traceback" not in said
