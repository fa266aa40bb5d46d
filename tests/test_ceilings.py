"""The table of what limits quality."""

from __future__ import annotations

import pytest
import torch

from patchscaler.evaluation import ceilings
from patchscaler.evaluation.metrics import to_8bit
from patchscaler.evaluation.scores import find_scorer
from patchscaler.images import ImageError, Picture, bicubic, read_picture, write_png
from patchscaler.loading import load_pipeline
from patchscaler.models import PatchDiT


@pytest.fixture
def folders(tmp_path):
    """One pair, 40×36 → 160×144, of which neither side is a whole number of patches."""
    generator = torch.Generator().manual_seed(0)
    truth = bicubic(torch.randn(1, 3, 36, 40, generator=generator).tanh(), 4)[0]
    for name, image in (("lr", bicubic(truth[None], 0.25)[0]), ("hr", truth)):
        (tmp_path / name).mkdir()
        write_png(Picture(image), tmp_path / name / "rock.png")
    return tmp_path / "lr", tmp_path / "hr"


def cells(table: str, row: str) -> list[float]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row}"))
    return [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]


def test_each_part_is_measured_with_perfect_parts_before_it(weights, folders, capsys, monkeypatch):
    # A Patch-DiT that leaves y0 as it is: then only what comes before it can differ.
    arguments = ["--lr", str(folders[0]), "--hr", str(folders[1]), "--weights", str(weights)]
    monkeypatch.setattr(PatchDiT, "forward", lambda self, x_t, y0, t, prompt=None: y0)
    assert ceilings.main(arguments) == 0
    table = capsys.readouterr().out
    same = cells(table, "final: GRM and Patch-DiT")
    for group in ("simple", "medium", "hard"):
        assert cells(table, f"every patch {group}") == same
    assert cells(table, "bicubic ")[0] < cells(table, "bicubic, encoded")[0]  # feature distance
    assert cells(table, "every patch at T 50, N 1") == same
    pipeline = load_pipeline(weights)
    analysis = pipeline.analyze(read_picture(folders[0] / "rock.png"))
    final, coarse = (to_8bit(each) for each in (pipeline(folders[0] / "rock.png").picture.rgb, analysis.coarse))
    near = find_scorer(torch.device("cpu"), ("haarpsi",))(final, coarse)["haarpsi"]
    assert f"- every patch at T 50, N 1 against the coarse image, HaarPSI: {near:.4f}, {near:.4f} at least" in table
    assert "| mesh in the smoothest tenth, power over the truths' | 2 pixels | 4 pixels | 8 pixels |" in table
    assert len(cells(table, "coarse |")) == len(cells(table, "final |")) == 3
    # Patches alone: the random weights put all of them into one group.
    alone = [cells(table, f"{group}: coarse") for group in ("simple", "medium", "hard")]
    assert sorted(map(len, alone)) == [0, 0, 5]
    # Up to the colour fix, which the final picture has had.
    perfect, truth = cells(table, "Patch-DiT on the true latents"), cells(table, "truth, encoded")
    assert perfect != same and len(perfect) == len(truth) == len(same)


def test_a_truth_of_another_size_is_named(tiny_pipeline, folders, tmp_path):
    write_png(Picture(torch.zeros(3, 8, 8)), folders[1] / "rock.png")
    pair = (folders[0] / "rock.png", folders[1] / "rock.png")
    with pytest.raises(ImageError, match="is 8×8; 4 times its input is 160×144"):
        ceilings.measure(tiny_pipeline, [pair])
