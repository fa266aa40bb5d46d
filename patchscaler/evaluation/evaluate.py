"""Measure a pipeline on a folder of images: figures of every image, their means, and contact sheets to look at.

python -m patchscaler evaluate --lr DIR --hr DIR -o OUT

Images are scored as an 8-bit file would hold them, to their very edges.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from patchscaler.evaluation import outputs
from patchscaler.evaluation.metrics import seam_score, to_8bit
from patchscaler.evaluation.pairs import (
    MEASURES,
    Pair,
    add_options,
    analyses,
    coarse_costs,
    costs,
    describe_setup,
    measure_pairs,
    score,
    score_patches,
)
from patchscaler.evaluation.reliability import draw_reliability, patch_errors, spearman
from patchscaler.evaluation.scores import METRICS, find_scorer
from patchscaler.evaluation.tables import HEADINGS, differences_table, mean_of, means_table, table
from patchscaler.figures import contact_sheet, qmap_overlay
from patchscaler.images import Picture, to_pil
from patchscaler.options import add_plan_option
from patchscaler.patches import PatchGrid, split
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.results import Analysis, Result

UNIFORM = SamplingPlan.uniform()
BATCH = 64  # patches that are given random priors at once
COLUMNS = ("image", "method", *(metric.key for metric in METRICS), "seam_score", *GROUPS, "evaluations", "seconds")


def evaluate(
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
    that cannot be measured here. `sheets/NAME.png` shows the pictures; `reliability.png`, with truths only, compares
    confidence and error; `summary.md` is the returned Markdown, which also has the coarse and the final image of each
    group's patches alone. ImageError names an image that is unreadable, too small to be scored, or not four
    times its input.
    """
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    scorer = find_scorer(pipeline.device)
    methods: dict[str, list[dict]] = {}
    patches: dict[str, list[dict]] = {f"{group}: {method}": [] for group in GROUPS for method in ("coarse", "final")}
    confidences, errors = [], []
    with open(out / "results.csv", "w", buffering=1, newline="", encoding="utf-8") as file:  # by lines, to follow it
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name, analysis, truth in analyses(pipeline, pairs, batch_size):
            runs = _run_all(pipeline, analysis, plan, seed, batch_size)
            images = {"bicubic": analysis.bicubic, "coarse": analysis.coarse}
            costs_of = {"bicubic": {"evaluations": 0}, "coarse": coarse_costs(analysis)}
            for method, run in runs.items():
                images[method] = run.picture.rgb
                costs_of[method] = {group.name: group.patches for group in run.groups} | costs(run)
            borders = seam_borders(analysis.grid, *analysis.bicubic.shape[-2:])
            for method, image in images.items():
                row = {"image": name, "method": method, **score(scorer, name, image, truth), **costs_of[method]}
                if any(borders):
                    row["seam_score"] = seam_score(to_8bit(image), *borders)
                writer.writerow(row)
                methods.setdefault(method, []).append(row)
            if truth is not None:
                confidences.append(analysis.patch_confidence)
                errors.append(patch_errors(analysis.coarse, truth, analysis.grid))
                shown = {method: images[method] for method in ("coarse", "final")}
                for key, values in score_patches(scorer, name, shown, truth, analysis.grid, runs["final"].assignment):
                    patches[key].append(values)
            sheet = _sheet(analysis, runs["final"], truth)
            text = PngInfo()
            for key, value in outputs.PNG_TEXT.items():
                text.add_text(key, value)
            sheet.save(out / "sheets" / f"{name}.png", pnginfo=text)
    lines = ["# Benchmark", "", describe_setup(pipeline, pairs, seed), f"Plan: `{plan.to_json()}`", ""]
    lines += [*_summary(methods, patches if errors else {}, plan), ""]
    if errors:
        confidence, error = torch.cat(confidences), torch.cat(errors)
        draw_reliability(confidence, error, plan, out / "reliability.png")
        lines.append(_correlation(confidence, error))
    lines += scorer.skipped_lines()
    summary = "\n".join(lines).rstrip() + "\n"
    (out / "summary.md").write_text(summary, encoding="utf-8")
    return summary


def seam_borders(grid: PatchGrid, height: int, width: int) -> tuple[list[int], list[int]]:
    """Rows and columns of pixels at which a patch begins or ends, inside an image of H×W."""
    rows, columns = grid.borders()
    return [row for row in rows if 0 < row < height], [column for column in columns if 0 < column < width]


def _run_all(
    pipeline: PatchScalerPipeline, analysis: Analysis, plan: SamplingPlan, seed: int, batch_size: int | None
) -> dict[str, Result]:
    null_prompt = pipeline.transformer.null_prompt.detach().float().cpu().expand(len(analysis.grid), -1, -1)  # N×L×D
    tasks = {
        "final": (analysis, plan),
        "random priors": (replace(analysis, prompt=_random_prompt(pipeline, analysis, seed)), plan),
        "no prompt": (replace(analysis, prompt=null_prompt), plan),
        "uniform": (analysis, UNIFORM),
    }
    return {method: [*pipeline.refine(*task, seed, batch_size)][-1] for method, task in tasks.items()}


@torch.inference_mode()
def _random_prompt(pipeline: PatchScalerPipeline, analysis: Analysis, seed: int) -> Tensor:
    """The prompts N×L×D of random entries of the texture memory, weighed by their own similarities to the patches."""
    memory, encoder = pipeline.texture_memory, pipeline.texture_encoder
    y0 = split(analysis.latents.to(pipeline.device), analysis.grid)  # N×C×V×V
    draws = torch.rand(len(y0), len(memory.features), generator=torch.Generator().manual_seed(seed))
    drawn = draws.topk(encoder.config.top_k).indices.to(pipeline.device)  # N×K
    prompts = []
    for patches, entries in zip(y0.split(BATCH), drawn.split(BATCH)):
        queries = F.normalize(pipeline.texture_classifier.features(patches).float(), dim=-1)  # N×D
        similarities = torch.einsum("nd,nkd->nk", queries, memory.features[entries])  # N×K
        prompts.append(encoder(memory.patches(entries), similarities, patches).float().cpu())
    return torch.cat(prompts)


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


def _summary(methods: Mapping[str, list[dict]], patches: Mapping[str, list[dict]], plan: SamplingPlan) -> list[str]:
    """Means per method and per group, differences from the final image, shares of the groups, and costs, as Markdown.

    `methods` have the rows of their images, `patches` those of `score_patches`; without truths there are none.
    """
    counts = [sum(row[group] for row in methods["final"]) for group in GROUPS]
    shares = [[group, str(count), f"{count / sum(counts):.1%}"] for group, count in zip(GROUPS, counts)]
    seconds, uniform = (sum(row["seconds"] for row in methods[method]) for method in ("final", "uniform"))
    lines = [
        *means_table(methods),
        "",
        *([*means_table(patches, "patches alone, mean of"), ""] if patches else []),
        *differences_table(methods, "final"),
        "",
        *table(["group", "patches", "share"], shares),
        "",
        f"- evaluations, plan / uniform: {plan.evaluations(counts) / UNIFORM.evaluations(counts):.3f}",
        f"- seconds, plan: {seconds:.1f} in all",
        f"- seconds, uniform: {uniform:.1f} in all",
        f"- seconds, plan / uniform: {seconds / uniform:.3f}",
    ]
    for key in ("feature_distance", "haarpsi"):
        means = [mean_of(methods[method], key) for method in ("final", "uniform")]
        if None not in means:
            lines.append(f"- {HEADINGS[key][0][:-2]}, plan / uniform: {means[0] / means[1]:.3f}")
    return lines


def _correlation(confidence: Tensor, error: Tensor) -> str:
    """A line of the summary: whether a surer patch is a better one. Both are N."""
    try:
        correlation = spearman(confidence, -error)
    except ModuleNotFoundError as missing:
        return f"- skipped: Spearman ({missing})"
    return f"- Spearman, patch confidence and negative squared error of coarse: {correlation:.3f}"


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `evaluate`."""
    parser = commands.add_parser("evaluate", help="measure on a folder of images, with or without their truths")
    parser.set_defaults(run=run)
    outputs.add_options(parser, "results.csv, summary.md and sheets")
    add_options(parser, hr_required=False)
    add_plan_option(parser)


def marks(pairs: Sequence[Pair]) -> dict[str, str]:
    """The files that `evaluate` writes, as `outputs.prepare` takes them."""
    texts = {"results.csv": ",".join(COLUMNS), "summary.md": MEASURES}
    pictures = ["reliability.png", *(f"sheets/{low.stem}.png" for low, _ in pairs)]
    return texts | dict.fromkeys(pictures, outputs.PNG_MARK)


def run(args: argparse.Namespace) -> int:
    return measure_pairs(args, evaluate, marks, out=args.out, plan=args.plan)
