"""Reading the samples of TIFF files: of any depth, in one plane or several, in either byte order.

Pillow's own reading takes some of these for others (WhiteIsZero of 16 bits, separate planes of 16 bits) and does not
know many more. Here Pillow and its libtiff only undo the compression, as they do for an 8-bit grey picture that is as
wide as a row has bytes; what the bytes mean is left to `numpy`. Tags and values are those of TIFF 6.0.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from patchscaler.limits import ImageError, Limits

ORDERS = {b"II": "<", b"MM": ">"}
VERSIONS = {b"*\0": False, b"\0*": False, b"+\0": True, b"\0+": True}  # BigTIFF or not; Pillow too takes either order
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, ORIENTATION, SAMPLES, ROWS, STRIP_BYTES, PLANAR, PREDICTOR = 273, 274, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES, INK_SET, EXTRA, FORMAT = 322, 323, 324, 325, 332, 338, 339
PROFILE = 34675
USED = {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 332, 338, 339, 34675}
LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, Deflate, PackBits, Deflate, LZMA, Zstandard
JPEG = (6, 7)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR = 0, 1, 2, 5, 6
MODES = {WHITE_IS_ZERO: "L", BLACK_IS_ZERO: "L", RGB: "RGB", CMYK: "CMYK"}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample formats
DEPTHS = {UNSIGNED: (*range(1, 17), 32, 64), SIGNED: (8, 16, 32, 64), FLOAT: (16, 32, 64)}
ASSOCIATED, UNASSOCIATED = (1,), (2, 999)  # kinds of alpha; 999 is written by Corel Draw
TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
SIZES = {kind: np.dtype(dtype).itemsize for kind, dtype in TYPES.items()} | {2: 1, 5: 8, 10: 8, 11: 4, 12: 8}
MAX_SAMPLES = 8  # per pixel
MAX_PARTS = 100_000  # strips or tiles
FULL = {UNSIGNED: (255, 65535), SIGNED: (255, 65535), FLOAT: (1, 255, 65535)}  # where the file does not say what is 1


@dataclass(frozen=True, eq=False)
class Samples:
    """A picture as its file has it, apart from the scale of the values.

    mode: "L", "RGB" or "CMYK". values: HxWxS float32 in [0, 1], where 0 is black, or no ink. alpha: HxW float32 in
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
    reads; UnidentifiedImageError for a broken header. On damaged pixels, Pillow and numpy raise errors of any kind.
    """
    if data[:2] not in ORDERS or data[2:4] not in VERSIONS:
        return None
    layout, notes = _Layout(data, limits), []
    if layout.left_to_pillow():
        return None
    layout.check()
    planes = layout.planes(data)  # HxWxS
    mode = MODES[layout.photometric]
    used, alpha = planes[..., : len(mode)], None
    for index, kind in enumerate(layout.extra, len(mode)):
        if kind in ASSOCIATED + UNASSOCIATED and alpha is None:
            alpha, premultiplied = index, kind in ASSOCIATED
        else:
            notes.append("A channel that is neither colour nor transparency was ignored.")
    if alpha is not None:
        used = np.concatenate([used, planes[..., alpha, None]], axis=-1)
    values = _scaled(used, layout, notes)
    if alpha is not None:
        values, alpha = values[..., :-1], values[..., -1]
    if layout.photometric == WHITE_IS_ZERO:
        values = (1 if alpha is None or not premultiplied else alpha[..., None]) - values
    if alpha is not None and premultiplied:
        values = np.divide(values, alpha[..., None], out=np.zeros_like(values), where=alpha[..., None] > 0)
        values = values.clip(0, 1)
    if layout.pages:
        notes.append("Only the first frame is used.")
    return Samples(mode, values, alpha, layout.bits, layout.orientation, layout.profile, tuple(dict.fromkeys(notes)))


class _Layout:
    """What the header of a TIFF file says of its first page."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        tags, self.pages = _directory(data)

        def numbers(tag: int, *default: int) -> tuple[int, ...]:
            return tuple(tags[tag].tolist()) if tag in tags else default

        def number(tag: int, default: int) -> int:
            return (*numbers(tag), default)[0]

        self.width, self.height = number(WIDTH, 0), number(HEIGHT, 0)
        limits.check(self.width, self.height)
        self.order = ORDERS[data[:2]]
        self.photometric, self.compression = number(PHOTOMETRIC, WHITE_IS_ZERO), number(COMPRESSION, 1)
        self.samples, self.separate = number(SAMPLES, 1), number(PLANAR, 1) == 2
        self.depths, self.formats = set(numbers(BITS, 1)), set(numbers(FORMAT, UNSIGNED))
        self.bits, self.format = max(self.depths), max(self.formats)
        self.predictor, self.fill_order = number(PREDICTOR, 1), number(FILL_ORDER, 1)
        self.cmyk = number(INK_SET, 1) == 1
        surplus = max(0, min(self.samples, MAX_SAMPLES) - len(MODES.get(self.photometric, "")))
        unsaid = UNASSOCIATED[:1] if self.photometric == RGB and self.samples == 4 else (0,) * surplus
        self.extra = (*numbers(EXTRA), *unsaid[len(numbers(EXTRA)) :])[:surplus]
        self.orientation = number(ORIENTATION, 1)
        self.profile = tags[PROFILE].tobytes() if PROFILE in tags else b""
        self.tiled = TILES in tags
        if self.tiled:
            self.part = number(TILE_WIDTH, 0), number(TILE_HEIGHT, 0)
            self.offsets, self.sizes = numbers(TILES), numbers(TILE_BYTES)
        else:
            self.part = self.width, min(number(ROWS, self.height), self.height)
            self.offsets, self.sizes = numbers(STRIPS), numbers(STRIP_BYTES)
        if min(self.part) < 1:
            raise UnidentifiedImageError("strips or tiles without pixels")
        across = -(-self.width // self.part[0])
        # Tiles are decoded whole, however small the image.
        if self.tiled and max(self.part[0] * self.part[1], across * self.part[0] * self.height // 2) > (
            limits.input_pixels
        ):
            size = f"{self.part[0]}×{self.part[1]}"
            raise ImageError(f"its tiles are {size} pixels; the limit is {limits.input_pixels:,}")
        self.across = across  # parts beside each other
        self.parts = across * -(-self.height // self.part[1])  # of a plane, or of all if they are in one

    def left_to_pillow(self) -> bool:
        """Whether Pillow is to read it. Raises ImageError for the kinds among these that Pillow misreads."""
        if self.compression in LOSSLESS and self.photometric in MODES:
            return False
        if self.depths - set(range(1, 9)):
            self.refuse(f"{self.bits} bits per sample ({self.kind})")
        if self.formats != {UNSIGNED}:
            self.refuse(f"sample format {self.format} ({self.kind})")
        if self.separate and self.samples > 1:
            self.refuse(f"separate planes ({self.kind})")
        if self.photometric == YCBCR and self.compression not in JPEG:
            self.refuse("Y'CbCr colours that are not compressed as JPEG")
        return True

    @property
    def kind(self) -> str:
        """Which of Pillow's it is."""
        if self.compression not in LOSSLESS:
            return "JPEG" if self.compression in JPEG else f"compression {self.compression}"
        return {3: "palette", YCBCR: "Y'CbCr", 8: "L*a*b*"}.get(self.photometric, f"photometric {self.photometric}")

    def refuse(self, what: str) -> None:
        raise ImageError(f"a TIFF with {what} is not read; save it as PNG, or as TIFF with 8 bits per channel")

    def check(self) -> None:
        """Raise ImageError for what `planes` does not read."""
        colors = len(MODES[self.photometric])
        if len(self.depths) > 1 or len(self.formats) > 1:
            self.refuse("channels of several kinds")
        if self.format not in DEPTHS:
            self.refuse(f"sample format {self.format}")
        if self.bits not in DEPTHS[self.format]:
            self.refuse(f"{self.bits} bits per sample")
        if not colors <= self.samples <= MAX_SAMPLES:
            self.refuse(f"{self.samples} samples per pixel where {MODES[self.photometric]} has {colors}")
        if self.photometric == CMYK and not self.cmyk:
            self.refuse("other inks than CMYK")
        predictable = {1: True, 2: self.bits in (8, 16, 32, 64), 3: self.format == FLOAT}
        if not predictable.get(self.predictor):
            self.refuse(f"predictor {self.predictor} for {self.bits} bits per sample of format {self.format}")
        parts = self.parts * (self.samples if self.separate else 1)
        if len(self.offsets) < parts:
            raise ImageError(f"the image is damaged: it has {len(self.offsets)} of {parts} strips or tiles")
        if parts > MAX_PARTS:
            raise ImageError(f"it has {parts:,} strips or tiles; the limit is {MAX_PARTS:,}")

    def planes(self, data: bytes) -> np.ndarray:
        """All samples HxWxS."""
        if not self.separate:
            return self._plane(data, 0, self.samples)
        return np.concatenate([self._plane(data, index * self.parts, 1) for index in range(self.samples)], axis=-1)

    def _plane(self, data: bytes, first: int, samples: int) -> np.ndarray:
        """The strips or tiles from one on, as samples HxWxS."""
        bits = self.part[0] * samples * self.bits  # of a row of one of them
        if self.tiled and bits % 8:
            self.refuse(f"tiles of {bits} bits a row")
        row = -(-bits // 8)
        last = first + self.parts
        pixels = _uncompressed(data, self, row, self.offsets[first:last], self.sizes[first:last])
        pixels = pixels.reshape(self.height, self.across, row)
        if self.bits in (8, 16, 32, 64):
            values = self._words(pixels, samples)
        else:
            values = _unpacked(pixels, self.part[0] * samples, self.bits)
        return values.reshape(self.height, -1, samples)[:, : self.width]

    def _words(self, pixels: np.ndarray, samples: int) -> np.ndarray:
        """Bytes HxPxB, of rows of P tiles, as samples in whole bytes."""
        size = self.bits // 8
        dtype = np.dtype(f"{'?uif'[self.format]}{size}")
        shape = (self.height, self.across, self.part[0], samples)
        if self.predictor == 3:  # differences of bytes, of which all the highest come first
            pixels = pixels.reshape(*shape[:2], -1, samples).cumsum(2, dtype=np.uint8)
            pixels = pixels.reshape(*shape[:2], size, -1).swapaxes(2, 3)
            return np.ascontiguousarray(pixels).view(dtype.newbyteorder(">")).astype(dtype)
        words = pixels.view(f"{self.order}u{size}").astype(f"u{size}").reshape(shape)
        if self.predictor == 2:  # differences of samples
            words = words.cumsum(2, dtype=words.dtype)
        return words.view(dtype)


def _directory(data: bytes) -> tuple[dict[int, np.ndarray], bool]:
    """The numbers in those tags of the first page that are `USED`, and whether there are more pages.

    Raises ImageError for tags that hold more than the file does: they overlap, and Pillow would copy them all.
    """
    order, big = ORDERS[data[:2]], VERSIONS[data[2:4]]
    count, entry, offset = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    tags, claimed = {}, 0
    try:
        (place,) = struct.unpack_from(order + offset, data, 8 if big else 4)
        (entries,) = struct.unpack_from(order + count, data, place)
        place += struct.calcsize(order + count)
        if place < 8 or entries > len(data) // 12:
            raise UnidentifiedImageError("no directory")
        for _ in range(entries):
            tag, kind, length, value = struct.unpack_from(order + entry, data, place)
            place += struct.calcsize(order + entry)
            size = length * SIZES.get(kind, 0)
            claimed += size
            if size > len(value):
                (begin,) = struct.unpack(order + offset, value)
                value = data[begin : begin + size] if tag in USED and claimed <= len(data) else b""
            if tag in USED and kind in TYPES and tag not in tags and size <= len(value):
                tags[tag] = np.frombuffer(value, order + TYPES[kind], length)
        (following,) = struct.unpack_from(order + offset, data, place)
    except (struct.error, OverflowError) as error:
        raise UnidentifiedImageError("cut off") from error
    if claimed > len(data):
        raise ImageError(f"the image is damaged: its tags have {claimed:,} bytes, the file {len(data):,}")
    return tags, following > 0


def _uncompressed(
    data: bytes, layout: _Layout, row: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """The bytes HxB of strips or tiles of `row` bytes a row: Pillow reads them as an 8-bit grey BigTIFF."""
    tags = {
        WIDTH: (layout.across * row,),
        HEIGHT: (layout.height,),
        BITS: (8,),
        COMPRESSION: (layout.compression,),
        PHOTOMETRIC: (BLACK_IS_ZERO,),
        FILL_ORDER: (layout.fill_order,),
        SAMPLES: (1,),
    }
    start = 16 + 8 + 20 * (len(tags) + (4 if layout.tiled else 3)) + 8 + 16 * len(offsets)
    offsets = tuple(start + offset for offset in offsets)
    if layout.tiled:
        tags |= {TILE_WIDTH: (row,), TILE_HEIGHT: (layout.part[1],), TILES: offsets, TILE_BYTES: sizes}
    else:
        tags |= {STRIPS: offsets, ROWS: (layout.part[1],), STRIP_BYTES: sizes}
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}Q", *numbers)
        if len(numbers) != 1:
            packed, values = struct.pack("<Q", 16 + 8 + 20 * len(tags) + 8 + len(values)), values + packed
        entries += struct.pack("<HHQ", tag, 16, len(numbers)) + packed
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)) + entries + bytes(8) + values
    with TiffImageFile(io.BytesIO(head.ljust(start, b"\0") + data)) as image:  # the data as they lay, so much later
        return np.asarray(image)


def _unpacked(pixels: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Bytes HxPxB as samples HxPxN of less than 16 bits, the highest bit first; rows begin at whole bytes."""
    values = np.empty((*pixels.shape[:2], count), np.uint16)
    weights = (1 << np.arange(bits)[::-1]).astype(np.uint16)
    for row, of_row in zip(values, pixels):  # one by one, as every bit takes a byte
        row[:] = np.unpackbits(of_row, axis=-1, count=count * bits).reshape(-1, count, bits) @ weights
    return values


def _scaled(samples: np.ndarray, layout: _Layout, notes: list[str]) -> np.ndarray:
    """Samples as float32 in [0, 1]."""
    if layout.format == UNSIGNED and layout.bits < 16:
        return samples.astype(np.float32) / (2**layout.bits - 1)
    if not np.isfinite(samples).all():
        raise ImageError("the image has values that are not finite (NaN or infinity)")
    low, high = float(samples.min()), float(samples.max())
    name = "grey" if layout.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) else "colour"
    if low < 0 or high > 65535:
        raise ImageError(f"{name} values reach from {low:g} to {high:g}; the limits are 0 and 65535")
    # Cameras and microscopes of 12 bits fill 16 bits up with zeros at the top.
    most = (4095, 65535) if layout.format == UNSIGNED and layout.bits == 16 else FULL[layout.format]
    full = next(limit for limit in most if high <= limit)
    if (layout.format, layout.bits, full) != (UNSIGNED, 16, 65535):
        notes.append(f"{name.capitalize()} values were taken as 0 to {full}.")
    return samples.astype(np.float32) / full
