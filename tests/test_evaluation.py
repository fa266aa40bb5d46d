from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from patchscaler.evaluation import benchmark as bench
from patchscaler.evaluation import components
from patchscaler.evaluation.metrics import psnr_rgb, psnr_y
from patchscaler.grouping import GROUPS, SamplingPlan
from patchscaler.images import ImageError, Picture, bicubic, read_picture, write_png
from patchscaler.patches import PatchGrid

PLAN = SamplingPlan(0.6, 0.4, start=(20, 30, 40), steps=(1, 2, 3))
# 40x36 becomes 160x144: a grid of 2x2 patches. 8x11 is smaller than one patch.
SIZES = {"rock": (40, 36), "dot": (8, 11)}


def texture(height: int, width: int, seed: int) -> torch.Tensor:
    """Noise of several scales, as photographs have it, 3xHxW in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(1, 3, max(2, height // s), max(2, width // s), generator=generator) for s in (1, 4, 16)]
    return sum(torch.nn.functional.interpolate(x, (height, width), mode="bicubic")[0] for x in layers).tanh()


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Folders of inputs and of truths, which are not all of one format."""
    lr, hr = tmp_path / "lr", tmp_path / "hr"
    lr.mkdir()
    hr.mkdir()
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        truth = texture(4 * height, 4 * width, seed)
        write_png(Picture(truth), hr / f"{name}.png")
        write_png(Picture(bicubic(truth[None], 0.25)[0]), lr / f"{name}.png")
    Image.open(lr / "dot.png").save(lr / "dot.bmp")
    (lr / "dot.png").unlink()
    (lr / "notes.txt").write_text("not an image")
    return lr, hr


def read_rows(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_perfect_ranking_correlates_fully():
    values = torch.tensor([0.1, 0.5, 0.2, 0.9])
    assert components.spearman(values, values.exp()) == pytest.approx(1)
    assert components.spearman(values, -(values**3)) == pytest.approx(-1)


def test_equal_values_share_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    a, b = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert components.spearman(a, b) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert components.spearman(a, b.flip(0)) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(components.spearman(torch.ones(4), b))


def test_patch_errors_find_the_patch_that_is_wrong():
    grid = PatchGrid(28, 16)  # two patches, one above the other, rows 0 to 128 and 96 to 224
    truth = torch.zeros(3, 220, 125)  # an output is smaller than the grid that was filled up for it
    image = truth.clone()
    image[:, 128:] = 0.5
    upper, lower = components.patch_errors(image, truth, grid).tolist()
    assert upper == 0
    assert lower == pytest.approx(0.25 * (220 - 128) / (220 - 96))


def test_eight_bits_are_what_a_file_gives_back(tmp_path):
    image = texture(20, 30, seed=5) * 1.2
    back = read_picture(write_png(Picture(image), tmp_path / "image.png")).rgb
    torch.testing.assert_close(components.to_8bit(image), back)


def test_every_method_of_every_image_has_its_row(tiny_pipeline, folders, tmp_path):
    lr, hr = folders
    out = tmp_path / "out"
    summary = bench.benchmark(tiny_pipeline, bench.find_pairs(lr, hr), out, PLAN, uniform=True)
    rows = read_rows(out)
    assert list(rows[0]) == [
        *("image", "method", "psnr_y", "ssim_y", "spectrum_distance"),
        *("simple", "medium", "hard", "evaluations", "seconds"),
    ]
    methods = ["bicubic", "coarse", "final", "uniform"]
    assert [(row["image"], row["method"]) for row in rows] == [(i, m) for i in ("dot", "rock") for m in methods]

    patches = {"dot": 1, "rock": 4}
    for row in rows:
        if row["method"] in ("final", "uniform"):
            counts = [int(row[group]) for group in GROUPS]
            assert sum(counts) == patches[row["image"]]
            plan = PLAN if row["method"] == "final" else SamplingPlan.uniform()
            assert int(row["evaluations"]) == plan.evaluations(counts)
            assert float(row["seconds"]) > 0

    assert summary == (out / "summary.md").read_text(encoding="utf-8")
    used = sum(int(row["evaluations"]) for row in rows if row["method"] == "final")
    assert f"evaluations, plan / uniform: {used / (20 * 5):.3f}" in summary
    coarse = [float(row["psnr_y"]) for row in rows if row["method"] == "coarse"]
    assert f"| coarse | {sum(coarse) / 2:.2f} |" in summary
    assert "Spearman" in summary


def test_rows_score_what_the_pipeline_gives(tiny_pipeline, folders, tmp_path):
    lr, hr = folders
    pairs = bench.find_pairs(lr, hr)
    bench.benchmark(tiny_pipeline, pairs, tmp_path, PLAN, seed=3)
    scores = {(row["image"], row["method"]): float(row["psnr_y"]) for row in read_rows(tmp_path)}
    for low, high in pairs:
        truth, picture = read_picture(high).rgb, read_picture(low)
        enlarged = read_picture(write_png(Picture(bicubic(picture.rgb[None])[0]), tmp_path / "up.png")).rgb
        assert scores[low.stem, "bicubic"] == pytest.approx(psnr_y(enlarged, truth), abs=1e-4)
        final = tiny_pipeline(picture, PLAN, 3).picture
        final = read_picture(write_png(final, tmp_path / "final.png")).rgb
        assert scores[low.stem, "final"] == pytest.approx(psnr_y(final, truth), abs=1e-4)
    assert scores["rock", "bicubic"] > scores["rock", "final"]  # the weights are random


def test_without_truth_only_the_costs_are_known(tiny_pipeline, folders, tmp_path):
    summary = bench.benchmark(tiny_pipeline, bench.find_pairs(folders[0], None), tmp_path, PLAN)
    rows = read_rows(tmp_path)
    assert [row["method"] for row in rows] == ["bicubic", "coarse", "final"] * 2
    assert {row[metric] for row in rows for metric in bench.METRICS} == {""}
    assert "Spearman" not in summary
    shares = [
        line.split("|")[3].strip() for line in summary.splitlines() if line.startswith(tuple(f"| {g} " for g in GROUPS))
    ]
    assert len(shares) == 3 and sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.2)


def test_sheets_show_the_pictures_in_order(tiny_pipeline, folders, tmp_path):
    lr, hr = folders
    bench.benchmark(tiny_pipeline, bench.find_pairs(lr, hr), tmp_path, PLAN)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["dot.png", "rock.png"]
    sheet = read_picture(tmp_path / "sheets" / "rock.png").rgb
    height, width = (4 * side for side in SIZES["rock"])
    step = sheet.shape[2] // 5
    panels = [sheet[:, -height:, i * step : i * step + width] for i in range(5)]
    assert torch.equal(panels[4], read_picture(hr / "rock.png").rgb)
    torch.testing.assert_close(panels[0], components.to_8bit(bicubic(read_picture(lr / "rock.png").rgb[None])[0]))
    analysis = tiny_pipeline.analyze(read_picture(lr / "rock.png"))
    torch.testing.assert_close(panels[1], components.to_8bit(analysis.coarse), atol=0.01, rtol=0)


def test_a_missing_or_ambiguous_file_is_named(folders):
    lr, hr = folders
    (hr / "dot.png").rename(hr / "other.png")
    with pytest.raises(FileNotFoundError, match="dot"):
        bench.find_pairs(lr, hr)
    Image.new("RGB", (4, 4)).save(lr / "rock.jpg")
    with pytest.raises(ValueError, match=r"rock\.jpg.*rock\.png"):
        bench.find_pairs(lr, None)
    (hr / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        components.find_images(hr / "empty")


def test_a_truth_of_another_size_is_named(tiny_pipeline, folders, tmp_path):
    lr, hr = folders
    Image.new("RGB", (43, 32)).save(hr / "dot.png")
    with pytest.raises(ImageError, match=r"dot\.png is 43x32; 4 times its input is 44x32"):
        bench.benchmark(tiny_pipeline, bench.find_pairs(lr, hr), tmp_path, PLAN)


def test_autoencoder_psnr_is_of_the_cut_image_in_eight_bits(tiny_pipeline, tmp_path):
    image = components.to_8bit(texture(45, 50, seed=7))
    write_png(Picture(image), tmp_path / "cut.png")
    write_png(Picture(image[:, :40, :48]), tmp_path / "whole.png")
    psnr = components.autoencoder_psnr(tiny_pipeline, tmp_path)
    assert psnr["cut.png"] == psnr["whole.png"]
    vae = tiny_pipeline.vae
    with torch.no_grad():
        output = vae.decode(vae.encode(image[None, :, :40, :48]).latents).sample[0].clamp(-1, 1)
    output = read_picture(write_png(Picture(output), tmp_path / "output.png")).rgb
    assert psnr["cut.png"] == pytest.approx(psnr_rgb(output, image[:, :40, :48]), abs=1e-3)


def test_prior_errors_are_paired_and_repeatable(tiny_pipeline, tmp_path):
    write_png(Picture(texture(160, 130, seed=1)), tmp_path / "a.png")
    write_png(Picture(texture(128, 128, seed=2)), tmp_path / "b.png")
    errors = components.prior_errors(tiny_pipeline, tmp_path)
    assert list(errors) == ["retrieved", "random", "none"]
    assert {len(values) for values in errors.values()} == {2 + 1}
    assert not torch.equal(errors["retrieved"], errors["random"])
    assert not torch.equal(errors["retrieved"], errors["none"])
    again = components.prior_errors(tiny_pipeline, tmp_path, batch_size=1)
    torch.testing.assert_close(again["retrieved"], errors["retrieved"])  # the noise of a patch is its own
    other = components.prior_errors(tiny_pipeline, tmp_path, seed=1)
    assert not torch.equal(other["none"], errors["none"])


def test_prior_errors_measure_the_distance_to_the_truth(tiny_pipeline, tmp_path, monkeypatch):
    """A network that gives its noisy input back errs by (1 - sqrt(abar))² x0² + (1 - abar) on average."""
    write_png(Picture(texture(128, 128, seed=2)), tmp_path / "b.png")
    monkeypatch.setattr(tiny_pipeline.transformer, "forward", lambda x_t, y0, t, prompt: x_t)
    error = components.prior_errors(tiny_pipeline, tmp_path)["none"].item()
    truth = read_picture(tmp_path / "b.png").rgb
    with torch.no_grad():
        x0 = tiny_pipeline.vae.encode(truth[None]).latents
    abar = tiny_pipeline.scheduler.alphas_cumprod[components.TIME - 1].item()
    assert error == pytest.approx((1 - abar**0.5) ** 2 * x0.square().mean().item() + 1 - abar, rel=0.1)


def test_the_prior_table_gives_the_paired_difference():
    retrieved = torch.tensor([1.0, 2.0, 3.0, 4.0])
    table = components.prior_table({"retrieved": retrieved, "random": retrieved + torch.tensor([0.0, 0.2, 0.0, 0.2])})
    error = 0.2 / math.sqrt(3) / 2  # the deviation of the differences, over the root of four
    assert "| retrieved | 2.500000 |  |" in table
    assert f"| random | 2.600000 | +0.100000 ± {error:.6f} |" in table


def test_images_too_small_for_a_patch_are_named(tiny_pipeline, tmp_path):
    write_png(Picture(texture(128, 127, seed=2)), tmp_path / "narrow.png")
    with pytest.raises(ImageError, match=r"narrow\.png is 127x128; at least 128x128"):
        components.prior_errors(tiny_pipeline, tmp_path)


@pytest.fixture(scope="module")
def weights(tiny_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_pipeline.save_pretrained(folder)
    return folder


def test_the_benchmark_runs_from_the_command_line(weights, folders, tmp_path, capsys):
    lr, hr = folders
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    arguments = ["--lr", lr, "--hr", hr, "-o", tmp_path / "out", "--weights", weights, "--device", "cpu"]
    bench.main([str(part) for part in [*arguments, "--plan", tmp_path / "plan.json", "--limit", 1]])
    assert capsys.readouterr().out == (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert {row["image"] for row in read_rows(tmp_path / "out")} == {"dot"}

    (hr / "rock.png").unlink()
    with pytest.raises(SystemExit) as stop:
        bench.main([str(part) for part in arguments])
    assert stop.value.code == 1
    assert "rock" in capsys.readouterr().err


def test_the_components_run_from_the_command_line(weights, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    write_png(Picture(texture(136, 130, seed=1)), folder / "a.png")
    components.main(["--images", str(folder), "--priors", str(folder), "--weights", str(weights)])
    output = capsys.readouterr().out
    assert "RGB PSNR" in output and "| random |" in output
    with pytest.raises(SystemExit):
        components.main(["--weights", str(weights)])
