"""The autoencoder and the confidence, each measured alone."""

from __future__ import annotations

import math

import pytest
import torch
from textures import texture

from patchscaler.evaluation import components, reliability
from patchscaler.evaluation.metrics import psnr_rgb, to_8bit
from patchscaler.images import ImageError, Picture, read_picture, write_png
from patchscaler.patches import PatchGrid


def test_a_perfect_ranking_correlates_fully():
    values = torch.tensor([0.1, 0.5, 0.2, 0.9])
    assert reliability.spearman(values, values.exp()) == pytest.approx(1)
    assert reliability.spearman(values, -(values**3)) == pytest.approx(-1)


def test_equal_values_share_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    a, b = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert reliability.spearman(a, b) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert reliability.spearman(a, b.flip(0)) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))
    with pytest.warns(match="constant"):
        assert math.isnan(reliability.spearman(torch.ones(4), b))


def test_patch_errors_find_the_patch_that_is_wrong():
    grid = PatchGrid(28, 16)  # two patches, one above the other, rows 0 to 128 and 96 to 224
    truth = torch.zeros(3, 220, 125)  # an output is smaller than the grid that was filled up for it
    image = truth.clone()
    image[:, 128:] = 0.5
    upper, lower = reliability.patch_errors(image, truth, grid).tolist()
    assert upper == 0
    assert lower == pytest.approx(0.25 * (220 - 128) / (220 - 96))


def test_eight_bits_are_what_a_file_gives_back(tmp_path):
    image = texture(20, 30, seed=5) * 1.2
    back = read_picture(write_png(Picture(image), tmp_path / "image.png")).rgb
    torch.testing.assert_close(to_8bit(image), back)


def test_autoencoder_psnr_is_of_the_cut_image_in_eight_bits(tiny_pipeline, tmp_path):
    image = to_8bit(texture(45, 50, seed=7))
    write_png(Picture(image), tmp_path / "cut.png")
    write_png(Picture(image[:, :40, :48]), tmp_path / "whole.png")
    psnr = components.autoencoder_psnr(tiny_pipeline, tmp_path)
    assert psnr["cut.png"] == psnr["whole.png"]
    vae = tiny_pipeline.vae
    with torch.no_grad():
        output = vae.decode(vae.encode(image[None, :, :40, :48]).latents).sample[0].clamp(-1, 1)
    output = read_picture(write_png(Picture(output), tmp_path / "output.png")).rgb
    assert psnr["cut.png"] == pytest.approx(psnr_rgb(output, image[:, :40, :48]), abs=1e-3)


def test_images_smaller_than_a_cell_are_named(tiny_pipeline, tmp_path):
    write_png(Picture(texture(7, 40, seed=2)), tmp_path / "narrow.png")
    with pytest.raises(ImageError, match=r"narrow\.png is 40×7; the autoencoder needs 8×8"):
        components.autoencoder_psnr(tiny_pipeline, tmp_path)


def test_the_components_run_from_the_command_line(weights, tmp_path, capsys):
    write_png(Picture(texture(48, 40, seed=1)), tmp_path / "a.png")
    components.main(["--images", str(tmp_path), "--weights", str(weights)])
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| autoencoder | images | RGB PSNR |"
    assert float(row.split("|")[3].removesuffix(" dB ")) > 0
    for refused in (
        ["--weights", str(weights)],
        ["--images", str(tmp_path), "--weights", str(tmp_path)],
        ["--images", str(tmp_path / "none"), "--weights", str(weights)],
    ):
        with pytest.raises(SystemExit, match="2"):
            components.main(refused)
