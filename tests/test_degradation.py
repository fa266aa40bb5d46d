from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from skimage import data

from patchscaler.training.degradation import (
    CONFIGS,
    KINDS,
    Blur,
    _stage_size,
    add_noise,
    blur,
    blur_kernels,
    degrade,
    jpeg,
    sinc_kernels,
)

STAGE = CONFIGS["real-esrgan"].stages[0]
GAUSSIAN = Blur((21, 21), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), sigma=(1.0, 3.0), sinc=0.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Sixteen crops of 96×96 of a photograph, in [-1, 1]."""
    photo = torch.from_numpy(data.astronaut()[:384, :384].copy()).permute(2, 0, 1) / 127.5 - 1
    return photo.unfold(1, 96, 96).unfold(2, 96, 96).permute(1, 2, 0, 3, 4).reshape(-1, 3, 96, 96)


# The whole


@pytest.mark.parametrize("kind", KINDS)
def test_result_is_small_in_range_and_8_bit(photos, kind):
    low = degrade(photos, rng(), kind)
    levels = (low + 1) * 127.5
    assert low.shape == (16, 3, 24, 24) and low.dtype == torch.float32
    assert low.min() >= -1 and low.max() <= 1
    assert (levels - levels.round()).abs().max() < 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_seed_decides_everything(photos, kind):
    first = degrade(photos, rng(5), kind)
    assert torch.equal(first, degrade(photos, rng(5), kind))
    assert not torch.equal(first, degrade(photos, rng(6), kind))
    generator = rng(5)
    assert torch.equal(first, degrade(photos, generator, kind))
    assert not torch.equal(first, degrade(photos, generator, kind))


def test_global_randomness_is_left_alone(photos):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    degrade(photos[:2], rng())
    assert torch.equal(torch.rand(3), expected)


def test_samples_of_a_batch_differ(photos):
    low = degrade(photos[:1].expand(8, -1, -1, -1), rng())
    assert len(low.flatten(1).unique(dim=0)) == 8


def test_severity_grows_from_bicubic_to_real_esrgan(photos):
    clean = degrade(photos, rng(), "bicubic")

    def error_of(kind: str) -> float:
        return sum((degrade(photos, rng(seed), kind) - clean).abs().mean().item() for seed in range(8))

    error = {kind: error_of(kind) for kind in KINDS}
    assert 0 == error["bicubic"] < error["resshift"] < error["real-esrgan"]


@pytest.mark.parametrize("size", [(4, 4), (32, 8), (36, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_small_and_odd_sizes(size, kind):
    for seed in range(6):
        low = degrade(torch.zeros(3, 3, *size), rng(seed), kind)
        assert low.shape == (3, 3, size[0] // 4, size[1] // 4) and low.isfinite().all()


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="30×32"):
        degrade(torch.zeros(1, 3, 30, 32), rng())
    with pytest.raises(ValueError, match="sharpen"):
        degrade(torch.zeros(1, 3, 32, 32), rng(), "sharpen")


@pytest.mark.parametrize("kind", CONFIGS)
def test_resize_factors_keep_to_their_ranges(kind):
    for stage in CONFIGS[kind].stages:
        generator = rng()
        factors = [_stage_size(stage, (1000, 1000), generator)[0] / 1000 for _ in range(400)]
        assert stage.factor[0] - 0.001 <= min(factors) < stage.factor[0] + 0.1
        assert stage.factor[1] - 0.1 < max(factors) <= stage.factor[1]
        counts = [sum(f > 1 for f in factors), sum(f < 1 for f in factors), factors.count(1)]
        shares = [count / 400 for count in counts]
        assert shares == pytest.approx(stage.resize, abs=0.08)


# Blur


@pytest.mark.parametrize("shape", range(6))
def test_kernels_are_non_negative_and_sum_to_1(shape):
    shapes = tuple(float(i == shape) for i in range(6))
    kernels = blur_kernels(replace(STAGE.blur, shapes=shapes, sinc=0.0), 64, rng())
    assert kernels.shape == (64, 21, 21)
    assert kernels.min() >= 0
    assert torch.allclose(kernels.sum((1, 2)), torch.ones(64), atol=1e-5)
    assert torch.allclose(kernels, kernels.flip(1, 2), atol=1e-6)
    if shape % 2 == 0:  # isotropic
        assert torch.allclose(kernels, kernels.transpose(1, 2), atol=1e-6)


def test_sinc_kernels_sum_to_1_with_negative_lobes():
    only_sinc = replace(STAGE.blur, sinc=1.0)
    for kernels in (sinc_kernels((7, 21), 1.0, 64, rng()), blur_kernels(only_sinc, 64, rng())):
        assert torch.allclose(kernels.sum((1, 2)), torch.ones(64), atol=1e-4)
        assert (kernels.amin((1, 2)) < 0).float().mean() > 0.9


def test_kernel_widths_and_sides_keep_to_their_ranges():
    kernels = blur_kernels(GAUSSIAN, 256, rng())
    x = torch.arange(21.0) - 10
    deviation = (kernels.sum(1) * x**2).sum(1).sqrt()
    assert 1 - 1e-3 < deviation.min() < 1.2 and 2.8 < deviation.max() < 3
    wide = replace(GAUSSIAN, sizes=(7, 21), sigma=(3.0, 3.0))
    sides = (blur_kernels(wide, 256, rng())[:, 10] > 0).sum(1)
    assert set(sides.tolist()) == set(range(7, 22, 2))


def test_unused_kernels_are_single_pixels():
    kernels = blur_kernels(replace(STAGE.blur, probability=0.0), 8, rng())
    images = torch.rand(8, 3, 30, 41)
    assert torch.allclose(blur(images, kernels), images, atol=1e-5)


def test_blur_is_the_direct_convolution_with_edges_replicated():
    images, kernels = torch.rand(4, 3, 37, 50), blur_kernels(STAGE.blur, 4, rng())
    padded = F.pad(images, (10,) * 4, mode="replicate")
    for image, kernel, result in zip(padded, kernels, blur(images, kernels)):
        # Correlation with the flipped kernel is convolution.
        expected = F.conv2d(image.unsqueeze(1), kernel.flip(0, 1)[None, None]).squeeze(1)
        assert torch.allclose(result, expected, atol=1e-5)


# Noise


def measured(**changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise on flat mid-grey images 64×3×48×48, and its deviation per image in 8-bit levels."""
    noise = add_noise(torch.full((64, 3, 48, 48), 128 / 255), replace(STAGE, **changes), rng()) - 128 / 255
    return noise, noise.flatten(1).std(1) * 255


def test_gaussian_noise_keeps_to_its_range():
    noise, deviation = measured(gaussian_probability=1.0, grey_probability=0.0)
    assert 0.9 < deviation.min() < 4 and 26 < deviation.max() < 31
    assert (noise[:, 0] - noise[:, 1]).abs().amax((1, 2)).min() > 0


def test_grey_noise_is_alike_in_all_channels():
    for probability in (0.0, 1.0):
        noise, _ = measured(gaussian_probability=probability, grey_probability=1.0)
        assert torch.allclose(noise, noise[:, :1].expand_as(noise), atol=1e-6)


def test_poisson_noise_grows_with_brightness():
    stage = replace(STAGE, gaussian_probability=0.0, grey_probability=0.0, poisson=(1.0, 1.0))
    ramp = torch.linspace(0, 1, 256).view(1, 1, 1, 256).expand(1, 3, 256, 256)
    noise = add_noise(ramp, stage, rng()) - ramp
    assert noise[..., :1].abs().max() < 1e-6  # black has no photons
    for level in (32, 64, 128):  # 256 grey levels make 256 photons at white
        assert noise[..., level - 8 : level + 9].std() == pytest.approx(math.sqrt(level / 255 / 256), rel=0.1)


# JPEG


@pytest.mark.parametrize(("period", "kept"), [(2, 0.0), (16, 1.0)])
def test_jpeg_halves_the_resolution_of_colour_alone(period, kept):
    # Stripes of red and of green as bright, on sides that are not whole blocks; and grey ones of one pixel.
    x = torch.arange(75)
    red = (x % period < period // 2).float()
    stripes = torch.stack([red, (1 - red) * 0.299 / 0.587, torch.zeros(75)])[:, None].expand(-1, 50, -1)
    grey = (0.3 + 0.4 * (x % 2)).expand(3, 50, 75)
    coloured, plain = jpeg(torch.stack([stripes, grey]), torch.tensor([100.0, 100.0]))
    assert coloured.shape == (3, 50, 75)
    deviation = coloured[0, :, :64].std() / stripes[0, :, :64].std()
    assert deviation == pytest.approx(kept, abs=0.15)
    assert (plain - grey).abs().max() * 255 < 4


def test_jpeg_quality_is_per_sample_and_orders_the_error(photos):
    images = (photos[:3] + 1) / 2
    same = images[:1].expand(3, -1, -1, -1)
    error = (jpeg(same, torch.tensor([95.0, 70.0, 30.0])) - same).abs().mean((1, 2, 3)) * 255
    assert error[0] < error[1] < error[2]
    assert error[0] < 2 and error[2] > 3.5
    batch = jpeg(images, torch.tensor([95.0, 70.0, 30.0]))
    assert torch.allclose(batch[2:], jpeg(images[2:], torch.tensor([30.0])), atol=1e-6)
