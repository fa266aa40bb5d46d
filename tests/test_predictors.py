"""Replayed evaluations, with stand-ins for CUDA graphs that compute on replay what was recorded."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_pipeline

from patchscaler import predictors
from patchscaler.grouping import SamplingPlan
from patchscaler.predictors import SIZES, Recordings, predicting

PLAN = SamplingPlan(0.95, 0.75, start=(200, 400, 600), steps=(2, 4, 6))


class Graph:
    """As a CUDA graph it reads and writes the same tensors at every replay."""

    def __init__(self, network, inputs, x0):
        self.call, self.x0, self.replays = lambda: network(*inputs), x0, 0

    def replay(self):
        self.replays += 1
        self.x0.copy_(self.call())


@pytest.fixture
def recorded(monkeypatch):
    """The tiny Patch-DiT with recordings, and the graphs that were made, by size."""
    network, graphs = copy.deepcopy(make_tiny_pipeline().transformer), {}

    def record(self, network, size):
        inputs = self.x_t[:size], self.y0[:size], self.t, predictors.first(self.keys, size)
        graphs.setdefault(size, []).append(Graph(network, inputs, torch.full_like(self.x_t[:size], float("nan"))))
        return graphs[size][-1], graphs[size][-1].x0

    monkeypatch.setattr(Recordings, "_record", record)
    predictors.record(network)
    yield network, graphs
    predictors.forget(network)


def batch(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, y0 and prompt."""
    draw = torch.Generator().manual_seed(seed)
    x_t, y0 = (torch.randn(count, 4, 16, 16, generator=draw) for _ in range(2))
    return x_t, y0, torch.randn(count, 12, 16, generator=draw)


@torch.inference_mode()
def test_a_growing_batch_is_filled_up_and_gives_what_the_network_gives(recorded):
    network, graphs = recorded
    for seed in range(2):  # the second batch finds what the first one left
        x_t, y0, prompt = batch(21, seed)
        kept = []
        with predicting(network, y0, prompt) as predict:
            for count, t in ((3, 900), (8, 500), (9, 400), (21, 7)):
                expected = network(x_t[:count], y0[:count], torch.tensor([t]), prompt[:count])
                kept.append((predict(x_t[:count], t), expected))
        for ours, expected in kept:  # all of them, after the last replay
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert {size: [graph.replays for graph in made] for size, made in graphs.items()} == {8: [4], 16: [2], 24: [2]}


@torch.inference_mode()
def test_large_batches_are_not_recorded_but_their_first_patches_are(recorded):
    network, graphs = recorded
    x_t, y0, prompt = batch(SIZES[-1] + 1)
    with predicting(network, y0, prompt) as predict:
        for count in (5, len(x_t)):
            expected = network(x_t[:count], y0[:count], torch.tensor([300]), prompt[:count])
            torch.testing.assert_close(predict(x_t[:count], 300), expected, rtol=0, atol=1e-5)
    assert [*graphs] == [8]


@torch.inference_mode()
def test_other_weights_or_inputs_are_recorded_anew(recorded):
    network, graphs = recorded
    x_t, y0, prompt = batch(4)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.bfloat16, 0.1)):
        network.to(dtype)
        with predicting(network, y0, prompt) as predict:
            expected = network(x_t, y0, torch.tensor([300]), prompt)
            torch.testing.assert_close(predict(x_t, 300), expected, rtol=0, atol=near)
    assert len(graphs[8]) == 2


def test_a_second_thread_goes_without(recorded):
    network, graphs = recorded
    x_t, y0, prompt = batch(4)
    results = []

    def other():
        with torch.inference_mode(), predicting(network, y0, prompt) as predict:
            results.append(predict(x_t, 300))

    with torch.inference_mode(), predicting(network, y0, prompt) as predict:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        results.append(predict(x_t, 300))
    assert graphs[8][0].replays == 1
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    with torch.inference_mode(), predicting(network, y0, prompt) as predict:  # given back
        predict(x_t, 300)
    assert graphs[8][0].replays == 2


def test_a_refinement_that_is_replayed(recorded, picture):
    pipeline = make_tiny_pipeline()
    analysis = pipeline.analyze(picture)
    by_hand = {index: index % 3 for index in range(len(analysis.grid))}
    *_, plain = pipeline.refine(analysis, PLAN, by_hand=by_hand)
    pipeline.transformer, graphs = recorded
    for _ in range(2):
        *_, replayed = pipeline.refine(analysis, PLAN, by_hand=by_hand)
        torch.testing.assert_close(replayed.picture.rgb, plain.picture.rgb, rtol=0, atol=1e-4)
    assert {size: made[0].replays for size, made in graphs.items()} == {8: 2 * 4, 16: 2 * 2}  # three, six and nine


def test_a_recording_is_made_on_a_stream_of_its_own_after_a_first_call(monkeypatch, tiny_pipeline):
    """The order of what CUDA is asked for, which has rules: a graph's first call must not be recorded."""
    asked = []

    class Stream:
        def __init__(self, *arguments, **options):
            asked.append(("stream", options))

        def wait_stream(self, other):
            asked.append("wait")

    current = SimpleNamespace(wait_stream=lambda other: asked.append("the caller's waits"))

    def graph(made, pool, stream, capture_error_mode):
        asked.append(("record", pool, capture_error_mode))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"pool": lambda self: "pool"})())
    network = copy.deepcopy(tiny_pipeline.transformer)
    network.register_forward_hook(lambda *_: asked.append("call"))
    x_t, y0, prompt = batch(4)
    recordings = Recordings()
    with torch.inference_mode():
        recordings.begin(network, y0, network.prompt_keys(prompt))
        for size in (8, 16):
            recordings.graphs[size] = recordings._record(network, size)
    called = ["wait", "call", "the caller's waits"]
    first = [("stream", {"priority": -1}), *called, ("record", None, "thread_local"), "call"]
    assert asked == [*first, *called, ("record", "pool", "thread_local"), "call"]
