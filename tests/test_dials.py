"""The dials, thresholds for a budget, and what a run is expected to take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patchscaler.plan import PRESETS, SamplingPlan, assign
from patchscaler.ui.networks import Calibration, Call, Work
from patchscaler.ui.state import MAX_SEED, RANGES, dials_of, enforce_order, in_range, plan_of, preset_of, seed_of
from patchscaler.ui.tune import thresholds_within


@pytest.mark.parametrize("plan", PRESETS.values(), ids=PRESETS)
def test_dials_show_a_plan_and_read_back(plan):
    assert plan_of(dials_of(plan)) == plan
    assert plan_of([float(value) for value in dials_of(plan)]) == plan  # as a browser may send them
    assert PRESETS[preset_of(plan)] == plan


@pytest.mark.parametrize("moved", range(8))
@pytest.mark.parametrize("to", ["low", "high"])
def test_no_move_of_a_dial_crosses_another(moved, to):
    dials = list(dials_of(SamplingPlan.paper()))
    dials[moved] = RANGES[moved][to == "high"]
    assert in_range(dials)
    after = enforce_order(dials, moved)
    assert after[moved] == dials[moved]
    plan_of(after)  # raises if anything crossed
    assert enforce_order(after, 8) == after
    pushed = {i for i in range(8) if after[i] != dials[i]}
    assert pushed <= ({0, 1} if moved < 2 else {2, 3, 4} if moved < 5 else {5, 6, 7})


@pytest.mark.parametrize("value", [None, True, 0.5, -1, MAX_SEED + 1, "3", float("nan"), float("inf")])
def test_a_seed_that_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match="seed is empty" if value is None else "seed="):
        seed_of(value)


def test_a_seed_may_come_as_a_whole_float():
    assert [seed_of(0), seed_of(5.0), seed_of(MAX_SEED)] == [0, 5, MAX_SEED]


def test_expected_seconds_are_those_of_calls_patches_and_pixels():
    calibration = Calibration()
    assert calibration.seconds(Work(10), 100) is None and calibration.analysis_seconds(100) is None
    # A call takes 0.5 s and 0.25 s more for each of its patches; a pixel of a picture, 1 ms.
    groups = [Call(8, 8 * count, 8 * (0.5 + 0.25 * count)) for count in (2, 20, 40)]
    calibration.learn([*groups, Call(0, 0, 0.0)], 1000, 3.0, pictures=3)
    calibration.learn_analysis(1000, 2.0)
    assert calibration.seconds(Work(100, calls=10, pictures=3), 5000) == pytest.approx(10 * 0.5 + 100 * 0.25 + 15)
    assert calibration.analysis_seconds(500) == 1.0
    # A run that sampled nothing tells about the rest only: the last picture takes more than the others.
    calibration.learn([], 1000, 1.75)
    assert calibration.seconds(Work(0), 1000) == pytest.approx(1.75)
    assert calibration.seconds(Work(0, pictures=3), 2000) == pytest.approx(6.0)


@pytest.mark.parametrize(
    "groups", [[Call(8, 160, 1.6)], [Call(8, 80, 1.0), Call(8, 160, 1.0)], [Call(8, 80, 1.0), Call(8, 160, 9.0)]]
)
def test_rates_are_never_negative(groups):
    calibration = Calibration()
    calibration.learn(groups, 100, 0.0)
    assert min(calibration.seconds(Work(1), 0), calibration.seconds(Work(0, calls=1), 0)) >= 0
    assert calibration.seconds(Work(160, calls=8), 0) == pytest.approx(groups[-1].seconds, rel=0.75)


def test_the_budget_is_kept_and_nearly_spent():
    confidence = torch.rand(60, generator=torch.Generator().manual_seed(1))
    plan = SamplingPlan.paper()

    def cost(counts):
        return (counts.new_tensor(plan.steps)[:, None, None] * counts).sum(0)

    def within(budget, by_hand=None):
        return thresholds_within(confidence, plan, cost, budget, by_hand or {})

    for budget in (500, 700, 1000, 1190):
        gammas = within(budget)
        fitted = replace(plan, gamma1=gammas[0], gamma2=gammas[1])
        spent = fitted.evaluations(assign(confidence, fitted).bincount(minlength=3).tolist())
        assert 0.9 * budget < spent <= budget
    cheapest = within(-5)
    assert (confidence <= cheapest[0]).sum() == (confidence <= 0.01).sum()
    # What is spent already is spent: the present thresholds are kept when they fit.
    now = plan.evaluations(assign(confidence, plan).bincount(minlength=3).tolist())
    assert within(now) == (plan.gamma1, plan.gamma2)
    everything_hard = within(20, dict.fromkeys(range(59), 2))
    assert everything_hard[0] <= 0.01 or confidence[59] > everything_hard[0]
    assert thresholds_within(confidence, plan, lambda counts: None, 20, {}) is None
