"""Retrieval of texture priors from the reference texture memory (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Memory(Protocol):
    """What retrieval needs of a texture memory of M entries."""

    features: Tensor  # MxD, rows of length 1 (RTM-key)

    def patches(self, indices: Tensor) -> Tensor:
        """The stored latents (RTM-value) of a LongTensor of any shape: ...xCxVxV float32."""


@dataclass(frozen=True)
class Priors:
    """The K best matches of N patches, best first."""

    indices: Tensor  # NxK, rows of the memory
    similarities: Tensor  # NxK float32 in [-1, 1]
    values: Tensor  # NxKxCxVxV float32 latents


def retrieve(queries: Tensor, memory: Memory, k: int) -> Priors:
    """Algorithm 1: the ``k`` entries whose keys have the largest normalised inner product with each query.

    ``queries`` NxD, of any length and float dtype. ValueError unless 1 <= k <= M.
    """
    size = memory.features.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k={k} is outside 1..{size}, the size of the texture memory")
    normalised = F.normalize(queries.float(), dim=-1)  # NxD
    scores = normalised @ memory.features.float().T  # NxM
    similarities, indices = scores.topk(k, dim=-1)  # NxK, sorted
    return Priors(indices, similarities, memory.patches(indices))
