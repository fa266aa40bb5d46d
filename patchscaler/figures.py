"""Pictures of what the pipeline decided: the groups over the coarse image, and the retrieved texture priors.

Shared by the page, the command line and the evaluation; drawn with Pillow and numpy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from patchscaler.images import Picture, to_pil
from patchscaler.patches import LATENT_PIXELS, PatchGrid

# Simple, medium, hard. Teal, amber and crimson differ in lightness and stay apart for the
# colour-blind, which green, amber and red do not.
GROUP_COLORS = ("#0a9396", "#e9a800", "#c2185b")

PREVIEW_SIDE = 1024  # pixels, of what is only looked at

_TINT = 0.5  # share of the group's colour in a cell
# Of a contact sheet, in pixels: room for a label's width, its height, and the space between pictures.
_LEAST, _LABEL, _GAP = 64, 20, 8


def qmap_overlay(
    coarse: Tensor,
    grid: PatchGrid,
    assignment: Tensor,
    by_hand: Collection[int] = (),
    grey: Image.Image | None = None,
) -> Image.Image:
    """Qmap (Eq. 2) drawn over the coarse image in grey, at most PREVIEW_SIDE pixels wide and high.

    Patches overlap, so each one colours the cell that lies nearer to its centre than to any other
    patch's; the cells tile the image.

    Args:
        coarse: 3×H×W in [-1, 1], its top left corner at the grid's; H and W may be less than the grid's.
        assignment: N group numbers 0, 1, 2 in the grid's order.
        grey: what `grey_preview(coarse)` gives, where it is kept for many drawings.
        by_hand: indices of patches whose group a person chose; their cells get a border.

    Raises:
        ValueError: the assignment's length is not the grid's.
    """
    if len(assignment) != len(grid):
        raise ValueError(f"{len(assignment)} assigned groups for {len(grid)} patches")
    grey = grey or grey_preview(coarse)
    size, scale = grey.size, min(1.0, PREVIEW_SIDE / max(coarse.shape[-2:]))
    rows = _cell_edges([patch.top for patch in grid.patches], grid.size, size[1], scale)
    columns = _cell_edges([patch.left for patch in grid.patches], grid.size, size[0], scale)
    groups = assignment.cpu().numpy().reshape(len(rows) - 1, len(columns) - 1)
    colors = np.array([ImageColor.getrgb(color) for color in GROUP_COLORS], dtype=np.uint8)[groups]
    tint = colors.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1)  # H×W×3
    pixels = np.array(Image.blend(grey, Image.fromarray(tint), _TINT))
    borders = [edge for edge in rows[1:-1] if edge < size[1]]
    pixels[borders] = tint[borders]  # thin, in the cell's own colour
    borders = [edge for edge in columns[1:-1] if edge < size[0]]
    pixels[:, borders] = tint[:, borders]
    overlay = Image.fromarray(pixels)
    draw = ImageDraw.Draw(overlay)
    for index in by_hand:
        row, column = divmod(index, len(columns) - 1)
        left, top, right, bottom = columns[column], rows[row], columns[column + 1] - 1, rows[row + 1] - 1
        for inset, color in ((1, "black"), (2, "white"), (3, "white")):  # seen on every colour
            if min(right - left, bottom - top) > 2 * inset:
                draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), outline=color)
    return overlay


def grey_preview(coarse: Tensor) -> Image.Image:
    """The coarse image 3×H×W in grey, so that every colour drawn on it is a group's, of `preview_size`."""
    image = to_pil(Picture(coarse.float().cpu()))
    return image.convert("L").resize(preview_size(*image.size), Image.Resampling.LANCZOS).convert("RGB")


def preview_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture scaled down to at most PREVIEW_SIDE on its longer side."""
    scale = min(1.0, PREVIEW_SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def priors_sheet(priors: Sequence[Tensor], similarities: Tensor, queries: Sequence[Tensor]) -> Image.Image:
    """A contact sheet of retrieved priors (Algorithm 1): a row per patch, the similarity under each prior.

    Args:
        priors: N tensors of K×3×h×w in [-1, 1].
        similarities: N×K.
        queries: N pictures 3×h×w of the patches themselves, drawn at the start of their rows.
    """
    rows = []
    for query, images, values in zip(queries, priors, similarities.tolist()):
        labels = ["patch", *(f"{value:.3f}" for value in values)]
        rows.append([(to_pil(Picture(image)), label) for image, label in zip((query, *images), labels)])
    return contact_sheet(rows)


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Rows of pictures, each resized to `size`, with its label under it."""
    width, height = size
    step_x, step_y = max(width, _LEAST) + _GAP, height + _LABEL + _GAP
    sheet = Image.new("RGB", (step_x * max(map(len, rows)) + _GAP, step_y * len(rows) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for y, row in enumerate(rows):
        for x, (picture, label) in enumerate(row):
            corner = (_GAP + x * step_x, _GAP + y * step_y)
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
            draw.text((corner[0] + width // 2, corner[1] + height + 3), label, "black", font, anchor="ma")
    return sheet


def _cell_edges(starts: Sequence[int], patch_size: int, length: int, scale: float) -> list[int]:
    """Pixel edges of the cells along one axis: halfway between the centres of neighbouring patches."""
    unique = sorted(set(starts))
    middles = [(a + b + patch_size) / 2 for a, b in zip(unique, unique[1:])]
    return [0, *(min(length, round(edge * LATENT_PIXELS * scale)) for edge in middles), length]
