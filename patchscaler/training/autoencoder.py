"""Train the compact autoencoder: python -m patchscaler.training.autoencoder --data DIR --out DIR --minutes 40

Loss: the mean over crops of the log of the squared error of the pixels, as in PSNR: without the logarithm the few
crops that no f8 latent can hold take most of the gradient (.3 dB on set14). Noise of a twentieth of each latent
channel's deviation is added before decoding, so that the decoder tolerates the small errors of GRM and Patch-DiT.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from patchscaler.models.autoencoder import CompactAutoencoder, decode_latents, encode_latents, load_autoencoder
from patchscaler.patches import LATENT_PIXELS
from patchscaler.training.data import DRAWN, ImageBank, image_bank
from patchscaler.training.fit import bf16, fit, parser, save_component, step_generator
from patchscaler.training.start import start_pipeline, take_weights

CONFIGS = {"compact": {"latent_channels": 32, "widths": (96, 192), "encoder_depth": (1, 2), "decoder_depth": (2, 3)}}
# The paper freezes Stable Diffusion's autoencoder (c = 4).
PRETRAINED = {"paper": "stabilityai/sd-vae-ft-mse"}
LATENT_NOISE = 0.05
FLOOR = 3e-4  # added to the squared error, for images in [-1, 1]: 41 dB
CROP = 128


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, measure the latents' statistics, save to OUT/vae and return the held-out PSNR.

    An autoencoder that is given (`--vae`, and always for the configuration `paper`) is only copied there.
    """
    device = torch.device(args.device)
    if given := args.vae or PRETRAINED.get(args.config):
        save_component(load_autoencoder(given), args.out / "vae")
        return {}
    batch = 2 if args.dry_run else args.batch or (16 if device.type == "cpu" else 256)
    bank = image_bank(args.data, device)
    torch.manual_seed(args.seed)
    model = CompactAutoencoder(**CONFIGS[args.config])
    start = start_pipeline(args)
    if start:
        take_weights(model, start.vae)
    model.to(device)

    def loss(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(args.seed, step)
        images, _ = bank.crops(batch, CROP, generator, drawn=DRAWN)
        shape = (batch, CONFIGS[args.config]["latent_channels"], CROP // LATENT_PIXELS, CROP // LATENT_PIXELS)
        noise = LATENT_NOISE * torch.randn(shape, generator=generator).to(device)
        with bf16(device):
            output = model(images.contiguous(memory_format=torch.channels_last), noise)
        error = (output.float() - images).square().mean((1, 2, 3))
        return {"loss": (error + FLOOR).log().mean(), "squared": error.detach().mean()}

    average = fit("autoencoder", model, loss, args, batch=batch, peak_rate=1e-4 if start else 1e-3)
    measure_statistics(average, bank, args.seed)
    save_component(average, args.out / "vae")
    held_out = image_bank(args.data, device, "held-out")
    images, _ = held_out.crops(4 if args.dry_run else 128, CROP, step_generator(args.seed, 0, 1))
    with torch.inference_mode(), bf16(device):
        error = decode_latents(average, encode_latents(average, images)) - images
    return {"autoencoder, RGB PSNR on held-out crops, dB": (-10 * (error / 2).square().mean().log10()).item()}


@torch.no_grad()
def measure_statistics(vae: CompactAutoencoder, bank: ImageBank, seed: int) -> None:
    """Set the config's latents_mean and latents_std, c numbers each, from 256 training crops."""
    images = torch.cat([bank.crops(32, CROP, step_generator(seed, part, 1))[0] for part in range(8)])
    with bf16(images.device):
        latents = vae.encode(images).latents.float()
    vae.register_to_config(latents_mean=latents.mean((0, 2, 3)).tolist(), latents_std=latents.std((0, 2, 3)).tolist())


if __name__ == "__main__":
    train(parser(__doc__).parse_args())
