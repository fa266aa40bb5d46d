"""Bands: the same picture as in one piece, whatever its size, in the memory of a band."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from patchscaler import large
from patchscaler.images import Picture, to_pil
from patchscaler.large import Bands, Rows
from patchscaler.plan import SamplingPlan

PLAN = SamplingPlan(0.95, 0.75, start=(200, 400, 600), steps=(1, 2, 3))


def random_picture(height: int, width: int, alpha: bool = False) -> Picture:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(3, height, width, generator=generator) - 0.5
    return Picture(rgb, torch.rand(1, height, width, generator=generator) if alpha else None)


@pytest.fixture(autouse=True)
def low_bands(monkeypatch):
    monkeypatch.setattr(large, "BAND", 16)
    monkeypatch.setattr(large, "PATCHES", 5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (150, 3), (77, 61), (131, 40), (160, 96)])
def test_bands_equal_the_whole(tiny_pipeline, height, width):
    picture = random_picture(height, width, alpha=width == 61)
    confidence = tiny_pipeline.analyze(picture).patch_confidence.double().sort().values
    thresholds = confidence[len(confidence) * 2 // 3] + 1e-3, confidence[len(confidence) // 3]
    plan = replace(PLAN, gamma1=thresholds[0].item(), gamma2=thresholds[1].item())  # every group is there
    color_fix = height != 131
    whole = tiny_pipeline(picture, plan, generator=3, color_fix=color_fix)
    upscaling = Bands(tiny_pipeline, picture, plan, seed=3, batch_size=4, color_fix=color_fix)
    rows = [*upscaling]
    assert all(len(band) == 128 for band in rows[:-1]) and sum(map(len, rows)) == 4 * height
    difference = np.concatenate(rows).astype(int) - np.asarray(to_pil(whole.picture))
    assert np.abs(difference).max() <= 1
    report, expected = upscaling.report(), whole.report()
    for one, other in zip(report["groups"], expected["groups"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert report["stages"].keys() == expected["stages"].keys() and min(report["stages"].values()) > 0
    assert {**report, "groups": 0, "stages": 0} == {**expected, "groups": 0, "stages": 0}


def test_no_more_rows_are_kept_than_are_asked_for():
    made = []

    def make(first):
        made.append(first)
        return torch.arange(first, min(first + 5, 23)).expand(2, 1, -1).transpose(1, 2)

    rows = Rows(23, make)
    for first, last in [(-3, 4), (2, 9), (2, 11), (10, 11), (18, 99)]:
        assert rows.get(first, last)[0, :, 0].tolist() == [*range(max(0, first), min(last, 23))]
        assert rows._kept.shape[1] <= last - max(0, first) + 5
    assert made == [0, 5, 10, 15, 20]  # each once


def test_noise_in_pieces_is_that_of_a_whole_run(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(large, "NOISE", 2**14)
    upscaling = Bands(tiny_pipeline, random_picture(638, 550), PLAN, seed=11)
    grid = upscaling.grid
    shape = (4, grid.height, grid.width)
    assert 4 * grid.height * grid.width % 16 and 4 * grid.height * grid.width > 3 * large.NOISE
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(11))
    with open(tmp_path / "noise", "w+b") as file:
        upscaling._draw(file)
        for first, last in [(0, 3), (100, 140), (grid.height - 1, grid.height)]:
            assert torch.equal(upscaling._noise(file, first, last), whole[:, first:last])
