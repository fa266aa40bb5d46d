"""Batches of one group: distributed over devices with the same result, and repeated in halves when memory is short."""

from __future__ import annotations

import copy
import time
import weakref
from collections import deque
from contextlib import suppress

import pytest
import torch
from conftest import make_tiny_pipeline

from patchscaler.plan import SamplingPlan
from patchscaler.results import Progress
from patchscaler.sampling import Batch, Patches, make_batches, sample_batches
from patchscaler.several import place, sample_on_several

PLAN = SamplingPlan(0.95, 0.75, start=(200, 400, 600), steps=(2, 4, 6))
HARD = 2


def hard(count: int, size: int = 64) -> list[Batch]:
    return make_batches(torch.full((count,), HARD), PLAN, size)


def makespan(seconds: list[float], devices: int) -> float:
    """When the last device is done with batches that take so long, each device taking the first one that is left."""
    ends = [0.0] * devices
    for each in seconds:
        ends[ends.index(min(ends))] += each
    return max(ends)


def random_patches(count: int, device: str = "cpu") -> Patches:
    draw = torch.Generator().manual_seed(0)
    y0, noise = (torch.randn(count, 4, 16, 16, generator=draw) for _ in range(2))
    prompt, x0 = torch.randn(count, 12, 16, generator=draw), torch.zeros(count, 4, 16, 16, device=device)
    return Patches(y0, noise, prompt, x0, torch.zeros(count))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3, 13, 40])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_every_device_has_a_share_of_every_patch_once(count, devices):
    placed = place(hard(count, 5), devices)
    assert all(map(len, placed)) and len(placed) >= min(devices, count)
    given = torch.cat([batch.indices for batch in placed])
    assert given.sort().values.tolist() == [*range(count)]
    sizes = [len(part) for part in hard(count)[0].parts(devices)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_no_batch_is_made_of_an_empty_group():
    groups = torch.tensor([1, 2] * 9)
    batches = make_batches(groups, PLAN, 8, chosen=groups == 1)
    assert [(b.group, b.start, b.steps, len(b)) for b in batches] == [(1, 400, 4, 8), (1, 400, 4, 1)]
    assert (groups[torch.cat([batch.indices for batch in batches])] == 1).all()
    assert make_batches(groups[:0], PLAN, 8) == []


def test_memory_for_one_patch_is_enough(tiny_pipeline):
    patches = random_patches(3)
    whole = run(tiny_pipeline, patches, hard(3), 1)

    def short(_, inputs):
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = tiny_pipeline.transformer.register_forward_pre_hook(short)
    try:
        assert torch.equal(run(tiny_pipeline, patches, hard(3), 1), whole)
    finally:
        hook.remove()


def test_evaluations_that_did_not_count_are_taken_back(tiny_pipeline):
    """Memory that runs out in the third step of four patches: two steps of them are made again."""
    calls = []

    def short(_, inputs):
        calls.append(len(inputs[0]))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = tiny_pipeline.transformer.register_forward_pre_hook(short)
    try:
        steps = [*sample_batches(tiny_pipeline.transformer, tiny_pipeline.scheduler, random_patches(4), deque(hard(4)))]
    finally:
        hook.remove()
    assert [step.evaluations for step in steps[:4]] == [4, 4, -8, 2]
    assert sum(step.evaluations for step in steps) == 4 * PLAN.steps[HARD]
    assert calls == [4] * 3 + [2] * 2 * PLAN.steps[HARD]


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
            run(tiny_pipeline, random_patches(3), hard(3), devices)
    finally:
        hook.remove()
    assert made and not any(ref() is not None for ref in made)


@torch.inference_mode()
def run(pipeline, patches: Patches, batches: list[Batch], devices: int, pause: float = 0) -> torch.Tensor:
    networks = [copy.deepcopy(pipeline.transformer) for _ in range(devices)]
    for network in networks:
        network.register_forward_hook(lambda _, inputs, __: time.sleep(pause * len(inputs[0])))
    if devices == 1:
        steps = sample_batches(networks[0], pipeline.scheduler, patches, deque(batches))
    else:
        steps = sample_on_several(networks, pipeline.scheduler, patches, batches)
    for _ in steps:
        pass
    return patches.x0.clone()


def test_the_time_of_several_devices_is_as_the_cost_model_says(tiny_pipeline, one_thread):
    """Devices whose time is known: a pause for each patch, long beside what the host does for it, on one core too."""
    patches, batches, evaluations = random_patches(40), hard(40, 8), 40 * PLAN.steps[HARD]

    def fastest(devices: int, pause: float) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            run(tiny_pipeline, patches, batches, devices, pause)
            times.append(time.perf_counter() - begin)
        return min(times)

    pause = max(0.005, 8 * fastest(1, 0) / evaluations)
    for devices in (1, 2):
        predicted = makespan([pause * batch.steps * len(batch) for batch in place(batches, devices)], devices)
        assert predicted < 1.15 * pause * evaluations / devices
        assert predicted <= fastest(devices, pause) < 1.5 * predicted


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


def test_an_error_on_one_device_is_raised(picture):
    pipeline = make_tiny_pipeline()
    pipeline.refine_on(["cpu"])
    analysis = pipeline.analyze(picture)
    pipeline.copies[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        list(pipeline.refine(analysis, PLAN, batch_size=1))


@pytest.mark.slow
def test_patch_dit_is_one_graph_for_batches_of_any_size(tiny_pipeline):
    """What `torch.compile` needs; here without its C++ compiler."""
    network, patches = copy.deepcopy(tiny_pipeline.transformer), random_patches(7)
    graph = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for count in (7, 3):
            inputs = patches.y0[:count], patches.noise[:count], torch.tensor([500]), patches.prompt[:count]
            assert torch.equal(graph(*inputs), network(*inputs))
