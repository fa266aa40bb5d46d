"""Tiles equal the whole, lack of memory leads to smaller tiles, and the next run is unaffected."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_pipeline
from torch import nn

import patchscaler
from patchscaler.device import OutOfMemory, halving, is_out_of_memory
from patchscaler.images import Picture
from patchscaler.plan import SamplingPlan
from patchscaler.tiles import ALIGN, Local, pieces, tiled

CPU = torch.device("cpu")
PLAN = SamplingPlan(0.95, 0.75, start=(400, 700, 1000), steps=(1, 2, 3))


@pytest.mark.parametrize("most", [1, 4, 7, 8, 100, 256])
def test_pieces_cover_every_length_without_overlap(most):
    for length in range(1, 600):
        cuts = pieces(length, most)
        assert cuts[0][0] == 0 and cuts[-1][1] == length
        assert all(before[1] == after[0] for before, after in zip(cuts, cuts[1:]))
        assert all(first % ALIGN == 0 and first < last for first, last in cuts)
        assert max(last - first for first, last in cuts) <= max(ALIGN, most)


@pytest.mark.parametrize(("name", "height", "width"), [
    ("encoding", 16, 300), ("restoring", 33, 131), ("restoring", 150, 1), ("decoding", 1, 97), ("decoding", 70, 41),
])  # fmt: skip
@torch.inference_mode()
def test_tiles_equal_the_whole(tiny_pipeline, name, height, width):
    local = getattr(tiny_pipeline, name)
    channels = 3 if name == "encoding" else 4
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, channels, height * local.before, width * local.before, generator=generator)
    whole = local.run(values)
    for side in (16, 40, 64):
        torch.testing.assert_close(tiled(local, values, side), whole, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_reach_is_that_of_the_layers():
    network = nn.Sequential(nn.Conv2d(1, 2, 7, padding=3), nn.SiLU(), nn.Conv2d(2, 1, 3, padding=1))  # 3 + 1 cells
    assert Local(network, "x", network, 1, 1).reach(1, CPU) == 8  # with one to spare, in steps of ALIGN
    blind = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4))
    local = Local(blind, "x", blind, 1, 1)
    assert local.reach(1, CPU) is None
    image = torch.rand(1, 1, 60, 60)
    assert torch.equal(tiled(local, image, 16), blind(image))  # it sees all, so it is given all


def test_halving_stops_at_the_least_and_lets_other_errors_through():
    asked = []

    def run(size, most):
        asked.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size

    assert halving(lambda size: run(size, 5), 50, 1, CPU) == 3 and asked == [50, 25, 12, 6, 3]
    with pytest.raises(OutOfMemory, match="not enough memory on cpu, even in the smallest pieces: close"):
        halving(lambda size: run(size, 0), 3, 1, CPU)
    with pytest.raises(ZeroDivisionError):
        halving(lambda size: size // 0, 8, 1, CPU)


def test_torch_says_on_a_cpu_that_memory_ran_out_in_words_that_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("the confidence has values that are NaN"))


def test_patches_too_many_for_memory_are_sampled_in_smaller_batches(picture):
    pipeline = make_tiny_pipeline()
    expected = pipeline(picture, PLAN).picture.rgb
    sizes = []

    def refuse(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    most = 2
    hooks = [pipeline.transformer.register_forward_pre_hook(refuse)]
    assert torch.equal(pipeline(picture, PLAN).picture.rgb, expected)
    assert max(sizes) > most and sum(size for size in sizes if size <= most) >= 3 * 9
    done = [event.done for event in pipeline.refine(pipeline.analyze(picture), PLAN) if hasattr(event, "done")]
    assert done == sorted(done) and done[-1] == 3 * 9
    most = 0
    with pytest.raises(OutOfMemory, match="not enough memory on cpu"):
        pipeline(picture, PLAN)
    for hook in hooks:
        hook.remove()
    assert torch.equal(pipeline(picture, PLAN).picture.rgb, expected)


@pytest.mark.parametrize("part", ["grm", "vae"])
def test_a_picture_too_large_for_memory_is_made_in_smaller_tiles(part):
    pipeline = make_tiny_pipeline()
    picture = Picture(torch.rand(3, 150, 130, generator=torch.Generator().manual_seed(0)) - 0.5)
    expected = pipeline(picture, PLAN).picture.rgb
    largest = []
    network = getattr(pipeline, part)

    def refuse(_, inputs):
        cells = inputs[0].shape[-2:].numel()
        if cells > 50 * 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        largest.append(cells)

    first = network.entry if part == "grm" else network.decoder[0]
    hook = first.register_forward_pre_hook(refuse)
    torch.testing.assert_close(pipeline(picture, PLAN).picture.rgb, expected, atol=1e-4, rtol=0)
    assert 16 * 16 < max(largest) <= 50 * 50
    hook.remove()
    assert torch.equal(pipeline(picture, PLAN).picture.rgb, expected)


SHORT_OF_MEMORY = """
import resource, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from conftest import make_tiny_pipeline
from patchscaler.plan import SamplingPlan
from patchscaler.images import Picture
pipeline, plan = make_tiny_pipeline(), SamplingPlan(0.95, 0.75, (400, 700, 1000), (1, 1, 1))
generator = torch.Generator().manual_seed(0)
small, large = (Picture(torch.rand(3, side, side, generator=generator) - 0.5) for side in (64, 1500))
before = pipeline(small, plan).picture.rgb
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 200 * 2**20, -1))
try:
    pipeline(large, plan)
except MemoryError as error:
    print(error)
except RuntimeError as error:
    print("not advice:", error)
assert torch.equal(pipeline(small, plan).picture.rgb, before)
print("the next run works")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit and /proc are Linux's")
def test_memory_that_really_runs_out_is_said_and_the_next_run_works():
    """A picture whose output alone is too large: no smaller piece can help, and the advice is given."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, "tests"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=patchscaler.__path__[0] + "/..", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the next run works"
    assert "not enough memory on cpu, even in the smallest pieces" in done.stdout
