from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from patchscaler.plan import GROUPS, PRESETS, SamplingPlan, assign


def test_paper_plan_is_the_papers():
    plan = SamplingPlan.paper()
    assert (plan.gamma1, plan.gamma2) == (0.95, 0.75)
    assert plan.start == (400, 700, 1000)
    assert plan.steps == (8, 14, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eq2_borders(dtype):
    """A confidence equal to a threshold belongs to the harder group."""
    confidence = torch.tensor([1.0, 0.95, 0.75, 0.0], dtype=dtype)
    up = torch.nextafter(confidence, torch.ones_like(confidence))
    assert assign(confidence, SamplingPlan.paper()).tolist() == [0, 1, 2, 2]
    assert assign(up, SamplingPlan.paper()).tolist() == [0, 0, 1, 2]


def test_extreme_thresholds_leave_groups_empty():
    confidence = torch.linspace(0, 1, 11)
    plan = replace(SamplingPlan.paper(), gamma1=1, gamma2=0)
    assert assign(confidence, plan).tolist() == [2] + [1] * 10


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_assign_refuses_values_outside_the_range(value):
    with pytest.raises(ValueError, match="outside"):
        assign(torch.tensor([0.5, value]), SamplingPlan.paper())


def test_assign_of_no_patches():
    assert assign(torch.empty(0), SamplingPlan.paper()).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma1": 1.5}, "gamma1=1.5"),
        ({"gamma2": -0.1}, "gamma2=-0.1"),
        ({"gamma1": float("nan")}, "gamma1=nan"),
        ({"gamma1": True}, "gamma1=True"),
        ({"gamma1": "0.9"}, "gamma1='0.9'"),
        ({"gamma1": 0.75}, "above gamma2=0.75"),
        ({"start": (0, 700, 1000)}, "start=0 of the simple group is not a whole number in 1..1000"),
        ({"start": (400, 700, 1001)}, "start=1001 of the hard group is not a whole number in 1..1000"),
        ({"start": (700, 400, 1000)}, "falls"),
        ({"start": (400.0, 700, 1000)}, "start=400.0"),
        ({"start": (400, 700)}, "tuple of 3"),
        ({"start": [400, 700, 1000]}, "tuple of 3"),
        ({"steps": (8, 14, float("nan"))}, "steps=nan"),
        ({"steps": (True, 14, 20)}, "steps=True"),
        ({"steps": (0, 14, 20)}, "steps=0 of the simple group is not a whole number in 1..400"),
        ({"steps": (-1, 14, 20)}, "steps=-1"),
        ({"steps": (401, 700, 1000)}, "steps=401 of the simple group is not a whole number in 1..400"),
        ({"steps": (8, 7, 20)}, "falls"),
    ],
)
def test_bad_plans_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SamplingPlan.paper(), **change)


def test_plan_is_frozen():
    with pytest.raises(FrozenInstanceError):
        SamplingPlan.paper().gamma1 = 0.5


@pytest.mark.parametrize("plan", PRESETS.values(), ids=PRESETS.keys())
def test_json_round_trip(plan):
    assert SamplingPlan.from_json(plan.to_json()) == plan


def test_json_refuses_other_keys_and_values():
    data = json.loads(SamplingPlan.paper().to_json())
    bad_values = [{**data, "steps": 8}, {**data, "gamma1": None}]
    for bad in ({**data, "gamma3": 0.1}, {"gamma1": 0.9}, [1, 2], *bad_values):
        with pytest.raises(ValueError):
            SamplingPlan.from_json(json.dumps(bad))
    with pytest.raises(ValueError):
        SamplingPlan.from_json("not json")


def test_evaluations():
    plan = SamplingPlan.paper()
    assert plan.evaluations([10, 5, 2]) == 10 * 8 + 5 * 14 + 2 * 20
    assert plan.evaluations([0, 0, 0]) == 0
    assert SamplingPlan.fast().evaluations([1, 1, 1]) < plan.evaluations([1, 1, 1])
    with pytest.raises(ValueError, match="2 counts"):
        plan.evaluations([1, 2])
    assert len(GROUPS) == 3
