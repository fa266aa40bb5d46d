"""Measure a pipeline on a folder of images: figures of every image, their means, and contact sheets to look at.

python -m patchscaler evaluate --lr DIR --hr DIR -o OUT

Images are scored as an 8-bit file would hold them, to their very edges.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from patchscaler.device import pick_device
from patchscaler.evaluation.components import MAX_TRUTH_PIXELS, find_images, patch_errors, read_image, spearman, to_8bit
from patchscaler.evaluation.metrics import seam_score
from patchscaler.evaluation.reliability import write_reliability
from patchscaler.evaluation.scores import METRICS, SHORT, Scorer, find_scorer
from patchscaler.evaluation.tables import HEADINGS, differences_table, groups_table, mean_of, means_table
from patchscaler.figures import contact_sheet, qmap_overlay
from patchscaler.images import ImageError, Picture, to_pil
from patchscaler.loading import load_pipeline
from patchscaler.options import UsageError, add_pipeline_options, add_plan_option, positive
from patchscaler.patches import PatchGrid, split
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS, PRESETS, SamplingPlan
from patchscaler.results import Analysis, Result

UNIFORM = PRESETS["uniform"]
BATCH = 64  # patches that are given random priors at once
COLUMNS = ("image", "method", *(metric.key for metric in METRICS), "seam_score", *GROUPS, "evaluations", "seconds")

Pair = tuple[Path, Path | None]  # an input, and its truth


def benchmark(
    pipeline: PatchScalerPipeline,
    pairs: Sequence[Pair],
    out: Path,
    plan: SamplingPlan,
    seed: int = 0,
    batch_size: int | None = None,
) -> str:
    """Upscale the first image of each pair, compare it with the second, and write what came of it into `out`.

    `results.csv` has a line for each image and method: bicubic, coarse, final, "random priors" (the same plan with
    random entries of the texture memory in place of the retrieved ones), "no prompt" (with the null prompt) and
    uniform (all patches at T 1000 and N 20). An empty field is a value that the method or the image does not have, or
    that cannot be measured here. `sheets/NAME.png` shows the pictures; `reliability.csv` and `.png`, with truths only,
    compare confidence and error; `summary.md` is the returned Markdown, which also has the coarse and the final image
    of each group's patches alone. ImageError names an image that is unreadable, too small to be scored, or not four
    times its input.
    """
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    scorer, short = find_scorer(pipeline.device), find_scorer(pipeline.device, SHORT)
    rows, confidences, errors = [], [], []
    patches = empty_groups(("coarse", "final"))
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for low, high in tqdm(pairs, unit="image", disable=None):  # a bar on a terminal only
            analysis = pipeline.analyze(read_image(low), batch_size)
            truth = None if high is None else read_truth(high, analysis.bicubic)
            runs = _run_all(pipeline, analysis, plan, seed, batch_size)
            new = _rows(low.stem, analysis, runs, truth, scorer)
            writer.writerows(new)
            file.flush()  # a long run can be followed, and stopped, at any time
            rows += new
            if truth is not None:
                confidences.append(analysis.patch_confidence)
                errors.append(patch_errors(analysis.coarse, truth, analysis.grid))
                images = {"coarse": analysis.coarse, "final": runs["final"].picture.rgb}
                score_groups(patches, short, low.stem, images, truth, analysis.grid, runs["final"].assignment)
            _sheet(analysis, runs["final"], truth).save(out / "sheets" / f"{low.stem}.png")
    lines = ["# Benchmark", "", describe_run(pipeline, pairs, seed), f"Plan: `{plan.to_json()}`", ""]
    lines += [*_summary(rows, patches if errors else {}, plan), ""]
    if errors:
        confidence, error = torch.cat(confidences), torch.cat(errors)
        write_reliability(confidence, error, plan, out)
        lines.append(_correlation(confidence, error))
    lines += [f"- {line}" for line in scorer.skipped_lines()]
    summary = "\n".join(lines).rstrip() + "\n"
    (out / "summary.md").write_text(summary, encoding="utf-8")
    return summary


def find_pairs(lr: Path, hr: Path | None) -> list[Pair]:
    """The images of `lr` by name, each with the one of its stem in `hr`; FileNotFoundError if there is none."""
    lows, highs = find_images(lr), find_images(hr) if hr else {}
    for stem, low in lows.items():
        if hr and stem not in highs:
            raise FileNotFoundError(f"no image {stem} in {hr} for {low}")
    return [(low, highs.get(stem)) for stem, low in lows.items()]


def read_truth(path: Path, bicubic: Tensor) -> Tensor:
    """The true image 3xHxW, which must be as large as the enlarged input; ImageError if it is not."""
    truth = read_image(path, MAX_TRUTH_PIXELS).rgb
    if truth.shape != bicubic.shape:
        sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (truth, bicubic)]
        raise ImageError(f"{path} is {sizes[0]}; {SCALE} times its input is {sizes[1]}")
    return truth


def score(scorer: Scorer, name: str, image: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Values of an image as an 8-bit file holds it. ImageError with its name if it is too small for a measure."""
    try:
        return scorer(to_8bit(image), truth)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error


def empty_groups(methods: Sequence[str]) -> dict[str, list[dict]]:
    """A list for each group and method, for `score_groups` to fill."""
    return {f"{group}: {method}": [] for group in GROUPS for method in methods}


def score_groups(
    rows: dict[str, list[dict]],
    scorer: Scorer,
    name: str,
    images: Mapping[str, Tensor],
    truth: Tensor,
    grid: PatchGrid,
    assignment: Tensor,
) -> None:
    """Add a row for each patch of each of the images, methods -> 3xHxW, to the list of its group and the method.

    A patch is cut out of the finished image and scored like a small image of its own: nothing outside of it counts,
    and all groups are scored at one size. So values are those of patches, not parts of the whole image's value.
    """
    for patch, group in zip(grid.patches, assignment.tolist()):
        for method, image in images.items():
            values = score(scorer, name, patch.pixels(image), patch.pixels(truth))
            rows[f"{GROUPS[group]}: {method}"].append(values)


def describe_run(pipeline: PatchScalerPipeline, pairs: Sequence[Pair], seed: int) -> str:
    about = f"Images: {len(pairs)} of `{pairs[0][0].parent}`, seed {seed}, {pipeline.device}"
    return f"{about}, {pipeline.transformer.dtype}. All measures on 8-bit images, no border cut."


def seam_borders(grid: PatchGrid, height: int, width: int) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels at which a patch begins or ends, inside an image of H x W."""
    rows, columns = grid.borders()
    return [row for row in rows if 0 < row < height], [column for column in columns if 0 < column < width]


def _run_all(
    pipeline: PatchScalerPipeline, analysis: Analysis, plan: SamplingPlan, seed: int, batch_size: int | None
) -> dict[str, Result]:
    null_prompt = pipeline.transformer.null_prompt.detach().float().cpu().expand(len(analysis.grid), -1, -1)  # NxLxD
    tasks = {
        "final": (analysis, plan),
        "random priors": (replace(analysis, prompt=_random_prompt(pipeline, analysis, seed)), plan),
        "no prompt": (replace(analysis, prompt=null_prompt), plan),
        "uniform": (analysis, UNIFORM),
    }
    return {method: [*pipeline.refine(*task, seed, batch_size)][-1] for method, task in tasks.items()}


@torch.inference_mode()
def _random_prompt(pipeline: PatchScalerPipeline, analysis: Analysis, seed: int) -> Tensor:
    """The prompts NxLxD of random entries of the texture memory, weighed by their own similarities to the patches."""
    memory, encoder = pipeline.texture_memory, pipeline.texture_encoder
    y0 = split(analysis.latents.to(pipeline.device), analysis.grid)  # NxCxVxV
    draws = torch.rand(len(y0), len(memory.features), generator=torch.Generator().manual_seed(seed))
    drawn = draws.topk(encoder.config.top_k).indices.to(pipeline.device)  # NxK
    prompts = []
    for patches, entries in zip(y0.split(BATCH), drawn.split(BATCH)):
        queries = F.normalize(pipeline.texture_classifier.features(patches).float(), dim=-1)  # NxD
        similarities = torch.einsum("nd,nkd->nk", queries, memory.features[entries])  # NxK
        prompts.append(encoder(memory.patches(entries), similarities, patches).float().cpu())
    return torch.cat(prompts)


def _rows(
    name: str, analysis: Analysis, runs: dict[str, Result], truth: Tensor | None, scorer: Scorer
) -> list[dict[str, str | float]]:
    """A row of COLUMNS for each method."""
    coarse_seconds = sum(analysis.seconds[stage] for stage in ("encode", "restore", "decode"))
    costs = {"bicubic": {"evaluations": 0}, "coarse": {"evaluations": 0, "seconds": coarse_seconds}}
    images = {"bicubic": analysis.bicubic, "coarse": analysis.coarse}
    for method, run in runs.items():
        images[method] = run.picture.rgb
        costs[method] = {group.name: group.patches for group in run.groups}
        costs[method]["evaluations"] = sum(group.evaluations for group in run.groups)
        costs[method]["seconds"] = sum(run.seconds.values())
    borders = seam_borders(analysis.grid, *analysis.bicubic.shape[-2:])
    rows = []
    for method, image in images.items():
        row = {"image": name, "method": method, **score(scorer, name, image, truth), **costs[method]}
        if any(borders):
            row["seam_score"] = seam_score(to_8bit(image), *borders)
        rows.append(row)
    return rows


def _sheet(analysis: Analysis, final: Result, truth: Tensor | None) -> Image.Image:
    """Input (its pixels as squares), bicubic, coarse, Qmap, final and truth, shrunk if they are large."""
    qmap = qmap_overlay(analysis.coarse, analysis.grid, final.assignment)
    panels = [
        (to_pil(Picture(analysis.picture.rgb)).resize(qmap.size, Image.Resampling.NEAREST), "input"),
        (to_pil(Picture(analysis.bicubic)), "bicubic"),
        (to_pil(Picture(analysis.coarse)), "coarse"),
        (qmap, "Qmap"),
        (to_pil(Picture(final.picture.rgb)), "final"),
    ]
    if truth is not None:
        panels.append((to_pil(Picture(truth)), "truth"))
    return contact_sheet([panels], qmap.size)


def _summary(rows: list[dict], patches: Mapping[str, list[dict]], plan: SamplingPlan) -> list[str]:
    """Means per method and per group, differences from the final image, shares of the groups, and costs, as Markdown.

    `patches` are the rows of `score_groups`, empty without truths.
    """
    methods = {row["method"]: [other for other in rows if other["method"] == row["method"]] for row in rows}
    counts = [sum(row[group] for row in methods["final"]) for group in GROUPS]
    seconds = {method: sum(row["seconds"] for row in methods[method]) for method in ("final", "uniform")}
    return [
        *means_table(methods),
        "",
        *([*means_table(patches, "patches alone, mean of"), ""] if patches else []),
        *differences_table(methods, "final", ("bicubic", "coarse", "random priors", "no prompt", "uniform")),
        "",
        *groups_table(dict(zip(GROUPS, counts))),
        "",
        f"- evaluations, plan / uniform: {plan.evaluations(counts) / UNIFORM.evaluations(counts):.3f}",
        f"- seconds, plan: {seconds['final']:.1f} in all",
        f"- seconds, uniform: {seconds['uniform']:.1f} in all",
        f"- seconds, plan / uniform: {seconds['final'] / seconds['uniform']:.3f}",
        *_ratios(methods),
    ]


def _ratios(methods: Mapping[str, list[dict]]) -> list[str]:
    """What the plan keeps of uniform sampling's quality."""
    lines = []
    for key in ("feature_distance", "haarpsi"):
        plan, uniform = (mean_of(methods[method], key) for method in ("final", "uniform"))
        if plan is not None:
            lines.append(f"- {HEADINGS[key][0][:-2]}, plan / uniform: {plan / uniform:.3f}")
    return lines


def _correlation(confidence: Tensor, error: Tensor) -> str:
    """A line of the summary: whether a surer patch is a better one. Both are N."""
    try:
        correlation = spearman(confidence, -error)
    except ModuleNotFoundError as missing:
        return f"- skipped: Spearman ({missing})"
    return f"- Spearman, patch confidence and negative squared error of coarse: {correlation:.3f}"


def add_data_options(parser: argparse.ArgumentParser, hr_required: bool, out_help: str) -> None:
    """--lr, --hr, -o and --limit."""
    add = parser.add_argument
    add("--lr", type=Path, required=True, help="folder of images to upscale")
    add("--hr", type=Path, required=hr_required, help="folder of the true images, of the same names")
    add("-o", "--out", type=Path, required=True, help=out_help)
    add("--limit", type=positive, help="only the first images, by name")


def measure_pairs(args: argparse.Namespace, measure: Callable[[PatchScalerPipeline, list[Pair]], str]) -> int:
    """Print what `measure` says, and return the exit status. UsageError for folders or a device that there are not."""
    try:
        pairs, device = find_pairs(args.lr, args.hr)[: args.limit], pick_device(args.device)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        print(measure(load_pipeline(args.weights, device, args.dtype), pairs), end="")
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `evaluate`."""
    evaluate = commands.add_parser("evaluate", help="measure on a folder of images, with or without their truths")
    evaluate.set_defaults(run=run)
    add_data_options(evaluate, hr_required=False, out_help="folder for results.csv, summary.md and sheets")
    add_plan_option(evaluate)
    add_pipeline_options(evaluate)


def run(args: argparse.Namespace) -> int:
    measure = partial(benchmark, out=args.out, plan=args.plan, seed=args.seed, batch_size=args.batch_size)
    return measure_pairs(args, measure)
