"""Tiled TIFF files that are written while a picture is made, so that it need not be held in memory."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tifffile

TILE = 256  # pixels


def write_tiff(
    bands: Iterable[np.ndarray], path: str | Path, shape: tuple[int, int, int], description: str = ""
) -> Path:
    """Write bands of rows RxWxS of 8 bits, from top to bottom, as one TIFF of HxWxS, and return its path.

    S is 3 for RGB or 4 for RGBA. Tiles are compressed without loss; above 2 GB the file is a BigTIFF. It appears whole
    or not at all: it is written beside its place and then renamed. Whatever ``bands`` raise ends the writing.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with tifffile.TiffWriter(temporary, bigtiff=np.prod(shape, dtype=np.int64) > 2**31) as file:
            file.write(
                _tiles(bands, shape[1]),
                shape=shape,
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                extrasamples=["unassalpha"] if shape[2] == 4 else None,
                compression="zlib",
                predictor=True,
                description=description,
                metadata=None,
                software="PatchScaler",
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _tiles(bands: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Tiles from left to right and from top to bottom. Those at the right and the bottom are filled up with zeros."""
    waiting: list[np.ndarray] = []

    def cut(rows: np.ndarray) -> Iterator[np.ndarray]:
        for left in range(0, width, TILE):
            tile = rows[:, left : left + TILE]
            yield np.pad(tile, [(0, TILE - tile.shape[0]), (0, TILE - tile.shape[1]), (0, 0)])

    for band in bands:
        waiting.append(band)
        while sum(map(len, waiting)) >= TILE:
            rows = np.concatenate(waiting)
            waiting = [rows[TILE:].copy()]
            yield from cut(rows[:TILE])
    rows = np.concatenate(waiting)
    if len(rows):
        yield from cut(rows)
