"""Retrieval of texture priors from the reference texture memory (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from patchscaler.models import TextureMemory


@dataclass(frozen=True)
class Priors:
    """The K best matches of N patches, best first."""

    indices: Tensor  # N×K, rows of the memory
    similarities: Tensor  # N×K float32 in [-1, 1]


def retrieve(queries: Tensor, memory: TextureMemory, k: int) -> Priors:
    """Algorithm 1: the `k` entries whose keys have the largest normalised inner product with each query.

    `queries` N×D, of any length and float dtype; the memory has M entries. ValueError unless 1 <= k <= M.
    """
    size = memory.features.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k={k} is outside 1..{size}, the size of the texture memory")
    normalised = F.normalize(queries.float(), dim=-1)  # N×D
    scores = normalised @ memory.features.T  # N×M
    similarities, indices = scores.topk(k, dim=-1)  # N×K, sorted
    return Priors(indices, similarities)
