"""Make the low-resolution examples beside this file, from free photographs and two drawings of our own.

    python examples/make_examples.py

Needs the `dev` and `eval` extras (scikit-image for the photographs, matplotlib for its DejaVu fonts).
Seeds are fixed: the same versions of the libraries write the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data

from patchscaler.training.degradation import degrade

HERE = Path(__file__).parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
INK = (32, 36, 48)


@dataclass(frozen=True)
class Example:
    """A picture (uint8 H×W or H×W×3), how far it is shrunk, and the seed of its degradation."""

    name: str
    picture: Callable[[], np.ndarray]
    seed: int
    scale: int = 4


def text() -> np.ndarray:
    """A page 400×640 of serif and sans-serif lines from large to small."""
    page = Image.new("RGB", (640, 400), (250, 247, 240))
    draw = ImageDraw.Draw(page)
    lines = (
        ("DejaVuSerif-Bold.ttf", 76, 24, "PatchScaler"),
        ("DejaVuSans.ttf", 46, 128, "four times as large,"),
        ("DejaVuSerif-Italic.ttf", 46, 190, "patch by patch."),
        ("DejaVuSans-Bold.ttf", 38, 268, "0123456789  R&D  50 %"),
        ("DejaVuSans.ttf", 30, 332, "Small print is the hardest part."),
    )
    for font, size, top, line in lines:
        draw.text((28, top), line, font=ImageFont.truetype(FONTS / font, size), fill=INK)
    return np.array(page)


def bicycle() -> np.ndarray:
    """An ink drawing 416×640 of a bicycle, drawn four times as large for smooth edges."""
    unit = 4
    sheet = Image.new("RGB", (640 * unit, 416 * unit), (252, 252, 250))
    draw = ImageDraw.Draw(sheet)

    def line(*points: tuple[float, float], width: float = 7) -> None:
        draw.line([(x * unit, y * unit) for x, y in points], INK, round(width * unit), joint="curve")

    def circle(centre: tuple[float, float], radius: float, width: float, fill: object = None) -> None:
        box = [(c + sign * radius) * unit for sign in (-1, 1) for c in centre]
        draw.ellipse(box, outline=INK, width=round(width * unit), fill=fill)

    rear, front, crank = (160, 262), (480, 262), (292, 268)
    seat, head, stem = (246, 124), (430, 118), (420, 86)
    line((20, 379), (620, 379), width=3)
    for hub in (rear, front):
        circle(hub, 116, 7)
        circle(hub, 106, 2)
        for spoke in range(20):
            angle = math.tau * spoke / 20
            line(hub, (hub[0] + 106 * math.cos(angle), hub[1] + 106 * math.sin(angle)), width=1.6)
        circle(hub, 9, 4, fill=(252, 252, 250))
    line(rear, crank, seat, rear, width=8)
    line(crank, head, width=8)
    line((252, 142), (434, 134), width=8)
    line(stem, (440, 150), (452, 196), front, width=8)
    line(seat, (240, 98), width=7)
    line((206, 94), (240, 97), (282, 92), width=13)
    line(stem, (450, 72), (478, 78), (486, 98), (470, 112), width=8)
    circle(crank, 27, 5, fill=(252, 252, 250))
    circle(crank, 7, 7)
    line((rear[0], rear[1] - 9), (crank[0], crank[1] - 27), width=2.5)
    line((rear[0], rear[1] + 9), (crank[0], crank[1] + 27), width=2.5)
    line((268, 224), (316, 312), width=6)
    line((254, 224), (282, 224), width=7)
    line((302, 312), (330, 312), width=7)
    return np.array(sheet.resize((640, 416), Image.Resampling.LANCZOS))


# Seeds chosen by eye: 1 blurs a little, 4 and 9 leave hard edges, 10 leaves most of the detail. The first, the cat, the
# photographer and the drawings have patches of all three groups.
EXAMPLES = (
    Example("1-astronaut", data.astronaut, seed=4, scale=3),
    Example("2-cat", data.chelsea, seed=4, scale=3),
    Example("3-coffee", data.coffee, seed=10),
    Example("4-rocket", data.rocket, seed=1),
    Example("5-photographer", data.camera, seed=9, scale=3),
    Example("6-gravel", data.gravel, seed=10, scale=3),
    Example("7-text", text, seed=10),
    Example("8-bicycle", bicycle, seed=1),
)


def low_resolution(example: Example) -> Image.Image:
    """The example's picture, cut to a multiple of its scale and degraded as ResShift's test pairs are."""
    pixels = np.array(Image.fromarray(example.picture()).convert("RGB"))
    height, width = (side // example.scale * example.scale for side in pixels.shape[:2])
    image = torch.from_numpy(pixels[:height, :width]).permute(2, 0, 1)[None] / 127.5 - 1  # [1, 3, H, W]
    generator = torch.Generator().manual_seed(example.seed)
    low = degrade(image, generator, kind="resshift", scale=example.scale)[0]
    return Image.fromarray(((low + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    for example in EXAMPLES:
        picture = low_resolution(example)
        picture.save(HERE / f"{example.name}.png", optimize=True)
        print(f"{example.name}.png {picture.width}×{picture.height}")
