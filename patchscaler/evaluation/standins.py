"""What one would run in place of PatchScaler, at its published size and with random weights.

These stand-ins do the work of a method and give no picture. Each is a lower bound: only the autoencoder and the
denoiser are there, without control networks, text encoders, guidance or colour fixes. Sizes are those of the
publications: ResShift (Yue et al., NeurIPS 2023) and Stable Diffusion 2.1, on which StableSR, DiffBIR, PASD and
OSEDiff are built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TILE = 512  # pixels of output at once; larger outputs are made in tiles of this, TILE_STRIDE apart
TILE_STRIDE = 448  # as ResShift's released code steps


@dataclass(frozen=True)
class StandIn:
    """A denoiser and an autoencoder, for one tile of TILE pixels."""

    label: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    inputs: tuple[tuple[int, ...], ...]  # shapes of the denoiser's tensors, x_t first
    latent: tuple[int, ...]  # shape of what the decoder takes
    steps: tuple[int, ...]  # the numbers of steps that it is published with


def _resshift() -> tuple[nn.Module, nn.Module]:
    """119.1M parameters where ResShift has 118.6M; its windowed attention is left to the smallest scale."""
    unet = UNet2DModel(
        in_channels=6,  # x_t and the low-resolution latent
        out_channels=3,
        block_out_channels=(160, 320, 320, 640),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
        attention_head_dim=32,
        resnet_time_scale_shift="scale_shift",
    )
    vq_f4 = VQModel(
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=8192,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    return unet, vq_f4


def _stable_diffusion() -> tuple[nn.Module, nn.Module]:
    """The UNet of Stable Diffusion 2.1, 865.9M parameters, and its autoencoder."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    kl_f8 = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return unet, kl_f8


STANDINS = {
    "resshift": StandIn("ResShift-sized", _resshift, ((1, 6, 128, 128),), (1, 3, 128, 128), (15, 4)),
    "sd": StandIn(
        "SD 2.1-sized (StableSR, DiffBIR, PASD; 1 step: OSEDiff)",
        _stable_diffusion,
        ((1, 4, 64, 64), (1, 77, 1024)),
        (1, 4, 64, 64),
        (20, 1),
    ),
}


def tiles(side: int) -> int:
    """Tiles that a square output of `side` pixels takes."""
    return (1 + max(0, math.ceil((side - TILE) / TILE_STRIDE))) ** 2


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module that was built on the meta device, with small random weights: no float32 copy ever exists."""
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.detach().normal_(std=0.02, generator=generator)
    return module.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def calls(kind: StandIn, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Encode, step and decode of one tile as calls without arguments. On the meta device nothing is computed."""
    with torch.device("meta"):
        denoiser, vae = kind.build()
    if device.type != "meta":
        denoiser, vae = (materialise(module, device, dtype) for module in (denoiser, vae))
    image, latent, x_t, *context = (
        torch.zeros(shape, device=device, dtype=dtype) for shape in ((1, 3, TILE, TILE), kind.latent, *kind.inputs)
    )
    t = torch.tensor([500.0], device=device)
    options = {"force_not_quantize": True} if isinstance(vae, VQModel) else {}  # looking codes up is no work
    return {
        "encode": lambda: vae.encode(image),
        "step": lambda: denoiser(x_t, t, *context).sample,
        "decode": lambda: vae.decode(latent, **options).sample,
    }


def count_flops(kind: StandIn) -> dict[str, int]:
    """Floating-point operations of encode, one step and decode of a tile."""
    counts = {}
    for name, call in calls(kind, torch.device("meta"), torch.float32).items():
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            call()
        counts[name] = counter.get_total_flops()
    return counts
