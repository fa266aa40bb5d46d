"""Patch-DiT ahead of time: the exported graph in place of the network. What it is compiled to needs a Space."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_pipeline

from patchscaler.grouping import SamplingPlan
from patchscaler.ui.ahead import compile_ahead, export, use

PLAN = SamplingPlan(0.95, 0.75, start=(200, 400, 600), steps=(1, 2, 3))


def test_the_graph_takes_the_networks_place_for_any_batch(tiny_pipeline, picture):
    analysis = tiny_pipeline.analyze(picture)
    pipeline, calls = make_tiny_pipeline(), []
    graph = export(pipeline.transformer).module()
    use(pipeline.transformer, lambda *inputs: calls.append(len(inputs[0])) or graph(*inputs))
    for size, sizes in ((64, {9}), (4, {4, 2}), (1, {2})):  # the last of nine is alone
        calls.clear()
        *_, expected = tiny_pipeline.refine(analysis, PLAN, batch_size=size)
        *_, result = pipeline.refine(analysis, PLAN, batch_size=size)
        assert torch.equal(result.picture.rgb, expected.picture.rgb) and set(calls) >= sizes


def test_it_is_off_unless_asked_for_and_for_zerogpu_only(tiny_pipeline, monkeypatch):
    monkeypatch.delenv("PATCHSCALER_AOT", raising=False)
    compile_ahead(tiny_pipeline)
    assert "forward" not in vars(tiny_pipeline.transformer)
    monkeypatch.setenv("PATCHSCALER_AOT", "1")
    with pytest.raises(RuntimeError, match="for ZeroGPU Spaces"):
        compile_ahead(tiny_pipeline)
