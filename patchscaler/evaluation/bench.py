"""Time, work and memory of our plans beside stand-ins for other methods, on this machine.

python -m patchscaler bench -o OUT

Every row is measured in a process of its own, one after the other, so that its peak memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchscaler.device import Stopwatch, pick_device, pick_dtype
from patchscaler.evaluation import standins
from patchscaler.evaluation.pairs import read_image
from patchscaler.evaluation.tables import table
from patchscaler.images import Picture
from patchscaler.loading import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.options import UsageError
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS, PRESETS, SamplingPlan

DEFAULT_IMAGE = Path(__file__).parents[2] / "examples" / "1-astronaut.png"
TILE = 128  # input pixels along a side of the smallest picture; larger ones repeat it
REPEATS = {512: 5, 1024: 5, 2048: 2, 4096: 1}  # output pixels along a side -> runs of each plan
SIZES = (512, 2048)  # sides at which every preset is measured, not only the paper's plan
BUDGET = 8.0  # seconds for the repeats of one call of a stand-in
STAGES = ("encode", "restore", "retrieve", *GROUPS, "decode", "color")
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
    """Measure everything and write bench.json, bench.png and bench.md, which is returned.

    A device that is not there has a section that says "not measured". `quick` leaves out the large outputs and the
    stand-ins, whose cost is the same on every machine but its speed.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "image": image.name, "weights": str(weights), "quick": quick, "devices": {}}
    for device in devices:
        there = device != "cuda" or torch.cuda.is_available()
        common = {"device": device, "image": str(image), "weights": str(weights)}
        report["devices"][device] = _device(common, quick) if there else None
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _plot(report, out / "bench.png")
    text = markdown(report)
    (out / "bench.md").write_text(text, encoding="utf-8")
    return text


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


def _device(common: dict, quick: bool) -> dict:
    """All that is measured on one device."""
    found: dict = {"ours": {}, "scaling": {}, "stand-ins": {}}
    for side, repeats in REPEATS.items():
        if quick and side > 1024:
            continue
        for name in PRESETS if side in SIZES else ("paper",):
            task = {"kind": "ours", "plan": name, "tiles": side // (SCALE * TILE), "repeats": repeats, **common}
            row = in_new_process(task)
            if side in SIZES:
                found["ours"].setdefault(str(side), {})[name] = row
            if name == "paper":
                found["scaling"][str(side)] = row
    several = _several(common["device"])
    task = {"kind": "several", "plan": "paper", "tiles": 1 if quick else 2, "repeats": 2, **common}
    found["several"] = in_new_process({**task, **several}) if several else None
    for name in () if quick else standins.STANDINS:
        found["stand-ins"][name] = in_new_process({"kind": "stand-in", "name": name, "budget": BUDGET, **common})
    return found


def _several(device: str) -> dict | None:
    """All GPUs, or two workers with half of the cores each; None where there is but one."""
    if device == "cpu":
        threads = machine()["cores"] // 2
        return {"devices": ["cpu", "cpu"], "threads": threads} if threads else None
    devices = [f"{device}:{index}" for index in range(torch.accelerator.device_count())]
    return {"devices": devices} if len(devices) > 1 else None


def in_new_process(task: dict, timeout: float = 900) -> dict:
    """Measure in a new process, of the task's number of threads if it has one.

    Raises RuntimeError with the last line that it wrote to stderr if it fails.
    """
    about = [f"{key} {task[key]}" for key in ("device", "name", "tiles", "plan") if key in task]
    print(f"measuring {task['kind']}: {', '.join(about)}", file=sys.stderr)
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    threads = {"OMP_NUM_THREADS": str(task["threads"])} if "threads" in task else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(f"{task}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(done.stdout.splitlines()[-1])


def tiled(image: str | Path, tiles: int) -> Picture:
    """The central TILE x TILE pixels of an image, `tiles` times in each direction, every other one mirrored."""
    rgb = read_image(Path(image)).rgb  # 3xHxW
    height, width = rgb.shape[-2:]
    if min(height, width) < TILE:
        raise ValueError(f"{image} is {width}x{height}; at least {TILE}x{TILE} is needed")
    top, left = (height - TILE) // 2, (width - TILE) // 2
    tile = rgb[:, top : top + TILE, left : left + TILE]
    row = torch.cat([tile.flip(-1) if n % 2 else tile for n in range(tiles)], dim=-1)
    return Picture(torch.cat([row.flip(-2) if n % 2 else row for n in range(tiles)], dim=-2))


def ours(task: dict) -> dict:
    """A plan on `tiled`: the fastest run with its stages and groups, the peak memory, and the FLOPs of a run."""
    device = torch.device(task["device"])
    pipeline, picture, plan = _prepare(task, device)
    pipeline(tiled(task["image"], 1), PRESETS["fast"])  # what a device does only once counts against no plan
    seconds = math.inf
    for _ in range(task["repeats"]):
        began = time.perf_counter()
        again = pipeline(picture, plan)
        if (elapsed := time.perf_counter() - began) < seconds:
            seconds, result = elapsed, again
    peak = peak_memory(device)
    with FlopCounterMode(display=False) as counter:
        pipeline(picture, plan)
    return {
        "seconds": seconds,
        "stages": result.seconds | {group.name: group.seconds for group in result.groups},
        "patches": [group.patches for group in result.groups],
        "evaluations": sum(group.evaluations for group in result.groups),
        "pixels": result.picture.height * result.picture.width,
        "flops": counter.get_total_flops(),
        "peak_bytes": peak,
        "dtype": result.dtype,
    }


def several(task: dict) -> dict:
    """Seconds of a refinement, to the pixels, on the first of the task's devices alone and on all of them."""
    pipeline, picture, plan = _prepare(task, task["devices"][0])
    analysis, seconds = pipeline.analyze(picture), []
    for others in ([], task["devices"][1:]):
        pipeline.refine_on(others)
        runs = []
        for _ in range(1 + task["repeats"]):  # the first one warms up
            began = time.perf_counter()
            [*pipeline.refine(analysis, plan)]
            runs.append(time.perf_counter() - began)
        seconds.append(min(runs[1:]))
    return {"devices": task["devices"], "side": SCALE * picture.width, "one": seconds[0], "all": seconds[1]}


def stand_in(task: dict) -> dict:
    """Encode, one step and decode of a stand-in's tile: shortest seconds, FLOPs, and the peak memory of it all."""
    device = torch.device(task["device"])
    kind = standins.STANDINS[task["name"]]
    with torch.inference_mode():
        calls = standins.calls(kind, device, pick_dtype(device))
        seconds = {name: _shortest_seconds(call, device, task["budget"]) for name, call in calls.items()}
    return {"seconds": seconds, "flops": standins.count_flops(kind), "peak_bytes": peak_memory(device)}


def _prepare(task: dict, device: torch.device | str) -> tuple[PatchScalerPipeline, Picture, SamplingPlan]:
    return load_pipeline(task["weights"], device), tiled(task["image"], task["tiles"]), PRESETS[task["plan"]]


def peak_memory(device: torch.device) -> int:
    """Bytes: CUDA's own counter on CUDA, else the largest resident set of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage would also count the parent, as it was when it started this process
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource  # not there on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _shortest_seconds(call: Callable, device: torch.device, budget: float) -> float:
    """The shortest of as many calls as fit into `budget` seconds; what else runs here only ever makes one longer."""
    clock, times = Stopwatch(device), []
    while not times or sum(times) < budget:
        call()
        times.append(clock.lap())
    return min(times)


def markdown(report: dict) -> str:
    """The whole report. The section of a device that was not there says "not measured"."""
    about = report["machine"]
    lines = [
        "# Bench",
        "",
        f"{about['cpu']}, {about['cores']} cores; GPUs: {', '.join(about['gpus']) or 'none'}; PyTorch "
        f"{about['torch']}. Input: the middle 128² of `{report['image']}`, mirrored and repeated for larger outputs.",
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
        measured = [
            (f"ours, {name}", f"{row['evaluations']} patches", row["flops"], row["seconds"], row["peak_bytes"])
            for name, row in plans.items()
        ]
        for name, row in found["stand-ins"].items():
            for steps in standins.STANDINS[name].steps:
                label = f"{standins.STANDINS[name].label}, {steps} step{'s' * (steps > 1)} *(work-only)*"
                flops, seconds = (stand_in_total(row[what], steps, int(side)) for what in ("flops", "seconds"))
                latents = f"{steps * standins.tiles(int(side))} latents"
                measured.append((label, latents, flops, seconds, row["peak_bytes"]))
        for label, evaluations, flops, seconds, peak in measured:
            ratio = f"{plans['paper']['seconds'] / seconds:.3f}"
            rows.append([label, f"{side}²", evaluations, f"{flops / 1e12:.2f}", _s(seconds), _gb(peak), ratio])
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
            rows.append([about, *(_s(row["stages"][stage]) for stage in STAGES)])
    return table(["seconds by stage", *STAGES], rows)


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


def _plot(report: dict, path: Path) -> None:
    """Seconds and peak memory of the paper's plan against output pixels."""
    from matplotlib.figure import Figure  # here, because `upscale` starts without it

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, key, label, unit in zip(
        figure.subplots(1, 2), ("seconds", "peak_bytes"), ("seconds", "peak memory, GB"), (1, 1e9)
    ):
        for device, found in report["devices"].items():
            rows = found["scaling"].values() if found else ()
            axes.plot([row["pixels"] / 1e6 for row in rows], [row[key] / unit for row in rows], "o-", label=device)
        axes.set(xlabel="output, million pixels", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


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


KINDS = {"ours": ours, "several": several, "stand-in": stand_in}

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(KINDS[task["kind"]](task)))
