"""What limits quality: each part of the pipeline beside what it would give if the parts before it were perfect.

python -m patchscaler.evaluation.ceilings --lr DIR --hr DIR

Also what later starts and more steps give the patches of each group, how little a start at T 50 changes, and whether
the networks leave meshes in smooth places.

C channels, H W pixels, h w latents.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from patchscaler.evaluation.benchmark import (
    Pair,
    describe_run,
    empty_groups,
    find_pairs,
    read_truth,
    score,
    score_groups,
)
from patchscaler.evaluation.components import read_image, to_8bit
from patchscaler.evaluation.metrics import MESH_PERIODS, mesh
from patchscaler.evaluation.scores import SHORT, find_scorer
from patchscaler.evaluation.tables import means_table, table
from patchscaler.loading import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.models import decode_latents, encode_latents
from patchscaler.patches import LATENT_PIXELS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.results import Analysis

FINAL = "final: GRM and Patch-DiT"
NEAR = "every patch at T 50, N 1"


def measure(pipeline: PatchScalerPipeline, pairs: Sequence[Pair], plan: SamplingPlan, seed: int = 0) -> str:
    """Markdown tables of means over pairs of inputs and truths. ImageError for a pair that does not fit."""
    scorer, haarpsi = (find_scorer(pipeline.device, keys) for keys in (SHORT, ("haarpsi",)))
    forced = {f"T {start}, N {steps}": group for group, (start, steps) in enumerate(zip(plan.start, plan.steps))}
    rows, patches = defaultdict(list), empty_groups(("coarse", *forced))
    near = []  # HaarPSI of the image at T 50 against the coarse one
    truths, made = [], {"coarse": [], "final": []}
    for low, high in tqdm(pairs, unit="image", disable=None):
        analysis = pipeline.analyze(read_image(low))
        truth = read_truth(high, analysis.bicubic)  # 3×H×W
        images = _images(pipeline, analysis, truth, plan, seed)
        for name, image in images.items():
            rows[name].append(score(scorer, low.stem, image, truth))
        alone = {name: images[_forced(plan, group)] for name, group in forced.items()}
        groups = assign(analysis.patch_confidence, plan)
        score_groups(patches, scorer, low.stem, {"coarse": analysis.coarse, **alone}, truth, analysis.grid, groups)
        near.append(score(haarpsi, low.stem, images[NEAR], to_8bit(analysis.coarse)).get("haarpsi"))
        truths.append(truth)
        for name, image in (("coarse", analysis.coarse), ("final", images[FINAL])):
            made[name].append(to_8bit(image))
    meshes = {name: mesh(images, truths) for name, images in made.items()}
    lines = [
        describe_run(pipeline, pairs, seed),
        "",
        *means_table(rows, "what, mean of"),
        "",
        *means_table(patches, "patches alone, mean of"),
        "",
        *table(
            ["mesh in the smoothest tenth, power over the truths'", *(f"{period} pixels" for period in MESH_PERIODS)],
            [[name, *(f"{values[period]:.2f}" for period in MESH_PERIODS)] for name, values in meshes.items()],
        ),
        "",
        *(f"- {line}" for line in scorer.skipped_lines()),
    ]
    if None not in near:
        mean = sum(near) / len(near)
        lines.append(f"- {NEAR} against the coarse image, HaarPSI: {mean:.4f}, {min(near):.4f} at least")
    return "\n".join(lines).rstrip()


def _forced(plan: SamplingPlan, group: int) -> str:
    return f"every patch {GROUPS[group]}: T {plan.start[group]}, N {plan.steps[group]}"


@torch.inference_mode()
def _images(
    pipeline: PatchScalerPipeline, analysis: Analysis, truth: Tensor, plan: SamplingPlan, seed: int
) -> dict[str, Tensor]:
    """Images 3×H×W by what they show."""
    x_hr = _encode(pipeline, truth, analysis.latents.shape[-2:])  # C×h×w
    y_lr = _encode(pipeline, analysis.bicubic, analysis.latents.shape[-2:])  # C×h×w

    def refined(latents: Tensor, plan: SamplingPlan = plan, by_hand: dict[int, int] | None = None) -> Tensor:
        *_, result = pipeline.refine(replace(analysis, latents=latents), plan, seed, by_hand=by_hand)
        return result.picture.rgb

    groups = {group: dict.fromkeys(range(len(analysis.grid)), group) for group in range(len(GROUPS))}
    return {
        "bicubic": analysis.bicubic,
        "bicubic, encoded and decoded": _decode(pipeline, y_lr, truth),
        "coarse: GRM": analysis.coarse,
        FINAL: refined(analysis.latents),
        **{_forced(plan, group): refined(analysis.latents, by_hand=every) for group, every in groups.items()},
        NEAR: refined(analysis.latents, replace(plan, start=(50, 50, 50), steps=(1, 1, 1))),
        "Patch-DiT on the true latents": refined(x_hr),
        "truth, encoded and decoded": _decode(pipeline, x_hr, truth),
    }


def _encode(pipeline: PatchScalerPipeline, image: Tensor, size: Sequence[int]) -> Tensor:
    """3×H×W → C×h×w of the given size, filled up as `analyze` does."""
    right, bottom = (LATENT_PIXELS * cells - side for cells, side in zip(size[::-1], image.shape[:0:-1], strict=True))
    padded = F.pad(image[None].to(pipeline.device), (0, right, 0, bottom), mode="replicate")
    return encode_latents(pipeline.vae, padded)[0].cpu()


def _decode(pipeline: PatchScalerPipeline, latents: Tensor, like: Tensor) -> Tensor:
    height, width = like.shape[-2:]
    return decode_latents(pipeline.vae, latents[None].to(pipeline.device))[0, :, :height, :width].cpu()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--lr", type=Path, required=True, help="folder of images to upscale")
    add("--hr", type=Path, required=True, help="folder of the true images, of the same names")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    args = parser.parse_args(argv)
    try:
        pairs = find_pairs(args.lr, args.hr)
        print(measure(load_pipeline(args.weights), pairs, SamplingPlan.paper()))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
