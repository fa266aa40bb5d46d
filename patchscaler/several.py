"""Sampling on several devices: each takes the costliest batch of patches that is left."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from threading import Event, Thread

import torch

from patchscaler.models import PatchDiT
from patchscaler.sampling import Batch, Patches, Scheduler, Step, sample_batches


def place(batches: Sequence[Batch], devices: int) -> list[Batch]:
    """The batches for so many devices, the costliest first. Where they are few, each is cut into a part for each."""
    ordered = sorted(batches, key=lambda batch: -batch.steps * len(batch))
    whole = len(ordered) - len(ordered) % devices if len(ordered) >= 4 * devices else 0
    return ordered[:whole] + [part for batch in ordered[whole:] for part in batch.parts(devices)]


def sample_on_several(
    networks: Sequence[PatchDiT], scheduler: Scheduler, patches: Patches, batches: Sequence[Batch]
) -> Iterator[Step]:
    """`sample_batches` on several networks, each on a device of its own, in a thread each.

    Close the generator to stop. What is raised in a thread is raised here.
    """
    todo = deque(place(batches, len(networks)))
    steps: queue.SimpleQueue = queue.SimpleQueue()
    stopped = Event()

    @torch.inference_mode()
    def work(network: PatchDiT) -> None:
        try:
            with closing(sample_batches(network, scheduler, patches, todo)) as running:
                for step in running:
                    steps.put(step)
                    if stopped.is_set():
                        break
        except BaseException as error:  # it is raised where the steps are read
            steps.put(error)
        else:
            steps.put(None)

    threads = [Thread(target=work, args=(network,), daemon=True) for network in networks]
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
