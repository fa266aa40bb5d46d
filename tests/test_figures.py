"""The drawings of groups and priors."""

import pytest
import torch
from PIL import ImageColor

from patchscaler.figures import GROUP_COLORS, priors_sheet, qmap_overlay
from patchscaler.patches import PatchGrid


def test_each_cell_has_its_patch_s_colour():
    grid = PatchGrid(28, 28)  # 2×2 patches, whose cells meet in the middle: pixel 112 of 224
    overlay = qmap_overlay(torch.zeros(3, 224, 224), grid, torch.tensor([0, 1, 2, 0]))
    assert overlay.size == (224, 224)
    for group, place in zip((0, 1, 2, 0), ((10, 10), (200, 10), (10, 200), (200, 200))):
        color = ImageColor.getrgb(GROUP_COLORS[group])
        expected = [round((channel + 127.5) / 2) for channel in color]  # half tint, half mid grey
        assert overlay.getpixel(place) == pytest.approx(expected, abs=1)
    assert overlay.getpixel((111, 10)) == overlay.getpixel((10, 10))
    assert overlay.getpixel((112, 10)) == ImageColor.getrgb(GROUP_COLORS[1])  # the border line of the right cell


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(4, 4, (4, 4)), (28, 4096, (1024, 7)), (1600, 800, (512, 1024))],
)
def test_cropped_and_scaled_overlays(height, width, size):
    grid = PatchGrid(max(16, -(-height // 8)), max(16, -(-width // 8)))
    overlay = qmap_overlay(torch.zeros(3, height, width), grid, torch.zeros(len(grid), dtype=torch.long))
    assert overlay.size == size


def test_overlay_wants_a_group_for_every_patch():
    with pytest.raises(ValueError, match="3 assigned groups for 4 patches"):
        qmap_overlay(torch.zeros(3, 224, 224), PatchGrid(28, 28), torch.tensor([0, 1, 2]))


def test_priors_sheet_has_a_row_for_each_patch():
    priors, similarities = torch.full((2, 3, 3, 128, 128), -1.0), torch.rand(2, 3)
    sheet = priors_sheet(list(priors), similarities, [torch.ones(3, 9, 9), torch.zeros(3, 128, 5)])
    assert sheet.getpixel((70, 70)) == (255, 255, 255)  # inside the first patch
    assert sheet.getpixel((206, 70)) == (0, 0, 0)  # inside its first prior
    assert sheet.getpixel((70, 226)) == pytest.approx((128,) * 3, abs=1)  # inside the second patch
    assert sheet.size == (8 + 4 * 136, 8 + 2 * 156)


def test_patches_set_by_hand_have_a_border():
    grid, groups = PatchGrid(28, 28), torch.zeros(4, dtype=torch.long)
    plain, marked = (qmap_overlay(torch.zeros(3, 224, 224), grid, groups, by_hand=hand) for hand in ((), (1,)))
    white, black = (255, 255, 255), (0, 0, 0)
    assert [marked.getpixel((x, 50)) for x in (113, 114, 115, 221, 222)] == [black, white, white, white, black]
    for x in (10, 111, 120, 215):  # the other patch and the inside keep their colour
        assert marked.getpixel((x, 50)) == plain.getpixel((x, 50))
