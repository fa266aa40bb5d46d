"""Dials, brush and budget: new groups at once, without a network."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from visitor import VISITOR, click, dial_view, last, moved, run, settings

from patchscaler.grouping import SamplingPlan, assign
from patchscaler.images import read_picture
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui.state import SKIP, Study, dials_of, plan_of


def test_a_moved_threshold_regroups_without_a_network(handlers, image, plan, dials, monkeypatch):
    views = run(handlers, image, dials)
    confidence = handlers.studies.get(image["path"]).analysis.patch_confidence
    for name in ("analyze", "refine", "decode_priors"):
        monkeypatch.delattr(PatchScalerPipeline, name)
    gamma1 = confidence.median().item()
    plan = replace(plan, gamma1=gamma1, gamma2=0.0)
    view = moved(handlers, image, last(views, "shown"), (*dials_of(plan), 7))
    counts = assign(confidence, plan).bincount(minlength=3).tolist()
    assert sum(count > 0 for count in counts) == 2
    for name, count in zip(("simple", "medium", "hard"), counts):
        assert f'data-group="{name}"' in view["legend"] and f"<b>{count}</b>" in view["legend"]
    assert f"<b>{plan.evaluations(counts)}</b>" in view["cost"]
    assert view["preset"] == "custom"
    with Image.open(view["qmap"]) as overlay:
        assert overlay.size == (320, 256)


def test_the_final_picture_is_called_old_while_the_dials_differ(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    assert moved(handlers, image, shown, dials, place=8)["stale"] == ""
    other = moved(handlers, image, shown, (*dials[:8], 8), place=8)["stale"]
    assert "seed 7" in other and "9 of 9 patches" in other
    # Only patches of a group with another T or N count, and no other image's run.
    hard = (shown.steps == 3).sum().item()
    assert f"{hard} of 9 patches" in moved(handlers, image, shown, (*dials[:7], 50, 7), place=7)["stale"]
    assert moved(handlers, {"path": "other"}, shown, dials, place=8)["stale"] == ""


def test_dials_push_each_other_and_presets_set_them_before_any_image(handlers, dials):
    view = moved(handlers, None, None, (0.7, 0.75, *dials[2:]), place=0)
    assert view["dials"][1] == 0.69 and all(view["dials"][i] is SKIP for i in (0, 2, 3, 4, 5, 6, 7))
    assert view["qmap"] is SKIP
    assert handlers.preset_chosen("uniform", *settings(None, dials))[:8] == dials_of(SamplingPlan.uniform())
    assert handlers.preset_chosen("custom", *settings(None, dials))[:8] == dials[:8]


@pytest.mark.parametrize("typed", [None, 7, 100.5, 5000, float("nan"), "400"])
def test_a_field_that_is_being_typed_into_changes_nothing(handlers, image, dials, typed):
    shown = last(run(handlers, image, dials), "shown")
    now = settings(image, (*dials[:2], typed, *dials[3:]), shown)
    view = handlers.dial_moved(2, *now)
    assert all(value is SKIP for value in view)
    assert handlers.refresh(VISITOR, *now)[9] is SKIP


def test_a_regroup_is_quick(handlers, dials):
    """The bar is 100 ms for 512 x 512."""
    source = sorted((Path(__file__).parent.parent / "examples").glob("*.png"))[0]
    analysis = handlers.pipeline.analyze(read_picture(source))
    handlers.studies.put(str(source), Study(analysis, Image.new("RGB", (1, 1))))
    spent = []
    for gamma in (0.3, 0.4, 0.5, 0.6, 0.7):
        began = time.thread_time()  # what the machine does besides is not counted
        moved(handlers, {"path": str(source)}, None, (gamma, *dials[1:]))
        spent.append(time.thread_time() - began)
    assert max(spent[1:]) < 0.1


def test_a_patch_is_put_into_another_group_by_hand_and_back(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    index = int((shown.steps == 1).nonzero()[0])
    patch = handlers.studies.get(image["path"]).analysis.grid.patches[index]
    at = (8 * patch.left + 64, 8 * patch.top + 64)
    picked = click(handlers, image, shown, dials, at, "hard")
    hand, view = picked["by_hand"], picked["view"]
    assert hand == {index: 2} and "set by hand" in picked["facts"]
    assert "1 of 9 patches" in view["stale"] and "Run renders 1 of 9" in view["cost"]
    views = run(handlers, image, dials, by_hand=hand)
    assert last(views, "shown").steps[index] == 3 and "1 of 9 patches were rendered anew" in last(views, "status")
    by_hand, *rest = handlers.reset_by_hand(*settings(image, dials, last(views, "shown"), hand))
    assert by_hand == {} and "1 of 9 patches" in rest[12]

def test_dials_that_are_crossed_for_a_moment_are_waited_for(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    crossed = settings(image, (*dials[:5], 8, 14, 1, dials[8]), shown)  # N3 is typed, its neighbours not yet pushed
    assert all(value is SKIP for value in handlers.refresh(VISITOR, *crossed)[:-1])
    assert handlers.budget_known(*crossed) is SKIP
    assert dial_view(handlers.dial_moved(7, *crossed))["dials"][5:7] == (1, 1)


@pytest.fixture
def analysed(handlers, image):
    """`handlers` that know `image` as if it had just been analysed."""
    analysis = handlers.pipeline.analyze(read_picture(image["path"]))
    handlers.studies.put(image["path"], Study(analysis, Image.new("RGB", (1, 1))))
    return handlers


def test_a_stroke_of_the_brush_paints_the_patches_under_it(analysed, image, dials):
    grid = analysed.studies.get(image["path"]).analysis.grid  # 3 x 3 patches
    across = json.dumps([[x / 50, 0.1] for x in range(51)])
    by_hand, *values = analysed.brushed(across, "hard", *settings(image, dials))
    assert by_hand == {0: 2, 1: 2, 2: 2} and len(grid) == 9
    confidence = analysed.studies.get(image["path"]).analysis.patch_confidence
    hard = assign(confidence, plan_of(dials[:8]), by_hand).bincount(minlength=3)[2].item()
    assert f"Hard <b>{hard}</b>" in dial_view(values)["legend"]
    # It adds to what was set before, and takes patches over from another group.
    down = json.dumps([[0.01, 0.05], [0.02, 0.95]])
    by_hand, *_ = analysed.brushed(down, "simple", *settings(image, dials, None, by_hand))
    assert by_hand == {0: 0, 1: 2, 2: 2, 6: 0}


@pytest.mark.parametrize(
    ("stroke", "mode"),
    [("[[0.5, 0.5]]", "inspect"), ("", "hard"), ("{}", "hard"), ("[[2, 0]]", "hard"), ("[[NaN, 0]]", "hard"),
     ('["ab"]', "hard"), ("[1]", "hard"), ("nonsense", "hard"), (None, "hard")],
)  # fmt: skip
def test_what_is_no_stroke_changes_nothing(analysed, image, dials, stroke, mode):
    assert all(value is SKIP for value in analysed.brushed(stroke, mode, *settings(image, dials)))
    assert all(value is SKIP for value in analysed.brushed("[[0.5, 0.5]]", "hard", *settings({"path": "?"}, dials)))


def test_a_patch_is_chosen_by_its_number_too(analysed, image, dials):
    facts, pictures, patch, center, by_hand, number, *_ = analysed.numbered(8, "hard", *settings(image, dials))
    assert "<b>Patch 8</b>" in facts and "set by hand" in facts and pictures.count("<img") == 1
    assert patch == (image["path"], 8) and by_hand == {8: 2} and number == 8
    assert center == (320 - 64, 256 - 64)
    for wrong in (None, 9, -1, "x"):
        assert all(value is SKIP for value in analysed.numbered(wrong, "hard", *settings(image, dials)))


def test_the_budget_moves_the_thresholds_after_the_first_run(handlers, image, dials):
    now = settings(image, dials)
    assert all(value is SKIP for value in handlers.budget_set(5.0, *now))
    run(handlers, image, dials)
    known = handlers.budget_known(*now)
    assert known["interactive"] and known["minimum"] <= known["value"] <= known["maximum"]
    for seconds, group in ((-1.0, "simple"), (3600.0, "hard")):
        view = dial_view(handlers.budget_set(seconds, *now))
        gamma1, gamma2 = view["dials"][:2]
        counts = assign(
            handlers.studies.get(image["path"]).analysis.patch_confidence,
            plan_of((gamma1, gamma2, *dials[2:8])),
        ).bincount(minlength=3)
        assert counts[("simple", "medium", "hard").index(group)] == 9
        assert f"<b>{9}</b>" in view["legend"]
