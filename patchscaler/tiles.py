"""Networks that see only so far, run on pieces of a picture: memory is bounded by the piece, not by the picture.

B batch, C channels, H W pixels, h w latents. A cell is one of the latent, 8×8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from patchscaler.cancellation import check_cancelled

PROBE = (4, 160)  # cells of the strip on which a reach is measured
ALIGN = 4  # pieces begin at multiples of this many cells, so that a network that halves sees whole pairs

_reaches: WeakKeyDictionary[nn.Module, dict[str, int | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Local:
    """One use of a network: `run` takes B×C×(before·h)×(before·w) and gives B×C'×(after·h)×(after·w)."""

    network: nn.Module
    name: str  # of this use, among those of the network
    run: Callable[[Tensor], Tensor]
    before: int  # pixels along a cell of the input: 8 for an image, 1 for a latent
    after: int

    def reach(self, channels: int, device: torch.device) -> int | None:
        """How many cells away an input can change the output, at most; None if that is the whole picture.

        Measured once per network, whatever its layers: NaN in one cell of a strip turns everything into NaN that
        the cell reaches. A diffusers autoencoder that tiles by itself does so from the picture's corner.
        """
        if getattr(self.network, "use_tiling", False):
            return None
        known = _reaches.setdefault(self.network, {})
        if self.name not in known:
            height, width = PROBE
            strip = torch.zeros(1, channels, height * self.before, width * self.before, device=device)
            middle = width // 2 * self.before
            strip[..., middle : middle + self.before] = float("nan")
            # Some of cuDNN's algorithms transform large pieces, and would spread the NaN over these.
            with torch.backends.cudnn.flags(enabled=False) if device.type == "cuda" else nullcontext():
                reached = self.run(strip).isnan().any(1).any(1)[0]  # after*w
            cells = reached.unflatten(0, (width, self.after)).any(1).nonzero()[:, 0]
            farthest = int((cells - width // 2).abs().max())
            # Of the cells of a pair, one may reach a cell further than the other.
            known[self.name] = None if farthest >= width // 2 - 1 else -(-(farthest + 1) // ALIGN) * ALIGN
        return known[self.name]


def tiled(local: Local, values: Tensor, side: int) -> Tensor:
    """`local.run(values)` in tiles of at most `side`×`side` cells, each with the surroundings that it sees.

    Equal to the whole but for the rounding of sums. A network that sees the whole picture is given all of it.
    """
    height, width = (length // local.before for length in values.shape[-2:])
    if max(height, width) <= side or (reach := local.reach(values.shape[1], values.device)) is None:
        return local.run(values)
    whole = None
    for top, bottom in pieces(height, side):
        for left, right in pieces(width, side):
            first, last = max(0, top - reach), min(height, bottom + reach)
            check_cancelled()
            start, end = max(0, left - reach), min(width, right + reach)
            tile = local.run(values[..., _pixels(first, last, local.before), _pixels(start, end, local.before)])
            if whole is None:
                whole = tile.new_empty(*tile.shape[:2], height * local.after, width * local.after)
            rows, columns = _pixels(top, bottom, local.after), _pixels(left, right, local.after)
            inner = _pixels(top - first, bottom - first, local.after), _pixels(left - start, right - start, local.after)
            whole[..., rows, columns] = tile[..., inner[0], inner[1]]
    return whole


def pieces(length: int, most: int) -> list[tuple[int, int]]:
    """Cut `length` cells at multiples of ALIGN into nearly equal pieces of at most `most`, or of ALIGN."""
    blocks = -(-length // ALIGN)
    count = -(-blocks // max(1, most // ALIGN))
    cuts = [i * blocks // count * ALIGN for i in range(count)] + [length]
    return list(zip(cuts, cuts[1:]))


def _pixels(first: int, last: int, each: int) -> slice:
    return slice(first * each, last * each)
