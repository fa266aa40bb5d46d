"""Small bad and odd image files, made on the spot, and what each must lead to wherever it is handed in."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

FORMATS = "PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF"
HEIC = FORMATS if find_spec("pillow_heif") else "save it as JPEG or PNG, or install pillow-heif"
DAMAGED = "damaged"
TOO_MANY = "the limit is 4,000,000"
FIRST_FRAME = "Only the first frame is used."


@dataclass(frozen=True)
class Case:
    """A file, and what it must lead to: an error with the words of `refused`, or else a picture of `size`."""

    name: str  # the stem is another for every case
    data: bytes
    refused: str | None = None
    size: tuple[int, int] = (0, 0)  # width, height
    alpha: bool = False
    note: str = ""  # words of the picture's notes


@cache
def cases() -> tuple[Case, ...]:
    """The whole corpus, the same at every call."""
    return (*_not_images(), *_damaged(), *_bombs(), *_modes(), *_metadata(), *_odd())


def write(folder: Path) -> list[tuple[Path, Case]]:
    """Write every file of the corpus into a folder that exists."""
    for case in cases():
        (folder / case.name).write_bytes(case.data)
    return [(folder / case.name, case) for case in cases()]


# Tools, for tests too


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand, for what Pillow does not write."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    parts = (header, *chunks, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def tiff(tags: dict[int, int], payload: bytes = b"") -> bytes:
    """A little-endian TIFF of LONG tags made by hand; the value -1 stands for where the payload begins."""
    start = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack("<HHII", tag, 4, 1, start if value == -1 else value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + payload


def overlapping() -> bytes:
    """A TIFF of 5,000 tags that all lie over the same 64 kB: a reader that copies them needs 300 MB."""
    entries = b"".join(struct.pack("<HHII", tag, 1, 60_000, 8) for tag in range(5000, 10_000))
    directory = struct.pack("<H", 5000) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 60_016) + bytes(60_008) + directory


def webp(width: int, height: int) -> bytes:
    """A lossless WebP of which only the header is right."""
    body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(51)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def swapped_profile() -> bytes:
    """The sRGB profile with red and blue exchanged: what it does to a picture is easy to say."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"temp", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"temp", b"bXYZ", 1)


def oriented(orientation: int) -> Image.Exif:
    """EXIF data with an orientation and a place on Earth."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0)})
    return exif


def with_comments(gif: bytes, count: int) -> bytes:
    """A GIF with comments behind its colour table."""
    place = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    return gif[:place] + b"\x21\xfe\x01x\0" * count + gif[place:]


def with_scans(jpeg: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + scan * count + jpeg[-2:]


# The files


def _photo(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(noise(14, 18)).convert(mode)


def _floats(value: float) -> Image.Image:
    return Image.fromarray(np.array([[0, value], [0.5, 1]], dtype=np.float32))


def _not_images() -> Iterator[Case]:
    files = {
        "empty.png": b"",
        "text.jpg": b"Dear server, please upscale this.\n",
        "random.png": noise(32, 32).tobytes(),
        "zeros.gif": bytes(500),
        "document.pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n",
        "photo.heic": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100),
        "photo_avif.png": b"\0\0\0\x1cftypavif\0\0\0\0mif1avif" + bytes(100),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "drawing_svg.png": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        "page.html.jpg": b"<!doctype html><script>alert(1)</script>",
        "archive.webp": b"PK\x03\x04" + bytes(60),
        "program.bmp": b"\x7fELF" + bytes(60),
        "script.gif": b"#!/bin/sh\nexit 1\n",
        "only_magic_png.png": b"\x89PNG\r\n\x1a\n",
        "only_magic_gif.gif": b"GIF89a",
    }
    for name, data in files.items():
        yield Case(name, data, HEIC if name == "photo.heic" else FORMATS)
    for format, name in {
        "EPS": "figure.eps",
        "PPM": "grey.ppm",
        "ICO": "icon.ico",
        "TGA": "old.tga",
        "JPEG2000": "new.jp2",
    }.items():
        yield Case(name, encoded(_photo(), format), FORMATS)
    yield Case("figure_eps.png", encoded(_photo(), "EPS"), FORMATS)


def _damaged() -> Iterator[Case]:
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"):
        data = encoded(_photo(), format)
        yield Case(f"half_{format.lower()}.{format.lower()}", data[: len(data) // 2], "")
    data = encoded(_photo(), "PNG")
    yield Case("no_end.png", data[:-12], DAMAGED)
    yield Case("bad_checksum.png", data[:-13] + bytes([data[-13] ^ 1]) + data[-12:], "checksum")
    yield Case("bad_header_checksum.png", data[:29] + bytes([data[29] ^ 1]) + data[30:], FORMATS)
    yield Case("too_few_rows.png", png(8, 8, 8, 0, bytes(20)), "truncated")
    yield Case("no_pixels.png", data[: data.index(b"IDAT") - 4] + chunk(b"IEND"), DAMAGED)
    yield Case("bad_deflate.png", b"\x89PNG\r\n\x1a\n" + data[8:33] + chunk(b"IDAT", b"x" * 40) + chunk(b"IEND"), "")
    yield Case("no_width.png", png(0, 8, 8, 0, bytes(8)), "")
    yield Case("bad_depth.png", png(8, 8, 7, 0, bytes(72)), FORMATS)
    yield Case("no_strips.tif", tiff({256: 4, 257: 4, 258: 8, 262: 1}), "")
    yield Case("strips_outside.tif", tiff({256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 10**6, 279: 16}), "")
    yield Case("endless.tif", b"II*\0" + struct.pack("<I", 0), FORMATS)
    yield Case("nan.tif", encoded(_floats(np.nan), "TIFF"), "not finite")
    yield Case("infinite.tif", encoded(_floats(-np.inf), "TIFF"), "not finite")
    yield Case("negative.tif", encoded(_floats(-3), "TIFF"), "from -3")
    yield Case("above_16_bits.tif", encoded(_floats(70000), "TIFF"), "70000; the limits are 0 and 65535")


def _bombs() -> Iterator[Case]:
    for side in (2001, 13377, 30000):
        yield Case(f"bomb_{side}.png", png(side, side, 1, 0, bytes(side * (-(-side // 8) + 1))), TOO_MANY)
    yield Case("wide.png", png(2**31 - 1, 1, 1, 0, bytes(99)), TOO_MANY)
    yield Case("bomb_webp.webp", webp(16383, 16383), TOO_MANY)
    yield Case("bomb_tiff.tif", tiff({256: 50000, 257: 50000, 258: 8, 259: 8, 262: 1, 273: -1, 279: 9}), TOO_MANY)
    yield Case("bomb_bmp.bmp", _resized_bmp(40000, 40000), TOO_MANY)
    gif, jpeg = encoded(_photo("P"), "GIF"), encoded(_photo(), "JPEG")
    yield Case("bomb_gif.gif", gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:], TOO_MANY)
    avif = encoded(_photo(), "AVIF")
    sides = avif.index(b"ispe") + 8
    yield Case("bomb_avif.avif", avif[:sides] + struct.pack(">II", 12000, 12000) + avif[sides + 8 :], TOO_MANY)
    frame = jpeg.index(b"\xff\xc0") + 5
    yield Case("bomb_jpeg.jpg", jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :], TOO_MANY)
    text = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 1)
    dot = png(1, 1, 8, 0, b"\0\0")
    yield Case("text_bomb.png", png(1, 1, 8, 0, b"\0\0", (b"zTXt", text)), "too large")
    yield Case("late_text_bomb.png", dot[:-12] + chunk(b"zTXt", text) + dot[-12:], "too large")
    yield Case("many_chunks.png", png(1, 1, 8, 0, b"\0\0", *[(b"abCd", b"")] * 11_000), "parts")
    yield Case("many_comments.gif", with_comments(gif, 11_000), "parts")
    yield Case("many_segments.jpg", jpeg[:2] + b"\xff\xfe\0\2" * 11_000 + jpeg[2:], "parts")
    yield Case("many_scans.jpg", with_scans(encoded(_photo(), "JPEG", progressive=True), 101), "scans")
    tiled = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32768, 323: 32768, 324: -1, 325: 9}
    yield Case("tile_bomb.tif", tiff(tiled, zlib.compress(bytes(10**7))), "its tiles are 32768×32768")


def _resized_bmp(width: int, height: int) -> bytes:
    data = encoded(_photo(), "BMP")
    return data[:18] + struct.pack("<II", width, height) + data[26:]


def _modes() -> Iterator[Case]:
    size = (18, 14)
    for mode, format in [
        ("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("I;16", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"),
        ("CMYK", "TIFF"), ("LAB", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("I;16", "TIFF"),
        ("1", "TIFF"), ("P", "TIFF"), ("P", "BMP"), ("1", "BMP"), ("L", "GIF"), ("RGB", "WEBP"), ("RGB", "AVIF"),
    ]:  # fmt: skip
        if mode == "LAB":  # the only mode that RGB has no direct way to
            image = Image.frombytes("LAB", size, _photo().tobytes())
        else:
            image = _photo("L").convert(mode) if mode in ("I", "F", "I;16") else _photo(mode)
        stem = f"{format}_{mode}".lower().replace(";", "")
        yield Case(f"{stem}.{format.lower()}", encoded(image, format), size=size)
    for mode, format in [
        *[("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("RGBA", "AVIF")],
    ]:
        image = _photo("L").convert(mode)
        image.putalpha(_photo("L"))
        name = f"alpha_{format}_{mode}.{format}".lower()
        yield Case(name, encoded(image, format), size=size, alpha=True)
    for format in ("PNG", "GIF"):
        data = encoded(Image.new("P", size, 3), format, transparency=3)
        yield Case(f"key_{format}.{format}".lower(), data, size=size, alpha=True)
    yield Case("colour_key.png", encoded(Image.new("RGB", size), "PNG", transparency=(0, 0, 0)), size=size, alpha=True)
    rows = b"".join(b"\0" + noise(1, 18, 6).tobytes() for _ in range(14))
    yield Case("colour_16_bits.png", png(*size, 16, 2, rows), size=size, note="16 bits per channel")


def _metadata() -> Iterator[Case]:
    for orientation, format in enumerate(("JPEG", "PNG", "WEBP", "TIFF", "JPEG", "PNG", "WEBP", "TIFF"), 1):
        size = (14, 18) if orientation > 4 else (18, 14)
        data = encoded(_photo(), format, exif=oriented(orientation))
        yield Case(f"orientation_{orientation}.{format.lower()}", data, size=size)
    size = (18, 14)
    broken = encoded(_photo(), "PNG", exif=b"Exif\0\0not a TIFF header")
    yield Case("broken_exif.png", broken, size=size, note="EXIF")
    profiled = encoded(_photo(), "JPEG", icc_profile=swapped_profile())
    yield Case("profile.jpg", profiled, size=size, note="sRGB")
    yield Case("broken_profile.png", encoded(_photo(), "PNG", icc_profile=b"none"), size=size, note="profile")
    unfit = encoded(_photo("CMYK"), "JPEG", icc_profile=swapped_profile())
    yield Case("unfit_profile.jpg", unfit, size=size, note="profile")


def _odd() -> Iterator[Case]:
    size, frames = (18, 14), [_photo(), _photo("L").convert("RGB")]
    for format in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        yield Case(f"animated.{format}.{format}".lower(), data, size=size, note=FIRST_FRAME)
    yield Case("one_pixel.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), size=(1, 1))
    yield Case("line.png", encoded(Image.new("L", (300, 1), 90), "PNG"), size=(300, 1))
    yield Case("column.webp", encoded(Image.new("RGB", (1, 200), "teal"), "WEBP"), size=(1, 200))
    for format, name in {
        "PNG": "really_png.gif",
        "JPEG": "really_jpeg.pdf",
        "GIF": "really_gif",
        "BMP": "x.exe",
    }.items():
        yield Case(name, encoded(_photo(), format), size=size)
    yield Case("ünïcode 画像 😀.png", encoded(_photo(), "PNG"), size=size)
    yield Case("-o; rm $HOME `id`.png", encoded(_photo(), "PNG"), size=size)
    yield Case("long" * 50 + ".png", encoded(_photo(), "PNG"), size=size)
    yield Case("appended.jpg", encoded(_photo(), "JPEG") + b"\xff\xda" * 500, size=size)
    yield Case("progressive.jpg", encoded(_photo(), "JPEG", progressive=True), size=size)
    tags = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: -1, 279: 16}
    for tag, value, words in ((258, 24, "24 bits"), (262, 3, ""), (259, 7, ""), (339, 5, "sample format 5")):
        yield Case(f"kind_{tag}_{value}.tif", tiff(tags | {tag: value}, bytes(16)), words)
    yield Case("overlapping_tags.tif", overlapping(), "its tags have")
    for compression in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        yield Case(f"tiff_{compression}.tif", encoded(_photo(), "TIFF", compression=compression), size=size)
