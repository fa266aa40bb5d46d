"""What only a GPU can show, on one, within two minutes: python tests/load/gpu.py [--weights DIR] [-o OUT] [PART ...].

Parts, all of them in this order unless some are named:
  card      its name, its bf16 matrix rate and its copy rates, which the shares below refer to
  pixels    against the CPU in float32; twice the same; batches of 64; without overlap; cut and blended at once
  syncs     no step within a batch waits for the GPU, and how often an analysis and a refinement do
  partial   pictures made beside the next group are those of their patches, and what that saves
  replay    small batches as CUDA graphs: pixels, and milliseconds of an evaluation by batch size
  stages    seconds of each plan, stage by stage, 128 to 512 and 512 to 2048; share of the matrix rate; peak memory
  memory    a run in less memory than it wants, by halves, and the error when nothing helps
  several   refinement on the GPU twice, and on GPU and CPU, against one
  compiled  `torch.compile`, alone and replayed
  bench     `python -m patchscaler bench` for this device, in one process and with short repeats, into OUT

Checks end in ok or FAILED, and the last lines repeat all that was found. Exits with 1 if one failed. With --device cpu
it rehearses itself: what only CUDA has is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from checks import PLANS, ROOT, Checks, one_after_the_other, replaying
from torch.utils.flop_counter import FlopCounterMode

from patchscaler import batches, devices, patches, predictors
from patchscaler.bands import Bands
from patchscaler.checkpoints import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.grouping import GROUPS
from patchscaler.images import to_pil
from patchscaler.records import Partial, Progress, Result

NOISE = 0.5  # grey levels on average, that rounding to bf16 in another order may change
STAGES = ("encode", "restore", "retrieve", "refine", "decode", "color")


def card(c: Checks) -> None:
    side, size = (8192, 2**30) if c.cuda else (256, 2**20)
    a, b = (torch.randn(side, side, device=c.device, dtype=torch.bfloat16) for _ in range(2))
    c.rate = 2 * side**3 / c.timed(lambda: a @ b, 10)
    there = torch.empty(size, dtype=torch.uint8, device=c.device)
    copied = torch.empty_like(there)
    inside = 2 * size / c.timed(lambda: copied.copy_(there))
    here = torch.empty(size // 4, dtype=torch.uint8, pin_memory=c.cuda)
    up = size / 4 / c.timed(lambda: copied[: size // 4].copy_(here, non_blocking=True))
    down = size / 4 / c.timed(lambda: here.copy_(copied[: size // 4], non_blocking=True))
    pageable = size / 4 / c.timed(lambda: copied[: size // 4].cpu())
    name = torch.cuda.get_device_name(c.device) if c.cuda else "CPU"
    c.say(f"card: {name}, torch {torch.__version__}, bf16 {side}^3 {c.rate / 1e12:.0f} TFLOP/s")
    rates = [f"{rate / 1e9:.1f}" for rate in (inside, up, down, pageable)]
    c.say(f"card: copies on it {rates[0]} GB/s, to it {rates[1]}, from it {rates[2]}, not pinned {rates[3]}")


def pixels(c: Checks) -> None:
    reference = load_pipeline(c.weights, "cpu", torch.float32)(c.small).picture.rgb
    ours = c.pipeline(c.small).picture.rgb
    c.close("pixels: CPU float32 against this", reference, ours, 1.0)
    c.equal("pixels: the same seed twice", ours, c.pipeline(c.small).picture.rgb)
    if c.cuda:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = load_pipeline(c.weights, c.device, torch.float32)(c.small).picture.rgb
        c.close("pixels: CPU float32 against float32 here", reference, exact, 0.25)
    analysis = c.pipeline.analyze(c.large)
    whole = c.refined(analysis)
    c.close("pixels: batches of 64 against the fitting one", whole.picture.rgb,
            c.refined(c.pipeline.analyze(c.large, 64), batch_size=64).picture.rgb, NOISE)  # fmt: skip
    with one_after_the_other():
        plain_analysis = c.pipeline.analyze(c.large)
        plain = c.refined(plain_analysis)
    for name in ("latents", "confidence", "patch_confidence", "prompt", "bicubic", "coarse"):
        c.equal(f"pixels: {name} with and without overlap", getattr(analysis, name), getattr(plain_analysis, name))
    c.equal("pixels: priors with and without overlap", analysis.priors.values, plain_analysis.priors.values)
    c.equal("pixels: the output with and without overlap", whole.picture.rgb, plain.picture.rgb)
    latents, grid = analysis.latents.to(c.device), analysis.grid
    cut = patches.split(analysis.latents, grid)
    c.equal("pixels: patches cut at once", patches._split_at_once(latents, grid), cut)
    blended = patches._merge_at_once(whole.sampled.patches.to(c.device), grid).cpu()
    error = (blended - patches.merge(whole.sampled.patches, grid)).abs().max().item()
    c.check(f"pixels: patches blended at once: {error:.1e} off, at most 1e-5", error <= 1e-5)
    bands = np.concatenate([*Bands(c.pipeline, c.large, PLANS["paper"])])
    levels = [torch.from_numpy(np.array(each)) / 127.5 for each in (bands, to_pil(whole.picture))]
    c.close("pixels: in bands against the whole", *levels, NOISE)


def syncs(c: Checks) -> None:
    if not c.cuda:
        return
    analysis = c.pipeline.analyze(c.large)
    c.refined(analysis)  # what is done only once may wait
    count, steps = len(analysis.grid), 0
    events = c.pipeline.refine(analysis, PLANS["paper"])
    try:
        for event in events:
            # Between the first step and the last, at whose end the clock waits.
            last = not isinstance(event, Progress) or event.done >= event.total - count
            torch.cuda.set_sync_debug_mode("default" if last else "error")
            steps += not last
        c.check(f"syncs: none within a batch, in {steps} events", steps > 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.set_warn_always(True)
    try:
        calls = {"analyze": lambda: c.pipeline.analyze(c.large), "refine": lambda: c.refined(analysis)}
        for name, call in calls.items():
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                call()
                torch.cuda.set_sync_debug_mode("default")
            waits = [w for w in found if "called a synchronizing" in str(w.message)]
            places = {f"{Path(w.filename).name}:{w.lineno}" for w in waits}
            c.say(f"syncs: {name} waits {len(waits)} times, at {', '.join(sorted(places)) or 'no place'}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(False)


def partial(c: Checks) -> None:
    # Groups that fill batches of their own, whatever the picture.
    analysis = c.pipeline.analyze(c.large)
    by_hand = {index: index % 3 for index in range(len(analysis.grid))}
    options = {"by_hand": by_hand, "partial": True}
    events, shown = [], []
    for event in c.pipeline.refine(analysis, PLANS["paper"], **options):
        events.append(type(event))
        if not isinstance(event, Progress):
            shown.append(event)
    c.check(f"partial: {len(shown) - 1} pictures before the last", [*map(type, shown)] == [Partial, Partial, Result])
    wanted = [each[None].to(c.device) for each in (analysis.coarse, analysis.bicubic)]
    with torch.inference_mode():
        for event in shown:
            again = c.pipeline._finish(analysis, event.sampled.patches.to(c.device), wanted)
            again.wait()
            name = GROUPS[event.group] if isinstance(event, Partial) else "all"
            c.equal(f"partial: the picture after {name} is its patches'", event.picture.rgb, again.picture.rgb)
    final = shown[-1].sampled.patches
    for event in shown[:-1]:
        ready = event.sampled.start > 0
        c.equal(f"partial: patches of {GROUPS[event.group]} are final", event.sampled.patches[ready], final[ready])
    together = c.refined(analysis, by_hand=by_hand)
    c.close("partial: the last picture against groups sampled together", together.picture.rgb,
            shown[-1].picture.rgb, NOISE)  # fmt: skip
    late = [index for index, kind in enumerate(events) if kind is Partial]
    c.say(f"partial: they came as events {late} of {len(events)}")
    beside = c.timed(lambda: [*c.pipeline.refine(analysis, PLANS["paper"], **options)], warm=1)
    with one_after_the_other():
        plain = c.timed(lambda: [*c.pipeline.refine(analysis, PLANS["paper"], **options)], warm=1)
    c.say(f"partial: {1e3 * beside:.0f} ms beside the next group, {1e3 * plain:.0f} ms one after the other")


def replay(c: Checks) -> None:
    network = c.pipeline.transformer
    with torch.inference_mode():
        evaluation, *_ = c.evaluations(network, 64)
        with FlopCounterMode(display=False) as counter:
            evaluation()
    c.work = counter.get_total_flops() / 64
    analyses = [c.pipeline.analyze(picture) for picture in (c.small, c.large)]
    plain = [c.refined(analysis) for analysis in analyses]
    recorded: dict[int, float] = {}
    if c.cuda:
        with replaying(network):
            for name, analysis, before in zip(("small", "large"), analyses, plain, strict=True):
                first, second = (c.refined(analysis) for _ in range(2))
                c.close(f"replay: {name} output against none", before.picture.rgb, first.picture.rgb, NOISE)
                c.equal(f"replay: {name} output, recorded and replayed", first.picture.rgb, second.picture.rgb)
            other = c.refined(analyses[0], seed=1)  # of other inputs in the same graphs
        c.close("replay: another seed", other.picture.rgb, c.refined(analyses[0], seed=1).picture.rgb, NOISE)
        with replaying(network), torch.inference_mode():
            for count in predictors.SIZES:
                _, x_t, prompt, _ = c.evaluations(network, count)
                with predictors.predicting(network, x_t, prompt) as predict:
                    recorded[count] = c.timed(lambda: predict(x_t, 500), 10)  # noqa: B023
    with torch.inference_mode():
        for count in (*predictors.SIZES, 441, 1024) if c.cuda else (8, 64):
            eager = c.timed(c.evaluations(network, count)[0], 10)
            share = c.work * count / c.rate / eager
            again = f", replayed {1e3 * recorded[count]:.2f} ms" if count in recorded else ""
            c.say(f"replay: {count} patches, an evaluation {1e3 * eager:.2f} ms, {share:.1%} of the rate{again}")


def stages(c: Checks) -> None:
    network = c.pipeline.transformer
    for picture in (c.small, c.large):
        side = 4 * picture.width
        for name, plan in PLANS.items():
            if c.cuda:
                torch.cuda.reset_peak_memory_stats()
            results = []

            def run(plan=plan, picture=picture, results=results):
                *_, result = c.pipeline.refine(c.pipeline.analyze(picture), plan)
                results.append(replace(result, picture=None, sampled=None))  # its memory is free again

            seconds = c.timed(run)
            results.sort(key=lambda result: sum(result.seconds.values()))
            middle = results[len(results) // 2]
            evaluations = sum(group.evaluations for group in middle.groups)
            share = evaluations * c.work / middle.seconds["refine"] / c.rate
            peak = torch.cuda.max_memory_allocated() / 2**30 if c.cuda else float("nan")
            each = ", ".join(f"{stage} {1e3 * middle.seconds[stage]:.1f}" for stage in STAGES)
            counts = "+".join(str(group.patches) for group in middle.groups)
            c.say(f"stages: {side}, {name}: {1e3 * seconds:.0f} ms; {each} ms; {counts} patches, {evaluations} "
                  f"evaluations, {share:.1%} of the rate; peak {peak:.2f} GiB")  # fmt: skip
            if name != "paper":
                continue
            with one_after_the_other():
                c.say(f"stages: {side}, {name}, without overlap: {1e3 * c.timed(run):.0f} ms")
            if c.cuda:
                with replaying(network):
                    c.say(f"stages: {side}, {name}, replayed: {1e3 * c.timed(run):.0f} ms")
                if side == 2048:
                    c.check(f"stages: 512 to 2048, paper's plan, {seconds:.3f} s, at most 0.35 s", seconds <= 0.35)


def memory(c: Checks) -> None:
    if not c.cuda:
        return
    run = lambda: c.pipeline(c.large, PLANS["fast"]).picture.rgb  # noqa: E731
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base, expected = torch.cuda.memory_allocated(), run()
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    halvings = []
    release = devices.release

    def counted(device):
        halvings.append(1)
        release(device)

    devices.release = batches.release = counted
    try:
        for part in (0.6, 0.4, 0.25):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((base + part * (peak - base)) / total)
            halvings.clear()
            less = run()
            if halvings:
                break
        c.say(f"memory: {base / 2**30:.2f} GiB before, {peak / 2**30:.2f} at the peak; then {part:.0%} of that")
        c.check(f"memory: by halves, {len(halvings)} times", len(halvings) > 0)
        c.close("memory: the output in less of it", expected, less, NOISE)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((base + 2**20) / total)
        try:
            run()
            c.check("memory: 1 MiB is not enough", False)
        except devices.OutOfMemory as error:
            c.check(f"memory: 1 MiB: {error}", True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        devices.release = batches.release = release
    c.equal("memory: the output after that", expected, run())


def several(c: Checks) -> None:
    analysis = c.pipeline.analyze(c.small)
    one = c.refined(analysis)
    alone = c.timed(lambda: c.refined(analysis), 3, 1)
    for others in ([str(c.device)], ["cpu"]) if c.cuda else (["cpu"],):
        c.pipeline.refine_on(others)
        try:
            two = c.refined(analysis)
            seconds = c.timed(lambda: c.refined(analysis), 3, 1)
        finally:
            c.pipeline.refine_on([])
        c.close(f"several: {c.device} and {others[0]} against one", one.picture.rgb, two.picture.rgb, NOISE)
        c.say(f"several: {c.device} and {others[0]}: {1e3 * seconds:.0f} ms, one {1e3 * alone:.0f} ms")


def compiled(c: Checks) -> None:
    analyses = {4 * picture.width: c.pipeline.analyze(picture) for picture in (c.small, c.large)}
    before = {side: c.refined(analysis) for side, analysis in analyses.items()}
    network = c.pipeline.transformer
    began = time.perf_counter()
    if c.cuda:
        network.compile(dynamic=True)
    else:
        network.compile(dynamic=True, backend="eager")
    try:
        for side, analysis in analyses.items():
            c.close(f"compiled: {side}", before[side].picture.rgb, c.refined(analysis).picture.rgb, NOISE)
        c.say(f"compiled: ready after {time.perf_counter() - began:.0f} s")
        for how in (nullcontext, lambda: replaying(network)) if c.cuda else (nullcontext,):
            with how():
                for side, analysis in analyses.items():
                    seconds = c.timed(lambda: c.refined(analysis), warm=1)  # noqa: B023
                    refine = statistics.median(c.refined(analysis).seconds["refine"] for _ in range(5))
                    name = "alone" if how is nullcontext else "replayed"
                    plain = before[side].seconds["refine"]
                    c.say(f"compiled: {side}, {name}: refinement {1e3 * seconds:.0f} ms, of that sampling "
                          f"{1e3 * refine:.1f} ms ({1e3 * plain:.1f} ms when not compiled)")  # fmt: skip
                    if how is not nullcontext:
                        c.close(f"compiled: {side}, {name}", before[side].picture.rgb,
                                c.refined(analysis).picture.rgb, NOISE)  # fmt: skip
    finally:
        network._compiled_call_impl = None


def bench(c: Checks) -> None:
    from patchscaler.evaluation import bench, bench_tables, measure

    def here(task: dict, timeout: float = 0) -> dict:
        if c.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        found = measure.KINDS[task["kind"]](task)
        print(f"bench: {task['kind']} {task.get('name', task.get('tiles', ''))}, {time.perf_counter() - began:.1f} s")
        return found

    bench.in_new_process, bench.BUDGET = here, 1.0
    bench_tables.plot = lambda report, path: None  # it needs matplotlib, and can be drawn of bench.json
    text = bench.bench(c.image, c.weights, [c.device.type], c.out, quick=not c.cuda)
    c.say(f"bench: {len(text.splitlines())} lines in {c.out / 'bench.md'}")


PARTS = (card, pixels, syncs, partial, replay, stages, memory, several, compiled, bench)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART")
    add("--weights", type=Path, default=DEFAULT_WEIGHTS)
    add("--image", type=Path, default=ROOT / "examples" / "1-astronaut.png")
    add("--device", type=devices.pick_device, default="cuda")
    add("--seconds", type=float, default=200, help="after so many no part is begun")
    add("-o", "--out", type=Path, help="folder for gpu.txt and what the bench writes; without it there is no bench")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - {part.__name__ for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    began = time.perf_counter()
    checks = Checks(args.device, args.weights, args.image, args.out)
    for part in PARTS:
        name = part.__name__
        if (args.parts and name not in args.parts) or (part is bench and args.out is None):
            continue
        if time.perf_counter() - began > args.seconds:
            checks.say(f"{name}: left out, {args.seconds:.0f} s are over")
            continue
        start = time.perf_counter()
        try:
            part(checks)
        except Exception:
            traceback.print_exc()
            checks.check(f"{name}: {traceback.format_exc().splitlines()[-1]}", False)
        print(f"{name} took {time.perf_counter() - start:.1f} s", flush=True)
    print("\n" + "\n".join(checks.lines))
    print(f"{checks.failed} checks FAILED" if checks.failed else "all ok", f"({time.perf_counter() - began:.0f} s)")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "gpu.txt").write_text("\n".join(checks.lines) + "\n")
    return int(checks.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
