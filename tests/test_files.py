"""Which files the command `upscale` makes of which, and what it leaves alone."""

import json
import os
import sys
from pathlib import Path

import pytest
from command import QUICK, save_image, written
from PIL import Image

from patchscaler.__main__ import main


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a.png", "in/a.jpg"], [], "would be both the output of"),
        (["a.png", "a.png"], [], "is named twice"),
        (["a.png", "in/A.bmp"], [], "would be both the output of"),  # one file on Windows and macOS
        (["a.png", "in/a.coarse.png"], ["--save-stages"], "the coarse stage of"),
        (["out/b.png"], [], "would be both the input"),
        (["a.png"], ["--report", "{}/out/a.png"], "would be both the report"),
        (["a.png"], ["--report", "{}/none/r.json"], "none does not exist"),
        (["empty"], [], "file in the folder"),
        (["a.png"], ["--plan", "slow"], "'slow' is neither one of paper, fast, balanced, uniform nor a file"),
        (["a.png"], ["--plan", "{}/bad.json"], "exactly the keys"),
        (["a.png"], ["--gamma1", "0.2"], "gamma1=0.2 must be above gamma2=0.75"),
        (["a.png"], ["--gamma2", "nan"], "gamma2=nan"),
        (["a.png"], ["--start", "1,2"], "'1,2' is not three whole numbers"),
        (["a.png"], ["--start", "900,700,1000"], "falls from simple to hard"),
        (["a.png"], ["--steps", "0,1,2"], "steps=0 of the simple group"),
        (["a.png"], ["--seed", "-1"], "-1 is outside 0..2^63-1"),
        (["a.png"], ["--seed", "1.5"], "invalid"),
        (["a.png"], ["--batch-size", "0"], "0 is less than 1"),
        (["a.png"], ["--devices", "cpu,cpu"], "--device and --devices are both given"),
        (["a.png"], ["--device", "abacus"], "abacus"),
        (["a.png"], ["--suffix", "/x4"], "'/x4' cannot be part of a file's name"),
        (["b.jpg"], [], "out/b.png exists and is not PatchScaler's output of"),
        (["a.png"], ["--report", "{}/in/a.jpg"], "in/a.jpg exists and is not a report"),
        ([f"{'x' * 246}.png"], ["--save-stages"], "would have 257 bytes; the limit is 255"),
        ([f"{'é' * 122}.png"], ["--suffix", "_upscaled"], "would have 257 bytes; the limit is 255"),
        (["others"], [], "photo.jxl: skipped, as .jxl files are not read"),
        (["a.png"], ["--suffix", "_dir", "--overwrite"], "out/a_dir.png is a folder"),
        (["a.png"], ["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_usage_errors_run_nothing(upscale, tmp_path, names, options, message, capsys):
    for name in ("a.png", "b.jpg", "in/a.jpg", "in/A.bmp", "in/a.coarse.png", "out/b.png"):
        save_image(tmp_path / name)
    unrelated = (tmp_path / "out" / "b.png").read_bytes()
    for name in ("empty", "others", "out/a_dir.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "others" / "photo.jxl").write_bytes(b"")
    (tmp_path / "bad.json").write_text('{"gamma1": 0.9}')
    with pytest.raises(SystemExit) as stop:
        upscale(*names, options=[option.format(tmp_path) for option in options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert written(tmp_path) == ["a_dir.png", "b.png"] and (tmp_path / "out" / "b.png").read_bytes() == unrelated


def test_only_own_outputs_of_the_same_input_are_replaced(upscale, tmp_path, capsys):
    save_image(tmp_path / "IMG_1.jpg")
    original = save_image(tmp_path / "out" / "IMG_1.png").read_bytes()
    with pytest.raises(SystemExit):
        upscale("IMG_1.jpg")
    assert (tmp_path / "out" / "IMG_1.png").read_bytes() == original
    assert upscale("IMG_1.jpg", options=["--suffix", "_x4", "--save-stages"]) == 0
    assert "IMG_1_x4.png" in written(tmp_path) and "IMG_1_x4.qmap.png" in written(tmp_path)
    made = (tmp_path / "out" / "IMG_1_x4.png").read_bytes()
    assert upscale("IMG_1.jpg", options=["--suffix", "_x4", "--seed", 1, "--save-stages"]) == 0
    assert (tmp_path / "out" / "IMG_1_x4.png").read_bytes() != made

    save_image(tmp_path / "IMG_1.jpg", size=(16, 16))  # another picture of the same name
    with pytest.raises(SystemExit):
        upscale("IMG_1.jpg", options=["--suffix", "_x4"])
    assert (tmp_path / "out" / "IMG_1.png").read_bytes() == original
    assert upscale("IMG_1.jpg", options=["--overwrite"]) == 0
    with Image.open(tmp_path / "out" / "IMG_1.png") as image:
        assert image.size == (64, 64)


def test_a_suffix_lets_one_name_with_two_extensions_through(upscale, tmp_path):
    for name in ("a.png", "A.jpg", "b.png"):
        save_image(tmp_path / "in" / name)
    with pytest.raises(SystemExit):
        upscale("in")
    assert upscale("in", options=["--suffix", "_x4"]) == 0
    assert written(tmp_path) == ["A_jpg_x4.png", "a_png_x4.png", "b_x4.png"]


def test_finished_outputs_are_skipped(upscale, tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name)
    assert upscale("a.png") == 0
    stamp = (tmp_path / "out" / "a.png").stat().st_mtime_ns
    report = tmp_path / "report.json"
    assert upscale("a.png", "b.png", options=["--skip-existing", "--report", report]) == 0
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == stamp and written(tmp_path) == ["a.png", "b.png"]
    assert "a.png: its output" in capsys.readouterr().out
    assert ["skipped" in entry for entry in json.loads(report.read_text())] == [True, False]
    assert upscale("a.png", options=["--skip-existing", "--seed", 1]) == 0  # that is another picture
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns > stamp
    for options in (["--save-stages"], ["--no-color-fix"], ["--save-stages"]):
        stamp = (tmp_path / "out" / "b.png").stat().st_mtime_ns
        assert upscale("b.png", options=["--skip-existing", *options]) == 0
        assert (tmp_path / "out" / "b.png").stat().st_mtime_ns > stamp
    assert "b.qmap.png" in written(tmp_path)
    monkeypatch.setattr("patchscaler.cli.load_pipeline", None)
    assert upscale("b.png", options=["--skip-existing", "--save-stages"]) == 0
    assert upscale("a.png", options=["--skip-existing", "--seed", 1]) == 0


def test_subfolders(upscale, weights, tmp_path):
    for name in ("in/a.png", "in/sub/a.png", "in/.hidden/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(tmp_path / name)
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    assert upscale("in", options=["--recursive"]) == 0
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert made == ["a.png", "sub/a.png"]
    assert upscale("in") == 0  # only what lies directly in it
    for _ in range(2):  # what the first run wrote is not an input of the second
        inside = [str(tmp_path / "in"), "-o", str(tmp_path / "in"), "--recursive", "--suffix", "_x4"]
        assert main(["upscale", *inside, "--device", "cpu", "--weights", str(weights), *QUICK]) == 0
        assert sorted(path.name for path in (tmp_path / "in").rglob("*_x4*")) == ["a_x4.png", "a_x4.png"]


def test_what_is_no_image_of_a_folder_is_left_out_and_other_images_are_named(upscale, tmp_path, capsys):
    save_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "._a.png").write_bytes(b"a sidecar of macOS")
    (tmp_path / "in" / "dir.png").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "b.JXL").write_bytes(b"\xff\x0a")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    report = tmp_path / "report.json"
    assert upscale("in", options=["--report", report]) == 0
    assert written(tmp_path) == ["a.png"]
    errors = capsys.readouterr().err
    assert errors == f"{tmp_path}/in/b.JXL: skipped, as .jxl files are not read\n"
    entries = {Path(entry["input"]).name: entry.get("skipped") for entry in json.loads(report.read_text())}
    assert entries == {"a.png": None, "b.JXL": "skipped, as .jxl files are not read"}
    assert upscale("in", "in/b.JXL") == 1  # named


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no file, not even root's")
def test_an_output_folder_that_cannot_be_written_is_found_first(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr("patchscaler.cli.load_pipeline", None)
    source = save_image(tmp_path / "a.png")
    for folder in ("/proc", str(source)):
        with pytest.raises(SystemExit, match="2"):
            main(["upscale", str(source), "-o", folder, "--weights", str(weights)])
        assert f"the folder {folder} cannot be written to: " in capsys.readouterr().err
