"""Time, work and memory of our plans beside stand-ins for other methods, on this machine.

python -m patchscaler bench -o OUT

Every row is measured in a process of its own, one after the other, so that its peak memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from patchscaler.device import pick_device, pick_dtype
from patchscaler.evaluation import outputs, standins
from patchscaler.evaluation.pairs import costs, read_image
from patchscaler.evaluation.tables import table
from patchscaler.images import Picture
from patchscaler.loading import DEFAULT_WEIGHTS, CheckpointError, load_pipeline
from patchscaler.options import UsageError
from patchscaler.pipeline import SCALE
from patchscaler.plan import GROUPS, PRESETS

DEFAULT_IMAGE = Path(__file__).parents[2] / "examples" / "1-astronaut.png"
TILE = 128  # input pixels along a side of the smallest picture; larger ones repeat it
REPEATS = {512: 5, 1024: 5, 2048: 2, 4096: 1}  # output pixels along a side → runs of each plan
SIZES = (512, 2048)  # sides at which every preset is measured, not only the paper's plan
QUICK = 1024  # the largest side of a quick bench
BUDGET = 8.0  # seconds for the repeats of one part of a stand-in
INPUT = "Input: the middle 128² of"
MARKS = {"bench.md": INPUT, "bench.json": '{\n "machine": {\n  "cpu": '}  # as `outputs.prepare` takes them
COLUMNS = ("encode", "restore", "retrieve", *GROUPS, "decode", "color")
NOTES = f"""\
- Seconds are from the decoded input to the output's pixels, models loaded; the fastest of the runs. Peak memory is the
  largest resident set of the measuring process, Python and PyTorch included; on CUDA, PyTorch's own counter.
- Stand-ins are *work-only*: diffusers classes of the published sizes with random weights, in the same precision. They
  give no picture. They are lower bounds: no control network, text encoder, guidance or colour fix. Their seconds are
  the measured encode and decode, and one measured step times the number of steps.
- Outputs larger than {standins.TILE}² are {standins.TILE}² tiles, {standins.TILE_STRIDE} apart: those rows are one
  tile's, times the number of tiles.
"""


def bench(image: Path, weights: str | Path, devices: Sequence[str], out: Path, quick: bool = False) -> str:
    """Measure everything and write bench.json and bench.md, which is returned.

    A device that is not there has a section that says "not measured". `quick` leaves out the large outputs and the
    stand-ins, whose cost is the same on every machine but its speed.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "image": image.name, "weights": str(weights), "quick": quick, "devices": {}}
    for device in devices:
        there = device != "cuda" or torch.cuda.is_available()
        report["devices"][device] = _device(device, image, weights, quick) if there else None
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report)
    (out / "bench.md").write_text(text, encoding="utf-8")
    return text


def machine() -> dict:
    """What the figures hold for."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _device(device: str, image: Path, weights: str | Path, quick: bool) -> dict:
    """All that is measured on one device."""
    rows = {
        side: {
            plan: in_new_process(ours, weights, image, side, plan, device, repeats)
            for plan in (PRESETS if side in SIZES else ("paper",))
        }
        for side, repeats in REPEATS.items()
        if side <= QUICK or not quick
    }
    devices = _several(device)
    names = () if quick else standins.STANDINS
    return {
        "ours": {str(side): plans for side, plans in rows.items() if side in SIZES},
        "scaling": {str(side): plans["paper"] for side, plans in rows.items()},
        "several": in_new_process(several, weights, image, SIZES[0] if quick else QUICK, devices) if devices else None,
        "stand-ins": {name: in_new_process(stand_in, name, device, BUDGET) for name in names},
    }


def _several(device: str) -> list[str]:
    """All GPUs, or two workers with half of the cores each; none where there is but one."""
    if device == "cpu":
        return ["cpu", "cpu"] if machine()["cores"] > 1 else []
    devices = [f"{device}:{index}" for index in range(torch.accelerator.device_count())]
    return devices if len(devices) > 1 else []


def in_new_process(measure: Callable[..., dict], *arguments: object) -> dict:
    """`measure(*arguments)` in a new Python. Raises what it raises, or BrokenExecutor if the process is killed."""
    print("measuring", measure.__name__, *(each for each in arguments if not isinstance(each, Path)), file=sys.stderr)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def tiled(image: Path, tiles: int) -> Picture:
    """The central TILE×TILE pixels of an image, `tiles` times in each direction, every other one mirrored."""
    rgb = read_image(image).rgb  # 3×H×W
    height, width = rgb.shape[-2:]
    if min(height, width) < TILE:
        raise ValueError(f"{image} is {width}×{height}; at least {TILE}×{TILE} is needed")
    top, left = (height - TILE) // 2, (width - TILE) // 2
    tile = rgb[:, top : top + TILE, left : left + TILE]
    row = torch.cat([tile.flip(-1) if n % 2 else tile for n in range(tiles)], dim=-1)
    return Picture(torch.cat([row.flip(-2) if n % 2 else row for n in range(tiles)], dim=-2))


def ours(weights: str | Path, image: Path, side: int, plan: str, device: str, repeats: int) -> dict:
    """A preset at an output of `side` pixels: the fastest run with its stages and groups, peak memory, and FLOPs."""
    pipeline, picture = load_pipeline(weights, device), tiled(image, side // (SCALE * TILE))
    pipeline(tiled(image, 1), PRESETS["fast"])  # what a device does only once counts against no plan
    runs = (pipeline(picture, PRESETS[plan]) for _ in range(repeats))
    result = min(runs, key=lambda run: costs(run)["seconds"])
    peak = peak_memory(device)
    with FlopCounterMode(display=False) as counter:
        pipeline(picture, PRESETS[plan])
    return {
        **costs(result),
        "stages": result.seconds | {group.name: group.seconds for group in result.groups},
        "patches": [group.patches for group in result.groups],
        "pixels": result.picture.height * result.picture.width,
        "flops": counter.get_total_flops(),
        "peak_bytes": peak,
        "dtype": result.dtype,
    }


def several(weights: str | Path, image: Path, side: int, devices: Sequence[str]) -> dict:
    """Seconds of the paper's plan's refinement, to the pixels, on the first of the devices alone and on all of them."""
    if "cpu" in devices:
        torch.set_num_threads(machine()["cores"] // len(devices))  # of each
    pipeline, seconds = load_pipeline(weights, devices[0]), {}
    analysis = pipeline.analyze(tiled(image, side // (SCALE * TILE)))
    for name, others in (("one", []), ("all", devices[1:])):
        pipeline.refine_on(others)
        _warming, *runs = timeit.repeat(lambda: [*pipeline.refine(analysis, PRESETS["paper"])], number=1, repeat=3)
        seconds[name] = min(runs)
    return {"devices": devices, "side": side, **seconds}


def stand_in(name: str, device: str, budget: float) -> dict:
    """Encode, one step and decode of a stand-in's tile: shortest seconds, FLOPs, and the peak memory of it all.

    Each is called for `budget` seconds; what else runs here only ever makes a call longer.
    """
    kind, place, threads = standins.STANDINS[name], torch.device(device), torch.get_num_threads()
    with torch.inference_mode():
        calls = standins.calls(kind, place, pick_dtype(place))
        timers = {part: Timer("call()", globals={"call": call}, num_threads=threads) for part, call in calls.items()}
        seconds = {part: min(timer.blocked_autorange(min_run_time=budget).times) for part, timer in timers.items()}
    return {"seconds": seconds, "flops": standins.count_flops(kind), "peak_bytes": peak_memory(device)}


def peak_memory(device: str) -> int:
    """Bytes: CUDA's own counter on CUDA, else the largest resident set of this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the parent, as it was when it started this process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource  # not there on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def markdown(report: dict) -> str:
    """The whole report. The section of a device that was not there says "not measured"."""
    about = report["machine"]
    lines = [
        "# Bench",
        "",
        f"{about['cpu']}, {about['cores']} cores; GPUs: {', '.join(about['gpus']) or 'none'}; PyTorch "
        f"{about['torch']}. {INPUT} `{report['image']}`, mirrored and repeated for larger outputs.",
    ]
    for device, found in report["devices"].items():
        lines += ["", f"## {device.upper()}"]
        if found is None:
            lines += ["", "not measured: PyTorch finds no such device here."]
            continue
        for section in (_methods(found), _stages(found), _scaling(found), _together(found["several"])):
            lines += ["", *section]
    return "\n".join(lines) + "\n\n" + NOTES


def _methods(found: dict) -> list[str]:
    """Ours and the stand-ins: one line for each method and output."""
    rows = []
    for side, plans in found["ours"].items():
        measured = [(f"ours, {name}", f"{row['evaluations']} patches", row) for name, row in plans.items()]
        for name, row in found["stand-ins"].items():
            for steps in standins.STANDINS[name].steps:
                label = f"{standins.STANDINS[name].label}, {steps} step{'s' * (steps > 1)} *(work-only)*"
                total = {what: stand_in_total(row[what], steps, int(side)) for what in ("flops", "seconds")}
                measured.append((label, f"{steps * standins.tiles(int(side))} latents", row | total))
        for label, evaluations, row in measured:
            ratio = f"{plans['paper']['seconds'] / row['seconds']:.3f}"
            work, seconds, memory = f"{row['flops'] / 1e12:.2f}", _s(row["seconds"]), _gb(row["peak_bytes"])
            rows.append([label, f"{side}²", evaluations, work, seconds, memory, ratio])
    return table(["method", "output", "evaluations", "TFLOP", "seconds", "peak memory", "paper's plan / this"], rows)


def stand_in_total(parts: dict[str, float], steps: int, side: int) -> float:
    """Seconds or FLOPs of a stand-in: encode, `steps` steps and decode, for each tile of a square output."""
    return standins.tiles(side) * (parts["encode"] + steps * parts["step"] + parts["decode"])


def _stages(found: dict) -> list[str]:
    """Seconds of every stage of ours."""
    rows = []
    for side, plans in found["ours"].items():
        for name, row in plans.items():
            about = f"{name}, {side}² ({', '.join(map(str, row['patches']))} patches)"
            rows.append([about, *(_s(row["stages"][stage]) for stage in COLUMNS)])
    return table(["seconds by stage", *COLUMNS], rows)


def _scaling(found: dict) -> list[str]:
    """The paper's plan at growing outputs of the same content."""
    rows = []
    for side, row in found["scaling"].items():
        megapixels = row["pixels"] / 1e6
        each = f"{row['seconds'] / megapixels:.2f}"
        patches, memory = str(sum(row["patches"])), _gb(row["peak_bytes"])
        rows.append([f"{side}²", f"{megapixels:.2f}", patches, _s(row["seconds"]), each, memory])
    return table(["paper's plan, output", "MP", "patches", "seconds", "seconds per MP", "peak memory"], rows)


def _together(check: dict | None) -> list[str]:
    if check is None:
        return ["Several devices: not measured, there is but one."]
    names, gain = ", ".join(check["devices"]), check["one"] / check["all"]
    text = f"{check['side']}², refinement on {names}: {_s(check['all'])}; on the first alone {_s(check['one'])}"
    return [f"{text} ({gain:.2f}x)." + (" Each has half of the cores." if "cpu" in names else "")]


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `bench`."""
    parser = commands.add_parser("bench", help="time, work and memory beside stand-ins for other methods")
    parser.set_defaults(run=run)
    add = parser.add_argument
    outputs.add_options(parser, "bench.md and bench.json")
    add("--image", type=Path, default=DEFAULT_IMAGE, help="its central 128×128 are upscaled (default: an example)")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    add("--device", help="auto, cpu or cuda (default: cpu, and cuda if there is one)")
    add("--quick", action="store_true", help="small outputs only, without the stand-ins")


def run(args: argparse.Namespace) -> int:
    try:
        devices = [pick_device(args.device).type] if args.device else ["cpu", "cuda"]
    except ValueError as error:
        raise UsageError(str(error)) from error
    outputs.prepare(args.out, MARKS, args.overwrite)
    try:
        print(bench(args.image, args.weights, devices, args.out, args.quick), end="")
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
