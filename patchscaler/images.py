"""Reading, writing and resizing pictures: where files become tensors and tensors become files."""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from patchscaler.limits import OUTPUT_PER_INPUT, ImageError, Limits
from patchscaler.srgb import coding_of, from_coding, from_profile
from patchscaler.tiff_samples import Samples, read_samples
from patchscaler.transparency import spread_colors

try:
    from pillow_heif import register_heif_opener
except ImportError:  # the extra heif
    HEIF = ()
else:
    register_heif_opener()
    HEIF = ("HEIF",)

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", *HEIF)
READABLE = "PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")  # of an ISO base media file, at its start
MAX_PARTS = 10_000  # PNG chunks, JPEG segments or GIF comments; Pillow walks them in Python
MAX_SCANS = 100  # of a progressive JPEG, each a pass over all pixels; encoders write about ten
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
ORIENTATION_TAG = 0x0112
FLIPS = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}  # what undoes an EXIF orientation, after the
TRANSPOSED = (5, 6, 7, 8)  # transposition that these begin with


@dataclass(frozen=True, eq=False)  # tensors have no single truth value, so fields cannot be compared
class Picture:
    """An upright sRGB picture.

    rgb: 3×H×W float32 in [-1, 1]. alpha: 1×H×W float32 in [0, 1], or None for a picture without transparency.
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

    def visible_rgb(self) -> Tensor:
        """rgb, but under alpha 0 the colours of visible pixels near by: what to upscale, see `spread_colors`."""
        return self.rgb if self.alpha is None else spread_colors(self.rgb, self.alpha)

    def is_grey(self) -> bool:
        """Whether the channels of every visible pixel are alike, to one of 255 levels, as profiles round."""
        spread = self.rgb.amax(0) - self.rgb.amin(0)  # H×W
        if self.alpha is not None:
            spread = spread[self.alpha[0] > 0]
        return bool((spread < 1.01 / 127.5).all())


def read_picture(source: str | Path, max_input_pixels: int | None = None) -> Picture:
    """Decode a PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file as `picture_from_pil` does; HEIC with pillow-heif.

    The format is told from the content, never from the name. Raises ImageError for a file that cannot be
    opened, is too large, is of another format, is damaged or cut off, or has too many pixels, which its header
    tells before anything is decoded. The limits are the environment's; `max_input_pixels` takes the place of
    those on pixels.
    """
    limits = _limits(max_input_pixels)
    data = _bytes(source, limits)
    with _refusing(limits):
        if samples := read_samples(data, limits):
            return _picture_from_samples(samples)
        image = _open(data, limits)
        if image.format == "PNG":  # decoding skips the checksums of the pixel data; verify() does not
            image.verify()
            image = _open(data, limits)
        return picture_from_pil(image, max_input_pixels)


def picture_from_pil(image: Image.Image, max_input_pixels: int | None = None) -> Picture:
    """Turn a Pillow image of any mode into a Picture.

    EXIF orientation is applied, and colours are converted to sRGB from an embedded profile or from what the file states
    of its gamma and primaries. Of several frames, the first is used. The colour of fully transparent pixels is kept.

    16-bit grey is divided by 65535. Of 16-bit colour other than TIFF's Pillow keeps the high byte, which is within one
    level of the exact 8-bit value. Grey of mode I or F is divided by the smallest of 1 (F only), 255 and 65535 that
    holds its largest value; so are TIFF samples of 32 bits, and those of 16 bits by 4095 if that holds them all. Values
    that are negative, larger or not finite raise ImageError, as do damaged pixels and more pixels than
    `max_input_pixels`, or than the environment's limits if it is not given.
    """
    limits = _limits(max_input_pixels)
    limits.check(*image.size)
    notes = []
    with _refusing(limits):
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile and image.fp:  # not decoded yet
            image.fp.seek(0)
            if samples := read_samples(image.fp.read(), limits):
                return _picture_from_samples(samples)
        if getattr(image, "is_animated", False):
            notes.append("Only the first frame is used.")
            image.seek(0)
        # A wide grey image keeps its 16 bits as mode I;16. The list is emptied by load().
        if not _is_wide_grey(image) and any(";16" in str(tile) for tile in getattr(image, "tile", ())):
            notes.append("16 bits per channel were reduced to 8.")
        # Browsers turn a picture by its EXIF data alone, Pillow by these as well.
        for name in ("xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(name, None)
        image.load()
        orientation = _orientation(image, notes)
        rgb, alpha = _wide_grey(image, notes) if _is_wide_grey(image) else _colour(image, notes)
    return _picture(rgb, alpha, orientation, notes)


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
    return Image.fromarray(levels.contiguous().numpy())  # H×W×3 becomes RGB, H×W×4 RGBA


def write_png(picture: Picture, path: str | Path, text: dict[str, str] | None = None) -> Path:
    """Write a lossless PNG with `text` as its text chunks, and return its path.

    The file appears whole or not at all: see `written_whole`. The folder must exist. Raises OSError if it cannot be
    written and ImageError for values that are not finite.
    """
    path = Path(path)
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    image = to_pil(picture)
    with written_whole(path) as file:
        image.save(file, format="PNG", pnginfo=chunks)
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end of the block, or is removed if that raises.

    An OSError over that file names `path` in its place.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None or Path(error.filename).name != temporary.name:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


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
    """Resize B×C×H×W in [-1, 1] to B×C×sH×sW, clamped to [-1, 1]; sides are rounded and at least 1 pixel."""
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
        raise ImageError(f"not a readable {READABLE} image") from error
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
    if not HEIF and data[4:8] == b"ftyp" and _is_heif(data):
        raise ImageError("HEIC is not read here; save it as JPEG or PNG, or install pillow-heif")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    limits.check(*image.size)
    if cicp := _cicp(image.format, data):
        image.info["cicp"] = cicp
    return image


def _is_heif(data: bytes) -> bool:
    """Whether the brands at the start of an ISO base media file say that it is HEIC."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 4096)]
    return any(brands[place : place + 4] in HEIF_BRANDS for place in range(0, len(brands), 4))


def _cicp(format: str | None, data: bytes) -> tuple[int, ...] | None:
    """Primaries, transfer curve, matrix and range as H.273 numbers them, of a PNG, AVIF or HEIC that states them."""
    if format == "PNG":
        place = 8
        while data[place + 4 : place + 8] not in (b"cICP", b"IDAT", b""):
            place += 12 + int.from_bytes(data[place : place + 4], "big")
        return tuple(data[place + 8 : place + 12]) if data[place : place + 8] == b"\0\0\0\4cICP" else None
    if format in ("AVIF", "HEIF") and (place := data.find(b"colrnclx")) >= 0 and len(data) >= place + 15:
        primaries, transfer = data[place + 9], data[place + 11]
        return primaries, transfer, 0, 1  # the decoder makes it full-range RGB
    return None


def _orientation(image: Image.Image, notes: list[str]) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # as hostile as pixels, but without it the pixels are still usable
        notes.append("Unreadable EXIF data was ignored; the picture may not be upright.")
        return 1


def _picture(rgb: Tensor, alpha: Tensor | None, orientation: int, notes: list[str]) -> Picture:
    """Upright, with three channels: of rgb C×H×W, where C may be 1 for grey, and alpha 1×H×W."""

    def upright(planes: Tensor) -> Tensor:
        planes = planes.transpose(-2, -1) if orientation in TRANSPOSED else planes
        return planes.flip(FLIPS.get(orientation, [])).contiguous()

    rgb = upright(rgb).expand(3, -1, -1).contiguous()
    return Picture(rgb, None if alpha is None else upright(alpha), tuple(dict.fromkeys(notes)))


def _picture_from_samples(samples: Samples) -> Picture:
    notes = list(samples.notes)
    rgb = torch.from_numpy(samples.values).permute(2, 0, 1) * 2 - 1  # C×H×W
    if samples.mode == "CMYK" or samples.profile:  # converted by LittleCMS, in 8 bits
        levels = np.rint(samples.values * 255).astype(np.uint8)
        image = Image.fromarray(levels[..., 0] if samples.mode == "L" else levels, samples.mode)
        if samples.bits > 8:
            notes.append(f"{samples.bits} bits per channel were reduced to 8.")
        rgb = _levels(from_profile(image, samples.profile, notes)) / 127.5 - 1
    alpha = None if samples.alpha is None else torch.from_numpy(samples.alpha)[None]
    return _picture(rgb, alpha, samples.orientation, notes)


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _wide_grey(image: Image.Image, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Grey of more than 8 bits, which Pillow would clip to 255, as 1×H×W in [-1, 1], and its alpha."""
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
    grey = torch.from_numpy(values / full * 2 - 1)[None]
    if coding := coding_of(image, notes):
        grey = from_coding(grey, coding, notes)
    elif image.info.get("icc_profile"):
        notes.append("The colour profile of an image with more than 8 bits was ignored.")
    alpha = None
    if "transparency" in image.info:  # a 16-bit grey PNG names the one value that is transparent
        alpha = torch.from_numpy((values != image.info["transparency"]).astype(np.float32))[None]
    return grey, alpha


def _colour(image: Image.Image, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Any 8-bit mode as sRGB, 1×H×W for grey and else 3×H×W in [-1, 1], and its alpha 1×H×W in [0, 1]."""
    coding, alpha = coding_of(image, notes), None
    profile = None if coding else image.info.get("icc_profile")
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
    rgb = _levels(from_profile(image, profile, notes)) / 127.5 - 1
    return from_coding(rgb, coding, notes) if coding else rgb, alpha


def _levels(image: Image.Image) -> Tensor:
    """The levels 0 to 255 of an 8-bit image as C×H×W float32."""
    array = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(np.atleast_3d(array).transpose(2, 0, 1).copy())
