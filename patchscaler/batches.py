"""Sampling many patches: which go together, and in what order batches are made, on one device or on several.

N patches, C channels, V patch side, L prompt tokens, D width.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from threading import Event, Thread

import torch
from torch import Tensor

from patchscaler.devices import Stopwatch, is_out_of_memory, out_of_memory, release, side_stream, to_device, wait_for
from patchscaler.grouping import SamplingPlan
from patchscaler.models import PatchDiT
from patchscaler.predictors import predicting
from patchscaler.sampling import Scheduler, denoise_together, nested


@dataclass(frozen=True, eq=False)
class Patches:
    """Patches to be sampled and where their x0 goes, on any device. All NxCxVxV but the prompt NxLxD."""

    y0: Tensor
    noise: Tensor
    prompt: Tensor
    x0: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Patches that are sampled together: the LongTensors of each group's, that with the earliest start first."""

    members: dict[int, Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    def evaluations(self, plan: SamplingPlan) -> int:
        return sum(plan.steps[group] * len(members) for group, members in self.members.items())

    def parts(self, count: int) -> list[Batch]:
        """Up to ``count`` batches, none empty, that share out the patches of every group."""
        groups = torch.cat([torch.full_like(members, group) for group, members in self.members.items()])
        indices = torch.cat([*self.members.values()])
        parts = []
        for first in range(min(count, len(self))):
            own, part = groups[first::count], indices[first::count]
            parts.append(Batch({group: part[own == group] for group in self.members if (own == group).any()}))
        return parts


@dataclass(frozen=True)
class Step:
    """One evaluation of a batch is done: per group its step from 1, its patches, and its share of the seconds."""

    steps: dict[int, int] = field(default_factory=dict)
    patches: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    evaluations: int = 0  # in patches; negative where a batch is to be made again, in halves
    device: int = 0  # which of the networks did it


def make_batches(members: Mapping[int, Tensor], plan: SamplingPlan, size: int) -> list[Batch]:
    """Batches of up to ``size`` patches of the groups' ``members``, from the first group to the last.

    Groups whose times are those of one grid fill a batch together; it grows as each group's time comes.
    """
    batches: list[Batch] = []
    filling: dict[int, Tensor] = {}
    for group, rest in members.items():
        if not len(rest):
            continue
        together = [(plan.start[each], plan.steps[each]) for each in (group, *filling)]
        if filling and not nested(together):
            batches.append(Batch(filling))
            filling = {}
        while len(rest):
            room = size - sum(map(len, filling.values()))
            filling = {group: rest[:room], **filling}
            rest = rest[room:]
            if len(rest) or sum(map(len, filling.values())) == size:
                batches.append(Batch(filling))
                filling = {}
    return [*batches, Batch(filling)] if filling else batches


def place(batches: Sequence[Batch], plan: SamplingPlan, devices: int) -> list[Batch]:
    """The batches for so many devices, the costliest first. Where they are few, each is cut into a part for each."""
    ordered = sorted(batches, key=lambda batch: -batch.evaluations(plan))
    whole = len(ordered) - len(ordered) % devices if len(ordered) >= 4 * devices else 0
    return ordered[:whole] + [part for batch in ordered[whole:] for part in batch.parts(devices)]


def makespan(seconds: Sequence[float], devices: int) -> float:
    """When the last device is done with batches that take so long, each device taking the first one that is left."""
    ends = [0.0] * devices
    for each in seconds:
        ends[ends.index(min(ends))] += each
    return max(ends)


def sample_batches(
    networks: Sequence[PatchDiT], scheduler: Scheduler, plan: SamplingPlan, patches: Patches, batches: Sequence[Batch]
) -> Iterator[Step]:
    """Sample all ``batches`` of the patches, and yield a Step after every evaluation of each.

    Several networks, each on a device of its own, take the costliest batch that is left. Close the generator to stop.
    A batch for which memory is short is made again in halves; a single patch for which it is raises OutOfMemory.
    """
    if len(networks) == 1:
        yield from _work(networks[0], scheduler, plan, patches, deque(batches))
        return
    todo = deque(place(batches, plan, len(networks)))
    steps: queue.SimpleQueue = queue.SimpleQueue()
    stopped = Event()
    home = patches.x0.device

    def work(device: int, network: PatchDiT) -> None:
        # Threads share a device's stream unless told otherwise, and copies from another device wait for all of it.
        own = torch.cuda.stream(side_stream(home, f"worker {device}")) if home.type == "cuda" else nullcontext()
        try:
            with own, closing(_work(network, scheduler, plan, patches, todo)) as running:
                for step in running:
                    steps.put(replace(step, device=device))
                    if stopped.is_set():
                        break
        except BaseException as error:  # it is raised where the steps are read
            steps.put(error)
        else:
            steps.put(None)

    wait_for(home)
    threads = [Thread(target=work, args=each, daemon=True) for each in enumerate(networks)]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            step = steps.get()
            if isinstance(step, BaseException):
                raise step
            if step is None:
                running -= 1
            else:
                yield step
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
        step = steps = None  # an error holds this frame, and the two would keep each other


@torch.inference_mode()
def _work(
    network: PatchDiT, scheduler: Scheduler, plan: SamplingPlan, patches: Patches, todo: deque[Batch]
) -> Iterator[Step]:
    """Sample batches on one device until none is left in ``todo``, which other threads may empty too."""
    device = network.device
    while True:
        try:
            batch = todo.popleft()
        except IndexError:
            return
        done = 0
        try:
            for step in _sample(network, scheduler, plan, patches, batch):
                done += step.evaluations
                yield step
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if len(batch) == 1:  # here the error, which held what there was no memory for, is gone
            raise out_of_memory(device)
        release(device)
        todo.extendleft(reversed(batch.parts(2)))
        yield Step(evaluations=-done)


def _sample(
    network: PatchDiT, scheduler: Scheduler, plan: SamplingPlan, patches: Patches, batch: Batch
) -> Iterator[Step]:
    """Sample one batch and put its x0 in place. The host waits for a GPU only at the end."""
    device = network.device
    clock = Stopwatch(device)
    indices = torch.cat([*batch.members.values()])
    y0, noise, prompt = (
        to_device(values[to_device(indices, values.device)], device)
        for values in (patches.y0, patches.noise, patches.prompt)
    )
    schedules = {group: (plan.start[group], plan.steps[group]) for group in batch.members}
    counts = {group: len(members) for group, members in batch.members.items()}
    most = max(steps for _, steps in schedules.values())
    with predicting(network, y0, prompt) as predict:
        run = denoise_together(predict, y0, noise, [*counts.values()], [*schedules.values()], scheduler)
        for k, predictions in enumerate(run):
            active = {group: counts[group] for group, _ in zip(counts, predictions)}
            steps = {group: k + 1 - most + plan.steps[group] for group in active}
            if last := k + 1 == most:
                x0 = torch.cat(predictions).to(patches.x0.device)
                patches.x0[to_device(indices, x0.device)] = x0
                if x0.device != device:
                    wait_for(x0.device)  # the clock waits for the other device only
            # A GPU's time is known for the whole batch only.
            shares = active if device.type == "cpu" else {group: steps[group] * active[group] for group in active}
            each = clock.lap(wait=last) / sum(shares.values())
            yield Step(steps, active, {group: each * share for group, share in shares.items()}, sum(active.values()))
            clock.lap(wait=False)


def patch_bytes(network: PatchDiT, length: int) -> int:
    """About what one patch of a batch takes on the device of ``network``, for a prompt of ``length`` tokens."""
    config = network.config
    tokens = (config.size // config.patch) ** 2
    values = 2 * config.depth * length + 16 * tokens  # keys and values; states of a block and what it makes of them
    return values * config.width * network.dtype.itemsize
