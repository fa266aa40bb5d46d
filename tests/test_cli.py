"""The command `upscale`, on a tiny random pipeline. Those that evaluate: test_evaluation.py."""

import json
import subprocess
import sys

import numpy as np
import pytest
from corpus import write as write_corpus
from PIL import Image

from patchscaler import __version__
from patchscaler.__main__ import main
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan

QUICK = ("--start", "40,70,100", "--steps", "1,2,3")
STAGES = {"encode", "restore", "retrieve", "refine", "decode", "color"}


@pytest.fixture
def upscale(weights, tmp_path):
    """Run the command on names inside tmp_path, writing to tmp_path/out."""

    def run(*names, options=()):
        paths = [str(tmp_path / name) for name in names]
        options = [str(option) for option in (*QUICK, *options)]
        out = str(tmp_path / "out")
        return main(["upscale", *paths, "-o", out, "--device", "cpu", "--weights", str(weights), *options])

    return run


def save_image(path, mode="RGB", size=(40, 24)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_one_file(upscale, tmp_path, capsys):
    source, report = save_image(tmp_path / "a.png"), tmp_path / "out" / "report.json"
    assert upscale("a.png", options=["--seed", 7, "--report", report]) == 0
    assert written(tmp_path) == ["a.png", "report.json"]
    assert "160x96" in capsys.readouterr().out

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
    assert [entry["input"][-6:] for entry in json.loads(report.read_text())] == ["/a.png", "c.webp"]
    errors = capsys.readouterr().err
    assert "b.jpg: " in errors and "missing.png: " in errors and "notes.txt" not in errors


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
            assert not image.getexif() and set(image.info) == {"Software", "plan", "seed"}
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
    """Row 25 of the table that tests/service.py names."""
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


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a.png", "in/a.jpg"], [], "would be both the output of"),
        (["a.png", "a.png"], [], "would be both the output of"),
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
        (["a.png"], ["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_usage_errors_run_nothing(upscale, tmp_path, names, options, message, capsys):
    for name in ("a.png", "in/a.jpg", "in/A.bmp", "in/a.coarse.png", "out/b.png"):
        save_image(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"gamma1": 0.9}')
    with pytest.raises(SystemExit) as stop:
        upscale(*names, options=[option.format(tmp_path) for option in options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert written(tmp_path) == ["b.png"]


def test_several_devices_write_what_one_does(upscale, weights, tmp_path):
    source = save_image(tmp_path / "a.png")
    assert upscale("a.png") == 0
    options = [*QUICK, "--devices", "cpu,cpu", "--weights", str(weights)]
    assert main(["upscale", str(source), "-o", str(tmp_path / "two"), *options]) == 0
    one, two = (np.asarray(Image.open(tmp_path / folder / "a.png")) for folder in ("out", "two"))
    assert np.array_equal(one, two)


def test_bad_weights(tmp_path, capsys):
    source = save_image(tmp_path / "a.png")
    assert main(["upscale", str(source), "-o", str(tmp_path / "out"), "--weights", str(tmp_path)]) == 1
    assert "model_index.json" in capsys.readouterr().err
    assert written(tmp_path) == []


def test_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "patchscaler"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "usage: patchscaler" in run.stderr
