"""Contact sheets: what became of an image, side by side."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchscaler.figures import qmap_overlay
from patchscaler.images import Picture, to_pil
from patchscaler.results import Analysis, Result

_LEAST, _LABEL, _GAP = 64, 24, 8  # room for a panel, and for its label above


def contact_sheet(analysis: Analysis, final: Result, truth: Tensor | None) -> Image.Image:
    """Input (its pixels as squares), bicubic, coarse, Qmap, final and truth, shrunk if they are large."""
    qmap = qmap_overlay(analysis.coarse, analysis.grid, final.assignment)
    panels = {
        "input": to_pil(Picture(analysis.picture.rgb)).resize(qmap.size, Image.Resampling.NEAREST),
        "bicubic": to_pil(Picture(analysis.bicubic)),
        "coarse": to_pil(Picture(analysis.coarse)),
        "Qmap": qmap,
        "final": to_pil(Picture(final.picture.rgb)),
    }
    if truth is not None:
        panels["truth"] = to_pil(Picture(truth))
    step = max(qmap.width, _LEAST) + _GAP
    sheet = Image.new("RGB", (len(panels) * step, qmap.height + _LABEL), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (name, panel) in enumerate(panels.items()):
        sheet.paste(panel.resize(qmap.size, Image.Resampling.LANCZOS), (place * step, _LABEL))
        draw.text((place * step, 3), name, "black", font)
    return sheet
