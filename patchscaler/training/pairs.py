"""Pairs of degraded and clean latents: what the GRM and Patch-DiT learn from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchscaler.images import bicubic
from patchscaler.models.autoencoder import encode_latents
from patchscaler.training.data import DRAWN, ImageBank
from patchscaler.training.degradation import degrade
from patchscaler.training.fit import bf16

# Shares of the degradations: the strong one for what the internet holds, the mild one of the paper's test
# pairs, and plain downscaling, so that a clean input is not over-smoothed.
SHARES = {"real-esrgan": 0.25, "resshift": 0.6, "bicubic": 0.15}
CROP = 160  # pixels: a patch of 128 and 32 around it


@torch.inference_mode()
def draw_pairs(
    vae: nn.Module,
    bank: ImageBank,
    count: int,
    size: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Draw `count` crops and degrade each by one kind of `SHARES`.

    Returns:
        y_lr and x_hr, count×c×size/8×size/8 in fp16; images, count×3×size×size in uint8.
    """
    images, _ = bank.crops(count, size, generator, drawn=DRAWN)
    counts = [round(count * share) for share in SHARES.values()]
    counts[0] += count - sum(counts)
    parts = images.split(counts)
    small = torch.cat([
        degrade(part, generator, kind) for part, kind in zip(parts, SHARES, strict=True) if len(part)
    ])  # fmt: skip
    with bf16(images.device):
        y_lr = encode_latents(vae, bicubic(small, 4))
        x_hr = encode_latents(vae, images)
    codes = ((images + 1) * 127.5).round().to(torch.uint8)
    return {"y_lr": y_lr.half(), "x_hr": x_hr.half(), "images": codes}


@torch.inference_mode()
def draw_restored(
    vae: nn.Module,
    grm: nn.Module,
    bank: ImageBank,
    count: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """`draw_pairs` of `CROP` with y_hr, what the GRM makes of y_lr, in its place."""
    pairs = draw_pairs(vae, bank, count, CROP, generator)
    y_lr = pairs.pop("y_lr").float().contiguous(memory_format=torch.channels_last)
    with bf16(bank.device):
        y_hr = grm(y_lr).latents
    return {"y_hr": y_hr.half(), **pairs}


def clean_images(rows: dict[str, Tensor]) -> Tensor:
    """The images of drawn pairs as the networks see them: B×3×H×W in [-1, 1], channels_last."""
    return rows["images"].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
