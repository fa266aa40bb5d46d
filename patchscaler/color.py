"""Colour correction of the final picture."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 5
REACH = 2**LEVELS - 1  # rows and columns
BAND = 256  # rows at a time: what is made of them stays in a CPU's cache, and memory is bounded


def wavelet_color_fix(output: Tensor, reference: Tensor, levels: int = LEVELS) -> Tensor:
    """Give `output` the low frequencies, and so the colours, of `reference` and keep its own detail.

    This is StableSR's wavelet fix: the highs of the output plus the low of the reference. Both are Bx3xHxW in
    [-1, 1], of any size from 1x1. The result is not clamped and may overshoot slightly. A pixel depends on
    those at most 2**levels - 1 rows or columns away. Raises ValueError if the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"shapes differ: output {tuple(output.shape)}, reference {tuple(reference.shape)}")
    height, reach = output.shape[-2], 2**levels - 1
    fixed = torch.empty_like(output)
    for top in range(0, height, BAND):
        bottom, first = min(top + BAND, height), max(0, top - reach)
        rows = slice(first, bottom + reach)
        # The low-pass is linear, so output - low(output) + low(reference) needs only the low of the difference.
        low = _low(reference[..., rows, :] - output[..., rows, :], levels)  # Bx3xH'xW
        torch.add(output[..., top:bottom, :], low[..., top - first : bottom - first, :], out=fixed[..., top:bottom, :])
    return fixed


def _low(image: Tensor, levels: int) -> Tensor:
    """Blur repeatedly with [1 2 1]x[1 2 1]/16, dilated by 2**i, edges replicated. Shapes stay BxCxHxW."""
    for level in range(levels):
        for axis in (-2, -1):
            image = _blur(image, 2**level, axis)
    return image.mul_(16.0**-levels)


def _blur(image: Tensor, step: int, axis: int) -> Tensor:
    """[1 2 1] along one axis, its places ``step`` apart: four times as bright. In place of padding, three sums."""
    blurred = image * 2
    length = image.shape[axis]
    edge = min(step, length)
    for first, last in ((0, 1), (length - 1, length)):  # the replicated edge, then what lies inside
        start = 0 if first == 0 else length - edge
        blurred.narrow(axis, start, edge).add_(image.narrow(axis, first, last - first))
    if length > step:
        blurred.narrow(axis, step, length - step).add_(image.narrow(axis, 0, length - step))
        blurred.narrow(axis, 0, length - step).add_(image.narrow(axis, step, length - step))
    return blurred
