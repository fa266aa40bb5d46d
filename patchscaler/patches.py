"""Overlapping square patches of a latent: where they lie, cutting them out and blending them back.

C channels, H W pixels, h w latents, N patches, V patch side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LATENT_PIXELS = 8  # pixels along the side of a latent cell: d of Section 3.1


@dataclass(frozen=True)
class Patch:
    """A square of `size` latent cells whose first row and column are `top` and `left`."""

    index: int
    top: int
    left: int
    size: int

    def pixels(self, image: Tensor) -> Tensor:
        """The patch's area of an image …×H×W: …×8V×8V, or less where H and W end before the grid does."""
        top, left, side = (LATENT_PIXELS * cells for cells in (self.top, self.left, self.size))
        return image[..., top : top + side, left : left + side]

    def cells(self, latents: Tensor, top: int = 0) -> Tensor:
        """The patch's area of latents …×h×w: …×V×V. `top` is the first row that `latents` hold."""
        return latents[..., self.top - top : self.top - top + self.size, self.left : self.left + self.size]


@dataclass(frozen=True)
class PatchGrid:
    """Patches that cover a latent of `height`×`width` cells.

    They are evenly spaced, at most `stride` apart, the first and the last flush with the edges. Raises
    ValueError if the latent is smaller than a patch or if `stride` would leave gaps.
    """

    height: int
    width: int
    size: int = 16
    stride: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size:
            raise ValueError(f"stride {self.stride} is not in 1..{self.size}")
        if min(self.height, self.width) < self.size:
            raise ValueError(f"latent {self.height}×{self.width} is smaller than a patch of {self.size}")

    @classmethod
    def covering(cls, height: int, width: int, size: int = 16) -> PatchGrid:
        """The grid of a picture of so many pixels: its latent, filled up to whole cells and at least one patch."""
        return cls(*(max(size, -(-side // LATENT_PIXELS)) for side in (height, width)), size=size)

    @cached_property
    def patches(self) -> tuple[Patch, ...]:
        """The patches in row-major order; `index` is the place in this tuple."""
        corners = [(top, left) for top in self._starts(self.height) for left in self._starts(self.width)]
        return tuple(Patch(index, top, left, self.size) for index, (top, left) in enumerate(corners))

    def __len__(self) -> int:
        return len(self.patches)

    def nearest(self, x: float, y: float) -> Patch:
        """The patch whose centre lies nearest to a pixel: x to the right, y down."""

        def distance(patch: Patch) -> float:
            middle = patch.size / 2
            return math.hypot(patch.left + middle - x / LATENT_PIXELS, patch.top + middle - y / LATENT_PIXELS)

        return min(self.patches, key=distance)

    def borders(self) -> tuple[list[int], list[int]]:
        """Rows and columns of pixels at which a patch begins or ends, the grid's own edges too."""
        rows, columns = (
            {LATENT_PIXELS * edge for start in self._starts(length) for edge in (start, start + self.size)}
            for length in (self.height, self.width)
        )
        return sorted(rows), sorted(columns)

    def _starts(self, length: int) -> list[int]:
        spare = length - self.size
        gaps = math.ceil(spare / self.stride)
        return [0] + [round(i * spare / gaps) for i in range(1, gaps + 1)]


def split(latents: Tensor, grid: PatchGrid) -> Tensor:
    """Cut C×h×w into the N×C×V×V patches of the grid. Raises ValueError if the grid is for another size."""
    if latents.shape[-2:] != (grid.height, grid.width):
        raise ValueError(f"latents {tuple(latents.shape)} do not fit a grid of {grid.height}×{grid.width}")
    return torch.stack([patch.cells(latents) for patch in grid.patches])


def merge(patches: Tensor, grid: PatchGrid) -> Tensor:
    """Blend N×C×V×V into C×h×w by the mean under Gaussian weights; `merge(split(x, grid), grid)` is x.

    Sums are kept in float32, whatever the patches' dtype; the result has that dtype again. Raises ValueError
    if number or size of the patches are not those of the grid.
    """
    if len(patches) != len(grid) or patches.shape[-2:] != (grid.size, grid.size):
        expected = f"{len(grid)} of {grid.size}×{grid.size}"
        raise ValueError(f"patches {tuple(patches.shape)} do not fit a grid of {expected}")
    total = torch.zeros(patches.shape[1], grid.height, grid.width, device=patches.device)  # C h w
    weights = torch.zeros(grid.height, grid.width, device=patches.device)  # h w
    blend(grid.patches, patches, total, weights)
    return (total / weights).to(patches.dtype)


def blend(places: Iterable[Patch], values: Tensor, total: Tensor, weights: Tensor, top: int = 0) -> None:
    """Add patches N×C×V×V to `total` C×h×w and their Gaussian weights to `weights` h×w, rows from `top` on."""
    weight = gaussian_weight(values.shape[-1]).to(values.device)  # V×V
    for patch, value in zip(places, values, strict=True):
        patch.cells(total, top).add_(value.float() * weight)
        patch.cells(weights, top).add_(weight)


def gaussian_weight(size: int) -> Tensor:
    """V×V float32 weights in (0, 1]: a Gaussian of variance .04 in units of the patch width.

    Neighbours 12 cells apart share 4 cells. Variance .04 spreads their disagreement over these, at most 29 % of
    it between two cells; with the .01 of StableSR's half-overlapping tiles it would be 83 %, a hard seam.
    """
    offset = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2) / size
    line = torch.exp(-offset.square() / (2 * 0.04))
    return line[:, None] * line[None, :]
