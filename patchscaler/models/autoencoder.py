"""The frozen autoencoder around the method: images ↔ latents at an eighth of the size (d = 8, Section 3.1)."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from patchscaler.models.blocks import residual_stack
from patchscaler.patches import LATENT_PIXELS


class CompactAutoencoder(ModelMixin, ConfigMixin):
    """Deterministic f8 autoencoder of plain convolutions, made for CPUs.

    Takes images B×3×H×W in [-1, 1] with H and W multiples of 8; gives latents B×c×H/8×W/8. Runs in float32,
    bfloat16 or float16. The pixels are unshuffled by 4 first, because convolutions at full resolution are
    what costs on a CPU.

    Args:
        latent_channels: c.
        widths: channels at a quarter and at an eighth of the size.
        encoder_depth, decoder_depth: residual blocks at a quarter and at an eighth of the size.
        latents_mean, latents_std: c numbers each, measured over training images; `encode_latents` uses them.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: tuple[int, int] = (96, 192),
        encoder_depth: tuple[int, int] = (1, 2),
        decoder_depth: tuple[int, int] = (2, 3),
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        quarter, eighth = widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, quarter, 3, padding=1),
            residual_stack(quarter, encoder_depth[0]),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            residual_stack(eighth, encoder_depth[1]),
            nn.Conv2d(eighth, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, eighth, 3, padding=1),
            residual_stack(eighth, decoder_depth[1]),
            nn.Conv2d(eighth, quarter * 4, 3, padding=1),
            nn.PixelShuffle(2),
            residual_stack(quarter, decoder_depth[0]),
            nn.Conv2d(quarter, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        """B×3×H×W in [-1, 1] → `.latents` B×c×H/8×W/8. Raises ValueError if H or W is no multiple of 8."""
        height, width = images.shape[-2:]
        if height % LATENT_PIXELS or width % LATENT_PIXELS:
            raise ValueError(f"image is {height}×{width}; height and width must be multiples of {LATENT_PIXELS}")
        return AutoencoderTinyOutput(latents=self.encoder(images))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """B×c×h×w → `.sample` B×3×8h×8w, about [-1, 1]; not clamped, so that losses keep their gradient."""
        return DecoderOutput(sample=self.decoder(latents))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Training pass: B×3×H×W → reconstruction B×3×H×W.

        `noise` (B×c×h×w, standard normal times its strength) is added in units of each channel's deviation:
        the decoder learns to tolerate the small errors that GRM and Patch-DiT will make.
        """
        latents = self.encode(images).latents
        noisy = latents + noise * latents.detach().float().std((0, 2, 3), keepdim=True)
        return self.decode(noisy).sample


def load_autoencoder(source: str | Path) -> ModelMixin:
    """The autoencoder in a folder, or behind a Hub id: ours or a diffusers class, by its config's class name."""
    name = CompactAutoencoder.load_config(source)["_class_name"]
    kind = CompactAutoencoder if name == CompactAutoencoder.__name__ else getattr(diffusers, name)
    model = kind.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False)
    return model.eval().requires_grad_(False)


def encode_latents(vae: nn.Module, images: Tensor) -> Tensor:
    """B×3×H×W in [-1, 1] → B×c×H/8×W/8, float32, zero mean and unit variance, for any diffusers autoencoder.

    AutoencoderKL is read at its distribution's mode. The statistics come from the config, by diffusers' names:
    `latents_mean` and `latents_std` per channel, or `shift_factor` and `scaling_factor` for all.
    """
    encoded = vae.encode(images.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    mean, std = _statistics(vae, latents.device)
    return (latents.float() - mean) / std


def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """B×c×h×w with zero mean and unit variance → B×3×8h×8w in [-1, 1], float32: undoes `encode_latents`."""
    return decode_unclamped(vae, latents).clamp(-1, 1)


def decode_unclamped(vae: nn.Module, latents: Tensor) -> Tensor:
    """`decode_latents` without the clamp, which has no gradient outside [-1, 1]: for losses in pixels."""
    mean, std = _statistics(vae, latents.device)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.float()


def _statistics(vae: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = config.latents_mean, config.latents_std
    else:
        shift, scale = getattr(config, "shift_factor", None), getattr(config, "scaling_factor", None)
        mean, std = [shift or 0.0], [1.0 / (scale or 1.0)]
    return tuple(torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
