"""Looking closely: two versions of the picture side by side, a magnified crop of both, and single patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchscaler.grouping import SamplingPlan, assign
from patchscaler.images import Picture, to_pil
from patchscaler.patches import LATENT_PIXELS, Patch
from patchscaler.ui import html
from patchscaler.ui.export import save_preview
from patchscaler.ui.state import ByHand, Shown, Study

SIDES = ("Bicubic input", "Coarse", "Final", "Uniform")
ZOOMS = ("100 %", "200 %", "400 %")
WINDOW = 480  # side of the zoomed crop on the page, in pixels
OVERLAY_SIDE = 1024  # the Qmap overlay is drawn no larger
PATCH_ZOOM = 4

Box = tuple[int, int, int, int]  # left, top, right, bottom


def pair(study: Study, shown: Shown | None, sides: tuple[str, str]) -> tuple[Path, Path] | None:
    """Previews of two sides for the slider, or None while one of them does not exist yet."""
    pictures = [side(study, shown, name) for name in sides]
    return None if None in pictures else tuple(save_preview(picture, "side") for picture in pictures)


def zoomed(
    study: Study, shown: Shown | None, sides: tuple[str, str], zoom: str, center: tuple[float, float] | None
) -> tuple[Path, Path] | None:
    """The same crop of two sides around a pixel, the middle unless given, magnified without smoothing."""
    height, width = study.analysis.coarse.shape[-2:]
    factor = int(zoom.split()[0]) // 100
    x, y = center or (width / 2, height / 2)
    box = window(x, width, WINDOW // factor) + window(y, height, WINDOW // factor)
    crops = [side(study, shown, name, (box[0], box[2], box[1], box[3])) for name in sides]
    if None in crops:
        return None
    return tuple(save_preview(magnified(crop, factor), "zoom") for crop in crops)


def window(center: float, length: int, side: int) -> tuple[int, int]:
    """First and last of `side` pixels around `center`, moved inside 0..length where they would reach out."""
    side = min(side, length)
    first = min(max(0, round(center - side / 2)), length - side)
    return first, first + side


def side(study: Study, shown: Shown | None, name: str, box: Box | None = None) -> Image.Image | None:
    """One of SIDES, or a part of it; None if there is no such picture of this image yet."""
    if name in ("Bicubic input", "Coarse"):
        image = study.analysis.bicubic if name == "Bicubic input" else study.analysis.coarse
        if box:
            image = image[:, box[1] : box[3], box[0] : box[2]]
        return to_pil(Picture(image))
    path = shown and (shown.final if name == "Final" else shown.uniform)
    if not path or not path.is_file():  # Gradio empties its folder after an hour
        return None
    with Image.open(path) as image:
        return (image.crop(box) if box else image).convert("RGB")


def magnified(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def difference(a: Tensor, b: Tensor) -> Image.Image:
    """Where two pictures 3xHxW in [-1, 1] differ: black for not at all, white for a quarter of the range."""
    amount = (a - b).abs().mean(0).mul(2).clamp(0, 1).numpy()  # HxW
    ramp = np.stack([amount * 2, amount * 2 - 0.6, amount * 3 - 2], axis=-1).clip(0, 1)  # black, red, yellow, white
    return Image.fromarray((ramp * 255).round().astype(np.uint8))


def clicked(study: Study, at: tuple[float, float]) -> tuple[float, float]:
    """A pixel of the upscaled picture for a place on the Qmap overlay, which may be smaller."""
    scale = max(1.0, max(study.analysis.coarse.shape[-2:]) / OVERLAY_SIDE)
    return at[0] * scale, at[1] * scale


def touched(study: Study, points: list[tuple[float, float]]) -> list[int]:
    """The patches nearest to points, in shares of the picture's width and height."""
    height, width = study.analysis.coarse.shape[-2:]
    middles = torch.tensor([middle(patch) for patch in study.analysis.grid.patches])  # Nx2
    return torch.cdist(torch.tensor(points) * torch.tensor([width, height]), middles).argmin(1).unique().tolist()


def middle(patch: Patch) -> tuple[float, float]:
    """The pixel in the middle of a patch: x, y."""
    return tuple(LATENT_PIXELS * (cells + patch.size / 2) for cells in (patch.left, patch.top))


def patch_views(
    study: Study, shown: Shown | None, index: int, plan: SamplingPlan, by_hand: ByHand
) -> tuple[str, str]:
    """A line about one patch, and the same with its pictures. Its priors come later: a network must decode them."""
    analysis = study.analysis
    patch = analysis.grid.patches[index]
    height, width = analysis.coarse.shape[-2:]
    left, top, size = (LATENT_PIXELS * cells for cells in (patch.left, patch.top, patch.size))
    box = (left, top, min(width, left + size), min(height, top + size))
    group = int(assign(analysis.patch_confidence, plan, by_hand)[index])
    pictures = [
        (label, magnified(picture, PATCH_ZOOM))
        for label, name in (("Before: bicubic", "Bicubic input"), ("After: final", "Final"))
        if (picture := side(study, shown, name, box)) is not None
    ]
    confidence = analysis.patch_confidence[index].item()
    facts = html.patch(index, box, confidence, group, plan, index in by_hand)
    closer = html.picked(box, width, height) + '<a href="#inspector">Inspect it below</a>'
    return facts + closer, facts + html.pictures(pictures)


def patch_coarse(study: Study, index: int) -> Image.Image:
    """The patch's y0, decoded."""
    return to_pil(Picture(study.analysis.grid.patches[index].pixels(study.analysis.coarse)))
