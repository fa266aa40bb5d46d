"""Train the global restoration module: python -m patchscaler.training.grm --data DIR --out DIR --minutes 40

Loss: Eq. 1 on latents, and for a quarter of each batch the squared error of the decoded pixels, which tells the GRM which
latent errors are seen. η is the 65th percentile of the squared errors, so that it need not be known before.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchscaler.models.autoencoder import CompactAutoencoder, decode_latents
from patchscaler.models.grm import GRM, confidence_loss, squared_error
from patchscaler.training.data import ImageBank
from patchscaler.training.fit import bf16, fit, make_accelerator, parser, pool_size, save_component, step_generator
from patchscaler.training.pairs import draw_pairs
from patchscaler.training.pool import Pool

CONFIGS = {
    "compact": {"widths": (160, 288), "depths": (2, 5, 3)},
    "paper": {"widths": (320, 512), "depths": (6, 8, 6)},
}
CROP = 160
ETA_QUANTILE = 0.65
PIXEL_WEIGHT = 30.0


def train(args: argparse.Namespace, bank: ImageBank | None = None) -> dict[str, float]:
    """Train, save to OUT/grm and return its errors on held-out images."""
    accelerator = make_accelerator(args)
    device = accelerator.device
    batch = 4 if args.dry_run else args.batch or (16 if device.type == "cpu" else 64)
    bank = bank or ImageBank(args.data, device)
    vae = CompactAutoencoder.from_pretrained(args.out / "vae").to(device, memory_format=torch.channels_last)
    vae.eval().requires_grad_(False)
    torch.manual_seed(args.seed)
    model = GRM(vae.config.latent_channels, **CONFIGS[args.config]).to(device, memory_format=torch.channels_last)

    def draw(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        return draw_pairs(vae, bank, count, CROP, generator)

    size, passes = (32, 1) if args.dry_run else (pool_size(args, 2048), 4 if device.type == "cpu" else 1)
    pool = Pool(draw, size=size, passes=passes, batch=batch, seed=args.seed, rank=accelerator.process_index)

    def loss(model: nn.Module, step: int, progress: float) -> dict[str, Tensor]:
        rows = pool.samples(step)
        target = rows["x_hr"].float()
        some = slice(batch // 4)
        with bf16(device):
            output = model(rows["y_lr"].float().contiguous(memory_format=torch.channels_last))
            decoded = decode_latents(vae, output.latents[some])
        eta = squared_error(output.latents.detach(), target).quantile(ETA_QUANTILE).item()
        judged = confidence_loss(output, target, eta)
        pixels = F.mse_loss(decoded, rows["images"][some].float().div(127.5).sub(1))
        return {"loss": judged + PIXEL_WEIGHT * pixels, "eq1": judged.detach(), "pixels": pixels.detach()}

    average = fit("grm", model, loss, args, accelerator, batch=batch, peak_rate=1e-3)
    figures = validate(average, vae, args, bank.device)
    average.register_to_config(eta=figures["eta, squared latent error"])
    if accelerator.is_main_process:
        save_component(average, args.out / "grm")
    return figures


@torch.inference_mode()
def validate(model: GRM, vae: CompactAutoencoder, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Latent errors before and after the GRM on held-out crops, and η, the percentile of what is left."""
    bank = ImageBank(args.data, device, held_out=True)
    count = 8 if args.dry_run else 128
    pairs = draw_pairs(vae, bank, count, CROP, step_generator(args.seed, 0, 1))
    target = pairs["x_hr"].float()
    errors = torch.cat([
        squared_error(model(part.float()).latents, clean)
        for part, clean in zip(pairs["y_lr"].split(16), target.split(16), strict=True)
    ])  # fmt: skip
    return {
        "y_LR, squared latent error": squared_error(pairs["y_lr"].float(), target).mean().item(),
        "y_HR, squared latent error": errors.mean().item(),
        "eta, squared latent error": errors.flatten().quantile(ETA_QUANTILE).item(),
    }


if __name__ == "__main__":
    print(train(parser(__doc__).parse_args()))
