"""A small network that stands in for a frozen decoder while the GRM is trained: a tenth of its cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchscaler.models.autoencoder import decode_unclamped
from patchscaler.patches import LATENT_PIXELS
from patchscaler.training.fit import bf16, learning_rate, step_generator
from patchscaler.training.optimizer import MuonAdamW
from patchscaler.training.pool import Pool

WIDTH = 128
STEPS = 400


def learn_stand_in(vae: nn.Module, pool: Pool, channels: int, steps: int, seed: int) -> tuple[nn.Module, Tensor]:
    """Three convolutions that do what the decoder does to y_LR, x_HR and whatever lies between them.

    An error of the coarse image is far larger than what the stand-in misses of the decoder, so its gradient is
    as good, and it makes a training step of the GRM half as dear.

    Returns:
        The stand-in, B×c×h×w → B×3×8h×8w, and its mean squared error in the last step, for images in [-1, 1].
    """
    device = next(vae.parameters()).device
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(channels, WIDTH, 3, padding=1), nn.SiLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(),
        nn.Conv2d(WIDTH, 3 * LATENT_PIXELS**2, 3, padding=1), nn.PixelShuffle(LATENT_PIXELS),
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    optimizer = MuonAdamW(model, 2e-3)
    for step in range(steps):
        optimizer.set_rate(learning_rate(2e-3, step / steps))
        rows = pool.samples(step)
        part = torch.rand(len(rows["y_lr"]), 1, 1, 1, generator=step_generator(seed, step)).to(device)
        latents = torch.lerp(rows["y_lr"].float(), rows["x_hr"].float(), part)
        latents = latents.contiguous(memory_format=torch.channels_last)
        with bf16(device):
            with torch.no_grad():
                wanted = decode_unclamped(vae, latents)
            seen = model(latents)
        error = F.mse_loss(seen.float(), wanted)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return model.eval().requires_grad_(False), error.detach()
