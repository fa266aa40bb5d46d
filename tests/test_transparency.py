"""Colours under alpha 0 do not leak, and grey stays grey: through the whole pipeline, with the real weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms

from patchscaler.images import Picture, picture_from_pil
from patchscaler.large import Bands
from patchscaler.loading import load_pipeline
from patchscaler.plan import SamplingPlan
from patchscaler.transparency import spread_colors

COLOUR = (200, 60, 40)
PLAN = SamplingPlan(0.95, 0.75, (100, 200, 300), (1, 2, 3))


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(device="cpu")


def disc(hidden: str) -> np.ndarray:
    """48×48 RGBA: a disc in one colour with a smooth edge, and something else where it is fully transparent."""
    y, x = np.mgrid[:48, :48] + 0.5
    alpha = np.rint(np.clip(17 - np.hypot(x - 24.2, y - 23.7), 0, 1) * 255)
    under = {"black": 0, "white": 255, "noise": np.random.default_rng(0).integers(0, 256, (48, 48, 3))}[hidden]
    return np.dstack([np.where(alpha[..., None] > 0, COLOUR, under), alpha]).astype(np.uint8)


@pytest.mark.parametrize("hidden", ["black", "white", "noise"])
def test_hidden_colours_do_not_bleed_into_an_edge(pipeline, hidden):
    image = disc(hidden)
    output = pipeline(Image.fromarray(image), PLAN).picture
    levels, alpha = (output.rgb + 1) * 127.5, output.alpha
    edge = (alpha[0] > 0.1) & (alpha[0] < 0.9)
    assert (levels[:, edge].mean(1) - torch.tensor(COLOUR)).abs().max() < 3
    before = torch.from_numpy(image / 255).float().permute(2, 0, 1)  # 4×H×W
    premultiplied = torch.cat([before[:3] * before[3:], before[3:]])[None]
    wanted = F.interpolate(premultiplied, scale_factor=4, mode="bicubic", antialias=True)[0]
    for ground in (0, 255):
        composited = levels * alpha + ground * (1 - alpha)
        expected = wanted[:3] * 255 + ground * (1 - wanted[3:])
        assert (composited - expected)[:, edge].abs().max() < 10


def test_the_result_does_not_depend_on_what_is_hidden(tiny_pipeline):
    pictures = [picture_from_pil(Image.fromarray(disc(hidden))) for hidden in ("black", "noise")]
    whole = [tiny_pipeline(picture, PLAN).picture.rgb for picture in pictures]
    assert torch.equal(*whole)
    banded = [np.concatenate(list(Bands(tiny_pipeline, picture, PLAN))) for picture in pictures]
    assert np.array_equal(*banded)


def test_visible_colours_stay_and_hidden_ones_are_those_near_by():
    rgb = torch.rand(3, 41, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    alpha = torch.zeros(1, 41, 30)
    alpha[:, :, :5], alpha[:, :, 20:] = 0.5, 1
    rgb[:, :, :5], rgb[:, :, 20:] = -0.6, 0.4
    spread = spread_colors(rgb, alpha)
    visible = alpha[0] > 0
    assert torch.equal(spread[:, visible], rgb[:, visible])
    assert (spread[:, :, 5:7] + 0.6).abs().max() < 0.15 and (spread[:, :, 18:20] - 0.4).abs().max() < 0.15
    assert spread.min() >= -0.6001 and spread.max() <= 0.4001


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5, 6)])
def test_nothing_visible_is_grey_and_everything_visible_is_kept(size):
    rgb = torch.ones(3, *size)
    assert spread_colors(rgb, torch.zeros(1, *size)).eq(0).all()
    assert spread_colors(rgb, torch.ones(1, *size)) is rgb


# Grey


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_grey_stays_grey(tiny_pipeline, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20), dtype=np.uint8)).convert(mode)
    picture = picture_from_pil(image)
    assert picture.is_grey()
    for color_fix in (True, False):
        *_, result = tiny_pipeline.refine(tiny_pipeline.analyze(picture), PLAN, color_fix=color_fix)
        rgb = result.picture.rgb
        assert torch.equal(rgb[0], rgb[1]) and torch.equal(rgb[0], rgb[2]) and rgb.std() > 0
    banded = np.concatenate(list(Bands(tiny_pipeline, picture, PLAN)))
    assert (banded[..., 0] == banded[..., 1]).all() and (banded[..., 0] == banded[..., 2]).all()


def test_a_picture_of_one_coloured_pixel_is_not_grey():
    rgb = torch.zeros(3, 5, 6)
    assert Picture(rgb).is_grey()
    rgb[0, 2, 3] = 3 / 127.5
    alpha = torch.ones(1, 5, 6)
    assert not Picture(rgb, alpha).is_grey()
    alpha[0, 2, 3] = 0  # where nobody sees it
    assert Picture(rgb, alpha).is_grey()


def test_grey_under_a_profile_is_grey(read, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "a.png"
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    Image.fromarray(grey).save(path, icc_profile=profile)
    assert read(path.read_bytes()).is_grey()
