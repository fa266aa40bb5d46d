"""Measure a pipeline on a folder of images: figures of every image, their means, and contact sheets to look at.

python -m patchscaler.evaluation.benchmark --lr DIR --hr DIR -o OUT

Images are scored as an 8-bit file would hold them, to their very edges, with `patchscaler.evaluation.metrics`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchscaler.checkpoints import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.devices import pick_device
from patchscaler.evaluation.components import (
    MAX_TRUTH_PIXELS,
    find_images,
    patch_errors,
    read_image,
    spearman,
    to_8bit,
)
from patchscaler.evaluation.metrics import psnr_y, spectrum_distance, ssim_y
from patchscaler.figures import qmap_overlay
from patchscaler.grouping import GROUPS, PRESETS, SamplingPlan
from patchscaler.images import ImageError, Picture, to_pil
from patchscaler.pipeline import SCALE, Analysis, PatchScalerPipeline, Result

UNIFORM = PRESETS["uniform"]
METRICS = {"psnr_y": psnr_y, "ssim_y": ssim_y, "spectrum_distance": spectrum_distance}
COLUMNS = ("image", "method", *METRICS, *GROUPS, "evaluations", "seconds")
_DIGITS = {"psnr_y": 2, "ssim_y": 4, "spectrum_distance": 3, "evaluations": 0, "seconds": 2}
_PANEL = 1024  # longest side of a picture on a contact sheet
_LEAST, _LABEL, _GAP = 64, 24, 8  # room for a panel, and for its label above


def benchmark(
    pipeline: PatchScalerPipeline,
    pairs: Sequence[tuple[Path, Path | None]],
    out: Path,
    plan: SamplingPlan,
    seed: int = 0,
    uniform: bool = False,
) -> str:
    """Upscale the first image of each pair, compare it with the second, and write what came of it into `out`.

    `results.csv` has a line for each image and method: bicubic, coarse, final and, if `uniform`, all patches
    at T 1000 and N 20; an empty field is a value that the method does not have. `sheets/NAME.png` shows the
    pictures, `summary.md` is the returned Markdown. ImageError names an image that is unreadable, too small
    to be scored, or not four times its input.
    """
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    rows, confidences, errors = [], [], []
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (low, high) in enumerate(pairs, 1):
            if sys.stderr.isatty():
                end = "\n" if number == len(pairs) else ""
                print(f"\r\033[K{number}/{len(pairs)} {low.name}", end=end, file=sys.stderr, flush=True)
            analysis = pipeline.analyze(read_image(low))
            truth = None if high is None else _read_truth(high, analysis.bicubic)
            plans = {"final": plan, **({"uniform": UNIFORM} if uniform else {})}
            runs = {name: [*pipeline.refine(analysis, each, seed)][-1] for name, each in plans.items()}
            new = _rows(low.stem, analysis, runs, truth)
            writer.writerows(new)
            file.flush()  # a long run can be followed, and stopped, at any time
            rows += new
            if truth is not None:
                confidences.append(analysis.patch_confidence)
                errors.append(patch_errors(analysis.coarse, truth, analysis.grid))
            _sheet(analysis, runs["final"], truth).save(out / "sheets" / f"{low.stem}.png")
    correlation = spearman(torch.cat(confidences), -torch.cat(errors)) if errors else None
    about = f"{len(pairs)} images of `{pairs[0][0].parent}`, seed {seed}, {pipeline.device}"
    summary = _summary(rows, plan, correlation, f"{about}, {pipeline.transformer.dtype}")
    (out / "summary.md").write_text(summary, encoding="utf-8")
    return summary


def find_pairs(lr: Path, hr: Path | None) -> list[tuple[Path, Path | None]]:
    """The images of `lr` by name, each with the one of its stem in `hr`; FileNotFoundError if that lacks."""
    lows, highs = find_images(lr), find_images(hr) if hr else {}
    for stem, low in lows.items():
        if hr and stem not in highs:
            raise FileNotFoundError(f"no image {stem} in {hr} for {low}")
    return [(low, highs.get(stem)) for stem, low in lows.items()]


def _read_truth(path: Path, bicubic: Tensor) -> Tensor:
    truth = read_image(path, MAX_TRUTH_PIXELS).rgb
    if truth.shape != bicubic.shape:
        sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (truth, bicubic)]
        raise ImageError(f"{path} is {sizes[0]}; {SCALE} times its input is {sizes[1]}")
    return truth


def _rows(name: str, analysis: Analysis, runs: dict[str, Result], truth: Tensor | None) -> list[dict]:
    """A row of COLUMNS for each method."""
    coarse_seconds = sum(analysis.seconds[stage] for stage in ("encode", "restore", "decode"))
    costs = {"bicubic": {"evaluations": 0}, "coarse": {"evaluations": 0, "seconds": coarse_seconds}}
    images = {"bicubic": analysis.bicubic, "coarse": analysis.coarse}
    for method, run in runs.items():
        images[method] = run.picture.rgb
        costs[method] = {group.name: group.patches for group in run.groups}
        costs[method]["evaluations"] = sum(group.evaluations for group in run.groups)
        costs[method]["seconds"] = sum(run.seconds.values())
    rows = [{"image": name, "method": method, **costs[method]} for method in images]
    if truth is not None:
        try:
            for row, image in zip(rows, images.values()):
                row.update({key: metric(to_8bit(image), truth) for key, metric in METRICS.items()})
        except ValueError as error:
            raise ImageError(f"{name}: {error}") from error
    return rows


def _summary(rows: list[dict], plan: SamplingPlan, correlation: float | None, about: str) -> str:
    """Means per method, shares of the groups, and costs, as Markdown."""
    lines = [f"# Benchmark\n\n{about}. PSNR and SSIM of luma in 8 bits, no border cut.", f"Plan: `{plan.to_json()}`"]
    lines += ["", "| mean of | PSNR-Y | SSIM-Y | spectrum distance | evaluations | seconds |", "|---" * 6 + "|"]
    methods = {row["method"]: [other for other in rows if other["method"] == row["method"]] for row in rows}
    for method, own in methods.items():
        means = {key: sum(row[key] for row in own) / len(own) for key in _DIGITS if key in own[0]}
        cells = [f"{means[key]:.{digits}f}" if key in means else "" for key, digits in _DIGITS.items()]
        lines.append(f"| {' | '.join([method, *cells])} |")

    counts = [sum(row[group] for row in methods["final"]) for group in GROUPS]
    lines += ["", "| group | patches | share |", "|---|---|---|"]
    lines += [f"| {name} | {count} | {count / sum(counts):.1%} |" for name, count in zip(GROUPS, counts)]

    seconds = {method: sum(row.get("seconds", 0) for row in own) for method, own in methods.items()}
    lines += ["", f"- evaluations, plan / uniform: {plan.evaluations(counts) / UNIFORM.evaluations(counts):.3f}"]
    lines.append(f"- seconds, plan: {seconds['final']:.1f} in all")
    if "uniform" in seconds:
        lines.append(f"- seconds, uniform: {seconds['uniform']:.1f} in all")
        lines.append(f"- seconds, plan / uniform: {seconds['final'] / seconds['uniform']:.3f}")
    if correlation is not None:
        lines.append(f"- Spearman, patch confidence and negative squared error of coarse: {correlation:.3f}")
    return "\n".join(lines) + "\n"


def _sheet(analysis: Analysis, final: Result, truth: Tensor | None) -> Image.Image:
    """Bicubic, coarse, Qmap, final and truth side by side, shrunk if they are large."""
    qmap = qmap_overlay(analysis.coarse, analysis.grid, final.assignment, _PANEL)
    panels = {
        "bicubic": to_pil(Picture(analysis.bicubic)),
        "coarse": to_pil(Picture(analysis.coarse)),
        "Qmap": qmap,
        "final": to_pil(Picture(final.picture.rgb)),
    }
    if truth is not None:
        panels["truth"] = to_pil(Picture(truth))
    step = max(qmap.width, _LEAST) + _GAP
    sheet = Image.new("RGB", (len(panels) * step, qmap.height + _LABEL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (name, panel) in enumerate(panels.items()):
        sheet.paste(panel.resize(qmap.size, Image.Resampling.LANCZOS), (place * step, _LABEL))
        draw.text((place * step, 3), name, "black", font)
    return sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lr", type=Path, required=True, help="folder of images to upscale")
    add("--hr", type=Path, help="folder of the true images, of the same names")
    add("-o", "--out", type=Path, required=True, help="folder for results.csv, summary.md and sheets")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    add("--plan", default="paper", help=f"{', '.join(PRESETS)} or FILE.json (default: paper)")
    add("--uniform", action="store_true", help="also run every patch at T 1000, N 20")
    add("--seed", type=int, default=0)
    add("--device", help="auto, cpu, cuda or mps (default: the fastest there is)")
    add("--limit", type=int, help="only the first images, by name")
    args = parser.parse_args(argv)
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit {args.limit} is below 1")
        plan = PRESETS.get(args.plan) or SamplingPlan.from_json(Path(args.plan).read_text(encoding="utf-8"))
        pairs = find_pairs(args.lr, args.hr)[: args.limit]
        pipeline = load_pipeline(args.weights, pick_device(args.device))
        print(benchmark(pipeline, pairs, args.out, plan, args.seed, args.uniform), end="")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
