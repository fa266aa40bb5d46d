"""Reading the samples of TIFF files with tifffile: of any depth, in one plane or several, in either byte order.

Pillow's own reading takes some of these for others (WhiteIsZero of 16 bits, separate planes of 16 bits) and does not
know many more. Before tifffile decodes anything, what a file asks for is held to limits here. Tags and values are those
of TIFF 6.0.
"""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from PIL import UnidentifiedImageError
from tifffile import TiffFile, TiffPage

from patchscaler.limits import ImageError, Limits

BEGINNINGS = tuple(order + version for order in (b"II", b"MM") for version in (b"*\0", b"\0*", b"+\0", b"\0+"))
LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, Deflate, PackBits, Deflate, LZMA, Zstandard
JPEG = (6, 7)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR = 0, 1, 2, 5, 6
MODES = {WHITE_IS_ZERO: "L", BLACK_IS_ZERO: "L", RGB: "RGB", CMYK: "CMYK"}
KINDS = {3: "palette", YCBCR: "Y'CbCr", 8: "L*a*b*"}  # that are not read here
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample formats
DEPTHS = {UNSIGNED: (*range(1, 17), 32, 64), SIGNED: (8, 16, 32, 64), FLOAT: (16, 32, 64)}
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of alpha
ALPHA = (ASSOCIATED, UNASSOCIATED, 999)  # the last is unassociated, as Corel Draw writes it
ORIENTATION, INK_SET, PROFILE = 274, 332, 34675
MAX_SAMPLES = 8  # per pixel
MAX_PARTS = 100_000  # strips or tiles
MAX_TAGS = 2 * 2**20  # bytes of those tags that tifffile reads at once, the places of all parts among them
FULL = {UNSIGNED: (255, 65535), SIGNED: (255, 65535), FLOAT: (1, 255, 65535)}  # where the file does not say what is 1

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # an ImageError says what matters of a broken file


@dataclass(frozen=True, eq=False)
class Samples:
    """A picture as its file has it, apart from the scale of the values.

    mode: "L", "RGB" or "CMYK". values: H×W×S float32 in [0, 1], where 0 is black, or no ink. alpha: H×W float32 in
    [0, 1] or None. bits: of a sample. orientation: as in EXIF. profile: an ICC profile or b"".
    """

    mode: str
    values: np.ndarray
    alpha: np.ndarray | None
    bits: int
    orientation: int
    profile: bytes
    notes: tuple[str, ...]


def read_samples(data: bytes, limits: Limits) -> Samples | None:
    """The first page of a TIFF file, or None for another file and for the kinds that Pillow reads correctly.

    Left to it are palettes, JPEG, the fax compressions and L*a*b*. Raises ImageError for too many pixels, before
    anything is decoded, for values beyond 65535, negative ones and those that are not finite, and for what neither
    reads; UnidentifiedImageError for a file without a page. On damaged files, tifffile raises errors of any kind.
    """
    if not data.startswith(BEGINNINGS):
        return None
    file = _Bounded(data)
    pages = TiffFile(file, is_lsm=False, is_ndpi=False, is_scanimage=False).pages
    try:
        page = pages.first
    except IndexError as error:
        raise UnidentifiedImageError("no page") from error
    claimed = sum(tag.valuebytecount for tag in page.tags.values())
    if claimed > len(data):  # they overlap, and Pillow would copy them all
        raise ImageError(f"the image is damaged: its tags have {claimed:,} bytes, the file {len(data):,}")
    limits.check(int(page.imagewidth), int(page.imagelength))
    if _left_to_pillow(page):
        return None
    _check(page, limits)
    file.left, notes = 2 * len(data), []
    planes = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # S×H×W×1 if separate, else 1×H×W×S
    planes = planes.transpose(1, 2, 0, 3).reshape(*planes.shape[1:3], -1)  # H×W×S
    mode = MODES[page.photometric]
    extra = page.extrasamples or (UNASSOCIATED,) * (mode == "RGB" and page.samplesperpixel == 4)
    channels = [index for index, kind in enumerate(extra, len(mode)) if kind in ALPHA and index < page.samplesperpixel]
    if page.samplesperpixel > len(mode) + bool(channels[:1]):
        notes.append("A channel that is neither colour nor transparency was ignored.")
    values = _scaled(planes[..., [*range(len(mode)), *channels[:1]]], page, notes)
    values, alpha = values[..., : len(mode)], values[..., len(mode)] if channels else None
    premultiplied = alpha is not None and extra[channels[0] - len(mode)] == ASSOCIATED
    if page.photometric == WHITE_IS_ZERO:
        values = (alpha[..., None] if premultiplied else 1) - values
    if premultiplied:
        values = np.divide(values, alpha[..., None], out=np.zeros_like(values), where=alpha[..., None] > 0).clip(0, 1)
    if pages.is_multipage:
        notes.append("Only the first frame is used.")
    orientation, profile = page.tags.valueof(ORIENTATION, default=1), page.tags.valueof(PROFILE, default=b"")
    return Samples(mode, values, alpha, page.bitspersample, orientation, profile, tuple(notes))


class _Bounded(io.BytesIO):
    """A file of which only so many bytes are read: its tags and its strips may all lie over the same ones."""

    left = MAX_TAGS

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._count(len(data))
        return data

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        self._count(count)
        return count

    def _count(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ImageError("the image is damaged: its tags, strips or tiles overlap or are too large")


def _refuse(what: str) -> NoReturn:
    raise ImageError(f"a TIFF with {what} is not read; save it as PNG, or as TIFF with 8 bits per channel")


def _left_to_pillow(page: TiffPage) -> bool:
    """Whether Pillow is to read it. Raises ImageError for the kinds among these that Pillow misreads."""
    if page.compression in LOSSLESS and page.photometric in MODES:
        return False
    if page.compression in LOSSLESS:
        kind = KINDS.get(page.photometric, f"photometric {page.photometric:d}")
    else:
        kind = "JPEG" if page.compression in JPEG else f"compression {page.compression:d}"
    if page.bitspersample not in range(1, 9):
        _refuse(f"{page.bitspersample} bits per sample ({kind})")
    if page.sampleformat != UNSIGNED:
        _refuse(f"sample format {page.sampleformat:d} ({kind})")
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        _refuse(f"separate planes ({kind})")
    if page.photometric == YCBCR and page.compression not in JPEG:
        _refuse("Y'CbCr colours that are not compressed as JPEG")
    return True


def _check(page: TiffPage, limits: Limits) -> None:
    """Raise ImageError for what is not read here, and for what would take more time or memory than a picture may."""
    mode, bits, samples = MODES[page.photometric], page.bitspersample, page.samplesperpixel
    if page.sampleformat not in DEPTHS:
        _refuse(f"sample format {page.sampleformat:d}")
    if bits not in DEPTHS[page.sampleformat]:
        _refuse(f"{bits} bits per sample")
    if not len(mode) <= samples <= MAX_SAMPLES:
        _refuse(f"{samples} samples per pixel where {mode} has {len(mode)}")
    if page.imagedepth != 1 or page.is_tiled and page.tiledepth != 1:
        _refuse("a volume")
    if page.photometric == CMYK and page.tags.valueof(INK_SET, default=1) != 1:
        _refuse("other inks than CMYK")
    predictable = {1: True, 2: bits in (8, 16, 32, 64), 3: page.sampleformat == FLOAT}
    if not predictable.get(page.predictor):
        _refuse(f"predictor {page.predictor:d} for {bits} bits per sample of format {page.sampleformat:d}")
    parts = math.prod(page.chunked)
    if parts > MAX_PARTS:
        raise ImageError(f"it has {parts:,} strips or tiles; the limit is {MAX_PARTS:,}")
    tile = page.tilewidth * page.tilelength  # 0 for strips
    if max(tile, tile * parts // page.shaped[0] // 2) > limits.input_pixels:  # they are decoded whole
        raise ImageError(
            f"its tiles are {page.tilewidth}×{page.tilelength} pixels; the limit is {limits.input_pixels:,}"
        )
    found = sum(1 for place in zip(page.dataoffsets, page.databytecounts) if all(place))
    if found < parts:
        raise ImageError(f"the image is damaged: it has {found} of {parts} strips or tiles")


def _scaled(samples: np.ndarray, page: TiffPage, notes: list[str]) -> np.ndarray:
    """Samples as float32 in [0, 1]."""
    kind, bits = page.sampleformat, page.bitspersample
    if kind == UNSIGNED and bits < 16:
        return samples.astype(np.float32) / (2**bits - 1)
    if not np.isfinite(samples).all():
        raise ImageError("the image has values that are not finite (NaN or infinity)")
    low, high = float(samples.min()), float(samples.max())
    name = "grey" if page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) else "colour"
    if low < 0 or high > 65535:
        raise ImageError(f"{name} values reach from {low:g} to {high:g}; the limits are 0 and 65535")
    # Cameras and microscopes of 12 bits fill 16 bits up with zeros at the top.
    full = next(most for most in ((4095, 65535) if (kind, bits) == (UNSIGNED, 16) else FULL[kind]) if high <= most)
    if (kind, bits, full) != (UNSIGNED, 16, 65535):
        notes.append(f"{name.capitalize()} values were taken as 0 to {full}.")
    return samples.astype(np.float32) / full
