"""The command `upscale`, on a tiny random pipeline. Files: test_files.py. Those that evaluate: test_evaluation.py."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import QUICK, save_image, written
from corpus import write as write_corpus
from PIL import Image

from patchscaler import __version__
from patchscaler.__main__ import main
from patchscaler.loading import load_pipeline
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan

STAGES = {"encode", "restore", "retrieve", "refine", "decode", "color"}


def test_one_file(upscale, tmp_path, capsys):
    source, report = save_image(tmp_path / "a.png"), tmp_path / "out" / "report.json"
    assert upscale("a.png", options=["--seed", 7, "--report", report]) == 0
    assert written(tmp_path) == ["a.png", "report.json"]
    assert "160×96" in capsys.readouterr().out

    with Image.open(tmp_path / "out" / "a.png") as image:
        assert (image.mode, image.size, image.format) == ("RGB", (160, 96), "PNG")
        plan = SamplingPlan.from_json(image.text["plan"])
        assert (plan.start, plan.steps, plan.gamma1) == (
            (40, 70, 100),
            (1, 2, 3),
            SamplingPlan.paper().gamma1,
        )
        assert (image.text["seed"], image.text["Software"]) == ("7", f"PatchScaler {__version__}")

    entry = json.loads(report.read_text())
    assert (entry["input"], entry["output"]) == (str(source), str(tmp_path / "out" / "a.png"))
    assert (entry["seed"], entry["device"], entry["version"]) == (7, "cpu", __version__)
    assert entry["dtype"] in ("float32", "bfloat16")
    assert SamplingPlan.from_json(json.dumps(entry["plan"])) == plan
    assert [group["name"] for group in entry["groups"]] == ["simple", "medium", "hard"]
    for group, start, steps in zip(entry["groups"], plan.start, plan.steps):
        assert set(group) == {"name", "patches", "start", "steps", "evaluations", "seconds"}
        assert (group["start"], group["steps"]) == (start, steps)
        assert group["evaluations"] == steps * group["patches"]
    assert set(entry["stages"]) == STAGES


def test_same_seed_same_file(upscale, tmp_path):
    save_image(tmp_path / "a.png")
    files = []
    for seed in (1, 1, 2):
        assert upscale("a.png", options=["--seed", seed]) == 0
        files.append((tmp_path / "out" / "a.png").read_bytes())
    assert files[0] == files[1] != files[2]


def test_without_the_color_fix(upscale, tmp_path):
    save_image(tmp_path / "a.png")
    report, seen = tmp_path / "report.json", []
    for options in ([], ["--no-color-fix"]):
        assert upscale("a.png", options=[*options, "--report", report]) == 0
        with Image.open(tmp_path / "out" / "a.png") as image:
            seen.append((image.text.get("color_fix"), json.loads(report.read_text())["color_fix"], image.tobytes()))
    (said, reported, fixed), (said_off, reported_off, raw) = seen
    assert (said, reported) == (None, True) and (said_off, reported_off) == ("off", False) and fixed != raw


def test_a_precision_by_option_or_environment(upscale, tmp_path, monkeypatch, capsys):
    save_image(tmp_path / "a.png")
    report = tmp_path / "report.json"
    monkeypatch.setenv("PATCHSCALER_DTYPE", "bfloat16")
    for options, expected in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        assert upscale("a.png", options=[*options, "--report", report]) == 0
        assert json.loads(report.read_text())["dtype"] == expected
    monkeypatch.setenv("PATCHSCALER_DTYPE", "int8")
    with pytest.raises(SystemExit):
        upscale("a.png")
    assert "dtype 'int8' is none of auto, float32, bfloat16, float16" in capsys.readouterr().err


def test_alpha_is_kept(upscale, tmp_path):
    save_image(tmp_path / "a.png", "RGBA")
    assert upscale("a.png") == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert (image.mode, image.size) == ("RGBA", (160, 96))


def test_folder_with_a_bad_file(upscale, tmp_path, capsys):
    save_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    save_image(tmp_path / "in" / "c.webp")
    report = tmp_path / "report.json"
    assert upscale("in", "missing.png", options=["--report", report]) == 1
    assert written(tmp_path) == ["a.png", "c.png"]
    entries = {Path(entry["input"]).name: entry for entry in json.loads(report.read_text())}
    assert list(entries) == ["a.png", "b.jpg", "c.webp", "missing.png"]
    assert [name for name, entry in entries.items() if "groups" in entry] == ["a.png", "c.webp"]
    assert [name for name, entry in entries.items() if "error" in entry] == ["b.jpg", "missing.png"]
    errors = capsys.readouterr().err
    assert "missing.png: cannot open the file: No such file or directory\n" in errors
    assert "b.jpg: " in errors and "notes.txt" not in errors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow warns of bombs and of broken tags
def test_the_whole_corpus_in_one_run(weights, tmp_path, capfd):
    (tmp_path / "in").mkdir()
    files = write_corpus(tmp_path / "in")
    arguments = ["--device", "cpu", "--weights", str(weights), "--start", "1,1,1", "--steps", "1,1,1"]
    assert main(["upscale", "-o", str(tmp_path / "out"), *arguments, "--", *(str(path) for path, _ in files)]) == 1
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and "Error" not in errors
    for path, case in files:
        lines = [line for line in errors.splitlines() if line.startswith(f"{path}: ")]
        if case.refused is not None:
            assert len(lines) == 1 and case.refused in lines[0], case.name
            continue
        assert case.note in " ".join(lines)
        with Image.open(tmp_path / "out" / f"{path.stem}.png") as image:
            image.load()
            assert image.size == (4 * case.size[0], 4 * case.size[1]), case.name
            assert image.mode == ("RGBA" if case.alpha else "RGB"), case.name
            assert not image.getexif() and set(image.info) == {"Software", "plan", "seed", "input_sha256"}
    assert written(tmp_path) == sorted(f"{path.stem}.png" for path, case in files if case.refused is None)


def test_a_bad_limit_is_said_for_the_file(upscale, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATCHSCALER_MAX_INPUT_PIXELS", "lots")
    save_image(tmp_path / "a.png")
    assert upscale("a.png") == 1
    assert "PATCHSCALER_MAX_INPUT_PIXELS='lots' is not a whole number" in capsys.readouterr().err


def test_failure_while_sampling_leaves_nothing(upscale, tmp_path, monkeypatch, capsys):
    refine = PatchScalerPipeline.refine
    runs = []

    def refine_once_badly(self, *args, **kwargs):
        runs.append(args)
        events = refine(self, *args, **kwargs)
        yield next(events)
        if len(runs) == 1:
            raise RuntimeError("out of memory")
        yield from events

    monkeypatch.setattr(PatchScalerPipeline, "refine", refine_once_badly)
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png")
    assert upscale("a.png", "b.png", options=["--save-stages"]) == 1
    assert written(tmp_path) == ["b.coarse.png", "b.png", "b.priors.png", "b.qmap.png"]
    assert "a.png: out of memory" in capsys.readouterr().err


def test_memory_that_runs_out_costs_time_or_ends_with_advice(upscale, tmp_path, memory_for, capsys):
    save_image(tmp_path / "a.png")
    assert upscale("a.png") == 0
    expected = (tmp_path / "out" / "a.png").read_bytes()
    sizes = memory_for(1)
    assert upscale("a.png") == 0 and max(sizes) > 1
    assert (tmp_path / "out" / "a.png").read_bytes() == expected
    (tmp_path / "out" / "a.png").unlink()
    memory_for(0)
    assert upscale("a.png") == 1 and written(tmp_path) == []
    assert "a.png: not enough memory on cpu, even in the smallest pieces: close" in capsys.readouterr().err
    memory_for(10**6)
    assert upscale("a.png") == 0 and written(tmp_path) == ["a.png"]


def test_stages(upscale, tmp_path):
    save_image(tmp_path / "a.gif")
    assert upscale("a.gif", options=["--save-stages"]) == 0
    assert written(tmp_path) == ["a.coarse.png", "a.png", "a.priors.png", "a.qmap.png"]
    for stage in ("coarse", "qmap"):
        with Image.open(tmp_path / "out" / f"a.{stage}.png") as image:
            assert image.size == (160, 96)
    with Image.open(tmp_path / "out" / "a.priors.png") as image:
        assert image.width > 3 * 128  # the patch and its priors side by side


def test_plan_from_a_file_with_one_value_replaced(upscale, tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "plan.json").write_text(SamplingPlan(0.6, 0.1, (5, 6, 7), (1, 1, 1)).to_json())
    report = tmp_path / "report.json"
    assert upscale("a.png", options=["--plan", tmp_path / "plan.json", "--gamma2", 0.2, "--report", report]) == 0
    assert json.loads(report.read_text())["plan"] == {
        "gamma1": 0.6,
        "gamma2": 0.2,
        "start": [40, 70, 100],  # from QUICK
        "steps": [1, 2, 3],
    }


def test_names_that_the_terminal_cannot_show(upscale, tmp_path, monkeypatch):
    names = ["日本語.png", os.fsdecode(b"caf\xe9.png"), "café.png"]
    for name in names:
        save_image(tmp_path / name)
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, "cp1252"))
    report = tmp_path / "out" / "report.json"
    assert upscale(*names, options=["--report", report]) == 0
    assert {*names} < {*written(tmp_path)}
    assert [Path(entry["input"]).name for entry in json.loads(report.read_text())] == names
    assert b"\\u65e5\\u672c\\u8a9e.png -> " in shown.getvalue() and b"caf\xe9.png -> " in shown.getvalue()


@pytest.mark.slow
def test_nobody_reads_what_is_printed(weights, tmp_path):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name)
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--device", "cpu", "--weights", str(weights), *QUICK, "--report", "report.json", "-o", "out"]
    command = [sys.executable, "-m", "patchscaler", "upscale", "a.png", "b.png", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipes = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.run(command, cwd=tmp_path, env=environment, **pipes)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")
    assert written(tmp_path) == ["a.png", "b.png"]
    assert ["groups" in entry for entry in json.loads((tmp_path / "report.json").read_text())] == [True, True]


def test_progress_is_shown_on_a_terminal_only(upscale, tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name)
    assert upscale("a.png", "b.png") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert upscale("a.png", "b.png") == 0
    shown = capsys.readouterr().err
    assert "[1/2] a.png, 2 patches" in shown and "[2/2] b.png, 2 patches" in shown
    assert upscale("a.png", "b.png", options=["--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_loading_shows_no_bars(tiny_pipeline, tmp_path, capfd):
    tiny_pipeline.save_pretrained(tmp_path / "weights", max_shard_size="50KB")
    assert list((tmp_path / "weights").glob("*/*-of-*.safetensors"))
    capfd.readouterr()
    load_pipeline(tmp_path / "weights", "cpu")
    assert capfd.readouterr().err == ""


def test_several_devices_write_what_one_does(upscale, weights, tmp_path):
    source = save_image(tmp_path / "a.png")
    assert upscale("a.png") == 0
    options = [*QUICK, "--devices", "cpu,cpu", "--weights", str(weights)]
    assert main(["upscale", str(source), "-o", str(tmp_path / "two"), *options]) == 0
    one, two = (np.asarray(Image.open(tmp_path / folder / "a.png")) for folder in ("out", "two"))
    assert np.array_equal(one, two)


def test_bad_weights(tmp_path, capsys):
    source = save_image(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="2"):
        main(["upscale", str(source), "-o", str(tmp_path / "out"), "--weights", str(tmp_path)])
    assert "model_index.json" in capsys.readouterr().err
    assert written(tmp_path) == []


@pytest.mark.slow
def test_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "patchscaler"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "usage: patchscaler" in run.stderr
