"""`upscale --large` and the TIFF that it writes band by band."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from patchscaler.__main__ import main
from patchscaler.images import read_picture
from patchscaler.large import write_tiff


def levels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(1, 1, 3), (256, 256, 4), (257, 300, 3), (700, 255, 4)])
@pytest.mark.parametrize("rows", [1024, 512, 256])
def test_bands_become_one_file(tmp_path, shape, rows):
    image = levels(*shape)
    bands = (image[top : top + rows] for top in range(0, shape[0], rows))
    path = write_tiff(bands, tmp_path / "a.tif", shape, "made by a test")
    with tifffile.TiffFile(path) as file:
        (page,) = file.pages
        assert page.is_tiled and page.description == "made by a test" and not file.is_bigtiff
        assert np.array_equal(page.asarray(), image)
    with Image.open(path) as other:  # another reader, libtiff
        assert other.mode == ("RGB", "RGBA")[shape[2] - 3] and np.array_equal(np.asarray(other), image)


def test_nothing_is_left_when_the_picture_fails(tmp_path):
    def bands():
        yield levels(300, 20, 3)
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        write_tiff(bands(), tmp_path / "a.tif", (600, 20, 3))
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def upscale(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "weights")

    def run(*options):
        plan = ["--start", "40,70,100", "--steps", "1,2,3", "--device", "cpu"]
        return main(["upscale", *map(str, options), "--weights", str(tmp_path / "weights"), *plan])

    return run


def test_a_picture_beyond_the_limit_is_written_as_tiff(upscale, tmp_path, monkeypatch, capsys):
    source, small = tmp_path / "photo.png", tmp_path / "small.png"
    Image.fromarray(levels(37, 60, 4)).save(source)
    Image.fromarray(levels(5, 6, 3)).save(small)
    assert upscale(source, "-o", tmp_path / "whole") == 0
    monkeypatch.setenv("PATCHSCALER_MAX_INPUT_PIXELS", "1000")
    assert upscale(source, "-o", tmp_path / "refused") == 1
    assert "37" in (said := capsys.readouterr().err) and "the limit is 1,000" in said and "--large" in said
    report = tmp_path / "report.json"
    assert upscale(source, small, "-o", tmp_path / "out", "--large", "--report", report) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo.tif", "small.png"}
    stamp = (tmp_path / "out" / "photo.tif").stat().st_mtime_ns
    again = (source, small, "-o", tmp_path / "out", "--large")
    assert upscale(*again, "--skip-existing") == 0 and (tmp_path / "out" / "photo.tif").stat().st_mtime_ns == stamp
    assert upscale(*again) == 0 and (tmp_path / "out" / "photo.tif").stat().st_mtime_ns > stamp
    (made, _) = json.loads(report.read_text())
    assert made["output"].endswith("photo.tif") and sum(group["patches"] for group in made["groups"]) == 2 * 3
    monkeypatch.undo()
    whole, banded = (read_picture(tmp_path / name) for name in ("whole/photo.png", "out/photo.tif"))
    assert (whole.rgb - banded.rgb).abs().max() <= 1.001 / 127.5
    assert (whole.alpha - banded.alpha).abs().max() <= 1.001 / 255
