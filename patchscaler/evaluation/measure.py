"""One measurement of the bench, in a process of its own, so that the peak memory is its own too.

python -m patchscaler.evaluation.measure '{"kind": "ours", ...}' prints a line of JSON. `in_new_process` asks for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchscaler.device import pick_dtype
from patchscaler.evaluation import standins
from patchscaler.evaluation.components import read_image
from patchscaler.images import Picture
from patchscaler.loading import load_pipeline
from patchscaler.models import PatchDiT
from patchscaler.patches import PatchGrid, split
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.results import Analysis, Progress, Result
from patchscaler.sampling import make_batches
from patchscaler.several import makespan, place

TILE = 128  # input pixels along a side of the smallest picture; larger ones repeat it
BATCH = 64  # patches of Patch-DiT at once
ONE, TWO = (SamplingPlan(1, 0, start=(2, 2, 2), steps=(n, n, n)) for n in (1, 2))


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
    """The central TILE x TILE pixels of an image, ``tiles`` times in each direction, every other one mirrored."""
    rgb = read_image(Path(image)).rgb  # 3xHxW
    height, width = rgb.shape[-2:]
    if min(height, width) < TILE:
        raise ValueError(f"{image} is {width}x{height}; at least {TILE}x{TILE} is needed")
    top, left = (height - TILE) // 2, (width - TILE) // 2
    tile = rgb[:, top : top + TILE, left : left + TILE]
    row = torch.cat([tile.flip(-1) if n % 2 else tile for n in range(tiles)], dim=-1)
    return Picture(torch.cat([row.flip(-2) if n % 2 else row for n in range(tiles)], dim=-2))


def ours(task: dict) -> dict:
    """A plan on `tiled`: the fastest run, its groups and stages, FLOPs of each, and the peak memory.

    Seconds are wall time from the decoded input to the pixels of the output, models loaded. The task's ``work`` is
    that of another plan on the same picture, whose counting takes longer than a run; without it, it is counted.
    """
    device, plan = torch.device(task["device"]), SamplingPlan.from_json(json.dumps(task["plan"]))
    pipeline = load_pipeline(task["weights"], device)
    picture = tiled(task["image"], task["tiles"])
    _whole(pipeline, tiled(task["image"], 1), ONE)  # what a device does only once counts against nobody
    seconds = float("inf")
    for _ in range(task["repeats"]):
        begin = time.perf_counter()
        analysis, again = _whole(pipeline, picture, plan)
        if (elapsed := time.perf_counter() - begin) < seconds:
            seconds, result = elapsed, again
    peak = peak_memory(device)
    work = task.get("work") or count_work(pipeline, picture)
    return {
        "seconds": seconds,
        "runs": task["repeats"],
        "peak_bytes": peak,
        "pixels": result.picture.height * result.picture.width,
        "evaluations": sum(group.evaluations for group in result.groups),
        "patches": [group.patches for group in result.groups],
        "large_patches": large_patches(analysis, plan),
        "group_seconds": [group.seconds for group in result.groups],
        "stages": result.seconds,
        "work": work,
        "flops": _stage_flops(work, result),
        "dtype": result.dtype,
    }


def several(task: dict) -> dict:
    """Seconds of a refinement on the first of the task's devices alone, on all of them, and predicted for these."""
    pipeline = load_pipeline(task["weights"], task["devices"][0])
    plan = SamplingPlan.from_json(json.dumps(task["plan"]))
    picture = tiled(task["image"], task["tiles"])
    analysis, seconds = pipeline.analyze(picture), []
    for others in ([], task["devices"][1:]):
        pipeline.refine_on(others)
        runs = []
        for _ in range(1 + task["repeats"]):  # the first one warms up
            begin = time.perf_counter()
            for event in pipeline.refine(analysis, plan):
                if isinstance(event, Progress) and event.done == event.total:
                    elapsed = time.perf_counter() - begin
            runs.append((elapsed, event))
        seconds.append(min(elapsed for elapsed, _ in runs[1:]))
        if not others:
            _, alone = min(runs[1:], key=lambda timed: timed[0])
    groups = [group.patches for group in alone.groups], [group.seconds for group in alone.groups]
    predicted = predict(*groups, plan, len(task["devices"]), pipeline.fitting_batch())
    found = {"one": seconds[0], "all": seconds[1], "predicted": predicted}
    return {"devices": task["devices"], "side": SCALE * picture.width, **found}


def predict(
    patches: Sequence[int], seconds: Sequence[float], plan: SamplingPlan, devices: int, batch_size: int = BATCH
) -> float:
    """Seconds of the refinement on so many devices, from the patches and the seconds of each group on one.

    The cost model: an evaluation of a group's patch takes what it took on average; groups come one after another, and
    the batches of a group go to devices as `sample_on_several` hands them out.
    """
    total = 0.0
    for group, (count, spent) in enumerate(zip(patches, seconds, strict=True)):
        batches = place(make_batches(group, torch.arange(count), plan, batch_size), devices)
        total += makespan([spent / count * len(batch) for batch in batches], devices)
    return total


def standin(task: dict) -> dict:
    """Encode, one step and decode of a stand-in's tile: shortest seconds, FLOPs, and the peak memory of it all."""
    device = torch.device(task["device"])
    kind, dtype = standins.STANDINS[task["name"]], pick_dtype(device)
    flops = standins.count_flops(kind)
    with torch.inference_mode():
        calls = standins.ready(kind, device, dtype)
        seconds = {name: _shortest_seconds(call, device, budget=task["budget"]) for name, call in calls.items()}
    return {"seconds": seconds, "flops": flops, "peak_bytes": peak_memory(device), "dtype": str(dtype)[6:]}


@torch.inference_mode()
def rates(task: dict) -> dict:
    """FLOP/s of a large matrix product, of products of Patch-DiT's own sizes, and of Patch-DiT, by precision."""
    device = torch.device(task["device"])
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        pipeline = load_pipeline(task["weights"], device, dtype)
        dit, tokens = pipeline.transformer, pipeline.texture_encoder.config
        c, size = dit.config.channels, dit.config.size
        x_t, y0 = torch.randn(2, BATCH, c, size, size, device=device)
        length = tokens.top_k * (tokens.size // tokens.patch) ** 2
        keys = dit.prompt_keys(torch.randn(BATCH, length, dit.config.prompt_width, device=device))
        t = torch.tensor([500], device=device)
        with FlopCounterMode(display=False) as counter:
            dit(x_t, y0, t, keys)
        seconds = _shortest_seconds(lambda: dit(x_t, y0, t, keys), device, budget=task["budget"])  # noqa: B023
        own = [matrix_seconds(shape, dtype, device, task["budget"] / 8) * n for shape, n in dit_products(dit).items()]
        work = sum(2 * m * k * n * times for (m, k, n), times in dit_products(dit).items())
        large = (2048, 2048, 2048)
        found[str(dtype)[6:]] = {
            "large": 2 * 2048**3 / matrix_seconds(large, dtype, device, task["budget"] / 4),
            "own": work / sum(own),
            "patch_dit": counter.get_total_flops() / seconds,
        }
    return {"rates": found, "threads": torch.get_num_threads()}


def dit_products(dit: PatchDiT) -> dict[tuple[int, int, int], int]:
    """(M, K, N) -> how often one evaluation of BATCH patches multiplies MxK by KxN; attention's small ones apart."""
    config = dit.config
    rows, width = BATCH * (config.size // config.patch) ** 2, config.width
    products = {(rows, dit.embed.in_features, width): 1, (rows, width, dit.final.out_features): 1}
    for inputs, outputs in ((1, 3), (1, 1), (1, 1), (1, 1), (1, 4), (4, 1)):  # qkv, out, cross query and out, MLP
        shape = (rows, inputs * width, outputs * width)
        products[shape] = products.get(shape, 0) + config.depth
    return products


def matrix_seconds(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, budget: float) -> float:
    """Shortest seconds of a linear layer that multiplies MxK by KxN."""
    m, k, n = shape
    x, weight, bias = (torch.randn(size, device=device).to(dtype) for size in ((m, k), (n, k), (n,)))
    return _shortest_seconds(lambda: F.linear(x, weight, bias), device, budget)


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


def large_patches(analysis: Analysis, plan: SamplingPlan) -> list[int]:
    """Patches of each group if they were of 64x64 cells, as Stable Diffusion needs them (adapters.py)."""
    grid = PatchGrid(analysis.grid.height, analysis.grid.width, size=64, stride=48)
    confidence = split(analysis.confidence, grid).mean((1, 2, 3))  # N
    return assign(confidence, plan).bincount(minlength=len(GROUPS)).tolist()


def _whole(pipeline: PatchScalerPipeline, picture: Picture, plan: SamplingPlan) -> tuple[Analysis, Result]:
    analysis = pipeline.analyze(picture)
    *_, result = pipeline.refine(analysis, plan)
    return analysis, result


def _stage_flops(work: dict[str, float], result: Result) -> dict[str, float]:
    """FLOPs of every stage and group of a result."""
    flops = {stage: work[stage] for stage in ("encode", "restore", "retrieve", "decode")}
    for group in result.groups:
        flops[group.name] = group.evaluations * work["evaluation"] + group.patches * work["prompt"]
    return flops


def count_work(pipeline: PatchScalerPipeline, picture: Picture) -> dict[str, float]:
    """FLOPs of the stages of any plan, of one evaluation of a patch, and of its prompt's keys.

    Counted on two short runs: what a second step adds to a first is one evaluation of each patch. The stages of the
    analysis are told apart by the networks that they call.
    """
    counts = dict.fromkeys(("encode", "restore", "decode"), 0)
    with FlopCounterMode(display=False) as counter:
        vae, grm = pipeline.vae, pipeline.grm
        calls = (vae, "encode", "encode"), (grm, "forward", "restore"), (vae, "decode", "decode")
        for module, method, stage in calls:
            setattr(module, method, _counted(getattr(module, method), counter, counts, stage))
        try:
            analysis = pipeline.analyze(picture)
            counts["retrieve"] = counter.get_total_flops() - sum(counts.values())
            sampling = []
            for plan in (ONE, TWO):
                before, decoded = counter.get_total_flops(), counts["decode"]
                [*pipeline.refine(analysis, plan)]
                again = counts["decode"] - decoded
                sampling.append(counter.get_total_flops() - before - again)
            counts["decode"] -= again  # a result has the coarse decode and one of its own, not two
        finally:
            for module, method, _ in calls:
                delattr(module, method)
    patches = len(analysis.grid)
    evaluation = (sampling[1] - sampling[0]) / patches
    return {**counts, "evaluation": evaluation, "prompt": sampling[0] / patches - evaluation}


def _counted(function: Callable, counter: FlopCounterMode, counts: dict[str, int], stage: str) -> Callable:
    def call(*args, **kwargs):
        before = counter.get_total_flops()
        try:
            return function(*args, **kwargs)
        finally:
            counts[stage] += counter.get_total_flops() - before

    return call


def _shortest_seconds(call: Callable[[], Tensor], device: torch.device, budget: float, most: int = 1000) -> float:
    """The shortest of as many calls as fit into ``budget`` seconds; what else runs here only ever makes one longer."""
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < most):
        begin = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


KINDS = {"ours": ours, "stand-in": standin, "rates": rates, "several": several}

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(KINDS[task["kind"]](task)))
