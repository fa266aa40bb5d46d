"""What only a GPU can show: ``pytest -m gpu``. Skipped where there is none."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from patchscaler import device as devices
from patchscaler import load_pipeline, read_picture, sampling, to_pil
from patchscaler.images import Picture
from patchscaler.large import Bands
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.results import Partial, Result

EXAMPLE = Path(__file__).parent.parent / "examples" / "1-astronaut.png"
PLAN = SamplingPlan.paper()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no GPU"),
]


@pytest.fixture(scope="module")
def device():
    return devices.pick_device()


@pytest.fixture(scope="module")
def gpu(device):
    return load_pipeline(device=device)


@pytest.fixture(scope="module")
def example():
    return Picture(read_picture(EXAMPLE).rgb[:, :128, :128].contiguous())


def levels(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean difference of two pictures in [-1, 1], in levels of 8 bits."""
    return 127.5 * (one - other).abs().mean().item()


def test_float32_is_that_of_the_cpu(device, example):
    ours, theirs = (load_pipeline(device=each, dtype="float32")(example, PLAN) for each in (device, "cpu"))
    assert torch.equal(ours.assignment, theirs.assignment)
    assert levels(ours.picture.rgb, theirs.picture.rgb) < 0.25


def test_its_own_precision_stays_close_and_is_the_same_twice(gpu, example):
    result, again = (gpu(example, PLAN) for _ in range(2))
    exact = load_pipeline(device="cpu", dtype="float32")(example, PLAN)
    assert torch.equal(result.picture.rgb, again.picture.rgb)
    assert levels(result.picture.rgb, exact.picture.rgb) < 1
    assert result.report()["device"] == str(gpu.device) and result.picture.rgb.device.type == "cpu"


def test_small_batches_bands_and_pictures_in_between(gpu, example):
    whole = gpu(example, PLAN)
    assert levels(gpu(example, PLAN, batch_size=7).picture.rgb, whole.picture.rgb) < 0.5
    bands = np.concatenate([*Bands(gpu, example, PLAN)]).astype(float)
    assert np.abs(bands - np.asarray(to_pil(whole.picture))).mean() < 0.5
    by_hand = {index: index % len(GROUPS) for index in range(len(whole.assignment))}
    events = gpu.refine(gpu.analyze(example), PLAN, by_hand=by_hand, partial=True)
    assert [type(event) for event in events if isinstance(event, (Partial, Result))] == [Partial, Partial, Result]


def test_seconds_are_those_of_the_device(gpu, example):
    """Work that is only queued would be counted in the stage after it."""
    gpu(example, PLAN)
    shares = []
    for _ in range(5):
        began = time.perf_counter()
        result = gpu(example, PLAN)
        shares.append(sum(result.seconds.values()) / (time.perf_counter() - began))
    assert 0.95 < max(shares) <= 1
    assert sum(group.seconds for group in result.groups) <= result.seconds["refine"]


def test_two_networks_refine_together(gpu, device, example):
    analysis = gpu.analyze(example)
    *_, one = gpu.refine(analysis, PLAN)
    for other in (device, "cpu"):
        gpu.refine_on([other])
        try:
            *_, two = gpu.refine(analysis, PLAN)
        finally:
            gpu.refine_on([])
        assert levels(one.picture.rgb, two.picture.rgb) < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA can be told to have less memory")
def test_less_memory_ends_in_smaller_pieces_and_none_in_advice(gpu, monkeypatch, example):
    large = Picture(torch.cat([example.rgb, example.rgb.flip(-1)] * 2, -1).repeat(1, 4, 1))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    expected = gpu(large, SamplingPlan.fast()).picture.rgb
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    halvings = []
    for module in (devices, sampling):
        monkeypatch.setattr(module, "release", lambda device: halvings.append(device) or torch.cuda.empty_cache())
    try:
        for part in (0.6, 0.4, 0.25):
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((base + part * (peak - base)) / total)
            less = gpu(large, SamplingPlan.fast()).picture.rgb
            if halvings:
                break
        assert halvings and levels(less, expected) < 0.5
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((base + 2**20) / total)
        with pytest.raises(devices.OutOfMemory, match="or use the CPU"):
            gpu(large, SamplingPlan.fast())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(gpu(large, SamplingPlan.fast()).picture.rgb, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiler is tried on CUDA")
def test_compiled_it_gives_the_same_picture(device, example):
    compiled = load_pipeline(device=device)
    expected = compiled(example, PLAN).picture.rgb
    compiled.compile()
    assert levels(compiled(example, PLAN).picture.rgb, expected) < 0.5
