"""What holds for any picture, plan and value, with examples drawn by hypothesis."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchscaler.images import Picture
from patchscaler.plan import GROUPS, MAX_TIMESTEP, SamplingPlan

# The same examples every time, and no clock: the machine may be busy.
CALM = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FIELDS = ("gamma1", "gamma2", "start", "steps")


@st.composite
def plans(draw, most_steps: int = MAX_TIMESTEP) -> SamplingPlan:
    """Any plan that is valid, with at most `most_steps` steps for a patch."""
    gamma2, gamma1 = sorted(draw(st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True)))
    start = sorted(draw(st.tuples(*[st.integers(1, MAX_TIMESTEP)] * 3)))
    steps, least = [], 1
    for limit in start:
        least = draw(st.integers(least, max(least, min(limit, most_steps))))
        steps.append(least)
    return SamplingPlan(gamma1, gamma2, tuple(start), tuple(steps))


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=5),
)


def valid_in_its_place(name: str, value: object) -> bool:
    """Whether a value could be right for a threshold, or for one number of T or N, at all."""
    if isinstance(value, bool):
        return False
    if name.startswith("gamma"):
        return isinstance(value, (int, float)) and 0 <= value <= 1
    return isinstance(value, int) and 1 <= value <= MAX_TIMESTEP


@settings(CALM, max_examples=15)
@given(st.integers(1, 50), st.integers(1, 50), plans(most_steps=2), st.booleans(), st.integers(0, 2**63 - 1))
def test_any_size_and_plan_give_a_picture_of_the_right_size(tiny_pipeline, height, width, plan, transparent, seed):
    generator = torch.Generator().manual_seed(height * 100 + width)
    rgb = torch.rand(3, height, width, generator=generator) * 2 - 1
    alpha = torch.rand(1, height, width, generator=generator) if transparent else None
    result = tiny_pipeline(Picture(rgb, alpha), plan, seed)
    assert result.picture.rgb.shape == (3, 4 * height, 4 * width)
    assert result.picture.rgb.isfinite().all() and result.picture.rgb.abs().max() <= 1
    assert (result.picture.alpha is not None) == transparent
    if transparent:
        assert result.picture.alpha.shape == (1, 4 * height, 4 * width)
        assert result.picture.alpha.min() >= 0 and result.picture.alpha.max() <= 1


@CALM
@given(plans())
def test_any_valid_plan_survives_json_and_costs_what_it_says(plan):
    assert SamplingPlan.from_json(plan.to_json()) == plan
    assert plan.evaluations((1, 1, 1)) == sum(plan.steps)


@CALM
@given(plans(), st.sampled_from(FIELDS), junk)
def test_any_wrong_value_is_named(plan, name, value):
    if valid_in_its_place(name, value):
        return
    values = {field: getattr(plan, field) for field in FIELDS} | {name: value}
    with pytest.raises(ValueError) as error:
        SamplingPlan(**values)
    assert f"{name}={value!r} " in str(error.value)


@CALM
@given(plans(), st.sampled_from(("start", "steps")), st.integers(0, 2), junk)
def test_any_wrong_number_in_a_group_is_named(plan, name, group, value):
    if valid_in_its_place(name, value):
        return
    numbers = list(getattr(plan, name))
    numbers[group] = value
    with pytest.raises(ValueError) as error:
        SamplingPlan(**{field: getattr(plan, field) for field in FIELDS} | {name: tuple(numbers)})
    assert f"{name}={value!r} of the {GROUPS[group]} group" in str(error.value)


@CALM
@given(st.floats(0, 1), st.floats(0, 1))
def test_thresholds_must_not_cross(a, b):
    low, high = sorted((a, b))
    with pytest.raises(ValueError) as error:
        SamplingPlan(low, high, (1, 1, 1), (1, 1, 1))
    assert f"gamma1={low} must be above gamma2={high}" in str(error.value)


@CALM
@given(st.permutations([10, 20, 30]).filter(lambda order: order != [10, 20, 30]), st.sampled_from(("start", "steps")))
def test_numbers_must_not_fall(order, name):
    values = {"start": (100, 100, 100), "steps": (1, 1, 1)} | {name: tuple(order)}
    with pytest.raises(ValueError) as error:
        SamplingPlan(0.9, 0.1, **values)
    assert f"{name}={tuple(order)} falls from simple to hard" in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner),
    max_leaves=8,
)


@CALM
@given(st.one_of(st.fixed_dictionaries(dict.fromkeys(FIELDS, json_values)), json_values))
def test_json_gives_a_valid_plan_or_a_value_error(data):
    try:
        plan = SamplingPlan.from_json(json.dumps(data))
    except ValueError:
        return
    assert 0 <= plan.gamma2 < plan.gamma1 <= 1 and math.isfinite(plan.gamma1)
    assert all(1 <= steps <= start <= MAX_TIMESTEP for steps, start in zip(plan.steps, plan.start))
