"""Load on a page of its own on 127.0.0.1: python tests/load/soak.py [--clients 16 --light 5000 --heavy 50].

Each client opens the page's session, runs one picture, and then sends light events as moved dials do, besides its
share of whole runs. Prints requests per second, the 95th percentile, errors, and how memory and disk grew between
the end of the warm-up and the end. Exits with 1 if there were errors or memory grew by 60 MB or more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
GROWTH = 60  # MB
PATIENCE = 600  # seconds
PARTS = 5  # after each of which the memory is looked at
LIGHT = ("regrouped", "seams", "new_seed", "compared")
# Quick, yet no group is without steps; the dials as they are named in the page.
QUICK = {"gamma1": 0.9, "gamma2": 0.5, "start1": 50, "start2": 50, "start3": 50, "steps1": 1, "steps2": 1, "steps3": 1}


class Visitor:
    """One browser's worth of requests."""

    def __init__(self, address: str, number: int) -> None:
        self.session = f"visitor{number}"
        self.number = number
        self.web = httpx.Client(base_url=address, timeout=PATIENCE)
        config = self.web.get("/config").json()
        self._events = {event["api_name"]: event for event in config["dependencies"]}
        self._elements = {part["id"]: part["props"] for part in config["components"]}
        self._image: dict | None = None

    def upload(self, path: Path) -> None:
        answer = self.web.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())})
        self._image = {"path": answer.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}

    def light(self, name: str, gamma: float = QUICK["gamma1"]) -> bool:
        """Whether the event was answered with data."""
        answer = self.web.post("/gradio_api/run/predict", json=self._body(name, gamma))
        return answer.status_code == 200 and "data" in answer.json()

    def run(self) -> bool:
        """Press Run and read until the end. Whether there was one without an error."""
        answer = self.web.post("/gradio_api/queue/join", json=self._body("run", QUICK["gamma1"]))
        if answer.status_code != 200:
            return False
        good = False
        with self.web.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                good |= message.get("msg") == "process_completed" and message["success"]
                if message.get("msg") == "close_stream":
                    break
        return good

    def _body(self, name: str, gamma: float) -> dict[str, Any]:
        event = self._events[name]
        # Another seed at each run, so that there is something to sample.
        given = {**QUICK, "input": self._image, "gamma1": gamma, "seed": time.monotonic_ns() % 10**9}
        parts = [self._elements[part] for part in event["inputs"]]
        data = [given.get(part.get("elem_id"), part.get("value") if part.get("elem_id") else None) for part in parts]
        return {"data": data, "fn_index": event["id"], "session_hash": self.session}


class Load:
    """So many events of both kinds, spread over the visitors, each of which waits for its answer."""

    def __init__(self, visitors: list[Visitor]) -> None:
        self._visitors = visitors
        self.seconds: list[float] = []  # of each light event
        self.errors = 0

    def send(self, light: int, heavy: int) -> float:
        """Seconds until all are answered."""
        count = len(self._visitors)
        threads = [
            threading.Thread(target=self._visit, args=(visitor, share(light, i, count), share(heavy, i, count)))
            for i, visitor in enumerate(self._visitors)
        ]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    def _visit(self, visitor: Visitor, light: int, heavy: int) -> None:
        total = light + heavy
        for i in range(total):
            is_heavy = (i + 1) * heavy // total > i * heavy // total
            began = time.perf_counter()
            try:
                name = LIGHT[i % len(LIGHT)]
                good = visitor.run() if is_heavy else visitor.light(name, round(0.6 + i % 40 / 100, 2))
            except (httpx.HTTPError, ValueError) as error:
                print(f"{visitor.session}: {error!r}", file=sys.stderr)
                good = False
            self.errors += not good
            if not is_heavy:
                self.seconds.append(time.perf_counter() - began)


def share(events: int, index: int, count: int) -> int:
    return events * (index + 1) // count - events * index // count


def megabytes(process: subprocess.Popen) -> float:
    """Resident memory."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def disk(folder: Path) -> float:
    """MB in files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def serve(weights: str, folder: Path, log: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "PATCHSCALER_WEIGHTS": weights,
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(PATIENCE):
        try:
            httpx.get(f"{address}/health").raise_for_status()
            return server, address
        except httpx.HTTPError:
            if server.poll() is not None:
                break
            time.sleep(1)
    raise SystemExit(f"the page did not start:\n{log.read_text()}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--light", type=int, default=5000)
    parser.add_argument("--heavy", type=int, default=50)
    parser.add_argument("--weights", default=str(ROOT / "assets/weights/compact"))
    parser.add_argument("--image", type=Path, default=sorted((ROOT / "examples").glob("*.png"))[0])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        uploads, log = Path(folder) / "uploads", Path(folder) / "log.txt"
        server, address = serve(args.weights, uploads, log)
        try:
            visitors = [Visitor(address, number) for number in range(args.clients)]
            for visitor in visitors:
                visitor.upload(args.image)
            fresh = megabytes(server)
            # One picture for everybody, and then a tenth of the events, until every cache is as full as it gets.
            warm = Load(visitors)
            warm.send(0, args.clients)
            warm.send(max(args.clients, args.light // 10), args.heavy // 10)
            before, disk_before = megabytes(server), disk(uploads)
            load = Load(visitors)
            took, memory = 0.0, []
            for part in range(PARTS):
                took += load.send(share(args.light, part, PARTS), share(args.heavy, part, PARTS))
                memory.append(megabytes(server))
            growth, disk_growth = memory[-1] - before, disk(uploads) - disk_before
            health = httpx.get(f"{address}/health").json()
        finally:
            server.terminate()
            server.wait(PATIENCE)
        tracebacks = log.read_text().count("Traceback")
    errors = warm.errors + load.errors
    p95 = statistics.quantiles(load.seconds, n=20)[-1]
    print(f"{args.clients} clients, {args.light} light and {args.heavy} heavy events in {took:.1f} s")
    print(f"{(args.light + args.heavy) / took:.1f} requests/s, light events' 95th percentile {1000 * p95:.0f} ms")
    print(f"{errors} errors, {tracebacks} tracebacks")
    later = ", ".join(f"{each:.0f}" for each in memory)
    print(f"memory {fresh:.0f} MB at first, {before:.0f} MB when warm, then {later}: {growth:.1f} MB more")
    print(f"disk {disk_before:.0f} MB, then {disk_growth:.1f} MB more")
    print(f"health afterwards: {health}")
    return int(bool(errors or tracebacks) or growth >= GROWTH or health["status"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
