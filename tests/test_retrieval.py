from __future__ import annotations

import pytest
import torch

from patchscaler.retrieval import retrieve


class Memory:
    def __init__(self, size=50, dim=8):
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(size, dim, generator=generator)
        self.features = features / features.norm(dim=-1, keepdim=True)


def test_algorithm_1_against_brute_force():
    memory = Memory()
    queries = 7 * torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
    priors = retrieve(queries, memory, k=4)
    for n, query in enumerate(queries):
        scores = [torch.dot(key, query / query.norm()).item() for key in memory.features]
        best = sorted(range(50), key=lambda i: -scores[i])[:4]
        assert priors.indices[n].tolist() == best
        assert priors.similarities[n].tolist() == pytest.approx([scores[i] for i in best], abs=1e-6)


def test_an_entry_finds_itself_first_at_any_scale():
    memory = Memory()
    for scale in (1e-3, 1.0, 1e3):
        priors = retrieve(scale * memory.features, memory, k=1)
        assert priors.indices[:, 0].tolist() == list(range(50))
        torch.testing.assert_close(priors.similarities[:, 0], torch.ones(50))


def test_shapes_dtypes_and_whole_memory():
    memory = Memory(size=3)
    priors = retrieve(torch.randn(5, 8).bfloat16(), memory, k=3)
    assert priors.indices.shape == (5, 3) and priors.indices.dtype == torch.long
    assert priors.similarities.shape == (5, 3) and priors.similarities.dtype == torch.float32
    assert priors.indices.sort(dim=-1).values.tolist() == [[0, 1, 2]] * 5


def test_a_zero_query_has_zero_similarity():
    priors = retrieve(torch.zeros(1, 8), Memory(), k=2)
    assert priors.similarities.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("k", [0, -1, 51])
def test_k_outside_the_memory(k):
    with pytest.raises(ValueError, match=f"k={k} is outside 1..50"):
        retrieve(torch.zeros(1, 8), Memory(), k=k)
