"""What the reader of pictures refuses, how fast, and that nothing but an ImageError ever comes out of it."""

from __future__ import annotations

import gc
import random
import re
import struct
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
from corpus import cases, chunk, encoded, noise, png, with_comments, with_scans
from PIL import Image

from patchscaler.images import ImageError, picture_from_pil, read_picture
from patchscaler.limits import LimitError, Limits

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of bombs and of broken tags
FUZZED = 20_000


@contextmanager
def at_most(seconds: float, megabytes: float):
    """Holds the block to its CPU time and to its growth of the peak memory, that of C code included."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("peak memory can only be measured on Linux")
    reset.write_text("5")
    before, began = kilobytes("VmRSS"), time.process_time()
    gc.disable()  # what it would look through is what other tests have left
    try:
        yield
    finally:
        gc.enable()
    took, growth = time.process_time() - began, (kilobytes("VmHWM") - before) / 1024
    assert took < seconds and growth < megabytes, f"{took:.3f} s, {growth:.0f} MB"


def kilobytes(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


# The corpus


@pytest.mark.parametrize("case", cases(), ids=lambda case: ascii(case.name)[:40])
def test_every_file_of_the_corpus_is_read_or_refused_as_it_must_be(case, tmp_path):
    path = tmp_path / case.name
    path.write_bytes(case.data)
    if case.refused is None:
        picture = read_picture(path)
        assert (picture.width, picture.height) == case.size
        assert (picture.alpha is not None) == case.alpha
        assert case.note in " ".join(picture.notes)
        assert picture.rgb.isfinite().all() and picture.rgb.abs().max() <= 1
    else:
        with pytest.raises(ImageError, match=re.escape(case.refused)) as refusal:
            read_picture(path)
        assert len(str(refusal.value)) < 200 and str(tmp_path) not in str(refusal.value)


def test_the_corpus_is_large_and_its_names_do_not_collide():
    assert len(cases()) >= 60
    assert len({Path(case.name).stem.casefold() for case in cases()}) == len(cases())
    assert max(len(case.data) for case in cases()) < 600_000


@pytest.mark.parametrize("case", [case for case in cases() if "bomb" in case.name], ids=lambda case: case.name)
def test_a_bomb_costs_neither_time_nor_memory(case, read):
    read(encoded(Image.new("RGB", (4, 4)), "PNG"))  # what is loaded only once does not count
    with at_most(seconds=0.2, megabytes=50), pytest.raises(ImageError):
        read(case.data)


def test_a_real_picture_over_the_limit_is_refused_before_it_is_decoded(read):
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        data = encoded(Image.new("L", (2048, 1954)).convert("L" if format != "WEBP" else "RGB"), format)
        with at_most(seconds=0.2, megabytes=50), pytest.raises(ImageError, match="2048×1954 is 4,001,792 pixels"):
            read(data)


# Refusals


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", bytes(range(256)) * 40, b"%PDF-1.7\n", b"\0\0\0\x14ftypmif1\0\0\0\0mif1"]
    + [b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    + [encoded(Image.new("RGB", (4, 4)), format) for format in ("PPM", "ICO", "TGA", "EPS", "JPEG2000")],
)
def test_other_files_are_refused(read, data):
    with pytest.raises(ImageError, match="PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF"):
        read(data)


def test_paths_that_cannot_be_opened_are_refused(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path, "nul\0.png", "x" * 5000):
        with pytest.raises(ImageError, match="cannot open"):
            read_picture(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(read, format, kept):
    data = encoded(Image.fromarray(noise(60, 60)), format)
    with pytest.raises(ImageError):
        read(data[: int(kept * len(data))])


@pytest.mark.parametrize("cut", [12, 16, 20])
def test_a_png_without_its_end_is_refused(read, cut):
    data = encoded(Image.fromarray(noise(9, 9)), "PNG")
    with pytest.raises(ImageError):
        read(data[:-cut])


def test_a_png_with_a_wrong_checksum_is_refused(read):
    data = bytearray(encoded(Image.fromarray(noise(9, 9)), "PNG"))
    data[-13] ^= 1  # last byte before IEND: the checksum of the pixel data
    with pytest.raises(ImageError, match="checksum"):
        read(bytes(data))


def test_the_limit_is_inclusive_and_named(read):
    data = encoded(Image.new("L", (10, 5)), "PNG")
    assert read(data, max_input_pixels=50).width == 10
    with pytest.raises(ImageError, match="10×5 is 50 pixels; the limit is 49"):
        read(data, max_input_pixels=49)
    with pytest.raises(ImageError, match="4,000,000"):
        picture_from_pil(Image.new("1", (2001, 2000)))


@pytest.mark.parametrize("count", [90, 110])
def test_a_progressive_jpeg_may_have_a_hundred_scans(read, count):
    data = with_scans(encoded(Image.fromarray(noise(8, 8)), "JPEG", progressive=True), count)
    if count == 90:
        assert read(data).width == 8
    else:
        with pytest.raises(ImageError, match="more scans than any picture needs; the limit is 100"):
            read(data)


def test_a_gif_may_have_comments(read):
    assert read(with_comments(encoded(Image.new("P", (8, 8)), "GIF"), 50)).width == 8


def test_a_text_bomb_is_named(read):
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))
    with pytest.raises(ImageError, match="too large"):
        read(png(1, 1, 8, 0, b"\0\0", bomb))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="0×5"):
        picture_from_pil(Image.new("RGB", (0, 5)))


# Limits of the environment


def test_the_defaults_are_those_of_the_page():
    assert Limits.from_environment() == Limits(4_000_000, 64_000_000, 20 * 1024**2)


def test_the_environment_moves_the_limits(read, monkeypatch):
    data = encoded(Image.fromarray(noise(10, 10)), "BMP")
    monkeypatch.setenv("PATCHSCALER_MAX_INPUT_PIXELS", "99")
    with pytest.raises(ImageError, match="10×10 is 100 pixels; the limit is 99"):
        read(data)
    assert read(data, max_input_pixels=100).width == 10
    monkeypatch.setenv("PATCHSCALER_MAX_INPUT_PIXELS", "5000000")
    monkeypatch.setenv("PATCHSCALER_MAX_OUTPUT_PIXELS", "1599")
    with pytest.raises(ImageError, match="1,600 pixels after upscaling; the limit is 1,599"):
        read(data)
    monkeypatch.setenv("PATCHSCALER_MAX_OUTPUT_PIXELS", "80000000")
    assert picture_from_pil(Image.new("1", (2001, 2000))).width == 2001
    monkeypatch.setenv("PATCHSCALER_MAX_FILE_BYTES", str(len(data)))
    assert read(data).width == 10
    monkeypatch.setenv("PATCHSCALER_MAX_FILE_BYTES", str(len(data) - 1))
    with pytest.raises(ImageError, match="too large; the limit is 373 bytes"):
        read(data)


@pytest.mark.parametrize("name", ["INPUT_PIXELS", "OUTPUT_PIXELS", "FILE_BYTES"])
@pytest.mark.parametrize("value", ["many", "0", "-5", "1e6", "4.5", " 7", "٣", "9" * 19])
def test_a_bad_limit_is_named(read, monkeypatch, name, value):
    monkeypatch.setenv(f"PATCHSCALER_MAX_{name}", value)
    with pytest.raises(LimitError, match=re.escape(f"PATCHSCALER_MAX_{name}={value!r} is not a whole number from 1")):
        read(encoded(Image.new("L", (2, 2)), "PNG"))


def test_a_file_over_20_mb_is_refused_without_being_read_whole(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.new("RGB", (4, 4)), "PNG"))
    with path.open("r+b") as file:
        file.truncate(2**31)  # sparse: takes no room on the disk
    with (
        at_most(seconds=0.2, megabytes=50),
        pytest.raises(ImageError, match="too large; the limit is 20,971,520"),
    ):
        read_picture(path)


# Fuzzing


def mutated(seed: bytes, other: bytes, draw: random.Random) -> bytes:
    """A few changes of the kinds that break parsers: bits, lengths, cuts, repeats, and parts of another file."""
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        place = draw.randrange(len(data) + 1) if draw.random() < 0.6 else draw.randrange(min(len(data), 64) + 1)
        end = place + draw.randrange(1, 17)
        match draw.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place : place + 1] = bytes([draw.choice((0, 1, 127, 128, 255))])
            case 2:
                values = (0, 1, 2, 255, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1)
                data[place : place + 4] = struct.pack(draw.choice("<>") + "I", draw.choice(values))
            case 3:
                del data[place:]
            case 4:
                del data[place:end]
            case 5:
                data[place:place] = data[place:end] * draw.choice((1, 2, 50))
            case _:
                start = draw.randrange(len(other) + 1)
                data[place:place] = other[start : start + 40]
    return bytes(data)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG as it is, but for checksums that hold, so that the fuzzer gets past them."""
    place, parts = 8, [data[:8]]
    while place + 12 <= len(data):
        length = min(int.from_bytes(data[place : place + 4], "big"), len(data) - place - 12)
        parts.append(chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return b"".join(parts)


@pytest.mark.slow
def test_no_mutated_file_raises_anything_but_an_image_error(tmp_path):
    seeds = [case.data for case in cases() if 0 < len(case.data) < 3000]
    draw, path, read, refused = random.Random(5), tmp_path / "input", 0, 0
    for index in range(FUZZED):
        seed = seeds[index % len(seeds)]
        data = mutated(seed, draw.choice(seeds), draw)
        if seed.startswith(b"\x89PNG") and draw.random() < 0.7:
            data = with_right_checksums(data)
        path.write_bytes(data)
        try:
            picture = read_picture(path, max_input_pixels=4096)
        except ImageError as refusal:
            refused += 1
            assert len(str(refusal)) < 200 and str(tmp_path) not in str(refusal)
        except BaseException as error:
            raise AssertionError(f"input {index}: {data!r}") from error
        else:
            read += 1
            assert 0 < picture.width * picture.height <= 4096
            assert picture.rgb.isfinite().all() and picture.rgb.abs().max() <= 1
    assert read > FUZZED / 20 and refused > FUZZED / 20  # neither all too broken nor all untouched
