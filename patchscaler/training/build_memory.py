"""Build the reference texture memory: python -m patchscaler.training.build_memory --data DIR --out DIR --minutes 2

20,000 candidate patches, of which farthest point sampling on values and keys together keeps 2,000 (Section 3.3). They
are of images that are reserved for the memory: no network was trained on them.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from patchscaler.loading import load_component
from patchscaler.models.autoencoder import encode_latents, load_autoencoder
from patchscaler.models.texture_classifier import TextureClassifier
from patchscaler.models.texture_memory import TextureMemory
from patchscaler.training.data import image_bank
from patchscaler.training.fit import bf16, parser, save_component, step_generator
from patchscaler.training.start import component

CROP = 128
CANDIDATES = 20_000
KEPT = 2_000
# Flat patches carry no texture, and farthest point sampling loves outliers: both ends of the candidates'
# spread of values are left out.
QUANTILES = (0.15, 0.99)
PROJECTED = 64


def build(args: argparse.Namespace) -> dict[str, float]:
    """Draw candidates for at most half of the minutes, sample, save to OUT/texture_memory."""
    device = torch.device(args.device)
    bank = image_bank(args.data, device, "memory")
    vae = load_autoencoder(component(args, "vae")).to(device)
    classifier = load_component(component(args, "texture_classifier"), TextureClassifier, torch.float32).to(device)
    wanted, kept = (64, 16) if args.dry_run else (CANDIDATES, KEPT)
    least = int(kept / (QUANTILES[1] - QUANTILES[0])) + 64
    deadline = time.perf_counter() + 30 * args.minutes
    values, count = [], 0
    while count < least or (count < wanted and time.perf_counter() < deadline):
        images, _ = bank.crops(32, CROP, step_generator(args.seed, count))
        with torch.inference_mode(), bf16(images.device):
            values.append(encode_latents(vae, images).half())
        count += len(images)
    values = torch.cat(values)  # N×c×V×V
    spread = values.float().std((-2, -1)).mean(1)  # N
    low, high = spread.quantile(torch.tensor(QUANTILES, device=spread.device))
    values = values[(spread >= low) & (spread <= high)]
    with torch.inference_mode():
        keys = torch.cat([classifier.features(part.float()) for part in values.split(256)])  # N×D
    chosen = farthest_points(_points(values, keys, args.seed), kept)
    memory = TextureMemory.from_patches(values[chosen].float().cpu(), keys[chosen].float().cpu())
    save_component(memory, args.out / "texture_memory")
    return {"texture memory, candidates": count, "texture memory, kept": len(chosen)}


def _points(values: Tensor, keys: Tensor, seed: int) -> Tensor:
    """Where candidates lie for the sampling: values and keys, each of length 1, so that both count the same.

    Values of c·V² numbers are projected at random to 64, which keeps distances (Johnson-Lindenstrauss).
    """
    flat = values.float().flatten(1)
    directions = torch.randn(flat.shape[1], PROJECTED, generator=torch.Generator().manual_seed(seed))
    projected = F.normalize(flat - flat.mean(0), dim=1) @ directions.to(flat) / PROJECTED**0.5
    return torch.cat([projected, F.normalize(keys.float() - keys.float().mean(0), dim=1)], dim=1)


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Greedy farthest point sampling: start at index 0, then take the point farthest from all taken so far.

    Args:
        points: N×D.
        count: how many to take, at most N.

    Returns:
        `count` distinct indices, in the order in which they were taken.

    Raises:
        ValueError: `count` is above N.
    """
    if count > len(points):
        raise ValueError(f"{count} points wanted of {len(points)}")
    chosen = torch.zeros(count, dtype=torch.long, device=points.device)
    distance = torch.full((len(points),), float("inf"), device=points.device)
    for index in range(1, count):
        distance = distance.minimum((points - points[chosen[index - 1]]).square().sum(1))
        distance[chosen[index - 1]] = -1  # taken, also among duplicates
        chosen[index] = distance.argmax()
    return chosen


if __name__ == "__main__":
    print(build(parser(__doc__).parse_args()))
