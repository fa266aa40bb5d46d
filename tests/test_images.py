from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
import torch
from corpus import encoded, noise, png, swapped_profile
from PIL import Image, ImageCms, PngImagePlugin

from patchscaler.images import ImageError, Picture, bicubic, picture_from_pil, read_picture, to_pil, write_png


def levels(picture: Picture) -> np.ndarray:
    """H×W×C levels 0 to 255, not rounded."""
    return ((picture.rgb + 1) * 127.5).permute(1, 2, 0).numpy()


# Formats and modes


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
    ],
)
def test_lossless_formats_are_read_exactly(read, format, options):
    pixels = noise(7, 5)
    picture = read(encoded(Image.fromarray(pixels), format, **options))
    assert picture.rgb.dtype == torch.float32 and picture.rgb.shape == (3, 7, 5)
    assert (picture.height, picture.width, picture.alpha, picture.notes) == (7, 5, None, ())
    np.testing.assert_allclose(levels(picture), pixels, atol=1e-4)


@pytest.mark.parametrize("format", ["JPEG", "GIF", "AVIF"])
def test_lossy_formats_are_read(read, format):
    picture = read(encoded(Image.new("RGB", (9, 8), (200, 100, 50)), format))
    np.testing.assert_allclose(levels(picture), np.broadcast_to((200, 100, 50), (8, 9, 3)), atol=3)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]
    + ["I", "F", "I;16", "I;16L", "I;16B"],
)
def test_every_mode_becomes_rgb(mode):
    picture = picture_from_pil(Image.new(mode, (4, 3)))
    assert picture.rgb.shape == (3, 3, 4)
    assert picture.rgb.abs().max() <= 1
    assert (picture.alpha is not None) == mode.lower().endswith("a")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("RGB", (1, 1), (255, 0, 0)).convert("YCbCr"), (254, 0, 0)),
        (Image.new("RGB", (1, 1), (10, 200, 30)).quantize(), (10, 200, 30)),
    ],
)
def test_colours_survive_their_mode(image, expected):
    np.testing.assert_allclose(levels(picture_from_pil(image))[0, 0], expected, atol=1)


def test_cmyk_without_a_profile_is_noted(read):
    assert "CMYK" in read(encoded(Image.new("CMYK", (8, 8)), "JPEG")).notes[0]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_used(read, format):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    picture = read(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    np.testing.assert_allclose(levels(picture)[3, 3], (255, 0, 0), atol=3)
    assert "first frame" in picture.notes[0]


def test_heic_is_read_with_the_extra_heif(read):
    heif = pytest.importorskip("pillow_heif")
    image = heif.from_pillow(Image.new("RGB", (64, 48), (200, 100, 50)))
    buffer = io.BytesIO()
    image.save(buffer, quality=95)
    picture = read(buffer.getvalue())
    np.testing.assert_allclose(levels(picture), np.broadcast_to((200, 100, 50), (48, 64, 3)), atol=4)
    with pytest.raises(ImageError, match="64×48 is 3,072 pixels; the limit is 3,071"):
        read(buffer.getvalue(), max_input_pixels=3071)


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"msf1\0\0\0\0hevc\0\0\0\0"])
def test_heic_without_the_extra_says_what_to_do(read, monkeypatch, brands):
    monkeypatch.setattr("patchscaler.images.HEIF", ())
    with pytest.raises(ImageError, match="HEIC is not read here; save it as JPEG or PNG, or install pillow-heif"):
        read(b"\0\0\0\x18ftyp" + brands + bytes(100))


# More than 8 bits


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(read, format):
    values = np.array([[0, 1, 255, 256, 32768, 65535]], dtype=np.uint16)
    picture = read(encoded(Image.fromarray(values), format))
    np.testing.assert_allclose(levels(picture)[0, :, 1], values[0] / 257, atol=1e-4)


def test_16_bit_colour_is_scaled(read):
    values = np.array([0, 255, 256, 1000, 32768, 65279, 65535])
    rows = b"\0" + np.repeat(values, 3).astype(">u2").tobytes()
    picture = read(png(7, 1, 16, 2, rows))
    np.testing.assert_allclose(levels(picture)[0, :, 2], values / 257, atol=1)
    assert "16 bits" in picture.notes[0]


def test_the_transparent_value_of_16_bit_grey(read):
    rows = b"\0" + np.array([700, 701], dtype=">u2").tobytes()
    assert read(png(2, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 700)))).alpha.tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("dtype", "largest", "full"),
    [("f4", 0.5, 1), ("f4", 1, 1), ("f4", 1.5, 255), ("f4", 60000, 65535)]
    + [("i4", 1, 255), ("i4", 255, 255), ("i4", 256, 65535)],
)
def test_32_bit_grey_is_scaled_by_what_holds_it(read, dtype, largest, full):
    values = np.array([[0, largest]], dtype=dtype)
    picture = read(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_allclose(levels(picture)[0, :, 0], [0, largest / full * 255], atol=1e-3)
    assert picture.notes == (f"Grey values were taken as 0 to {full}.",)


@pytest.mark.parametrize(
    ("value", "named"), [(np.nan, "NaN"), (np.inf, "infinity"), (-1, "-1"), (70000, "70000.*65535")]
)
def test_32_bit_grey_out_of_range_is_refused(read, value, named):
    with pytest.raises(ImageError, match=named):
        read(encoded(Image.fromarray(np.array([[0, value]], dtype="f4")), "TIFF"))


# Alpha


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_alpha_is_split_and_hidden_colours_are_kept(read, format, options):
    pixels = noise(6, 4, 4)
    pixels[:2, :, 3] = 0
    picture = read(encoded(Image.fromarray(pixels), format, **options))
    np.testing.assert_allclose(levels(picture), pixels[..., :3], atol=1e-4)
    np.testing.assert_allclose(picture.alpha[0].numpy() * 255, pixels[..., 3], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(to_pil(picture)), pixels)


def test_grey_with_alpha(read):
    picture = read(encoded(Image.new("LA", (2, 2), (90, 128)), "PNG"))
    assert np.asarray(to_pil(picture))[0, 0].tolist() == [90, 90, 90, 128]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_palette_entry(read, transparency):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    picture = read(encoded(image, "PNG", transparency=transparency))
    assert np.asarray(to_pil(picture)).tolist() == [[[10, 20, 30, 255], [40, 50, 60, 0]]]


@pytest.mark.parametrize(("mode", "key"), [("L", 9), ("RGB", (9, 9, 9))])
def test_a_transparent_colour(read, mode, key):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 0 if mode == "L" else (0, 0, 0))
    assert read(encoded(image, "PNG", transparency=key)).alpha.tolist() == [[[0, 1]]]


# Metadata


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(read, format, orientation):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = (255, 0, 0)  # top left
    upright[:8, 24:] = (0, 255, 0)  # top right
    stored = {  # the rotation or mirroring that the viewer undoes
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif)
    picture = read(data)
    assert picture.rgb.shape == (3, 16, 32)
    corners = levels(picture)[[4, 4, 12], [4, 28, 4]]
    np.testing.assert_allclose(corners, [(255, 0, 0), (0, 255, 0), (0, 0, 0)], atol=30)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_orientation_that_only_xmp_states_is_not_applied(read, format):
    image, options = Image.new("RGB", (32, 16)), {"xmp": XMP}
    if format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options = {"pnginfo": text}
    if format == "TIFF":
        options = {"tiffinfo": {700: XMP}, "compression": "jpeg"}
    data = encoded(image, format, **options)
    assert XMP in data
    picture = read(data)
    assert (picture.width, picture.height) == (32, 16)


def test_outputs_carry_no_metadata_but_the_given_text(read, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    picture = read(encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif, icc_profile=swapped_profile()))
    text = {"plan": '{"gamma1": 0.95}', "title": "Überblick ×4 画像"}
    with Image.open(write_png(picture, tmp_path / "out.png", text)) as image:
        image.load()
        assert not image.getexif() and "icc_profile" not in image.info
        assert image.text == text


def test_broken_exif_is_ignored_with_a_note(read):
    picture = read(encoded(Image.new("RGB", (4, 2)), "PNG", exif=b"Exif\0\0not a TIFF header"))
    assert picture.rgb.shape == (3, 2, 4)
    assert "EXIF" in picture.notes[0]


@pytest.mark.filterwarnings("ignore:.*tag 305")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_broken_tag_does_not_hide_the_orientation(read, format):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0131], exif[0x0132] = "software", "padding" * 9
    data = exif.tobytes().replace(b"\x01\x31\x00\x02", b"\x01\x31\x00\x0b")  # text that claims to be numbers
    picture = read(encoded(Image.new("RGB", (4, 2)), format, exif=data))
    assert picture.rgb.shape == (3, 4, 2)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4)])
def test_an_embedded_profile_is_converted(read, mode, channels):
    pixels = noise(5, 6, channels)
    picture = read(encoded(Image.fromarray(pixels), "PNG", icc_profile=swapped_profile()))
    np.testing.assert_allclose(levels(picture), pixels[..., 2::-1], atol=2)
    assert (picture.alpha is not None) == (mode == "RGBA")
    assert "sRGB" in picture.notes[0]


def test_an_srgb_profile_changes_nothing(read):
    pixels = noise(5, 6)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = read(encoded(Image.fromarray(pixels), "PNG", icc_profile=profile))
    np.testing.assert_allclose(levels(picture), pixels, atol=1e-4)
    assert picture.notes == ()


@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"no profile"), ("L", swapped_profile())])
def test_a_broken_or_unfit_profile_is_ignored_with_a_note(read, mode, profile):
    picture = read(encoded(Image.new(mode, (2, 2), 0), "PNG", icc_profile=profile))
    assert picture.rgb.eq(-1).all()
    assert "profile" in picture.notes[0]


# Writing


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (20, 3)])
def test_a_written_picture_reads_back_exactly(tmp_path, channels, size):
    picture = picture_from_pil(Image.fromarray(noise(*size, channels)))
    again = read_picture(write_png(picture, tmp_path / "out.png"))
    assert torch.equal(again.rgb, picture.rgb)
    assert again.alpha is None if channels == 3 else torch.equal(again.alpha, picture.alpha)


def test_values_are_rounded_and_clamped():
    rgb = torch.tensor([-2.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 2.0]).expand(3, 1, 4)
    assert np.asarray(to_pil(Picture(rgb)))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_values_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(ImageError, match="finite"):
        write_png(Picture(torch.full((3, 2, 2), float("nan"))), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["save", "replace"])
def test_a_failed_write_leaves_what_was_there(monkeypatch, tmp_path, step):
    path = tmp_path / "out.png"
    path.write_bytes(b"older result")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if step == "save":  # fails after the first bytes
        monkeypatch.setattr(PngImagePlugin.ImageFile, "_save", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_png(Picture(torch.zeros(3, 64, 64)), path)
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    assert path.read_bytes() == b"older result"


def test_a_missing_folder_is_said_of_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "out.png"
    with pytest.raises(FileNotFoundError) as refused:
        write_png(Picture(torch.zeros(3, 8, 8)), path)
    assert str(refused.value) == f"[Errno 2] No such file or directory: '{path}'"


# Resizing


@pytest.mark.parametrize("scale", [4, 0.25])
def test_bicubic_agrees_with_pillow(scale):
    pixels = noise(24, 32) // 2 + 64  # no overshoot, which Pillow clips between its two passes
    picture = picture_from_pil(Image.fromarray(pixels))
    size = (int(32 * scale), int(24 * scale))
    expected = np.asarray(to_pil(picture).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    resized = Picture(bicubic(picture.rgb[None], scale)[0])
    np.testing.assert_allclose(levels(resized), expected, atol=1.5)  # Pillow rounds twice


def test_bicubic_stays_in_range_and_never_vanishes():
    checks = (torch.arange(8) % 2 * 2.0 - 1).expand(1, 3, 8, 8)
    assert bicubic(checks).abs().max() <= 1
    assert bicubic(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 4, 4)
    assert bicubic(torch.zeros(1, 3, 1, 9), 0.25).shape == (1, 3, 1, 2)
