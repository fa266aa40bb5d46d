"""What limits quality: each part of the pipeline beside what it would give if the parts before it were perfect.

python -m patchscaler.evaluation.ceilings --lr DIR --hr DIR

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

from patchscaler.evaluation.benchmark import Pair, describe_run, find_pairs, read_truth, score, with_progress
from patchscaler.evaluation.components import read_image
from patchscaler.evaluation.scores import Scorer, find_scorer
from patchscaler.evaluation.tables import means_table
from patchscaler.loading import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.models import decode_latents, encode_latents
from patchscaler.patches import LATENT_PIXELS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan


def measure(pipeline: PatchScalerPipeline, pairs: Sequence[Pair], plan: SamplingPlan, seed: int = 0) -> str:
    """A Markdown table of means over pairs of inputs and truths. ImageError for a pair that does not fit."""
    scorer = find_scorer(pipeline.device)
    rows = defaultdict(list)
    for low, high in with_progress(pairs):
        for name, row in _rows(pipeline, low, high, plan, seed, scorer).items():
            rows[name].append(row)
    about = [describe_run(pipeline, pairs, seed), "", *means_table(rows, first="what, mean of")]
    return "\n".join([*about, *(f"- {line}" for line in scorer.skipped_lines())])


@torch.inference_mode()
def _rows(pipeline: PatchScalerPipeline, low, high, plan: SamplingPlan, seed: int, scorer: Scorer) -> dict[str, dict]:
    analysis = pipeline.analyze(read_image(low))
    truth = read_truth(high, analysis.bicubic)  # 3×H×W
    x_hr = _encode(pipeline, truth, analysis.latents.shape[-2:])  # C×h×w
    y_lr = _encode(pipeline, analysis.bicubic, analysis.latents.shape[-2:])  # C×h×w

    def refined(latents: Tensor, by_hand: dict[int, int] | None = None) -> Tensor:
        *_, result = pipeline.refine(replace(analysis, latents=latents), plan, seed, by_hand=by_hand)
        return result.picture.rgb

    images = {
        "bicubic": analysis.bicubic,
        "bicubic, encoded and decoded": _decode(pipeline, y_lr, truth),
        "coarse: GRM": analysis.coarse,
        "final: GRM and Patch-DiT": refined(analysis.latents),
        **{
            f"every patch {name}: T {plan.start[group]}, N {plan.steps[group]}": refined(
                analysis.latents, dict.fromkeys(range(len(analysis.grid)), group)
            )
            for group, name in enumerate(GROUPS)
        },
        "Patch-DiT on the true latents": refined(x_hr),
        "truth, encoded and decoded": _decode(pipeline, x_hr, truth),
    }
    return {name: score(scorer, low.stem, image, truth) for name, image in images.items()}


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
