"""Dials, brush and budget: new groups at once, without a network."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from visitor import click, last, moved, run, settings

from patchscaler.images import read_picture
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan, assign
from patchscaler.ui.state import DIALS, CachedAnalysis, dials_of, plan_of


def test_a_moved_threshold_regroups_without_a_network(runner, image, plan, dials, monkeypatch):
    views = run(runner, image, dials)
    confidence = runner.cache.get(image["path"]).analysis.patch_confidence
    for name in ("analyze", "refine", "prior_images"):
        monkeypatch.delattr(PatchScalerPipeline, name)
    gamma1 = confidence.median().item()
    plan = replace(plan, gamma1=gamma1, gamma2=0.0)
    view = moved(runner, image, last(views, "shown"), (*dials_of(plan), 7))
    counts = assign(confidence, plan).bincount(minlength=3).tolist()
    assert sum(count > 0 for count in counts) == 2
    for name, count in zip(("simple", "medium", "hard"), counts):
        assert f'data-group="{name}"' in view["legend"] and f"<b>{count}</b>" in view["legend"]
    assert f"<b>{plan.evaluations(counts)}</b>" in view["cost"]
    assert view["preset"] == "custom"
    with Image.open(view["qmap"]) as overlay:
        assert overlay.size == (320, 256)


def test_the_final_picture_is_called_old_while_the_dials_differ(runner, image, dials):
    shown = last(run(runner, image, dials), "shown")
    assert moved(runner, image, shown, dials, place=8)["stale"] == ""
    other = moved(runner, image, shown, (*dials[:8], 8), place=8)["stale"]
    assert "seed 7" in other and "9 of 9 patches" in other
    # Only patches of a group with another T or N count, and no other image's run.
    hard = (shown.steps == 3).sum().item()
    assert f"{hard} of 9 patches" in moved(runner, image, shown, (*dials[:7], 50, 7), place=7)["stale"]
    assert moved(runner, {"path": "other"}, shown, dials, place=8)["stale"] == ""


def test_dials_push_each_other_and_presets_set_them_before_any_image(runner, dials):
    view = moved(runner, None, None, (0.7, 0.75, *dials[2:]), place=0)
    assert view == {"gamma2": 0.69, "preset": "custom", "stale": ""}
    chosen = runner.tuner.preset_chosen(settings(None, dials), "uniform")
    assert tuple(chosen[name] for name in DIALS[:8]) == dials_of(SamplingPlan.uniform())
    assert not runner.tuner.preset_chosen(settings(None, dials), "custom").keys() & set(DIALS)


@pytest.mark.parametrize("typed", [None, 7, 100.5, 5000, float("nan"), "400"])
def test_a_field_that_is_being_typed_into_changes_nothing(runner, image, dials, typed):
    shown = last(run(runner, image, dials), "shown")
    now = settings(image, (*dials[:2], typed, *dials[3:]), shown)
    assert runner.tuner.dial_moved(now, 2) == runner.tuner.regrouped(now) == {}


def test_a_regroup_is_quick(runner, dials):
    """The bar is 100 ms for 512 x 512."""
    source = sorted((Path(__file__).parent.parent / "examples").glob("*.png"))[0]
    analysis = runner.pipeline.analyze(read_picture(source))
    runner.cache.put(str(source), CachedAnalysis(analysis, runner.networks.draw_priors))
    spent = []
    for gamma in (0.3, 0.4, 0.5, 0.6, 0.7):
        began = time.thread_time()  # what the machine does besides is not counted
        moved(runner, {"path": str(source)}, None, (gamma, *dials[1:]))
        spent.append(time.thread_time() - began)
    assert max(spent[1:]) < 0.1


def test_a_patch_is_put_into_another_group_by_hand_and_back(runner, image, dials):
    shown = last(run(runner, image, dials), "shown")
    index = int((shown.steps == 1).nonzero()[0])
    patch = runner.cache.get(image["path"]).analysis.grid.patches[index]
    at = (8 * patch.left + 64, 8 * patch.top + 64)
    view, page = click(runner, image, shown, dials, at, "hard")
    hand = page.by_hand
    assert hand == {index: 2} and "set by hand" in view["facts"]
    assert "1 of 9 patches" in view["stale"] and "Run renders 1 of 9" in view["cost"]
    views = run(runner, image, dials, by_hand=hand)
    assert last(views, "shown").steps[index] == 3 and "1 of 9 patches were rendered anew" in last(views, "status")
    now = settings(image, dials, last(views, "shown"), hand)
    assert "1 of 9 patches" in runner.tuner.reset_by_hand(now)["stale"] and now.page.by_hand == {}

def test_dials_that_are_crossed_for_a_moment_are_waited_for(runner, image, dials):
    shown = last(run(runner, image, dials), "shown")
    crossed = settings(image, (*dials[:5], 8, 14, 1, dials[8]), shown)  # N3 is typed, its neighbours not yet pushed
    assert runner.tuner.regrouped(crossed) == runner.tuner.budget_known(crossed) == {}
    pushed = runner.tuner.dial_moved(crossed, 7)
    assert (pushed["steps1"], pushed["steps2"]) == (1, 1)


@pytest.fixture
def analysed(runner, image):
    """`runner` that know `image` as if it had just been analysed."""
    analysis = runner.pipeline.analyze(read_picture(image["path"]))
    runner.cache.put(image["path"], CachedAnalysis(analysis, runner.networks.draw_priors))
    return runner


def test_a_stroke_of_the_brush_paints_the_patches_under_it(analysed, image, dials):
    grid = analysed.cache.get(image["path"]).analysis.grid  # 3 x 3 patches
    across = json.dumps([[x / 50, 0.1] for x in range(51)])
    now = settings(image, dials)
    view = analysed.tuner.brushed(now, across, "hard")
    by_hand = now.page.by_hand
    assert by_hand == {0: 2, 1: 2, 2: 2} and len(grid) == 9
    confidence = analysed.cache.get(image["path"]).analysis.patch_confidence
    hard = assign(confidence, plan_of(dials[:8]), by_hand).bincount(minlength=3)[2].item()
    assert f"Hard <b>{hard}</b>" in view["legend"]
    # It adds to what was set before, and takes patches over from another group.
    down = json.dumps([[0.01, 0.05], [0.02, 0.95]])
    analysed.tuner.brushed(now, down, "simple")
    assert now.page.by_hand == {0: 0, 1: 2, 2: 2, 6: 0}


@pytest.mark.parametrize(
    ("stroke", "mode"),
    [("[[0.5, 0.5]]", "inspect"), ("", "hard"), ("{}", "hard"), ("[[2, 0]]", "hard"), ("[[NaN, 0]]", "hard"),
     ('["ab"]', "hard"), ("[1]", "hard"), ("nonsense", "hard"), (None, "hard")],
)  # fmt: skip
def test_what_is_no_stroke_changes_nothing(analysed, image, dials, stroke, mode):
    assert analysed.tuner.brushed(settings(image, dials), stroke, mode) == {}
    assert analysed.tuner.brushed(settings({"path": "?"}, dials), "[[0.5, 0.5]]", "hard") == {}


def test_a_patch_is_chosen_by_its_number_too(analysed, image, dials):
    now = settings(image, dials)
    view = analysed.tuner.numbered(now, 8, "hard")
    assert "<b>Patch 8</b>" in view["facts"] and "set by hand" in view["facts"]
    assert view["inspector"].count("<img") == 1 and view["number"] == 8
    assert (now.page.patch, now.page.by_hand, now.page.center) == (8, {8: 2}, (320 - 64, 256 - 64))
    for wrong in (9, -1):
        view = analysed.tuner.numbered(settings(image, dials), wrong, "hard")
        assert view == {"facts": f"<p>There is no patch {wrong}: there are 9 patches, 0 to 8.</p>"}
    for wrong in (None, "x"):
        assert analysed.tuner.numbered(settings(image, dials), wrong, "hard") == {}


def test_the_budget_moves_the_thresholds_after_the_first_run(runner, image, dials):
    now = settings(image, dials)
    assert runner.tuner.budget_set(now, 5.0) == {}
    run(runner, image, dials)
    known = runner.tuner.budget_known(now)["budget"]
    assert known["interactive"] and known["minimum"] <= known["value"] <= known["maximum"]
    for seconds, group in ((-1.0, "simple"), (3600.0, "hard")):
        view = runner.tuner.budget_set(now, seconds)
        gamma1, gamma2 = view["gamma1"], view["gamma2"]
        counts = assign(
            runner.cache.get(image["path"]).analysis.patch_confidence,
            plan_of((gamma1, gamma2, *dials[2:8])),
        ).bincount(minlength=3)
        assert counts[("simple", "medium", "hard").index(group)] == 9
        assert f"<b>{9}</b>" in view["legend"]
