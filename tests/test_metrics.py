from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity

from patchscaler.evaluation.metrics import luma, psnr_rgb, psnr_y, seam_score, spectrum_distance, ssim_y


def noise(height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(image: torch.Tensor, factor: int = 4) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(image[None], factor), image.shape[-2:], mode="bilinear")[0]


def test_luma_runs_from_16_to_235_with_green_heaviest():
    assert luma(-torch.ones(3, 2, 2)).flatten().tolist() == [16.0] * 4
    assert luma(torch.ones(3, 2, 2)).flatten().tolist() == pytest.approx([235.0] * 4)
    primaries = torch.eye(3).view(3, 1, 3) * 2 - 1  # red, green and blue pixels
    assert (luma(primaries) - 16).flatten().tolist() == pytest.approx([65.481, 128.553, 24.966])


def test_psnr_of_a_constant_offset_is_analytic():
    a = torch.zeros(3, 16, 16)
    b = a + 2 * 10 / 255  # ten levels brighter in every channel
    assert psnr_rgb(a, b) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)
    assert psnr_y(a, b) == pytest.approx(20 * math.log10(255 / (10 * 219 / 255)), abs=1e-4)


def test_equal_images_are_perfect():
    a = noise()
    assert psnr_y(a, a) == psnr_rgb(a, a) == math.inf
    assert ssim_y(a, a) == pytest.approx(1)
    assert spectrum_distance(a, a) == 0


def test_crop_hides_errors_at_the_edges():
    a = noise()
    b = a.clone()
    b[:, :4] = b[:, -4:] = 0
    b[:, :, :4] = b[:, :, -4:] = 0
    assert psnr_y(a, b, crop=3) < 60
    assert psnr_y(a, b, crop=4) == psnr_rgb(a, b, crop=4) == math.inf
    assert ssim_y(a, b, crop=4) == pytest.approx(1)


@pytest.mark.parametrize("other", [smooth(noise()), noise(seed=1), -noise(), noise() * 0.5])
def test_ssim_agrees_with_scikit_image(other):
    a = noise()
    expected = structural_similarity(
        luma(a).numpy(),
        luma(other).numpy(),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim_y(a, other) == pytest.approx(expected, abs=1e-9)


def test_spectrum_distance_of_doubled_contrast_is_log_4():
    a = noise() * 0.4
    assert spectrum_distance(a, 2 * a) == pytest.approx(math.log(4), abs=0.01)


def test_spectrum_distance_sees_lost_detail_and_not_alignment():
    a = noise(64, 64)
    shifted = a.roll((5, 9), (1, 2))
    assert spectrum_distance(a, shifted) < 0.3 < 1 < spectrum_distance(a, smooth(a))
    assert spectrum_distance(a, smooth(a, 2)) < spectrum_distance(a, smooth(a, 8))


def test_spectrum_distance_finds_the_ring_of_a_wave():
    flat = torch.zeros(3, 64, 96)
    wave = (0.5 * torch.sin(2 * math.pi * 8 / 64 * torch.arange(96))).expand(3, 64, 96)
    # 8 cycles in 64 pixels, the shorter side, fill ring 8; the window spreads them to its neighbours.
    assert spectrum_distance(flat, wave) * 32 > math.log(100)
    assert spectrum_distance(flat, flat) == 0


def test_seam_score_is_one_for_noise_and_grows_with_a_step():
    a = noise(96, 96) * 0.2
    assert seam_score(a, rows=(32, 64), columns=(48,)) == pytest.approx(1, abs=0.15)
    a[:, 32:] += 0.5
    assert seam_score(a, rows=(32,)) > 3
    assert seam_score(a, rows=(31,)) < 1.2
    assert seam_score(a.transpose(1, 2), columns=(32,)) == pytest.approx(seam_score(a, rows=(32,)))


def test_seam_score_of_a_known_ramp():
    ramp = torch.linspace(-0.5, 0.5, 11).view(1, 1, 11).repeat(3, 4, 1)
    ramp[:, :, 5:] += 0.2  # one step of .3 among nine of .1
    assert seam_score(ramp, columns=(5,)) == pytest.approx(3, rel=1e-5)


def test_seam_score_of_flat_images():
    flat = torch.zeros(3, 8, 8)
    assert seam_score(flat, rows=(4,)) == 1
    flat[:, 4:] = 0.5
    assert seam_score(flat, rows=(4,)) == math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda a: psnr_y(a, a[:, 1:]),
        lambda a: psnr_rgb(a, a, crop=24),
        lambda a: psnr_y(a[None], a[None]),
        lambda a: psnr_rgb(a[:1], a[:1]),
        lambda a: ssim_y(a[:, :10], a[:, :10]),
        lambda a: spectrum_distance(a, a[:, 1:]),
        lambda a: seam_score(a),
        lambda a: seam_score(a, rows=(0,)),
        lambda a: seam_score(a, columns=(64,)),
    ],
)
def test_unusable_input_is_refused(call):
    with pytest.raises(ValueError):
        call(noise())
