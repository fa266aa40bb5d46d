"""What limits quality: each part of the pipeline beside what it would give if the parts before it were perfect.

python -m patchscaler.evaluation.ceilings --lr DIR --hr DIR

Also what later starts and more steps give the patches of each group, how little a start at T 50 changes, and whether
the networks leave meshes in smooth places.

C channels, H W pixels, h w latents.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscaler.evaluation.metrics import MESH_PERIODS, mesh, to_8bit
from patchscaler.evaluation.pairs import (
    Pair,
    add_options,
    analyses,
    describe_setup,
    measure_pairs,
    score,
    score_patches,
)
from patchscaler.evaluation.scores import find_scorer
from patchscaler.evaluation.tables import mean_of, means_table, table
from patchscaler.models import decode_latents, encode_latents
from patchscaler.options import UsageError
from patchscaler.patches import LATENT_PIXELS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.results import Analysis

FINAL = "final: GRM and Patch-DiT"
NEAR = "every patch at T 50, N 1"
PLAN = SamplingPlan.paper()
FORCED = {f"T {start}, N {steps}": group for group, (start, steps) in enumerate(zip(PLAN.start, PLAN.steps))}


def measure(pipeline: PatchScalerPipeline, pairs: Sequence[Pair], seed: int = 0, batch_size: int | None = None) -> str:
    """Markdown tables of means over pairs of inputs and truths. ImageError for a pair that does not fit."""
    scorer = find_scorer(pipeline.device)
    rows = defaultdict(list)
    patches = {f"{group}: {setting}": [] for group in GROUPS for setting in ("coarse", *FORCED)}
    near = []  # the image at T 50 against the coarse one
    truths, made = [], {"coarse": [], "final": []}
    for name, analysis, truth in analyses(pipeline, pairs, batch_size):
        images = _images(pipeline, analysis, truth, seed, batch_size)
        for what, image in images.items():
            rows[what].append(score(scorer, name, image, truth))
        alone = {"coarse": analysis.coarse, **{key: images[_forced(key)] for key in FORCED}}
        groups = assign(analysis.patch_confidence, PLAN)
        for key, values in score_patches(scorer, name, alone, truth, analysis.grid, groups):
            patches[key].append(values)
        near.append(score(scorer, name, images[NEAR], to_8bit(analysis.coarse)))
        truths.append(truth)
        made["coarse"].append(to_8bit(analysis.coarse))
        made["final"].append(to_8bit(images[FINAL]))
    meshes = [[name, *(f"{value:.2f}" for value in mesh(images, truths).values())] for name, images in made.items()]
    lines = [
        describe_setup(pipeline, pairs, seed),
        "",
        *means_table(rows, "what, mean of"),
        "",
        *means_table(patches, "patches alone, mean of"),
        "",
        *table(
            ["mesh in the smoothest tenth, power over the truths'", *(f"{period} pixels" for period in MESH_PERIODS)],
            meshes,
        ),
        "",
        *scorer.skipped_lines(),
    ]
    if (mean := mean_of(near, "haarpsi")) is not None:
        least = min(row["haarpsi"] for row in near)
        lines.append(f"- {NEAR} against the coarse image, HaarPSI: {mean:.4f}, {least:.4f} at least")
    return "\n".join(lines).rstrip() + "\n"


def _forced(setting: str) -> str:
    return f"every patch {GROUPS[FORCED[setting]]}: {setting}"


@torch.inference_mode()
def _images(
    pipeline: PatchScalerPipeline, analysis: Analysis, truth: Tensor, seed: int, batch_size: int | None
) -> dict[str, Tensor]:
    """Images 3×H×W by what they show."""
    x_hr = _encode(pipeline, truth, analysis.latents.shape[-2:])  # C×h×w
    y_lr = _encode(pipeline, analysis.bicubic, analysis.latents.shape[-2:])  # C×h×w

    def refined(latents: Tensor, plan: SamplingPlan = PLAN, group: int | None = None) -> Tensor:
        by_hand = {} if group is None else dict.fromkeys(range(len(analysis.grid)), group)
        *_, result = pipeline.refine(replace(analysis, latents=latents), plan, seed, batch_size, by_hand=by_hand)
        return result.picture.rgb

    return {
        "bicubic": analysis.bicubic,
        "bicubic, encoded and decoded": _decode(pipeline, y_lr, truth),
        "coarse: GRM": analysis.coarse,
        FINAL: refined(analysis.latents),
        **{_forced(setting): refined(analysis.latents, group=group) for setting, group in FORCED.items()},
        NEAR: refined(analysis.latents, replace(PLAN, start=(50, 50, 50), steps=(1, 1, 1))),
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    try:
        return measure_pairs(parser.parse_args(argv), measure)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
