"""Train the global restoration module: python -m patchscaler.training.grm --data DIR --out DIR --minutes 40

Loss: Eq. 1. While training, η is the 65th percentile of the batch's squared errors; `calibrate` then sets it.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchscaler.grouping import SamplingPlan
from patchscaler.models.autoencoder import load_autoencoder, pixel_metric
from patchscaler.models.grm import GRM, confidence_loss, restoration_loss, squared_error
from patchscaler.training.data import ImageBank
from patchscaler.training.fit import bf16, fit, make_accelerator, parser, pool_size, save_component, step_generator
from patchscaler.training.pairs import draw_pairs
from patchscaler.training.pool import Pool

CONFIGS = {
    "compact": {"widths": (96, 192), "depths": (2, 4, 2)},
    "paper": {"widths": (320, 512), "depths": (6, 8, 6)},
}
CROP = 128
ETA_QUANTILE = 0.65
JUDGING_WEIGHT = 0.2  # λ of Eq. 1
VALIDATION_CROP = 256
HARD_SHARE = 0.3  # of held-out patches, at the paper's thresholds


def train(args: argparse.Namespace, bank: ImageBank | None = None) -> dict[str, float]:
    """Train, save to OUT/grm and return its errors on held-out images."""
    accelerator = make_accelerator(args)
    device = accelerator.device
    batch = 4 if args.dry_run else args.batch or (16 if device.type == "cpu" else 64)
    bank = bank or ImageBank(args.data, device)
    vae = load_autoencoder(args.out / "vae").to(device, memory_format=torch.channels_last)
    torch.manual_seed(args.seed)
    model = GRM(vae.config.latent_channels, **CONFIGS[args.config]).to(device)

    def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return draw_pairs(vae, bank, count, CROP, generator)

    size, passes = (32, 1) if args.dry_run else (pool_size(args, 2048), 6 if device.type == "cpu" else 1)
    pool = Pool(draw, size=size, passes=passes, batch=batch, seed=args.seed, rank=accelerator.process_index)

    probes = draw(4 if args.dry_run else 32, step_generator(args.seed, 0, 2))
    metric = pixel_metric(vae, probes["x_hr"].float())

    def loss(model: nn.Module, step: int, progress: float) -> dict[str, Tensor]:
        rows = pool.samples(step)
        target = rows["x_hr"].float()
        with bf16(device):
            output = model(rows["y_lr"].float().contiguous(memory_format=torch.channels_last))
        eta = squared_error(output.latents.detach(), target).quantile(ETA_QUANTILE).item()
        restored = restoration_loss(output.latents, target, metric)
        judged = confidence_loss(output, target, eta)
        return {"loss": restored + JUDGING_WEIGHT * judged, "restored": restored.detach(), "judged": judged.detach()}

    average = fit("grm", model, loss, args, accelerator, batch=batch, peak_rate=5e-4)
    held_out = ImageBank(args.data, device, held_out=True)
    pairs = draw_pairs(vae, held_out, 8 if args.dry_run else 96, VALIDATION_CROP, step_generator(args.seed, 0, 1))
    figures = calibrate(average, pairs["y_lr"].float(), pairs["x_hr"].float())
    if accelerator.is_main_process:
        save_component(average, args.out / "grm")
    return figures


@torch.inference_mode()
def calibrate(model: GRM, y_lr: Tensor, x_hr: Tensor) -> dict[str, float]:
    """Set η by how full the groups shall be, and measure the latent errors on held-out pairs B×c×h×w.

    Where it is not saturated C is η / e², so a shift of its logits by b stands for η multiplied by eᵇ. b is
    chosen so that `HARD_SHARE` of the patches lie below the paper's γ₂; it goes into the last bias, and η into
    the config.
    """
    outputs = [model(part) for part in y_lr.split(16)]
    logits = torch.cat([output.confidence_logits.float() for output in outputs])  # B×1×h×w
    errors = squared_error(torch.cat([output.latents for output in outputs]), x_hr)  # B×1×h×w
    low, high = -10.0, 10.0
    for _ in range(40):
        shift = (low + high) / 2
        confidence = F.avg_pool2d((logits + shift).sigmoid(), 16)  # of patches that do not overlap
        hard = (confidence <= SamplingPlan.paper().gamma2).float().mean().item()
        low, high = (shift, high) if hard > HARD_SHARE else (low, shift)
    model.judge[-1].bias.add_(shift)
    eta = errors.flatten().quantile(ETA_QUANTILE).item() * math.exp(shift)
    model.register_to_config(eta=eta)
    simple = (confidence > SamplingPlan.paper().gamma1).float().mean().item()
    return {
        "y_LR, squared latent error": squared_error(y_lr, x_hr).mean().item(),
        "y_HR, squared latent error": errors.mean().item(),
        "eta, squared latent error": eta,
        "share of simple patches": simple,
        "share of hard patches": hard,
    }


if __name__ == "__main__":
    print(train(parser(__doc__).parse_args()))
