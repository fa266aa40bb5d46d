"""Reading, writing and resizing pictures: where files become tensors and tensors become files."""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MAX_INPUT_PIXELS = 4_000_000
OUTPUT_PER_INPUT = 16  # pixels, at 4 times the width and height
MAX_PARTS = 10_000  # PNG chunks, JPEG segments or GIF comments; Pillow walks them in Python
MAX_SCANS = 100  # of a progressive JPEG, each a pass over all pixels; encoders write about ten
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
ORIENTATION_TAG = 0x0112
TURNS = {  # what undoes each EXIF orientation but 1
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that is refused; the message names the value and the limit and can be shown to a visitor."""


class LimitError(ValueError):
    """A limit in the environment that cannot be; the message names the variable."""


def limit_from_environment(name: str, default: int) -> int:
    """The whole number in an environment variable, or the default if it is empty or not set.

    Raises LimitError for anything but a whole number of at least 1.
    """
    text = os.environ.get(name)
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise LimitError(f"{name}={text!r} is not a whole number from 1 to {10**18 - 1}")
    return int(text)


@dataclass(frozen=True)
class Limits:
    """How large a picture may be before and after upscaling, in pixels, and its file, in bytes."""

    input_pixels: int = MAX_INPUT_PIXELS
    output_pixels: int = OUTPUT_PER_INPUT * MAX_INPUT_PIXELS
    file_bytes: int = 20 * 2**20

    @classmethod
    def from_environment(cls) -> Limits:
        """The defaults, or what PATCHSCALER_MAX_INPUT_PIXELS, _OUTPUT_PIXELS and _FILE_BYTES put in their place.

        Raises LimitError for a setting that is not a whole number of at least 1.
        """
        names = {field.name: f"PATCHSCALER_MAX_{field.name.upper()}" for field in fields(cls)}
        return cls(**{field: limit_from_environment(name, getattr(cls, field)) for field, name in names.items()})


@dataclass(frozen=True, eq=False)  # tensors have no single truth value, so fields cannot be compared
class Picture:
    """An upright sRGB picture.

    rgb: 3xHxW float32 in [-1, 1]. alpha: 1xHxW float32 in [0, 1], or None for a picture without transparency.
    notes: one short sentence for each thing that reading the picture lost or guessed.
    """

    rgb: Tensor
    alpha: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return self.rgb.shape[-2]

    @property
    def width(self) -> int:
        return self.rgb.shape[-1]


def read_picture(source: str | Path, max_input_pixels: int | None = None) -> Picture:
    """Decode a PNG, JPEG, WebP, TIFF, BMP or GIF file as `picture_from_pil` does.

    The format is told from the content, never from the name. Raises ImageError for a file that cannot be
    opened, is too large, is of another format, is damaged or cut off, or has too many pixels, which its header
    tells before anything is decoded. The limits are the environment's; ``max_input_pixels`` takes the place of
    those on pixels.
    """
    limits = _limits(max_input_pixels)
    data = _bytes(source, limits)
    with _refusing(limits):
        image = _open(data, limits)
        if image.format == "PNG":  # decoding skips the checksums of the pixel data; verify() does not
            image.verify()
            image = _open(data, limits)
        return picture_from_pil(image, max_input_pixels)


def picture_from_pil(image: Image.Image, max_input_pixels: int | None = None) -> Picture:
    """Turn a Pillow image of any mode into a Picture.

    EXIF orientation is applied and an embedded colour profile is converted to sRGB. The colour of fully
    transparent pixels is kept. Of several frames, the first is used. 16-bit grey is divided by 65535. Of
    16-bit colour Pillow keeps the high byte, which is within one level of the exact 8-bit value. Grey of mode
    I or F is divided by the smallest of 1 (F only), 255 and 65535 that holds its largest value. Grey values
    that are negative, larger or not finite raise ImageError, as do damaged pixels and more pixels than
    ``max_input_pixels``, or than the environment's limits if it is not given.
    """
    limits = _limits(max_input_pixels)
    _check_size(image, limits)
    notes = []
    with _refusing(limits):
        if getattr(image, "is_animated", False):
            notes.append("Only the first frame is used.")
            image.seek(0)
        # A wide grey image keeps its 16 bits as mode I;16. The list is emptied by load().
        if not _is_wide_grey(image) and any(";16" in str(tile) for tile in getattr(image, "tile", ())):
            notes.append("16 bits per channel were reduced to 8.")
        image.load()
        image = _upright(image, notes)
        rgb, alpha = _wide_grey(image, notes) if _is_wide_grey(image) else _colour(image, notes)
    return Picture(rgb, alpha, tuple(notes))


def to_pil(picture: Picture) -> Image.Image:
    """An 8-bit RGB or RGBA image, rounded to the nearest level, without any metadata.

    Values outside the range are clamped; values that are not finite raise ImageError.
    """
    planes = [(picture.rgb.detach().float().cpu() + 1) * 127.5]
    if picture.alpha is not None:
        planes.append(picture.alpha.detach().float().cpu() * 255)
    levels = torch.cat(planes)
    if not torch.isfinite(levels).all():
        raise ImageError("the picture has values that are not finite")
    levels = levels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.contiguous().numpy())  # HxWx3 becomes RGB, HxWx4 RGBA


def write_png(picture: Picture, path: str | Path, text: dict[str, str] | None = None) -> Path:
    """Write a lossless PNG with `text` as its text chunks, and return its path.

    The file appears whole or not at all: it is written beside its place and then renamed. The folder must
    exist. Raises OSError if it cannot be written and ImageError for values that are not finite.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    image = to_pil(picture)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=chunks)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_png_text(source: str | Path) -> dict[str, str]:
    """The texts that `write_png` put into a PNG; {} for any other file, and for one that `read_picture` refuses."""
    limits = Limits.from_environment()
    try:
        data = _bytes(source, limits)
        if not data.startswith(b"\x89PNG"):
            return {}
        with _refusing(limits):
            information = _open(data, limits).info  # of what lies before the pixels, which are not decoded
    except ImageError:
        return {}
    return {key: value for key, value in information.items() if isinstance(value, str)}


def bicubic(image: Tensor, scale: float = 4) -> Tensor:
    """Resize BxCxHxW in [-1, 1] to BxCxsHxsW, clamped to [-1, 1]; sides are rounded and at least 1 pixel."""
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _bytes(source: str | Path, limits: Limits) -> bytes:
    """A file's content, unless it is too large or made to keep a decoder busy."""
    try:
        with open(source, "rb") as file:
            data = file.read(limits.file_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"cannot open the file: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > limits.file_bytes:
        raise ImageError(f"the file is too large; the limit is {limits.file_bytes:,} bytes")
    _check_parts(data)
    return data


def _limits(max_input_pixels: int | None) -> Limits:
    limits = Limits.from_environment()
    if max_input_pixels is None:
        return limits
    return Limits(max_input_pixels, OUTPUT_PER_INPUT * max_input_pixels, limits.file_bytes)


@contextmanager
def _refusing(limits: Limits) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not a readable PNG, JPEG, WebP, TIFF, BMP or GIF image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        over = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"  # Pillow refused before the size could be asked
        raise ImageError(f"{over}; the limit is {limits.input_pixels:,}") from error
    except Exception as error:  # on hostile bytes decoders raise nearly anything, even SyntaxError
        reason = str(error)[:120] or type(error).__name__
        raise ImageError(f"the image is damaged or cannot be decoded: {reason}") from error


def _check_parts(data: bytes) -> None:
    """Refuse a PNG, JPEG or GIF that is small, but made to keep a decoder busy for hours."""
    parts = scans = place = 0
    if data.startswith(b"\x89PNG"):
        place = 8
        while place < len(data) and parts <= MAX_PARTS:
            place += 12 + int.from_bytes(data[place : place + 4], "big")
            parts += 1
    elif data.startswith(b"\xff\xd8"):
        while (marker := JPEG_MARKER.search(data, place)) and parts <= MAX_PARTS and scans <= MAX_SCANS:
            place, code = marker.end(), marker[1][0]
            if code == 0xD9:  # end of the image; phones append others, and films
                break
            if code > 0x01 and code != 0xD8:  # those two have no length
                place += int.from_bytes(data[place : place + 2], "big")
            parts += 1
            scans += code == 0xDA
    elif data.startswith(b"GIF8"):
        parts = data.count(b"\x21\xfe")  # a few hundred by chance; joining comments takes Pillow quadratic time
    if parts > MAX_PARTS:
        raise ImageError(f"the file has more parts than any picture needs; the limit is {MAX_PARTS:,}")
    if scans > MAX_SCANS:
        raise ImageError(f"the file has more scans than any picture needs; the limit is {MAX_SCANS}")


def _open(data: bytes, limits: Limits) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image, limits)
    if image.format == "TIFF":  # libtiff decodes whole tiles, however small the image
        tags = (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
        width, height = (int(image.tag_v2.get(tag, 0)) for tag in tags)
        if width * height > limits.input_pixels:
            raise ImageError(f"its tiles are {width}×{height} pixels; the limit is {limits.input_pixels:,}")
    return image


def _check_size(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    pixels = width * height
    if pixels > limits.input_pixels:
        raise ImageError(f"{width}×{height} is {pixels:,} pixels; the limit is {limits.input_pixels:,}")
    if OUTPUT_PER_INPUT * pixels > limits.output_pixels:
        output = f"{OUTPUT_PER_INPUT * pixels:,} pixels after upscaling"
        raise ImageError(f"{width}×{height} would be {output}; the limit is {limits.output_pixels:,}")
    if pixels == 0:
        raise ImageError(f"{width}×{height} has no pixels; at least 1×1 is needed")


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:  # ImageOps.exif_transpose also writes the other tags back, and fails if one of them is broken
        turn = TURNS.get(image.getexif().get(ORIENTATION_TAG))
    except Exception:  # as hostile as pixels, but without it the pixels are still usable
        notes.append("Unreadable EXIF data was ignored; the picture may not be upright.")
        return image
    return image if turn is None else image.transpose(turn)


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _wide_grey(image: Image.Image, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Grey of more than 8 bits, which Pillow would clip to 255, as 3xHxW in [-1, 1], and its alpha."""
    values = np.asarray(image).astype(np.float32)  # a 32-bit integer rounds, by less than any limit here
    if not np.isfinite(values).all():
        raise ImageError("the image has values that are not finite (NaN or infinity)")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"grey values reach from {low:g} to {high:g}; the limits are 0 and 65535")
    full = 65535
    if image.mode in ("I", "F"):  # the file does not say what is white
        limits = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        full = next(limit for limit in limits if high <= limit)
        notes.append(f"Grey values were taken as 0 to {full}.")
    if image.info.get("icc_profile"):
        notes.append("The colour profile of an image with more than 8 bits was ignored.")
    alpha = None
    if "transparency" in image.info:  # a 16-bit grey PNG names the one value that is transparent
        alpha = torch.from_numpy((values != image.info["transparency"]).astype(np.float32))[None]
    grey = torch.from_numpy(values / full * 2 - 1)
    return grey.expand(3, -1, -1).contiguous(), alpha


def _colour(image: Image.Image, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Any 8-bit mode as sRGB 3xHxW in [-1, 1], and its alpha 1xHxW in [0, 1]."""
    alpha = None
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        alpha = _levels(rgba.getchannel("A")) / 255
        image = image.convert("L") if image.mode in ("L", "LA") else rgba.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    rgb = _levels(_to_srgb(image, notes)) / 127.5 - 1
    return rgb, alpha


def _to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, TypeError):
            notes.append("A colour profile that is broken or does not fit was ignored.")
        else:
            if image.mode != "RGB" or converted.tobytes() != image.tobytes():
                notes.append("Colours were converted from the embedded profile to sRGB.")
            return converted
    elif image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without a colour profile.")
    return image.convert("RGB")


def _levels(image: Image.Image) -> Tensor:
    """The levels 0 to 255 of an 8-bit image as CxHxW float32."""
    array = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(np.atleast_3d(array).transpose(2, 0, 1).copy())
