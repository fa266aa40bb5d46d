"""Looking closely: two versions of the picture side by side, a magnified crop of both, and single patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from patchscaler.images import Picture, to_pil
from patchscaler.patches import LATENT_PIXELS, Patch
from patchscaler.plan import SamplingPlan, assign
from patchscaler.ui import html
from patchscaler.ui.export import save_preview
from patchscaler.ui.state import ByHand, CachedAnalysis, SessionCache, Settings, Shown, View, choice_of, whole_pictures

SIDES = ("Bicubic input", "Coarse", "Final", "Uniform")
ZOOMS = {"100 %": 1, "200 %": 2, "400 %": 4}
LEFT, RIGHT, ZOOM = "Bicubic input", "Final", "200 %"  # on a new page
WINDOW = 480  # side of the zoomed crop on the page, in pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Closeups:
    """Events of the before/after slider, the zoom, the patch borders and the patch inspector."""

    def __init__(self, cache: SessionCache, decode: Callable[[Tensor], Tensor]) -> None:
        """`decode` makes images K×3×H×W in [-1, 1] of the K rows of the texture memory in a LongTensor K."""
        self.cache = cache
        self._decode = decode

    @whole_pictures()
    def compared(self, now: Settings, left: str, right: str) -> View:
        """Two whole pictures for the slider, or why there are none."""
        known = self.cache.get(now.source)
        pictures = pair(known, now.page.shown, (left, right)) if known else None
        return {"compare": pictures, "no-side": html.NO_SIDE if known and now.page.shown and not pictures else ""}

    @whole_pictures()
    def zoomed(self, now: Settings, left: str, right: str, zoom: str) -> View:
        """The same crop of both."""
        known = self.cache.get(now.source)
        return {"zoom": zoomed(known, now.page.shown, (left, right), zoom, now.page.center) if known else None}

    def centered(self, now: Settings, at: tuple[float, float]) -> None:
        """The place of a click on a panel that shows the picture in its full size."""
        now.page.center = at

    def inspected(self, now: Settings) -> View:
        """The priors of the patch that was clicked."""
        known, index = self.cache.get(now.source), now.page.patch
        if known is None or index is None:
            return {"inspected": ""}
        priors = known.analysis.priors
        coarse = known.analysis.grid.patches[index].pixels(known.analysis.coarse)
        similarities = enumerate(priors.similarities[index].tolist(), start=1)
        labels = ["y₀: the coarse patch", *(f"Prior {place}, similarity {value:.3f}" for place, value in similarities)]
        pictures = [to_pil(Picture(values)) for values in (coarse, *self._decode(priors.indices[index]))]
        return {"inspected": html.figures(list(zip(labels, pictures)), "priors")}

    def seams(self, now: Settings, on: Any) -> View:
        """The borders of all patches, over every panel that shows the whole picture."""
        known = self.cache.get(now.source)
        if known is None or not on:
            return {"grid": ""}
        height, width = known.analysis.coarse.shape[-2:]
        return {"grid": html.seams(known.analysis.grid, width, height)}


def pair(known: CachedAnalysis, shown: Shown | None, sides: tuple[str, str]) -> tuple[Path, Path] | None:
    """Previews of two sides for the slider, or None while one of them does not exist yet."""
    pictures = [side(known, shown, name) for name in sides]
    return None if None in pictures else tuple(save_preview(picture, "side") for picture in pictures)


def zoomed(
    known: CachedAnalysis, shown: Shown | None, sides: tuple[str, str], zoom: str, center: tuple[float, float] | None
) -> tuple[Path, Path] | None:
    """The same crop of two sides around a pixel, the middle unless given, magnified without smoothing."""
    height, width = known.analysis.coarse.shape[-2:]
    factor = ZOOMS[choice_of("zoom", zoom, ZOOMS)]
    x, y = center or (width / 2, height / 2)
    (left, right), (top, bottom) = window(x, width, WINDOW // factor), window(y, height, WINDOW // factor)
    crops = [side(known, shown, name, (left, top, right, bottom)) for name in sides]
    if None in crops:
        return None
    return tuple(save_preview(ImageOps.scale(crop, factor, Image.Resampling.NEAREST), "zoom") for crop in crops)


def window(center: float, length: int, side: int) -> tuple[int, int]:
    """First and last of `side` pixels around `center`, moved inside 0..length where they would reach out."""
    side = min(side, length)
    first = min(max(0, round(center - side / 2)), length - side)
    return first, first + side


def side(known: CachedAnalysis, shown: Shown | None, name: str, box: Box | None = None) -> Image.Image | None:
    """One of SIDES, or a part of it; None if there is no such picture of this image yet."""
    choice_of("side", name, SIDES)
    if name in ("Bicubic input", "Coarse"):
        image = known.analysis.bicubic if name == "Bicubic input" else known.analysis.coarse
        if box:
            image = image[:, box[1] : box[3], box[0] : box[2]]
        return to_pil(Picture(image))
    path = shown and (shown.final if name == "Final" else shown.uniform)
    if not path or not path.is_file():  # Gradio empties its folder after an hour
        return None
    with Image.open(path) as image:
        return (image.crop(box) if box else image).convert("RGB")


def difference(a: Tensor, b: Tensor) -> Image.Image:
    """Where two pictures 3×H×W in [-1, 1] differ: black for not at all, white for a quarter of the range."""
    amount = (a - b).abs().mean(0).mul(2).clamp(0, 1).numpy()  # H×W
    ramp = np.stack([amount * 2, amount * 2 - 0.6, amount * 3 - 2], axis=-1).clip(0, 1)  # black, red, yellow, white
    return Image.fromarray((ramp * 255).round().astype(np.uint8))


def clicked(known: CachedAnalysis, at: tuple[float, float]) -> tuple[float, float]:
    """A pixel of the upscaled picture for a place on the Qmap overlay, which may be smaller."""
    scale = max(known.analysis.coarse.shape[-2:]) / max(known.grey.size)
    return at[0] * scale, at[1] * scale


def touched(known: CachedAnalysis, points: list[tuple[float, float]]) -> list[int]:
    """The patches nearest to points, in shares of the picture's width and height."""
    height, width = known.analysis.coarse.shape[-2:]
    middles = torch.tensor([middle(patch) for patch in known.analysis.grid.patches])  # N×2
    return torch.cdist(torch.tensor(points) * torch.tensor([width, height]), middles).argmin(1).unique().tolist()


def middle(patch: Patch) -> tuple[float, float]:
    """The pixel in the middle of a patch: x, y."""
    return tuple(LATENT_PIXELS * (cells + patch.size / 2) for cells in (patch.left, patch.top))


def patch_views(
    known: CachedAnalysis, shown: Shown | None, index: int, plan: SamplingPlan, by_hand: ByHand
) -> tuple[str, str]:
    """A line about one patch, and the same with its pictures. Its priors come later: a network must decode them."""
    analysis = known.analysis
    patch = analysis.grid.patches[index]
    height, width = analysis.coarse.shape[-2:]
    left, top, size = (LATENT_PIXELS * cells for cells in (patch.left, patch.top, patch.size))
    box = (left, top, min(width, left + size), min(height, top + size))
    group = int(assign(analysis.patch_confidence, plan, by_hand)[index])
    pictures = [
        (label, picture)
        for label, name in (("Before: bicubic", "Bicubic input"), ("After: final", "Final"))
        if (picture := side(known, shown, name, box)) is not None
    ]
    confidence = analysis.patch_confidence[index].item()
    facts = html.patch(index, box, confidence, group, plan, index in by_hand)
    closer = html.patch_frame(box, width, height) + '<a href="#inspector">Inspect it below</a>'
    return facts + closer, facts + html.figures(pictures)
