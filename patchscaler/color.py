"""Colour correction of the final picture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def wavelet_color_fix(output: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """Give `output` the low frequencies, and so the colours, of `reference` and keep its own detail.

    This is StableSR's wavelet fix: the highs of the output plus the low of the reference. Both are Bx3xHxW in
    [-1, 1], of any size from 1x1. The result is not clamped and may overshoot slightly. A pixel depends on
    those at most 2**levels - 1 rows or columns away. Raises ValueError if the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"shapes differ: output {tuple(output.shape)}, reference {tuple(reference.shape)}")
    # The low-pass is linear, so output - low(output) + low(reference) needs only the low of the difference.
    return output + _low(reference - output, levels)


def _low(image: Tensor, levels: int) -> Tensor:
    """Blur repeatedly with [1 2 1]x[1 2 1]/16, dilated by 2**i, edges replicated. Shapes stay BxCxHxW."""
    for level in range(levels):
        step = 2**level
        height, width = image.shape[-2:]
        rows = F.pad(image, (0, 0, step, step), mode="replicate")  # B C H+2s W
        image = (rows[..., :height, :] + rows[..., 2 * step :, :]) / 4 + image / 2
        columns = F.pad(image, (step, step, 0, 0), mode="replicate")  # B C H W+2s
        image = (columns[..., :width] + columns[..., 2 * step :]) / 4 + image / 2
    return image
