from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchscaler.color import wavelet_color_fix


def random_images(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(*shape, generator=generator) * 2 - 1 for _ in range(2))


def low(image: torch.Tensor, *distances: int) -> torch.Tensor:
    """The low-pass as StableSR describes it: dilated 3×3 convolutions."""
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    channels = image.shape[1]
    kernel = (line[:, None] * line).expand(channels, 1, 3, 3)
    for step in distances:
        image = F.conv2d(F.pad(image, (step,) * 4, mode="replicate"), kernel, groups=channels, dilation=step)
    return image


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (3, 5), (31, 33), (80, 64)])
def test_equals_the_direct_computation(size):
    output, reference = random_images(2, 3, *size)
    fixed = wavelet_color_fix(output, reference)
    lows = (low(image, 1, 2, 4, 8, 16) for image in (reference, output))
    torch.testing.assert_close(fixed, output + next(lows) - next(lows), rtol=0, atol=1e-5)


def test_restores_a_colour_shift():
    image = random_images(1, 3, 48, 64)[0] / 2
    shift = torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1, 1)
    torch.testing.assert_close(wavelet_color_fix(image + shift, image), image, rtol=0, atol=1e-5)


def test_keeps_detail_and_takes_slow_colour_from_the_reference():
    ramp = torch.linspace(-0.5, 0.5, 128).expand(1, 3, 128, 128)
    checks = 0.2 * (torch.arange(128)[:, None] + torch.arange(128)).remainder(2) - 0.1
    fixed = wavelet_color_fix(checks.expand(1, 3, 128, 128), ramp)
    inner = (..., slice(32, -32), slice(32, -32))  # replicated edges bend a ramp
    torch.testing.assert_close(fixed[inner], (ramp + checks)[inner], rtol=0, atol=1e-3)


def test_a_pixel_reaches_31_pixels_and_bands_do_not_show():
    """1 + 2 + 4 + 8 + 16: what rows in bands rely on."""
    image = torch.zeros(1, 3, 101, 101)
    reference = image.clone()
    reference[..., 50, 50] = 1
    rows = wavelet_color_fix(image, reference)[0, 0].abs().sum(dim=1).nonzero().flatten()
    assert (rows.min(), rows.max()) == (50 - 31, 50 + 31)
    output, reference = random_images(2, 3, 600, 3)  # higher than what is blurred at once
    direct = output + low(reference - output, 1, 2, 4, 8, 16)
    torch.testing.assert_close(wavelet_color_fix(output, reference), direct, rtol=0, atol=1e-5)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="1, 3, 4, 4"):
        wavelet_color_fix(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 1))
