from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d
from skimage.metrics import structural_similarity

from patchscaler.evaluation.features import feature_distance
from patchscaler.evaluation.metrics import luma, mesh, psnr_rgb, psnr_y, seam_score, ssim_y
from patchscaler.evaluation.scores import METRICS, find_scorer
from patchscaler.images import read_picture

COFFEE = Path(__file__).parent.parent / "examples" / "3-coffee.png"


def noise(height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth(image: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(image[None], 4), image.shape[-2:], mode="bilinear")[0]


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
        lambda a: psnr_rgb(a[:, :0], a[:, :0]),
        lambda a: psnr_y(a[None], a[None]),
        lambda a: psnr_rgb(a[:1], a[:1]),
        lambda a: ssim_y(a[:, :10], a[:, :10]),
        lambda a: seam_score(a),
        lambda a: seam_score(a, rows=(0,)),
        lambda a: seam_score(a, columns=(64,)),
        lambda a: feature_distance(a, a[:, 1:]),
        lambda a: feature_distance(a[:1], a[:1]),
        lambda a: mesh([a], [a]),  # 48 rows hold no window of 64
        lambda a: mesh([a, a], [a]),
    ],
)
def test_unusable_input_is_refused(call):
    with pytest.raises(ValueError):
        call(noise())


@pytest.fixture(scope="module")
def piq_scorer():
    """The measures that come from piq: without it these tests fail, so that no CI runs without them."""
    scorer = find_scorer(torch.device("cpu"), ("haarpsi", "mdsi"))
    assert not scorer.skipped_lines()
    return scorer


@pytest.fixture(scope="module")
def photo():
    return read_picture(COFFEE).rgb[:, :96, :112]


def test_piq_measures_of_equal_images_are_perfect(piq_scorer, photo):
    assert piq_scorer(photo, photo) == pytest.approx({"haarpsi": 1, "mdsi": 0})


def test_piq_measures_worsen_with_noise_and_with_blur(piq_scorer, photo):
    disturbance = noise(96, 112)
    blurred = [F.avg_pool2d(photo[None], n, 1, n // 2, count_include_pad=False)[0] for n in (3, 5, 9)]
    noisy = [(photo + strength * disturbance).clamp(-1, 1) for strength in (0.1, 0.3, 0.9)]
    for images in (blurred, noisy):
        values = [piq_scorer(image, photo) for image in images]
        assert 1 > values[0]["haarpsi"] > values[1]["haarpsi"] > values[2]["haarpsi"] > 0
        assert 0 < values[0]["mdsi"] < values[1]["mdsi"] < values[2]["mdsi"]


def test_haarpsi_agrees_with_its_paper(photo):
    """Reisenhofer et al. 2018, Section 2, written out for luma alone, to which grey images reduce it."""
    grey = photo.mean(0, keepdim=True).expand(3, -1, -1)
    other = (grey + 0.3 * noise(96, 112)[:1]).clamp(-1, 1)
    coefficients = []
    for image in (grey, other):
        y = (image[0].double().numpy() + 1) * 127.5
        y = y.reshape(48, 2, 56, 2).mean((1, 3))  # half as large, for the distance of the viewer
        levels = []
        for side in (2, 4, 8):
            haar = np.ones((side, side)) / side
            haar[: side // 2] *= -1
            # The part that MATLAB's conv2, of the authors' code, calls "same"; scipy's is a pixel off it.
            part = slice(side // 2, side // 2 + 48), slice(side // 2, side // 2 + 56)
            levels.append([np.abs(convolve2d(y, each)[part]) for each in (haar, haar.T)])
        coefficients.append(np.array(levels))  # [3 scales, 2 orientations, 48, 56]
    a, b = coefficients
    similarity = ((2 * a * b + 30) / (a**2 + b**2 + 30))[:2].mean(0)
    weight = np.maximum(a[2], b[2])
    # The chroma of grey images is alike everywhere; its similarity, 1, has the mean of the two weights.
    similarity = np.concatenate([similarity, np.ones((1, 48, 56))])
    weight = np.concatenate([weight, weight.mean(0, keepdims=True)])
    squashed = 1 / (1 + np.exp(-4.2 * similarity))
    mean = (squashed * weight).sum() / weight.sum()
    expected = (math.log(mean / (1 - mean)) / 4.2) ** 2
    scorer = find_scorer(torch.device("cpu"), ("haarpsi",))
    assert scorer(other, grey)["haarpsi"] == pytest.approx(expected, abs=1e-5)
    assert expected < 0.9


def blurred(image: torch.Tensor, side: int) -> torch.Tensor:
    return F.avg_pool2d(image[None], side, 1, side // 2, count_include_pad=False)[0]


def test_feature_distance_of_known_images(photo):
    """The weights and the stages are those that the project's figures were measured with."""
    assert feature_distance(photo, photo) == 0
    found = [feature_distance(blurred(photo, side), photo) for side in (3, 5, 9)]
    assert found == pytest.approx([0.1036, 0.1747, 0.2980], abs=5e-4)
    found = [feature_distance((photo + each * noise(96, 112)).clamp(-1, 1), photo) for each in (0.1, 0.3, 0.9)]
    assert found == pytest.approx([0.0757, 0.2271, 0.5263], abs=5e-4)
    assert found == sorted(found)
    assert feature_distance(blurred(photo, 3), photo) == pytest.approx(feature_distance(photo, blurred(photo, 3)))


def test_what_eyes_see_leads_the_tables():
    assert [metric.key for metric in METRICS] == ["feature_distance", "haarpsi", "mdsi", "psnr_y", "ssim_y"]


def with_mesh(image: torch.Tensor, period: int, levels: float = 2) -> torch.Tensor:
    """A checkerboard of a period is added, whose fields differ by twice so many 8-bit levels."""
    rows, columns = (torch.arange(side) % period < period / 2 for side in image.shape[1:])
    return image + levels / 127.5 * ((rows[:, None] ^ columns).float() * 2 - 1)


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_mesh_is_found_at_its_period(period):
    ramp = torch.linspace(-0.7, 0.7, 256).expand(3, 256, 256)
    truths = [ramp + 0.02 * noise(256, 256, seed) for seed in (0, 1)]
    found = mesh([with_mesh(truth, period) for truth in truths], truths)
    assert found.pop(period) > 3
    assert all(value == pytest.approx(1, abs=0.1) for value in found.values())


def test_a_mesh_is_looked_for_in_the_smoothest_tenth():
    smooth, rough = 0.01 * noise(64, 64), 0.8 * noise(576, 64, seed=1)  # one window and nine
    truth = torch.cat([rough, smooth], dim=1)
    in_smooth, in_rough = truth.clone(), truth.clone()
    in_smooth[:, 576:] = with_mesh(smooth, 4)
    in_rough[:, :576] = with_mesh(rough, 4, levels=20)
    assert mesh([truth], [truth]) == mesh([in_rough], [truth]) == {2: 1, 4: 1, 8: 1}
    assert mesh([in_smooth], [truth])[4] > 10


def test_a_measure_that_an_image_is_too_small_for_is_named(piq_scorer):
    with pytest.raises(ValueError, match="HaarPSI"):
        piq_scorer(noise(12, 40), noise(12, 40))
