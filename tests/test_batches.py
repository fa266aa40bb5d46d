"""Batches: shared out among devices with the same result, made again in parts, and free to run ahead of the host."""

from __future__ import annotations

import copy
import time
import weakref
from contextlib import suppress

import pytest
import torch
from conftest import make_tiny_pipeline

from patchscaler.batches import Batch, Patches, make_batches, makespan, place, sample_batches
from patchscaler.devices import Stopwatch, fitting_batch
from patchscaler.grouping import SamplingPlan
from patchscaler.records import Progress

PLAN = SamplingPlan(0.95, 0.75, start=(200, 400, 600), steps=(2, 4, 6))  # on one grid
OFF_GRID = SamplingPlan(0.95, 0.75, start=(200, 500, 900), steps=(1, 2, 3))


def groups(*counts: int) -> dict[int, torch.Tensor]:
    return dict(enumerate(torch.arange(sum(counts)).split(counts)))


def together(*counts: int) -> Batch:
    """All groups in one batch, that with the earliest start first."""
    return Batch(dict(reversed(groups(*counts).items())))


def random_patches(count: int, device: str = "cpu") -> Patches:
    draw = torch.Generator().manual_seed(0)
    y0, noise = (torch.randn(count, 4, 16, 16, generator=draw) for _ in range(2))
    return Patches(y0, noise, torch.randn(count, 12, 16, generator=draw), torch.zeros(count, 4, 16, 16, device=device))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("counts", [(1, 1, 1), (7, 0, 2), (0, 0, 1), (13, 5, 8)])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_device_has_a_share_of_every_patch_once(counts, devices):
    for plan in (PLAN, OFF_GRID):
        batches = make_batches(groups(*counts), plan, 5)
        placed = place(batches, plan, devices)
        assert all(map(len, placed))
        given = torch.cat([members for batch in placed for members in batch.members.values()])
        assert given.sort().values.tolist() == [*range(sum(counts))]
        assert len(placed) >= min(devices, sum(counts))
        for part in batches[0].parts(devices):
            assert abs(len(part) - len(batches[0]) / min(devices, len(batches[0]))) < 1
            for group, members in part.members.items():  # an equal share of each group
                assert abs(len(members) - len(batches[0].members[group]) / devices) < 1 or len(batches[0]) < devices


def test_memory_for_one_patch_is_enough_though_groups_share_a_batch(tiny_pipeline):
    patches, batch = random_patches(3), together(1, 1, 1)
    whole = run(tiny_pipeline, patches, [batch], 1)

    def short(_, inputs):
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = tiny_pipeline.transformer.register_forward_pre_hook(short)
    try:
        assert torch.equal(run(tiny_pipeline, patches, [batch], 1), whole)
    finally:
        hook.remove()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, ZeroDivisionError])
def test_what_an_error_held_is_free_once_it_was_handled(tiny_pipeline, devices, fault, no_collector):
    made = []

    def fail(*_):
        held = torch.zeros(1)
        made.append(weakref.ref(held))
        raise fault

    hook = tiny_pipeline.transformer.register_forward_pre_hook(fail)
    try:
        with suppress(MemoryError, ZeroDivisionError):
            run(tiny_pipeline, random_patches(3), [together(1, 1, 1)], devices)
    finally:
        hook.remove()
    assert made and not any(ref() is not None for ref in made)


def run(pipeline, patches: Patches, batches: list[Batch], devices: int, pause: float = 0) -> torch.Tensor:
    networks = [copy.deepcopy(pipeline.transformer) for _ in range(devices)]
    for network in networks:
        network.register_forward_hook(lambda _, inputs, __: time.sleep(pause * len(inputs[0])))
    for step in sample_batches(networks, pipeline.scheduler, PLAN, patches, batches):
        assert 0 <= step.device < devices
    return patches.x0.clone()


def test_the_time_of_several_devices_is_as_the_cost_model_says(tiny_pipeline, one_thread):
    """Devices whose time is known: a pause for each patch, long beside what the host does for it, on one core too."""
    patches, counts = random_patches(40), (20, 12, 8)
    batches = make_batches(groups(*counts), PLAN, 8)

    def fastest(devices: int, pause: float) -> float:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            run(tiny_pipeline, patches, batches, devices, pause)
            times.append(time.perf_counter() - begin)
        return min(times)

    pause = max(0.005, 8 * fastest(1, 0) / PLAN.evaluations(counts))
    for devices in (1, 2):
        placed = place(batches, PLAN, devices)
        predicted = makespan([pause * batch.evaluations(PLAN) for batch in placed], devices)
        assert predicted < 1.15 * pause * PLAN.evaluations(counts) / devices
        assert predicted <= fastest(devices, pause) < 1.5 * predicted


@pytest.mark.parametrize("plan", [PLAN, OFF_GRID])
def test_two_devices_give_the_result_of_one(tiny_pipeline, picture, plan):
    analysis = tiny_pipeline.analyze(picture)
    *events, one = tiny_pipeline.refine(analysis, plan)
    pipeline = make_tiny_pipeline()  # of the same weights
    pipeline.refine_on(["cpu", "cpu"])
    called = {}
    for number, network in enumerate([pipeline.transformer, *pipeline.copies]):
        network.register_forward_hook(lambda *_, number=number: called.update({number: True}) or time.sleep(0.01))
    *events, three = pipeline.refine(analysis, plan)
    assert torch.equal(three.picture.rgb, one.picture.rgb) and len(called) == 3
    assert [group.evaluations for group in three.groups] == [group.evaluations for group in one.groups]
    assert all(isinstance(event, Progress) for event in events) and events[-1].done == events[-1].total
    assert 0 < three.seconds["refine"] < sum(group.seconds for group in three.groups)  # they worked at the same time


def test_what_befalls_one_device_is_raised(picture):
    pipeline = make_tiny_pipeline()
    pipeline.refine_on(["cpu"])
    analysis = pipeline.analyze(picture)
    pipeline.copies[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        list(pipeline.refine(analysis, PLAN, batch_size=1))


def test_the_host_never_waits_within_a_batch(tiny_pipeline, monkeypatch):
    """On the meta device there are no values: reading one, for which a GPU is waited for, raises."""
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waits.append(device))
    network, patches = copy.deepcopy(tiny_pipeline.transformer).to("meta"), random_patches(9, "meta")
    steps = [*sample_batches([network], tiny_pipeline.scheduler, PLAN, patches, [together(3, 3, 3)])]
    assert len(steps) == 6 and len(waits) == 2  # before the first and after the last
    with pytest.raises(RuntimeError):
        patches.x0.sum().item()
    Stopwatch(torch.device("meta")).lap(wait=False)
    assert len(waits) == 3  # for its start only


def test_patch_dit_is_one_graph_for_batches_of_any_size(tiny_pipeline):
    """What `torch.compile` and ahead-of-time compilation need; here without the compiler of C++ behind them."""
    network, patches = copy.deepcopy(tiny_pipeline.transformer), random_patches(7)
    graph = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for count in (7, 3):
            inputs = patches.y0[:count], patches.noise[:count], torch.tensor([500]), patches.prompt[:count]
            assert torch.equal(graph(*inputs), network(*inputs))


def test_a_gpus_batch_is_as_large_as_its_free_memory_allows(monkeypatch):
    gpu, free = torch.device("cuda"), 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    assert fitting_batch(gpu, 10**6) == 500 and fitting_batch(gpu, 1) == 1024 and fitting_batch(gpu, 10**9) == 1
    assert fitting_batch(torch.device("cpu"), 10**12) == 64
