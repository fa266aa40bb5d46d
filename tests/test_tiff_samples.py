"""TIFF of every kind: read as it was written, or refused by what is not read."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import tifffile
from corpus import swapped_profile, tiff
from PIL import Image

from patchscaler.images import ImageError, Picture, picture_from_pil

HEIGHT, WIDTH = 21, 37
NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6


def packbits(rows: np.ndarray) -> bytes:
    """Runs of literals, row by row."""
    packed = b""
    for row in rows.reshape(len(rows), -1).view(np.uint8):
        for start in range(0, len(row), 128):
            packed += bytes([len(row[start : start + 128]) - 1]) + row[start : start + 128].tobytes()
    return packed


def lzw(data: bytes) -> bytes:
    """Literals alone, in codes of 9 bits, for which the table is cleared before it needs 10."""
    codes = [code for start in range(0, len(data), 250) for code in (256, *data[start : start + 250])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def encoded(part: np.ndarray, order: str, compression: int, predictor: int) -> bytes:
    """Samples H×W×S as a strip or tile, see TIFF 6.0 and, for predictor 3, Adobe's Technical Note 3."""
    size, channels = part.itemsize, part.shape[-1]
    if predictor == 3:
        rows = part.astype(part.dtype.newbyteorder(">")).view(np.uint8).reshape(len(part), -1, size).swapaxes(1, 2)
        rows = rows.reshape(len(part), -1, channels)
    else:
        rows = part.view(f"u{size}")
    if predictor > 1:
        rows = np.diff(rows, axis=1, prepend=np.zeros_like(rows[:, :1]))
    rows = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder(order)))
    if compression == PACKBITS:
        return packbits(rows)
    return {NONE: bytes, LZW: lzw, DEFLATE: zlib.compress}[compression](rows.tobytes())


def tiff_of(
    samples: np.ndarray,
    photometric: int,
    order: str = "<",
    separate: bool = False,
    compression: int = NONE,
    predictor: int = 1,
    tile: int | None = None,
    rows: int = HEIGHT,
    extra: tuple[int, ...] = (),
    **tags: int,
) -> bytes:
    """Samples H×W×S as a TIFF; `tags` such as t258=12 take the place of others."""
    height, width, channels = samples.shape
    side = (tile or rows, tile or width)
    parts = []
    for plane in np.split(samples, channels, axis=-1) if separate else [samples]:
        for top in range(0, height, side[0]):
            for left in range(0, width, side[1]):
                part = plane[top : top + side[0], left : left + side[1]]
                if tile:
                    part = np.pad(part, [(0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)])
                parts.append(encoded(np.ascontiguousarray(part), order, compression, predictor))
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries = {256: [width], 257: [height], 258: [8 * samples.itemsize] * channels, 259: [compression]}
    entries |= {262: [photometric], 277: [channels], 284: [2 if separate else 1], 317: [predictor]}
    entries |= {339: [kind] * channels} | ({338: list(extra)} if extra else {})
    offsets, sizes = (324, 325) if tile else (273, 279)
    entries |= {322: [tile], 323: [tile]} if tile else {278: [rows]}
    entries |= {offsets: [0] * len(parts), sizes: list(map(len, parts))}
    entries |= {int(tag[1:]): [value] for tag, value in tags.items()}
    start = 8 + 2 + 12 * len(entries) + 4
    first = start + sum(4 * len(values) for values in entries.values() if len(values) > 1)
    if not offsets == 273 or "t273" not in tags:
        entries[offsets] = [first + sum(map(len, parts[:index])) for index in range(len(parts))]
    directory = values = b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, values = struct.pack(f"{order}I", start + len(values)), values + packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + directory + bytes(4) + values + b"".join(parts)


def drawn(dtype: str, channels: int) -> np.ndarray:
    """Noise over the whole range that is read."""
    draw, shape = np.random.default_rng(0), (HEIGHT, WIDTH, channels)
    if dtype.startswith("f"):
        return draw.random(shape).astype(dtype)
    return draw.integers(0, min(65535, np.iinfo(dtype).max), shape, endpoint=True).astype(dtype)


def shown(picture: Picture) -> np.ndarray:
    """H×W×C in [0, 1]."""
    return ((picture.rgb + 1) / 2).permute(1, 2, 0).numpy()


FULL = {"u1": 255, "u2": 65535, "u4": 65535, "i2": 65535}  # of `drawn`
ENCODINGS = [
    *[(NONE, 1), (PACKBITS, 1), (LZW, 1), (DEFLATE, 1)],
    *[(LZW, 2), (DEFLATE, 2), (LZW, 3), (DEFLATE, 3)],
]


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "f2", "f4", "f8"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("photometric", "channels", "extra"),
    [
        (WHITE_IS_ZERO, 1, ()),
        (BLACK_IS_ZERO, 1, ()),
        (WHITE_IS_ZERO, 2, (2,)),
        (BLACK_IS_ZERO, 2, (1,)),
        (RGB, 3, ()),
        (RGB, 4, (1,)),
        (RGB, 4, (2,)),
        (RGB, 4, (0,)),
        (CMYK, 4, ()),
        (CMYK, 5, (2,)),
    ],
)
def test_the_samples_are_those_that_were_written(read, photometric, channels, extra, separate, dtype):
    samples = drawn(dtype, channels)
    if extra == (1,):  # premultiplied
        samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
    values = samples.astype(float) / FULL.get(dtype, 1)
    alpha = values[..., -1] if extra in ((1,), (2,)) else None
    colours = values[..., : {RGB: 3, CMYK: 4}.get(photometric, 1)]
    if extra == (1,):
        colours = colours / np.maximum(alpha, 1e-9)[..., None]
    if photometric == WHITE_IS_ZERO:
        colours = 1 - colours
    if photometric == CMYK:
        colours = np.rint(colours * 255) / 255
        colours = (1 - colours[..., :3]) * (1 - colours[..., 3:])
    shapes = itertools.cycle([{}, {"rows": 5}, {"tile": 16}, {"rows": 5}])  # of strips and tiles
    for (compression, predictor), order in itertools.product(ENCODINGS, "<>"):
        if predictor == 3 and not dtype.startswith("f"):
            continue
        options = {"order": order, "separate": separate, "extra": extra, **next(shapes)}
        data = tiff_of(samples, photometric, compression=compression, predictor=predictor, **options)
        picture = read(data)
        tolerance = (1.01 if photometric == CMYK else 0.02) / 255
        assert np.abs(shown(picture) - colours).max() < tolerance, (compression, predictor, options)
        assert (picture.alpha is None) == (alpha is None)
        assert alpha is None or np.abs(picture.alpha[0].numpy() - alpha).max() < tolerance
        assert ("channel that is neither" in " ".join(picture.notes)) == (extra == (0,))


def test_pictures_that_pillow_opened_are_read_the_same(read):
    samples = drawn("u2", 3)
    data = tiff_of(samples, RGB, separate=True)
    with Image.open(io.BytesIO(data)) as image:
        assert np.abs(shown(picture_from_pil(image)) - samples / 65535).max() < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12, 14])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("order", "<>")
def test_samples_that_are_not_whole_bytes(read, bits, photometric, order):
    levels = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH))
    rows = (levels[..., None] >> np.arange(bits)[::-1] & 1).reshape(HEIGHT, -1).astype(np.uint8)
    packed = np.packbits(rows, axis=1)
    data = tiff_of(packed[..., None], photometric, order, t256=WIDTH, t258=bits)
    grey = levels / (2**bits - 1)
    assert np.abs(shown(read(data))[..., 0] - (grey if photometric else 1 - grey)).max() < 1e-4


def test_twelve_bits_in_sixteen_are_not_black(read):
    samples = drawn("u2", 1) // 16
    picture = read(tiff_of(samples, BLACK_IS_ZERO))
    assert np.abs(shown(picture)[..., :1] - samples / 4095).max() < 1e-4
    assert picture.notes == ("Grey values were taken as 0 to 4095.",)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_big_endian_floats_that_are_compressed_are_no_nan(read, dtype):
    samples = drawn(dtype, 1)
    picture = read(tiff_of(samples, BLACK_IS_ZERO, ">", compression=DEFLATE))
    assert np.abs(shown(picture)[..., :1] - samples).max() < 1e-4


def test_the_orientation_is_applied(read):
    samples = drawn("u2", 3)
    picture = read(tiff_of(samples, RGB, t274=6))
    assert np.abs(shown(picture) - np.rot90(samples / 65535, -1)).max() < 1e-4


def test_a_profile_is_applied_to_16_bits(read, tmp_path):
    samples = drawn("u2", 3)
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", iccprofile=swapped_profile())
    picture = read((tmp_path / "a.tif").read_bytes())
    assert np.abs(shown(picture) - samples[..., ::-1] / 65535).max() < 2 / 255
    assert "16 bits per channel were reduced to 8." in picture.notes and "sRGB" in " ".join(picture.notes)


@pytest.mark.parametrize("order", "<>")
def test_bigtiff_and_pages(read, tmp_path, order):
    samples = drawn("u2", 1)[..., 0]
    with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=True, byteorder=order) as file:
        for page in (samples, 65535 - samples):
            file.write(page, photometric="miniswhite", metadata=None)
    picture = read((tmp_path / "a.tif").read_bytes())
    assert np.abs(shown(picture)[..., 0] - (1 - samples / 65535)).max() < 1e-4
    assert picture.notes == ("Only the first frame is used.",)


@pytest.mark.parametrize(
    ("dtype", "channels", "photometric", "options", "named"),
    [
        ("u1", 1, BLACK_IS_ZERO, {"t258": 24}, "24 bits per sample"),
        ("f4", 1, BLACK_IS_ZERO, {"t258": 24}, "24 bits per sample"),
        ("u2", 1, PALETTE, {}, "16 bits per sample (palette)"),
        ("u1", 3, YCBCR, {}, "Y'CbCr colours that are not compressed as JPEG"),
        ("u2", 3, 8, {}, "16 bits per sample (L*a*b*)"),
        ("u1", 3, 8, {"separate": True}, "separate planes (L*a*b*)"),
        ("u1", 3, RGB, {"separate": True, "t259": 7}, "separate planes (JPEG)"),
        ("u2", 1, BLACK_IS_ZERO, {"t259": 7}, "16 bits per sample (JPEG)"),
        ("u2", 1, BLACK_IS_ZERO, {"t259": 34712}, "16 bits per sample (compression 34712)"),
        ("u1", 4, CMYK, {"t332": 2}, "other inks than CMYK"),
        ("u1", 2, RGB, {}, "2 samples per pixel"),
        ("u1", 1, BLACK_IS_ZERO, {"t339": 5}, "sample format 5"),
        ("u1", 1, BLACK_IS_ZERO, {"t258": 4, "t317": 2}, "predictor 2 for 4 bits"),
        ("u2", 1, BLACK_IS_ZERO, {"t317": 3}, "predictor 3 for 16 bits per sample of format 1"),
    ],
)
def test_what_is_not_read_is_named(read, dtype, channels, photometric, options, named):
    with pytest.raises(ImageError) as refusal:
        read(tiff_of(drawn(dtype, channels), photometric, **options))
    assert named in str(refusal.value) and "save it as PNG" in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "named"),
    [(np.nan, "NaN"), (-1.0, "colour values reach from -1"), (7e4, "70000; the limits are 0 and 65535")],
)
def test_colours_out_of_range_are_refused(read, value, named):
    samples = drawn("f4", 3)
    samples[2, 3, 1] = value
    with pytest.raises(ImageError, match=named):
        read(tiff_of(samples, RGB))


@pytest.mark.parametrize("compression", [NONE, LZW, DEFLATE, PACKBITS])
def test_strips_that_are_cut_off_are_refused(read, compression):
    data = tiff_of(drawn("u2", 3), RGB, compression=compression, rows=5)
    for kept in (0.1, 0.5, 0.95):
        with pytest.raises(ImageError):
            read(data[: int(kept * len(data))])


def in_one_strip(values: np.ndarray, compression: int) -> bytes:
    """A grey TIFF of 4×4 pixels whose one strip has all the values."""
    strip = encoded(values.astype("u1")[None, :, None], "<", compression, 1)
    tags = {256: 4, 257: 4, 258: 8, 259: compression, 262: BLACK_IS_ZERO, 273: -1, 279: len(strip)}
    return tiff(tags, strip)


@pytest.mark.parametrize("compression", [NONE, LZW])
def test_a_strip_may_hold_more_than_the_picture_needs(read, compression):
    picture = read(in_one_strip(np.arange(5000), compression))
    assert np.abs(shown(picture)[..., 0] - np.arange(16).reshape(4, 4) / 255).max() < 1e-4


@pytest.mark.parametrize("compression", [DEFLATE, PACKBITS])
def test_a_strip_that_unpacks_to_more_than_its_rows_is_refused(read, compression):
    with pytest.raises(ImageError, match="damaged or cannot be decoded"):
        read(in_one_strip(np.arange(5000), compression))
