from __future__ import annotations

import pytest
import torch

from patchscaler.patches import PatchGrid, gaussian_weight, merge, split

SIZES = [(16, 16), (16, 17), (17, 16), (16, 28), (29, 27), (16, 211), (53, 40), (31, 100)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_merge_undoes_split(height, width):
    latents = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    grid = PatchGrid(height, width)
    patches = split(latents, grid)
    assert patches.shape == (len(grid), 3, 16, 16)
    torch.testing.assert_close(merge(patches, grid), latents, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 5, 12, 16])
def test_grid_covers_every_cell_without_gaps_or_overhang(stride):
    for height in range(16, 90):
        grid = PatchGrid(height, 16, stride=stride)
        tops = [patch.top for patch in grid.patches]
        assert tops[0] == 0 and tops[-1] == height - 16
        assert all(1 <= after - before <= stride for before, after in zip(tops, tops[1:]))


def test_grid_is_row_major_and_indexed():
    patches = PatchGrid(40, 28).patches
    assert [(patch.top, patch.left) for patch in patches] == [
        (0, 0),
        (0, 12),
        (12, 0),
        (12, 12),
        (24, 0),
        (24, 12),
    ]
    assert [patch.index for patch in patches] == list(range(6))


def test_other_patch_sizes():
    latents = torch.rand(1, 13, 9)
    grid = PatchGrid(13, 9, size=8, stride=6)
    torch.testing.assert_close(merge(split(latents, grid), grid), latents, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(15, 16), (16, 15), (0, 40)])
def test_latents_smaller_than_a_patch_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}×{width}.*16"):
        PatchGrid(height, width)


@pytest.mark.parametrize("stride", [0, 17])
def test_stride_outside_its_range_is_refused(stride):
    with pytest.raises(ValueError, match=str(stride)):
        PatchGrid(32, 32, stride=stride)


def test_wrong_shapes_are_refused():
    grid = PatchGrid(20, 20)
    with pytest.raises(ValueError, match="20×20"):
        split(torch.zeros(1, 20, 21), grid)
    with pytest.raises(ValueError, match="4 of 16×16"):
        merge(torch.zeros(3, 1, 16, 16), grid)


def test_gaussian_weight_has_variance_of_four_hundredths():
    weight = gaussian_weight(16)
    assert weight.dtype == torch.float32
    assert weight[0, 8] == pytest.approx(0.0634, rel=0.01)
    assert weight.min() > 0
    assert torch.equal(weight, weight.T) and torch.equal(weight, weight.flip(0))


def test_half_precision_patches_are_summed_in_float32():
    latents = torch.full((1, 40, 40), 0.7, dtype=torch.bfloat16)
    grid = PatchGrid(40, 40)
    merged = merge(split(latents, grid), grid)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, latents)


@pytest.mark.parametrize(("stride", "largest"), [(12, 0.29), (8, 0.2)])
def test_seams_on_a_gradient_are_blended(stride, largest):
    """Neighbours that disagree by a constant turn into each other over the overlap, without ringing.

    Pasting them would leave one step of the whole disagreement.
    """
    gradient = torch.linspace(-1, 1, 64).expand(1, 16, 64)
    grid = PatchGrid(16, 64, stride=stride)
    offsets = torch.tensor([0.1 if patch.index % 2 else -0.1 for patch in grid.patches])
    error = merge(split(gradient, grid) + offsets[:, None, None, None], grid) - gradient
    assert error.abs().max() <= 0.1 + 1e-6
    assert error.diff(dim=-1).abs().max() < largest * 0.2
    assert error.diff(dim=-2).abs().max() < 1e-6


def test_the_nearest_patch_to_a_pixel():
    grid = PatchGrid(28, 40)  # columns at 0, 12, 24; rows at 0, 12
    for (x, y), index in {(0, 0): 0, (111, 0): 0, (113, 0): 1, (319, 0): 2, (0, 113): 3, (319, 223): 5}.items():
        assert grid.nearest(x, y).index == index
    assert grid.nearest(-5, 9999).index == 3
