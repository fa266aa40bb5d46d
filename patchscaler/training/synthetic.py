"""Text and line art, drawn on the fly: print and drawings melt first, and photographs hold little of them."""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_letters + string.digits + string.punctuation
OVERSAMPLING = 2  # drawn larger and reduced, for smooth edges of lines


def draw_page(size: int, seed: int) -> np.ndarray:
    """A square of text lines or of lines, ellipses and polygons on a plain or shaded ground: size×size×3 uint8."""
    rng = np.random.default_rng(seed)
    side = size * OVERSAMPLING
    image = _ground(side, rng)
    (_write if rng.random() < 0.6 else _sketch)(image, rng)
    return np.asarray(image.reduce(OVERSAMPLING))


def _ground(side: int, rng: np.random.Generator) -> Image.Image:
    """One colour, or a gradient between two."""
    ends = rng.integers(0, 256, (2, 3)) if rng.random() < 0.6 else np.full((2, 3), 255 * rng.integers(0, 2))
    share = np.linspace(0, float(rng.random() < 0.3), 256)[:, None, None]
    ramp = Image.fromarray((ends[0] * (1 - share) + ends[1] * share).astype(np.uint8))
    return ramp.resize((side, side)).rotate(90 * int(rng.integers(4)))


def _ink(image: Image.Image, rng: np.random.Generator) -> tuple[int, ...]:
    """A colour that stands out from the ground; black or white half of the time, as in print."""
    dark = np.mean(image.getpixel((image.width // 2, image.height // 2))) > 127
    if rng.random() < 0.5:
        return (0 if dark else 255,) * 3
    return tuple((rng.integers(0, 110, 3) + (0 if dark else 145)).tolist())


def _write(image: Image.Image, rng: np.random.Generator) -> None:
    pen, side = ImageDraw.Draw(image), image.width
    height = int(side * rng.uniform(0.04, 0.3))
    font = _font(int(rng.integers(len(_font_files()))), height)
    ink, top = _ink(image, rng), -int(rng.integers(height))
    while top < side:
        words = ("".join(rng.choice(list(LETTERS), rng.integers(1, 10))) for _ in range(5))
        pen.text((-int(rng.integers(4 * height)), top), " ".join(words), fill=ink, font=font)
        top += int(height * rng.uniform(1.0, 1.6))


def _sketch(image: Image.Image, rng: np.random.Generator) -> None:
    pen, side = ImageDraw.Draw(image), image.width
    for _ in range(int(rng.integers(4, 20))):
        points = [tuple(point) for point in rng.uniform(-0.2, 1.2, (int(rng.integers(2, 6)), 2)) * side]
        width, ink, fill = int(rng.integers(1, 12)), _ink(image, rng), _ink(image, rng)
        kind = rng.random()
        if kind < 0.5:
            pen.line(points, fill=ink, width=width, joint="curve")
        elif kind < 0.75:
            (left, top), (right, bottom) = np.sort(np.array(points[:2]), axis=0).tolist()
            pen.ellipse((left, top, right, bottom), outline=ink, width=width, fill=fill if kind < 0.6 else None)
        else:
            pen.polygon(points if len(points) > 2 else [*points, (0, side)], outline=ink, width=width, fill=fill)


@lru_cache
def _font_files() -> list[Path]:
    """The DejaVu and STIX faces that matplotlib ships: sans, serif and mono, upright, bold and slanted."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted([*folder.glob("DejaVuS*.ttf"), *folder.glob("STIXGeneral*.ttf")])


@lru_cache(maxsize=256)
def _font(index: int, height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_files()[index], height)
