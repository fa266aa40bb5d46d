"""Time, work and memory of our plans and of stand-ins for other methods, side by side on this machine.

python -m patchscaler bench -o OUT

Every row is measured in a process of its own (measure.py), one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from patchscaler.device import pick_device
from patchscaler.evaluation import bench_tables as tables
from patchscaler.evaluation.measure import in_new_process
from patchscaler.evaluation.standins import STANDINS
from patchscaler.loading import DEFAULT_WEIGHTS
from patchscaler.options import UsageError
from patchscaler.plan import PRESETS

DEFAULT_IMAGE = Path(__file__).parents[2] / "examples" / "1-astronaut.png"
SIZES = {512: 1, 2048: 4}  # output pixels along a side -> copies of the 128x128 tile in each direction
SCALING = {512: 1, 1024: 2, 2048: 4, 4096: 8}  # the same for the plot, with the paper's plan
REPEATS = {512: 5, 1024: 5, 2048: 2, 4096: 1}
GPU_REPEATS = 5  # the first one of a size is slow: it has the memory to get
BUDGET = 8.0  # seconds for the repeats of one small measurement


def bench(image: Path, weights: str | Path, devices: Sequence[str], out: Path, quick: bool = False) -> str:
    """Measure everything and write bench.json, bench.png and bench.md, which is returned.

    A device that is not there has rows that say "not measured". ``quick`` leaves out the large outputs and the
    stand-ins, whose cost is the same on every machine but its speed.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "image": image.name, "weights": str(weights), "quick": quick, "devices": {}}
    for device in devices:
        if device == "cuda" and not torch.cuda.is_available():
            report["devices"][device] = None
            continue
        report["devices"][device] = _device(device, {"image": str(image), "weights": str(weights)}, quick)
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    tables.plot(report, out / "bench.png")
    text = tables.markdown(report)
    (out / "bench.md").write_text(text, encoding="utf-8")
    return text


def _device(device: str, common: dict, quick: bool) -> dict:
    """All that is measured on one device."""
    common = {"device": device, **common}
    sizes, scaling = ({512: 1}, {512: 1, 1024: 2}) if quick else (SIZES, SCALING)
    found: dict = {"ours": {}, "scaling": {}, "stand-ins": {}}
    found |= in_new_process({"kind": "rates", "budget": BUDGET / 4, **common})
    for side, tiles in sorted({**sizes, **scaling}.items()):
        for name, plan in PRESETS.items():
            if side not in sizes and name != "paper":
                continue
            repeats = REPEATS[side] if device == "cpu" else GPU_REPEATS
            task = {"kind": "ours", "plan": asdict(plan), "tiles": tiles, "repeats": repeats, **common}
            # FLOPs are counted once for each size in the table; those of the sizes that are only timed are left out.
            known = found["scaling"].get(str(side if side in sizes else min(sizes)), {})
            result = in_new_process({**task, "work": known.get("work")})
            if side in sizes:
                found["ours"].setdefault(str(side), {})[name] = result
            else:
                del result["work"], result["flops"]
            if name == "paper":
                found["scaling"][str(side)] = result
    found["several"] = _several(device, {"tiles": 1 if quick else 2, **common})
    for name in () if quick else STANDINS:
        found["stand-ins"][name] = in_new_process({"kind": "stand-in", "name": name, "budget": BUDGET, **common})
    return found


def _several(device: str, common: dict) -> dict | None:
    """The refinement on all GPUs, or on two workers that have half of the cores each; None where there is but one."""
    devices, task = ["cpu", "cpu"], {"kind": "several", "plan": asdict(PRESETS["paper"]), "repeats": 2}
    if device == "cpu":
        task["threads"] = machine()["cores"] // 2
    else:
        devices = [f"{device}:{index}" for index in range(torch.accelerator.device_count())]
    few = task.get("threads") == 0 or len(devices) < 2
    return None if few else in_new_process({**common, **task, "devices": devices})


def machine() -> dict:
    """What the figures hold for."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "gpus": gpus, "torch": torch.__version__, "python": platform.python_version()}


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `bench`."""
    parser = commands.add_parser("bench", help="time, work and memory beside stand-ins for other methods")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, help="folder for bench.md, bench.json and bench.png")
    add("--image", type=Path, default=DEFAULT_IMAGE, help="its central 128x128 are upscaled (default: an example)")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    add("--device", help="auto, cpu or cuda (default: cpu, and cuda if there is one)")
    add("--quick", action="store_true", help="small outputs only, without the stand-ins")


def run(args: argparse.Namespace) -> int:
    try:
        devices = [pick_device(args.device).type] if args.device else ["cpu", "cuda"]
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        print(bench(args.image, args.weights, devices, args.out, args.quick), end="")
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
