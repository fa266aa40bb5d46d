"""Synthetic low-resolution images: blur, resize, noise and JPEG, drawn at random for every sample.

"real-esrgan" is the second-order degradation of Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data"; "resshift" the milder one-stage variant of the test pairs of
Yue et al. 2024, "ResShift: Efficient Diffusion Model for Image Super-resolution by Residual Shifting";
"bicubic" plain anti-aliased bicubic downscaling.
B batch, C channels, H W pixels, S kernel side. Inside this file images are in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Range = tuple[float, float]

# Sizes must agree inside a tensor: resize factors are drawn for a group of this many samples, not for each. A GPU waits
# for the host with small ones.
GROUP, GPU_GROUP = 8, 64
RESIZE_MODES = ("area", "bilinear", "bicubic")
BICUBIC = "bicubic"


@dataclass(frozen=True)
class Blur:
    """Random blur kernels. `shapes` weighs iso, aniso, generalised and plateau (iso, aniso) Gaussians."""

    sizes: tuple[int, int]
    shapes: tuple[float, float, float, float, float, float]
    sigma: Range
    beta_generalised: Range = (1.0, 1.0)
    beta_plateau: Range = (1.0, 1.0)
    sinc: float = 0.1
    probability: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Blur, resize, noise, JPEG. Noise deviations are in 8-bit levels; `jpeg` is a range of qualities 1..100.

    `resize` weighs enlarging, shrinking and keeping; `factor` is relative to the high-resolution size in the
    first stage and to the low-resolution size in the second.
    """

    blur: Blur
    resize: tuple[float, float, float]
    factor: Range
    gaussian: Range
    poisson: Range
    jpeg: Range | None
    gaussian_probability: float = 0.5
    grey_probability: float = 0.4


@dataclass(frozen=True)
class Degradation:
    """One or two stages, then in either order {resize to the final size, sinc filter} and {JPEG}."""

    stages: tuple[Stage, ...]
    final_sizes: tuple[int, int]
    final_sinc: float
    final_jpeg: Range


_STRONG_BLUR = Blur(
    sizes=(7, 21),
    shapes=(0.45, 0.25, 0.12, 0.03, 0.12, 0.03),
    sigma=(0.2, 3.0),
    beta_generalised=(0.5, 4.0),
    beta_plateau=(1.0, 2.0),
)

CONFIGS = {
    "real-esrgan": Degradation(
        stages=(
            Stage(
                blur=_STRONG_BLUR,
                resize=(0.2, 0.7, 0.1),
                factor=(0.15, 1.5),
                gaussian=(1.0, 30.0),
                poisson=(0.05, 3.0),
                jpeg=(30.0, 95.0),
            ),
            Stage(
                blur=replace(_STRONG_BLUR, sigma=(0.2, 1.5), probability=0.8),
                resize=(0.3, 0.4, 0.3),
                factor=(0.3, 1.2),
                gaussian=(1.0, 25.0),
                poisson=(0.05, 2.5),
                jpeg=None,  # the final JPEG takes its place
            ),
        ),
        final_sizes=(7, 21),
        final_sinc=0.8,
        final_jpeg=(30.0, 95.0),
    ),
    "resshift": Degradation(
        stages=(
            Stage(
                blur=Blur((3, 11), (0.6, 0.4, 0.0, 0.0, 0.0, 0.0), sigma=(0.2, 0.8)),
                resize=(0.2, 0.7, 0.1),
                factor=(0.5, 1.5),
                gaussian=(1.0, 15.0),
                poisson=(0.05, 0.3),
                jpeg=(70.0, 95.0),
            ),
        ),
        final_sizes=(3, 5),
        final_sinc=0.2,
        final_jpeg=(80.0, 100.0),
    ),
}
KINDS = (*CONFIGS, BICUBIC)


def degrade(images: Tensor, generator: torch.Generator, kind: str = "real-esrgan", scale: int = 4) -> Tensor:
    """Degrade images B×3×H×W in [-1, 1] to B×3×(H/scale)×(W/scale) in [-1, 1], rounded to 8 bits.

    `generator` is a CPU generator and decides everything that is random; the same seed gives the same result
    on the same device. ValueError for an unknown kind, or a height or width that `scale` does not divide.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    height, width = images.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"image {height}×{width}: sides must be multiples of {scale}")
    size = (height // scale, width // scale)
    images = (images.float() + 1) / 2  # [B, 3, H, W] in [0, 1]
    if kind == BICUBIC:
        low = F.interpolate(images, size, mode="bicubic", antialias=True)
    else:
        groups = images.split(GROUP if images.device.type == "cpu" else GPU_GROUP)
        low = torch.cat([_degrade_group(group, size, CONFIGS[kind], generator) for group in groups])
    return _round8(low) * 2 - 1


def _degrade_group(images: Tensor, size: tuple[int, int], config: Degradation, generator: torch.Generator) -> Tensor:
    full = tuple(images.shape[-2:])
    for base, stage in zip((full, size), config.stages):
        images = blur(images, blur_kernels(stage.blur, len(images), generator))
        images = _resize(images, _stage_size(stage, base, generator), generator).clamp(0, 1)
        images = add_noise(images, stage, generator)
        if stage.jpeg:
            images = jpeg(images, _uniform(stage.jpeg, len(images), generator))
    quality = _uniform(config.final_jpeg, len(images), generator)
    sinc = sinc_kernels(config.final_sizes, config.final_sinc, len(images), generator)
    if _chance(0.5, 1, generator):
        return jpeg(blur(_resize(images, size, generator), sinc).clamp(0, 1), quality)
    return blur(_resize(jpeg(images, quality), size, generator), sinc)


# Resizing


def _stage_size(stage: Stage, base: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
    low, high = stage.factor
    choice = torch.multinomial(torch.tensor(stage.resize), 1, generator=generator).item()
    span = ((1.0, high), (low, 1.0), (1.0, 1.0))[choice]
    factor = _uniform(span, 1, generator).item()
    return max(1, int(base[0] * factor)), max(1, int(base[1] * factor))


def _resize(images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    mode = RESIZE_MODES[torch.randint(len(RESIZE_MODES), (1,), generator=generator).item()]
    # No anti-aliasing, as in Real-ESRGAN: aliasing is one of the defects to learn.
    return images if tuple(images.shape[-2:]) == size else F.interpolate(images, size, mode=mode)


# Blur


def blur_kernels(config: Blur, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` kernels, count×S×S with S the largest size, each summing to 1 (Real-ESRGAN, 3.1 and 3.3).

    A fraction `config.sinc` are ideal low-pass (sinc) kernels, which alone have negative weights; a fraction
    1 - `config.probability` are single pixels, which blur nothing.
    """
    side = _odd_sizes(config.sizes, count, generator)
    shape = torch.multinomial(torch.tensor(config.shapes), count, replacement=True, generator=generator)
    shape = shape.view(-1, 1, 1)
    sigma_u = _uniform(config.sigma, count, generator).view(-1, 1, 1)
    sigma_v = torch.where(shape % 2 == 0, sigma_u, _uniform(config.sigma, count, generator).view(-1, 1, 1))
    angle = _uniform((-math.pi, math.pi), count, generator).view(-1, 1, 1)
    generalised = _exponents(config.beta_generalised, count, generator)
    plateau = _exponents(config.beta_plateau, count, generator)
    beta = torch.where(shape < 2, 1.0, torch.where(shape < 4, generalised, plateau))
    y, x = _coordinates(config.sizes[1])
    u = (x * angle.cos() + y * angle.sin()) / sigma_u  # [count, S, S]
    v = (y * angle.cos() - x * angle.sin()) / sigma_v
    power = (u * u + v * v) ** beta
    kernels = torch.where(shape < 4, torch.exp(-0.5 * power), 1 / (1 + power))
    # Large kernels may cut lower frequencies than small ones can hold.
    lowest = torch.where(side < 13, math.pi / 3, math.pi / 5)
    cutoff = lowest + (math.pi - lowest) * torch.rand(count, generator=generator)
    is_sinc = _chance(config.sinc, count, generator).view(-1, 1, 1)
    kernels = _normalise(torch.where(is_sinc, _sinc(cutoff, config.sizes[1]), kernels), side)
    used = _chance(config.probability, count, generator).view(-1, 1, 1)
    return torch.where(used, kernels, _pulse(config.sizes[1]))


def sinc_kernels(sizes: tuple[int, int], probability: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw kernels count×S×S: ideal low-pass (cut-off pi/3 to pi) with `probability`, else single pixels."""
    side = _odd_sizes(sizes, count, generator)
    kernels = _normalise(_sinc(_uniform((math.pi / 3, math.pi), count, generator), sizes[1]), side)
    used = _chance(probability, count, generator).view(-1, 1, 1)
    return torch.where(used, kernels, _pulse(sizes[1]))


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve images B×C×H×W, edges replicated, each with its own kernel B×S×S, by Fourier transform."""
    height, width = images.shape[-2:]
    radius = kernels.shape[-1] // 2
    # The transform is fast on sizes with small factors: pad further, to a multiple of 32.
    rows, columns = (-(-(n + 2 * radius) // 32) * 32 for n in (height, width))
    pad = (radius, columns - width - radius, radius, rows - height - radius)
    spectrum = torch.fft.rfft2(F.pad(images, pad, mode="replicate"))
    response = torch.fft.rfft2(kernels.to(images.device), s=(rows, columns)).unsqueeze(1)
    blurred = torch.fft.irfft2(spectrum * response, s=(rows, columns))
    return blurred[..., 2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def _exponents(span: Range, count: int, generator: torch.Generator) -> Tensor:
    """Half of the exponents below 1, half above, so that heavy tails are as frequent as flat tops."""
    below, above = _uniform((span[0], 1.0), count, generator), _uniform((1.0, span[1]), count, generator)
    return torch.where(_chance(0.5, count, generator), below, above).view(-1, 1, 1)


def _sinc(cutoff: Tensor, side: int) -> Tensor:
    """Impulse response of a circular low-pass filter, cut-off in radians per pixel: w J1(w r) / (2 pi r)."""
    y, x = _coordinates(side)
    radius = (x * x + y * y).sqrt()
    cutoff = cutoff.view(-1, 1, 1)
    response = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    return torch.where(radius == 0, cutoff**2 / (4 * math.pi), response)


def _normalise(kernels: Tensor, side: Tensor) -> Tensor:
    """Cut kernels to their own side lengths and make them sum to 1."""
    y, x = _coordinates(kernels.shape[-1])
    kernels = kernels * (torch.maximum(x.abs(), y.abs()) <= side.view(-1, 1, 1) // 2)
    return kernels / kernels.sum((1, 2), keepdim=True)


def _pulse(side: int) -> Tensor:
    y, x = _coordinates(side)
    return ((x == 0) & (y == 0)).float()


def _coordinates(side: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(side, dtype=torch.float32) - side // 2
    return torch.meshgrid(axis, axis, indexing="ij")


# Noise


def add_noise(images: Tensor, config: Stage, generator: torch.Generator) -> Tensor:
    """Add Gaussian or Poisson noise, coloured or grey, to images B×3×H×W in [0, 1]; the result is clamped."""
    count = len(images)
    gaussian = _chance(config.gaussian_probability, count, generator)
    grey = _chance(config.grey_probability, count, generator)
    sigma = _uniform(config.gaussian, count, generator) / 255
    strength = _uniform(config.poisson, count, generator)
    # Fields are drawn where the images are; their generator is seeded by the one that decides everything.
    field = torch.Generator(images.device).manual_seed(torch.randint(2**62, (1,), generator=generator).item())
    noisy = images.clone()
    for is_gaussian in (True, False):
        for is_grey in (True, False):
            chosen = ((gaussian == is_gaussian) & (grey == is_grey)).nonzero().flatten()
            if not len(chosen):
                continue
            clean = images[chosen.to(images.device)]  # [b, 3, H, W]
            source = _luma(clean) if is_grey else clean  # [b, 1 or 3, H, W]
            if is_gaussian:
                noise = torch.randn(source.shape, generator=field, device=images.device)
                level = sigma[chosen]
            else:
                noise, level = _poisson(source, field), strength[chosen]
            noisy[chosen.to(images.device)] = clean + noise * level.to(images.device).view(-1, 1, 1, 1)
    return noisy.clamp(0, 1)


def _poisson(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shot noise of images in [0, 1]; photons at white: the grey levels in use, up to a power of two."""
    images = _round8(images)
    levels = (images * 255).round().long().flatten(1)
    used = torch.zeros(len(images), 256, device=images.device).scatter_(1, levels, 1.0).sum(1)
    photons = (2 ** used.log2().ceil()).view(-1, 1, 1, 1)
    return torch.poisson(images * photons, generator=generator) / photons - images


def _luma(images: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


# JPEG


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Images B×3×H×W in [0, 1] after JPEG at `quality` (B values in 1..100), chroma halved (4:2:0).

    Pillow's encoder and decoder do it on the CPU, wherever the images are.
    """
    pixels = (images * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()  # [B, H, W, 3]
    decoded = np.empty_like(pixels)
    for index, level in enumerate(quality.tolist()):
        file = BytesIO()
        Image.fromarray(pixels[index]).save(file, "JPEG", quality=int(level), subsampling="4:2:0")
        decoded[index] = Image.open(file)
    return torch.from_numpy(decoded).to(images.device).permute(0, 3, 1, 2) / 255


# Drawing


def _uniform(span: Range, count: int, generator: torch.Generator) -> Tensor:
    return span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator)


def _chance(probability: float, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < probability


def _odd_sizes(sizes: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    return sizes[0] + 2 * torch.randint((sizes[1] - sizes[0]) // 2 + 1, (count,), generator=generator)


def _round8(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255) / 255
