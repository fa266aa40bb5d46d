"""Colours that a PNG, AVIF or HEIC states otherwise than by an ICC profile."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from corpus import chunk, encoded, noise, swapped_profile
from PIL import Image, ImageCms

from patchscaler.images import Picture

SRGB = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
DISPLAY_P3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


def levels(picture: Picture) -> np.ndarray:
    return ((picture.rgb + 1) * 127.5).permute(1, 2, 0).numpy()


def stating(image: Image.Image, *chunks: tuple[bytes, bytes], **options) -> bytes:
    """A PNG with chunks before its pixels."""
    data = encoded(image, "PNG", **options)
    return data[:33] + b"".join(chunk(kind, value) for kind, value in chunks) + data[33:]


def gamma(value: int) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", value)


def primaries(values: tuple[int, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *values)


def encode(light: np.ndarray) -> np.ndarray:
    """Levels of sRGB, IEC 61966-2-1."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
def test_a_linear_png_is_as_bright_as_it_says(read, mode):
    image = Image.linear_gradient("L").point(lambda level: 60 + level * 100 // 255).convert(mode)
    plain, linear = (read(stating(image, *chunks)) for chunks in ((), (gamma(100_000),)))
    assert levels(plain).mean() == pytest.approx(110, abs=1)  # as if the chunk were not there
    assert levels(linear).mean() == pytest.approx(encode(levels(plain) / 255).mean(), abs=0.1)
    assert 170 < levels(linear).mean() < 182 and "gamma" in " ".join(linear.notes)


def test_a_linear_png_of_every_level(read):
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    linear = read(stating(image, gamma(100_000)))
    np.testing.assert_allclose(levels(linear)[0, :, 0], encode(np.arange(256) / 255), atol=0.01)


def test_a_linear_16_bit_grey_png(read):
    values = np.arange(0, 65536, 257, dtype=np.uint16)[None] // 3
    linear = read(stating(Image.fromarray(values), gamma(100_000)))
    np.testing.assert_allclose(levels(linear)[..., 1], encode(values / 65535), atol=0.01)


@pytest.mark.parametrize("value", [45455, 45000, 46000])
def test_the_gamma_that_stands_for_srgb_changes_nothing(read, value):
    pixels = noise(9, 11)
    picture = read(stating(Image.fromarray(pixels), gamma(value), primaries(SRGB)))
    np.testing.assert_allclose(levels(picture), pixels, atol=1e-4)
    assert picture.notes == ()


def test_primaries_are_applied(read):
    pixels = np.array([[[234, 51, 35], [128, 128, 128], [117, 251, 76]]], dtype=np.uint8)  # sRGB's red and green in P3
    for chunks in ([primaries(DISPLAY_P3)], [gamma(45455), primaries(DISPLAY_P3)], [(b"cICP", bytes((12, 13, 0, 1)))]):
        picture = read(stating(Image.fromarray(pixels), *chunks))
        np.testing.assert_allclose(levels(picture), [[[255, 0, 0], [128, 128, 128], [0, 255, 0]]], atol=12)
        np.testing.assert_allclose(levels(picture)[0, 1], 128, atol=0.01)


def test_the_order_is_cicp_iccp_srgb_gama(read):
    pixels = noise(9, 11)
    image, linear, srgb = Image.fromarray(pixels), gamma(100_000), (b"sRGB", b"\0")
    cicp = b"cICP", bytes((1, 8, 0, 1))  # linear
    profile = {"icc_profile": swapped_profile()}
    np.testing.assert_allclose(levels(read(stating(image, srgb, linear))), pixels, atol=1e-4)
    np.testing.assert_allclose(levels(read(stating(image, linear, **profile))), pixels[..., ::-1], atol=2)
    for options in ({}, profile):
        picture = read(stating(image, cicp, srgb, **options))
        np.testing.assert_allclose(levels(picture), encode(pixels / 255), atol=0.01)
    same = read(stating(image, (b"cICP", bytes((1, 13, 0, 1))), **profile))
    np.testing.assert_allclose(levels(same), pixels, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((9, 16, 0, 1), "PQ"),
        ((9, 18, 0, 1), "HLG"),
        ((1, 1, 0, 1), "BT.709"),
        ((1, 99, 0, 1), "number 99"),
        ((22, 13, 0, 1), "primaries that the file states (number 22)"),
        ((1, 13, 1, 1), "full-range"),
        ((1, 13, 0, 0), "full-range"),
    ],
)
def test_what_of_cicp_is_not_applied_is_noted_and_the_next_counts(read, values, named):
    pixels = noise(9, 11)
    picture = read(stating(Image.fromarray(pixels), (b"cICP", bytes(values)), gamma(100_000)))
    np.testing.assert_allclose(levels(picture), encode(pixels / 255), atol=0.01)
    assert named in picture.notes[0] and "not applied" in picture.notes[0]


@pytest.mark.parametrize(
    "broken",
    [gamma(0), gamma(2**32 - 1), primaries((0,) * 8), primaries((31270, 32900) * 4), primaries((2**32 - 1,) * 8)]
    + [primaries((90_000, 9_000, *SRGB[2:]))],
)
def test_chunks_that_cannot_be_right_are_ignored_with_a_note(read, broken):
    pixels = noise(9, 11)
    picture = read(stating(Image.fromarray(pixels), broken))
    np.testing.assert_allclose(levels(picture), pixels, atol=1e-4)
    assert "cannot be right" in picture.notes[0]


def test_avif_states_primaries_too(read):
    pixels = np.full((16, 16, 3), (234, 51, 35), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), "AVIF", quality=100, subsampling="4:4:4")
    place = data.index(b"colrnclx") + 8
    plain = levels(read(data))
    wide = read(data[:place] + struct.pack(">HH", 12, 13) + data[place + 4 :])
    assert plain.mean((0, 1))[0] < 238 and levels(wide).mean((0, 1))[0] > 248
    hdr = read(data[:place] + struct.pack(">HH", 9, 16) + data[place + 4 :])
    assert "PQ" in hdr.notes[0]


def test_a_grey_profile_is_applied_and_grey_stays(read):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture = read(encoded(Image.new("L", (2, 2), 90), "PNG", icc_profile=lab))  # does not fit
    assert picture.is_grey() and "profile" in picture.notes[0]
