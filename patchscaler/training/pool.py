"""A pool of prepared samples: encoded once, drawn from several times, so that training waits less for inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchscaler.training.fit import step_generator

Samples = dict[str, Tensor]


class Pool:
    """Batches for every step from a pool that is redrawn every `passes` passes over it.

    Which samples a step gets depends on the step and the seed alone: a resumed run draws the pool again that
    it was in the middle of and goes on as if it had never stopped.

    Args:
        draw: (count, generator) → named tensors with `count` rows; called for `chunk` rows at a time.
        size: rows in the pool.
        passes: how often each row is used before the pool is redrawn.
        batch: rows per step.
    """

    def __init__(
        self,
        draw: Callable[[int, torch.Generator], Samples],
        *,
        size: int,
        passes: int,
        batch: int,
        chunk: int = 32,
        seed: int = 0,
    ):
        if size % batch or size % chunk:
            raise ValueError(f"pool of {size} is no multiple of batch {batch} and chunk {chunk}")
        self.draw, self.size, self.passes, self.batch, self.chunk = draw, size, passes, batch, chunk
        self.seed, self.round = seed, -1

    def samples(self, step: int) -> Samples:
        """The batch of a step, named tensors with `batch` rows."""
        steps_per_pass = self.size // self.batch
        round_, within = divmod(step, steps_per_pass * self.passes)
        if round_ != self.round:
            parts = [
                self.draw(self.chunk, step_generator(self.seed + 1, round_ * self.size + first))
                for first in range(0, self.size, self.chunk)
            ]
            self.rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self.round = round_
        pass_, index = divmod(within, steps_per_pass)
        shuffle = step_generator(self.seed + 2, round_ * self.passes + pass_)
        order = torch.randperm(self.size, generator=shuffle)[index * self.batch : (index + 1) * self.batch]
        return {name: rows[order.to(rows.device)] for name, rows in self.rows.items()}
