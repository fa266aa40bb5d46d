"""The wavelet colour fix: the final image takes its colours from the input."""

from __future__ import annotations

import torch
from torch import Tensor

# A low-pass is [1 2 1]/4 along both axes, once for each of these distances between its three places: the five levels
# of StableSR's wavelets.
LEVELS = (1, 2, 4, 8, 16)
REACH = sum(LEVELS)  # rows and columns
BAND = 256  # rows at a time: what is made of them stays in a CPU's cache, and memory is bounded


def colored(output: Tensor, upscaled: Tensor, color_fix: bool, grey: bool) -> Tensor:
    """The decoded picture 3×H×W with the colours of the bicubic upscale, or as it is; grey where the input is."""
    if color_fix:
        output = wavelet_color_fix(output[None], upscaled[None].to(output.device))[0].clamp_(-1, 1)
    return output.mean(0, keepdim=True).expand_as(output) if grey else output


def wavelet_color_fix(output: Tensor, reference: Tensor) -> Tensor:
    """Give `output` the low frequencies, and so the colours, of `reference` and keep its own detail.

    This is StableSR's wavelet fix: the highs of the output plus the low of the reference. Both are B×3×H×W in
    [-1, 1], of any size from 1×1. The result is not clamped and may overshoot slightly. A pixel depends on
    those at most 31 rows or columns away. Raises ValueError if the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(output.shape)} and {tuple(reference.shape)}")
    fixed = torch.empty_like(output)
    height = output.shape[-2]
    for top in range(0, height, BAND):
        bottom, first = min(top + BAND, height), max(0, top - REACH)
        seen = (..., slice(first, bottom + REACH), slice(None))
        # The low-pass is linear, so output - low(output) + low(reference) needs only the low of the difference.
        low = _low(reference[seen] - output[seen])[..., top - first : bottom - first, :]
        torch.add(output[..., top:bottom, :], low, out=fixed[..., top:bottom, :])
    return fixed


def _low(image: Tensor) -> Tensor:
    """Blur repeatedly with [1 2 1]×[1 2 1]/16, its places ever farther apart, edges replicated: B×C×H×W still."""
    for distance in LEVELS:
        for axis in (-2, -1):
            image = _blur(image, distance, axis)
    return image.mul_(16.0 ** -len(LEVELS))


def _blur(image: Tensor, step: int, axis: int) -> Tensor:
    """[1 2 1] along one axis, its places `step` apart: four times as bright. In place of padding, three sums."""
    blurred = image * 2
    length = image.shape[axis]
    edge = min(step, length)
    blurred.narrow(axis, 0, edge).add_(image.narrow(axis, 0, 1))  # the replicated edges
    blurred.narrow(axis, length - edge, edge).add_(image.narrow(axis, length - 1, 1))
    if length > step:  # what lies inside
        blurred.narrow(axis, step, length - step).add_(image.narrow(axis, 0, length - step))
        blurred.narrow(axis, 0, length - step).add_(image.narrow(axis, step, length - step))
    return blurred
