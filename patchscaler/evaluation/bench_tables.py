"""What the bench measured, as Markdown and as a plot."""

from __future__ import annotations

import math
from pathlib import Path

from patchscaler.evaluation.measure import predict
from patchscaler.evaluation.standins import HALF_STRIDE, STANDINS, TILE, tiles
from patchscaler.plan import GROUPS, PRESETS

STAGES = ("encode", "restore", "retrieve", *GROUPS, "decode", "color")
DEVICES = (1, 2, 4, 8)
UNIFIED_STEPS = 20  # of StableSR in the paper
NOTES = f"""\
- Seconds are from the decoded input to the output's pixels, models loaded; the fastest of the runs. Peak memory is the
  largest resident set of the measuring process, Python and PyTorch included; on CUDA, PyTorch's own counter.
- Stand-ins are *work-only*: diffusers classes of the published sizes with random weights, in the same precision. They
  give no picture. They are lower bounds: no control network, text encoder, guidance or colour fix. Their seconds are
  the measured encode and decode, and one measured step times the number of steps.
- Outputs larger than {TILE}² are {TILE}² tiles, 448 apart: those rows are one tile's, times the number of tiles.
- ResShift's VQ-f4 makes a latent of 128² of a {TILE}² picture. The row with 64² is a quarter of that work, for caution.
- PGS / unified: steps alone give no less than 8/20 = 0.40, which is every patch simple. The paper's 0.24 for StableSR
  (2048², 35.22 s to 8.53 s, Table 3) thus has more tiles in the unified run than patches in PGS: in each step,
  StableSR's released code lays tiles of 64² latents half over each other, 49 of 2048² as one canvas. To be 0.24 of
  these, patches would take 9.4 steps on average. Its script for large pictures first cuts pieces of 1280 pixels and
  comes to 144 tiles; the paper does not say which was timed.
"""


def markdown(report: dict) -> str:
    """The whole report. Sections of a device that was not there say "not measured"."""
    machine = report["machine"]
    lines = [
        "# Bench",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; GPUs: {', '.join(machine['gpus']) or 'none'}; PyTorch "
        f"{machine['torch']}. Input: the middle 128² of `{report['image']}`, mirrored and repeated for larger outputs.",
    ]
    for device, found in report["devices"].items():
        lines += ["", f"## {device.upper() if device != 'cuda' else 'CUDA'}", ""]
        if found is None:
            lines.append("not measured: PyTorch finds no such device here.")
            continue
        sections = [_rates(found), _methods(found), _stages(found), _scaling(found), _several(found), _ratios(found)]
        for section in filter(None, sections):
            lines += [*section, ""]
        lines.pop()
    return "\n".join(lines) + "\n\n" + NOTES


def _rates(found: dict) -> list[str]:
    """How fast the machine multiplies, and how much of that Patch-DiT makes use of."""
    lines = [
        f"Matrix products, {found['threads']} threads, TFLOP/s:",
        "",
        *_head("precision", "2048³", "Patch-DiT's own sizes", "Patch-DiT", "its share of its own sizes'"),
    ]
    for dtype, rate in found["rates"].items():
        values = [f"{rate[name] / 1e12:.3f}" for name in ("large", "own", "patch_dit")]
        lines.append(_line(dtype, *values, f"{rate['patch_dit'] / rate['own']:.0%}"))
    return lines


def _methods(found: dict) -> list[str]:
    """Ours and the stand-ins: one line for each method and output."""
    lines = _head("method", "output", "evaluations", "TFLOP", "seconds", "peak memory", "paper's plan / this")
    for side, plans in found["ours"].items():
        rows = []
        for name, row in plans.items():
            flops, evaluations = sum(row["flops"].values()), f"{row['evaluations']} patches"
            rows.append((f"ours, {name}", evaluations, flops, row["seconds"], row["peak_bytes"]))
        for name, row in found["stand-ins"].items():
            for steps in STANDINS[name].steps:
                flops, seconds = (standin_total(row, steps, int(side), what) for what in ("flops", "seconds"))
                label = f"{STANDINS[name].label}, {steps} step{'s' * (steps > 1)} *(work-only)*"
                rows.append((label, f"{steps * tiles(int(side))} latents", flops, seconds, row["peak_bytes"]))
        if "sd" in found["stand-ins"]:
            evaluations, seconds, flops = pgs_total(plans["paper"], found["stand-ins"]["sd"])
            label = "SD 2.1-sized with our GRM and PGS, V = 64, paper's plan *(work-only)*"
            peak = found["stand-ins"]["sd"]["peak_bytes"]
            rows.append((label, f"{evaluations} latents", flops, seconds, peak))
        for label, evaluations, flops, seconds, peak in rows:
            ratio = f"{plans['paper']['seconds'] / seconds:.3f}"
            lines.append(_line(label, f"{side}²", evaluations, f"{flops / 1e12:.2f}", _s(seconds), _gb(peak), ratio))
    return lines


def _stages(found: dict) -> list[str]:
    """Seconds and GFLOP of every stage of ours, and its share of the matrix rate at Patch-DiT's sizes."""
    lines = _head("stage by stage: seconds, GFLOP, share of the matrix rate", *STAGES)
    for side, plans in found["ours"].items():
        for name, row in plans.items():
            seconds = row["stages"] | dict(zip(GROUPS, row["group_seconds"]))
            own = found["rates"][row["dtype"]]["own"]
            cells = [_stage(seconds[stage], row["flops"].get(stage, 0), own) for stage in STAGES]
            patches = ", ".join(map(str, row["patches"]))
            lines.append(_line(f"{name}, {side}² ({patches} patches)", *cells))
    return lines


def _stage(seconds: float, flops: float, rate: float) -> str:
    if not flops or not seconds:
        return _s(seconds)
    return f"{_s(seconds)}, {flops / 1e9:.0f}, {flops / seconds / rate:.0%}"


def _scaling(found: dict) -> list[str]:
    """The paper's plan at growing outputs of the same content."""
    lines = _head("paper's plan, output", "MP", "patches", "seconds", "seconds per MP", "peak memory")
    for side, row in found["scaling"].items():
        megapixels = row["pixels"] / 1e6
        each = f"{row['seconds'] / megapixels:.2f}"
        cells = f"{megapixels:.2f}", str(sum(row["patches"])), _s(row["seconds"]), each, _gb(row["peak_bytes"])
        lines.append(_line(f"{side}²", *cells))
    return lines


def _several(found: dict) -> list[str]:
    """What several devices would give, by the cost model, and how good that is where it can be measured."""
    lines = _head("paper's plan, refine / whole run, predicted", *(f"{n} device{'s' * (n > 1)}" for n in DEVICES))
    for side, plans in found["ours"].items():
        row, cells = plans["paper"], []
        one = row["stages"]["refine"]
        for devices in DEVICES:
            refine = predict(row["patches"], row["group_seconds"], PRESETS["paper"], devices)
            whole = row["seconds"] - one + refine
            cells.append(f"{_s(refine)} ({one / refine:.2f}x) / {_s(whole)} ({row['seconds'] / whole:.2f}x)")
        lines.append(_line(f"{side}²", *cells))
    check = found["several"]
    if check is None:
        return [*lines, "", "The prediction is not checked: there is but one such device."]
    names, side = ", ".join(check["devices"]), check["side"]
    one, both, predicted = (_s(check[name]) for name in ("one", "all", "predicted"))
    text = f"{side}², refine on {names}: {both}; predicted {predicted} from {one} on the first alone."
    return [*lines, "", text + (" Each has half of the cores." if "cpu" in names else "")]


def _ratios(found: dict) -> list[str]:
    lines = []
    for side, plans in found["ours"].items():
        paper, uniform = plans["paper"], plans["uniform"]
        evaluations = paper["evaluations"] / uniform["evaluations"]
        seconds = paper["stages"]["refine"] / uniform["stages"]["refine"]
        lines.append(f"- {side}², refine, paper's plan / uniform: evaluations {evaluations:.2f}, seconds {seconds:.2f}")
    if "sd" in found["stand-ins"]:
        for side, plans in found["ours"].items():
            lines += _table_3(int(side), plans["paper"], found["stand-ins"]["sd"])
    lines.append(f"- seconds per pixel over these outputs: within ±{linearity(found['scaling']):.0%} of their middle")
    return lines


def _table_3(side: int, ours: dict, standin: dict) -> list[str]:
    """PGS against unified sampling of the same patches, and of tiles that lie as StableSR's do, if these are more."""
    evaluations, seconds, _ = pgs_total(ours, standin)
    patches, tiled = sum(ours["large_patches"]), tiles(side, HALF_STRIDE)
    unified = standin_total(standin, UNIFIED_STEPS, side, "seconds")
    lines = []
    for place, count in (("of the same patches", patches), ("in tiles half over each other, as StableSR's", tiled)):
        more = (count - patches) * UNIFIED_STEPS * standin["seconds"]["step"]
        about = f"{evaluations / UNIFIED_STEPS / count:.2f}, seconds {seconds / (unified + more):.2f}"
        what = f"- {side}², SD 2.1-sized, PGS / unified {UNIFIED_STEPS} steps {place} ({count}): evaluations {about}"
        lines.append(f"{what}; {evaluations / patches:.1f} steps for a patch")
    return lines if tiled > patches else lines[:1]


def linearity(scaling: dict) -> float:
    """How far the seconds per pixel stray from the middle of their range, as a fraction of it."""
    each = [row["seconds"] / row["pixels"] for row in scaling.values()]
    return (max(each) - min(each)) / (max(each) + min(each))


def standin_total(row: dict, steps: int, side: int, what: str) -> float:
    """Seconds or FLOPs of a stand-in: encode, ``steps`` steps and decode, for each tile of a square output."""
    parts = row[what]
    return tiles(side) * (parts["encode"] + steps * parts["step"] + parts["decode"])


def pgs_total(ours: dict, standin: dict) -> tuple[int, float, float]:
    """Evaluations, seconds and FLOPs of the SD-sized stand-in under the paper's plan, with our coarse restoration.

    Its patches of 64x64 cells lie as the stand-in's tiles do, so each is encoded and decoded once as well.
    """
    steps = PRESETS["paper"].steps
    evaluations = sum(n * count for n, count in zip(steps, ours["large_patches"]))
    patches = sum(ours["large_patches"])
    totals = []
    for what, own in (("seconds", ours["stages"]), ("flops", ours["flops"])):
        parts = standin[what]
        coarse = own["encode"] + own["restore"] + own["decode"] / 2  # the coarse decode is one of two
        totals.append(coarse + patches * (parts["encode"] + parts["decode"]) + evaluations * parts["step"])
    return evaluations, *totals


def plot(report: dict, path: Path) -> None:
    """Seconds and peak memory against output pixels, ours, both axes logarithmic, beside a straight line."""
    from matplotlib.figure import Figure  # here, because `upscale` starts without it

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for device, found in report["devices"].items():
        if found is None:
            continue
        rows = list(found["scaling"].values())
        pixels = [row["pixels"] / 1e6 for row in rows]
        time.loglog(pixels, [row["seconds"] for row in rows], "o-", label=f"paper's plan, {device}")
        each = math.exp(sum(math.log(row["seconds"] / x) for row, x in zip(rows, pixels)) / len(rows))
        time.loglog(pixels, [each * x for x in pixels], ":", color="#64748b", label=f"{each:.2f} s per MP")
        memory.semilogx(pixels, [row["peak_bytes"] / 1e9 for row in rows], "o-", label=device)
    for axes, label in ((time, "seconds"), (memory, "peak memory, GB")):
        axes.set_xlabel("output, million pixels")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    memory.set_ylim(0)
    figure.savefig(path, dpi=110)


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
