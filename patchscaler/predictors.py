"""Patch-DiT as the samplers call it: f_theta for one batch, which on CUDA may be replayed from recorded graphs.

N patches, C channels, V patch side, L prompt tokens, D width. A batch grows: a call takes the first n of its patches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from patchscaler.devices import wait_for
from patchscaler.models import PatchDiT
from patchscaler.models.patch_dit import PromptKeys
from patchscaler.sampling import Predict

# Patches of a recorded evaluation; smaller batches are filled up. Above, a GPU takes longer for an evaluation than the
# host for starting its kernels, and nothing is gained.
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)

_recording = Lock()  # CUDA captures one graph at a time
_recorded: WeakKeyDictionary[PatchDiT, deque[Recordings]] = WeakKeyDictionary()


def record(network: PatchDiT) -> None:
    """From now on have small batches of ``network`` recorded as CUDA graphs, once for each size, and then replayed.

    An evaluation is some 250 kernels, and the host starts one in the time in which a GPU does several.
    """
    _recorded[network] = deque([Recordings()])


def forget(network: PatchDiT) -> None:
    """Undo `record`."""
    _recorded.pop(network, None)


@contextmanager
def predicting(network: PatchDiT, y0: Tensor, prompt: Tensor) -> Iterator[Predict]:
    """f_theta for one batch: y0 NxCxVxV and prompt NxLxD, whose keys are computed once, not per step."""
    keys = network.prompt_keys(prompt)

    def predict(x_t: Tensor, t: int) -> Tensor:
        # One time for all: besides being cheaper, its products then have the same shape in every batch,
        # without which float32 results of a patch would depend on the size of its batch (by 2e-6).
        count = len(x_t)
        return network(x_t, y0[:count], torch.full((1,), t, device=x_t.device), first(keys, count))

    kept = _recorded.get(network)
    try:
        recordings = kept.pop() if kept else None
    except IndexError:  # another thread has just taken them
        recordings = None
    if recordings is None:
        yield predict
        return
    try:
        recordings.begin(network, y0, keys)
        yield lambda x_t, t: recordings.predict(network, x_t, t) if len(x_t) <= SIZES[-1] else predict(x_t, t)
    finally:
        wait_for(y0.device)  # another thread, which may have another stream, may be next
        kept.append(recordings)


def first(keys: PromptKeys, count: int) -> PromptKeys:
    """Those of the first ``count`` patches."""
    return [(key[:count], value[:count]) for key, value in keys]


class Recordings:
    """Graphs of one network for the SIZES that came up, which all read the same tensors and share their memory."""

    def __init__(self) -> None:
        self._made_for: tuple | None = None

    def begin(self, network: PatchDiT, y0: Tensor, keys: PromptKeys) -> None:
        """Let the graphs read a batch. They are made anew if the network is elsewhere or its inputs are other ones."""
        key = keys[0][0]
        made_for = network.embed.weight.data_ptr(), network.dtype, y0.dtype, y0.shape[1:], key.dtype, key.shape[1:]
        if made_for != self._made_for:
            self._made_for = None  # until all is there
            self.x_t, self.y0 = (y0.new_zeros(SIZES[-1], *y0.shape[1:]) for _ in range(2))
            self.keys = [tuple(part.new_zeros(SIZES[-1], *part.shape[1:]) for part in pair) for pair in keys]
            self.t = torch.ones(1, dtype=torch.long, device=y0.device)
            self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
            self.stream: torch.cuda.Stream | None = None
            self._made_for = made_for
        count = min(len(y0), SIZES[-1])
        self.y0[:count] = y0[:count]
        for mine, given in zip(self.keys, keys, strict=True):
            for to, part in zip(mine, given, strict=True):
                to[:count] = part[:count]

    def predict(self, network: PatchDiT, x_t: Tensor, t: int) -> Tensor:
        """x0 of the first patches of the batch."""
        size = next(size for size in SIZES if size >= len(x_t))
        if size not in self.graphs:
            with _recording:
                self.graphs[size] = self._record(network, size)
        graph, x0 = self.graphs[size]
        self.x_t[: len(x_t)] = x_t
        self.t.fill_(t)
        graph.replay()
        return x0[: len(x_t)].clone()  # the next replay overwrites it

    def _record(self, network: PatchDiT, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        inputs = self.x_t[:size], self.y0[:size], self.t, first(self.keys, size)
        # Of a priority that nothing else has: other streams are shared, and what others ask of them would be recorded.
        self.stream = self.stream or torch.cuda.Stream(self.t.device, priority=-1)
        self.stream.wait_stream(torch.cuda.current_stream(self.t.device))
        with torch.cuda.stream(self.stream):
            network(*inputs)  # what libraries and compilers do only once is no part of a graph
        torch.cuda.current_stream(self.t.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.graphs.values()), None)  # they never run at the same time
        # Other threads may use the GPU meanwhile, hence the mode.
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            x0 = network(*inputs)
        return graph, x0
