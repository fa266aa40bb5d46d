"""Weight-free measures of a restored image against the true one, of its patch seams and of meshes in it.

Images are 3×H×W in [-1, 1]; results are Python floats. H W pixels. All sums run in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MESH_PERIODS = (2, 4, 8)  # pixels: the strides of decoder and feature networks, which leave such meshes
MESH_WINDOW = 64  # pixels along a side; a multiple of the periods, which then fall on whole frequencies


def to_8bit(image: Tensor) -> Tensor:
    """What an 8-bit file of the image, of any shape and in [-1, 1], gives back."""
    return ((image + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def luma(image: Tensor) -> Tensor:
    """BT.601 luma H×W of an image 3×H×W in [-1, 1], from 16 (black) to 235 (white)."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image {tuple(image.shape)}: expected 3×H×W")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=image.device).view(3, 1, 1)
    return 16 + (weights * (image.double() + 1) / 2).sum(0)


def psnr_y(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of the luma in dB; inf if equal."""
    check_pair(a, b)
    return _psnr(luma(a), luma(b))


def psnr_rgb(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of all channels in dB; inf if equal."""
    check_pair(a, b)
    return _psnr(a.double() * 127.5, b.double() * 127.5)


def ssim_y(a: Tensor, b: Tensor) -> float:
    """Structural similarity of the luma (Wang et al. 2004), in -1..1.

    Gaussian window of 11×11 and sigma 1.5 wherever it fits. ValueError for an image smaller than the window.
    """
    check_pair(a, b)
    x, y = luma(a), luma(b)
    if min(x.shape) < 11:
        raise ValueError(f"image {x.shape[0]}×{x.shape[1]}: SSIM needs 11×11 at least")
    line = torch.exp(-((torch.arange(11, dtype=torch.float64, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    line = line / line.sum()
    moments = torch.stack([x, y, x * x, y * y, x * y]).unsqueeze(1)  # [5, 1, H, W]
    moments = F.conv2d(F.conv2d(moments, line.view(1, 1, 11, 1)), line.view(1, 1, 1, 11))
    mean_x, mean_y, xx, yy, xy = moments.squeeze(1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (numerator / denominator).mean().item()


def seam_score(image: Tensor, rows: Sequence[int] = (), columns: Sequence[int] = ()) -> float:
    """How much patch borders stand out: 1 where they do not, 2 where luma steps twice as far across them.

    Ratio of the mean absolute luma difference of neighbouring pixels across borders to that elsewhere. Row r
    is the border between pixel rows r - 1 and r; columns alike. Only directions that have borders count.
    Upscaled images score above 1 on the multiples of their scale: compare with bicubic at the same borders.
    A flat image scores 1; flat patches with steps between them score inf.
    ValueError without borders, or for one outside 1..H-1 (rows) or 1..W-1 (columns).
    """
    y = luma(image)
    across, elsewhere = [], []
    for plane, borders in ((y, rows), (y.T, columns)):
        if not len(borders):
            continue
        if min(borders) < 1 or max(borders) >= len(plane):
            raise ValueError(f"borders {min(borders)}..{max(borders)}: expected 1..{len(plane) - 1}")
        steps = plane.diff(dim=0).abs()  # step r - 1 lies between r - 1 and r
        is_border = torch.zeros(len(steps), dtype=torch.bool, device=y.device)
        is_border[[border - 1 for border in borders]] = True
        across.append(steps[is_border].flatten())
        elsewhere.append(steps[~is_border].flatten())
    if not across:
        raise ValueError("no borders: give rows or columns")
    border, inside = torch.cat(across).mean().item(), torch.cat(elsewhere).mean().item()
    if inside == 0:
        return math.inf if border > 0 else 1.0
    return border / inside


def mesh(images: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[int, float]:
    """How much a mesh stands out in smooth places: 1 where no more than in the truths, 2 with twice the power.

    Keys are the periods MESH_PERIODS in pixels. A value is the power at that period over the mean power of the
    neighbouring frequencies, divided by the same of the truths. Luma is cut into windows of MESH_WINDOW pixels, of
    which the tenth is taken whose truth is smoothest (by the mean absolute difference of neighbouring pixels).
    ValueError if the sizes of a pair differ, or if no image holds a window.
    """
    if len(images) != len(truths):
        raise ValueError(f"{len(images)} images for {len(truths)} truths")
    for pair in zip(images, truths):
        check_pair(*pair)
    ours, true = (torch.cat([_windows(luma(image)) for image in side]) for side in (images, truths))  # M×S×S each
    if not len(true):
        raise ValueError(f"no image holds a window of {MESH_WINDOW}×{MESH_WINDOW}")
    roughness = true.diff(dim=1).abs().mean((1, 2)) + true.diff(dim=2).abs().mean((1, 2))  # M
    smooth = roughness.argsort()[: math.ceil(len(true) / 10)]
    return {period: _peak(ours[smooth], period) / _peak(true[smooth], period) for period in MESH_PERIODS}


def check_pair(a: Tensor, b: Tensor) -> None:
    """ValueError unless both are colour images of one size."""
    if a.shape != b.shape or a.ndim != 3 or a.shape[0] != 3 or not a.numel():
        raise ValueError(f"images {tuple(a.shape)} and {tuple(b.shape)}: expected both 3×H×W, of one size")


def _psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().item()
    return 10 * math.log10(255**2 / error) if error > 0 else math.inf


def _windows(y: Tensor) -> Tensor:
    """The whole windows M×S×S of luma H×W, side by side."""
    if min(y.shape) < MESH_WINDOW:
        return y.new_empty(0, MESH_WINDOW, MESH_WINDOW)
    return y.unfold(0, MESH_WINDOW, MESH_WINDOW).unfold(1, MESH_WINDOW, MESH_WINDOW).flatten(0, 1)


def _peak(windows: Tensor, period: int) -> float:
    """Power of M×S×S at a period over that of its neighbours: the mean over rows, columns and both diagonals."""
    side, k = windows.shape[-1], windows.shape[-1] // period
    line = torch.hann_window(side, dtype=torch.float64, device=windows.device, periodic=False)
    window = torch.outer(line, line)
    # The power of 8-bit rounding is added: nothing below it is seen, and a flat image has some.
    power = (torch.fft.fft2((windows - windows.mean((1, 2), keepdim=True)) * window).abs() ** 2).mean(0)
    power = power / (window**2).sum() + 1 / 12
    around = torch.ones(7, 7, dtype=torch.float64, device=windows.device)
    around[2:5, 2:5] = 0  # as far as the window spreads the peak
    ratios = []
    for row, column in ((0, k), (k, 0), (k, k), (k, -k)):
        near = power.roll((3 - row, 3 - column), (0, 1))[:7, :7]  # the frequency itself is in the middle
        ratios.append((near[3, 3] / ((near * around).sum() / around.sum())).item())
    return sum(ratios) / len(ratios)
