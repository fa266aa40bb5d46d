"""The command `bench`: real measurements of a tiny pipeline, the sizes of the stand-ins, and the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from patchscaler.__main__ import main
from patchscaler.evaluation import bench, outputs, standins
from patchscaler.images import ImageError
from patchscaler.plan import GROUPS, PRESETS

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_quick_bench_measures_and_says_what_it_did_not(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_new_process", lambda measure, *arguments: measure(*arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, threads = {**bench.machine(), "cores": 2}, []
    monkeypatch.setattr(bench, "machine", lambda: here)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert main(["bench", "-o", str(tmp_path / "out"), "--weights", str(weights), "--quick"]) == 0
    outputs.prepare(tmp_path / "out", bench.MARKS, overwrite=False)  # its own may be replaced
    text = (tmp_path / "out" / "bench.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "## CUDA\n\nnot measured" in text

    found = json.loads((tmp_path / "out" / "bench.json").read_text())["devices"]["cpu"]
    plans = found["ours"]["512"]
    assert list(plans) == list(PRESETS) and list(found["scaling"]) == ["512", "1024"]
    for name, row in plans.items():
        assert row["evaluations"] == PRESETS[name].evaluations(row["patches"])
        assert row["pixels"] == 512 * 512 and sum(row["patches"]) == 25
        assert row["seconds"] > row["stages"]["refine"] >= sum(row["stages"][group] for group in GROUPS) > 0
        total = f"{row['flops'] / 1e12:.2f}"
        assert f"| ours, {name} | 512² | {row['evaluations']} patches | {total} | {row['seconds']:.2f} s |" in text
    assert plans["fast"]["flops"] < plans["uniform"]["flops"]
    assert "| seconds by stage | encode | restore | retrieve | simple | medium | hard | decode | color |" in text
    check = found["several"]
    assert check["devices"] == ["cpu", "cpu"] and check["one"] > 0 and check["all"] > 0
    assert threads[0] == 1  # one of the two cores each
    assert f"512², refinement on cpu, cpu: {check['all']:.2f} s; on the first alone {check['one']:.2f} s" in text


@pytest.mark.parametrize("name", ["bench.md", "bench.json"])
def test_files_of_others_and_bad_weights_are_refused(tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("# Bench\n\nmy notes")
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "-o", str(out), "--weights", str(tmp_path), "--quick"])
    assert f"{out / name} exists and is not of an earlier run" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "# Bench\n\nmy notes")]
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "-o", str(tmp_path / "other"), "--weights", str(tmp_path), "--device", "cpu"])
    assert "is not a pipeline folder" in capsys.readouterr().err


def test_flops_are_those_of_a_whole_run(tiny_pipeline, weights):
    row = bench.ours(weights, bench.DEFAULT_IMAGE, 512, "fast", "cpu", repeats=1)
    with FlopCounterMode(display=False) as counter:
        tiny_pipeline(bench.tiled(bench.DEFAULT_IMAGE, 1), PRESETS["fast"])
    assert row["flops"] == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.slow
def test_a_process_of_its_own_has_its_own_peak_memory(weights):
    held = torch.ones(400_000_000, dtype=torch.int8)  # 0.4 GB here are not to be seen there
    row = bench.in_new_process(bench.ours, weights, bench.DEFAULT_IMAGE, 512, "paper", "cpu", 1)
    assert 100e6 < row["peak_bytes"] < bench.peak_memory("cpu")
    assert row["pixels"] == 512 * 512 and held[-1] == 1
    with pytest.raises(ImageError, match="missing.png"):
        bench.in_new_process(bench.ours, weights, Path("missing.png"), 512, "paper", "cpu", 1)


def test_larger_inputs_repeat_the_tile_without_an_edge():
    one, three = (bench.tiled(bench.DEFAULT_IMAGE, n).rgb for n in (1, 3))
    assert one.shape == (3, 128, 128) and three.shape == (3, 384, 384)
    assert torch.equal(three[:, 256:, 256:], one) and torch.equal(three[:, :128, 128:256], one.flip(-1))
    assert torch.equal(three[:, 127], three[:, 128])
    with pytest.raises(ValueError, match="2-cat.png is 150×100; at least 128×128"):
        bench.tiled(ROOT / "examples" / "2-cat.png", 1)


@pytest.mark.parametrize(
    ("name", "millions", "step", "encode", "decode"),
    [("resshift", (119.1, 55.3), 323, 1793, 3095), ("sd", (865.9, 83.7), 804, 1117, 2515)],
)
def test_stand_ins_have_the_published_sizes(name, millions, step, encode, decode):
    with torch.device("meta"):
        parts = standins.STANDINS[name].build()
    sizes = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in parts]
    assert sizes == pytest.approx(millions, abs=0.05)
    flops = {part: round(count / 1e9) for part, count in standins.count_flops(standins.STANDINS[name]).items()}
    assert flops == {"encode": encode, "step": step, "decode": decode}


def tiny_stand_in() -> tuple[nn.Module, nn.Module]:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(down_block_types=down, up_block_types=up, cross_attention_dim=8, **sizes)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return unet, AutoencoderKL(**sizes, **blocks)


def test_a_stand_in_is_run_and_timed(monkeypatch):
    monkeypatch.setattr(standins, "TILE", 64)
    kind = standins.StandIn("tiny", tiny_stand_in, ((1, 4, 32, 32), (1, 5, 8)), (1, 4, 32, 32), (2,))
    monkeypatch.setitem(standins.STANDINS, "tiny", kind)
    row = bench.stand_in("tiny", "cpu", budget=0.1)
    assert set(row["seconds"]) == set(row["flops"]) == {"encode", "step", "decode"}
    assert all(value > 0 for part in (row["seconds"], row["flops"]) for value in part.values())
    calls = standins.calls(kind, torch.device("cpu"), torch.float32)
    assert calls["step"]().shape == (1, 4, 32, 32) and calls["decode"]().shape == (1, 3, 64, 64)
    assert calls["step"]().isfinite().all()


def test_totals_of_tiles():
    parts = {"encode": 1.0, "step": 0.5, "decode": 2.0}
    assert standins.tiles(512) == 1 and standins.tiles(513) == 4 and standins.tiles(2048) == 25
    assert bench.stand_in_total(parts, 15, 512) == 10.5
    assert bench.stand_in_total(parts, 4, 2048) == 25 * 5
