"""A run on the page, without a browser."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace

import gradio as gr
import pytest
from PIL import Image
from visitor import collected, last, moved, run, settings

from patchscaler.images import write_png
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.ui.state import Shown, dials_of


def test_a_run_shows_the_analysis_before_the_result(runner, image, dials):
    views = run(runner, image, dials)
    first = {
        name: next(i for i, view in enumerate(views) if name in view)
        for name in ("coarse", "qmap", "priors", "final")
    }
    assert first["coarse"] == first["qmap"] < first["priors"] < first["final"]
    for name in first:
        with Image.open(last(views, name)) as panel:
            panel.load()
    assert "Done in" in last(views, "status")
    assert last(views, "timing").count('<th scope="row">') == 3 + 1 + 6
    steps = [view["status"] for view in views if "<progress" in view.get("status", "")]
    assert len(steps) == 1 + 2 + 3 and "step 3 of 3" in steps[-1]


def test_the_final_png_is_what_the_pipeline_gives_and_says_how(runner, image, plan, dials, tiny_pipeline):
    path = last(run(runner, image, dials), "final")
    result = tiny_pipeline(image["path"], plan, 7)
    expected = write_png(result.picture, path.with_name("expected.png"))
    assert path.name == "some_picture_x4.png"
    with Image.open(path) as ours, Image.open(expected) as theirs:
        assert ours.tobytes() == theirs.tobytes()
        assert SamplingPlan.from_json(ours.text["plan"]) == plan and ours.text["seed"] == "7"


def test_another_plan_for_the_same_image_needs_no_second_analysis(runner, image, plan, dials, monkeypatch):
    calls = []
    analyze = PatchScalerPipeline.analyze
    monkeypatch.setattr(PatchScalerPipeline, "analyze", lambda *args: calls.append(1) or analyze(*args))
    run(runner, image, dials)
    views = run(runner, image, (*dials_of(replace(plan, steps=(1, 1, 1))), 8))
    assert len(calls) == 1
    assert "reused" in last(views, "timing")
    assert last(views, "priors").is_file() and last(views, "coarse").is_file()


def test_a_stopped_run_says_so_last_and_only_the_visitors_own_run_stops(runner, image, dials):
    slow = (*dials[:5], 30, 40, 50, dials[8])

    now = settings(image, slow)

    def watch(view):
        if "step 2 of 30" in view.get("status", ""):
            runner.stop(settings(image, slow, session="somebody else"))
            assert runner.settle(now)["stop"]["interactive"]  # an earlier run's end
        if "step 5 of 30" in view.get("status", ""):
            runner.stop(now)

    views = collected(lambda now: runner.run(now, False), now, watch)
    assert "Stopped" in views[-1]["status"] and "step 5 of 30" in views[-2]["status"]
    assert not runner.settle(now)["stop"]["interactive"]
    assert "Done in" in last(run(runner, image, dials), "status")


def test_a_run_that_waits_for_its_turn_can_be_stopped(runner, image, dials):
    async def collect():
        other = runner.jobs.stream(lambda: (done.append(time.sleep(0.1)) for _ in range(30)))
        await anext(other)  # somebody else's job has the thread
        views = []
        now = settings(image, dials)
        async for view in runner.run(now, False):
            views.append(view)
            runner.stop(now)
        await other.aclose()
        return views

    done = []
    views = asyncio.run(collect())
    assert ["Waiting" in views[0]["status"], "Stopped" in views[1]["status"], len(views)] == [True, True, 2]
    assert len(done) < 30  # it did not wait for the other job's end


def test_pictures_that_come_in_behind_another_image_are_taken_away(runner, image, dials):
    now = settings(image, dials)
    assert runner.settle(now).keys() == {"stop"}
    now.page.source, now.page.by_hand = "another", {0: 2}
    view = runner.settle(now)
    assert view["coarse"] is None and view["run"]["interactive"]
    assert (now.page.source, now.page.by_hand) == (image["path"], {})
    now = settings(None, dials)
    now.page.source = image["path"]
    assert not runner.settle(now)["run"]["interactive"] and now.page.source is None


def test_what_is_wrong_with_a_request_is_said(runner, image, dials, tmp_path):
    (tmp_path / "no.png").write_bytes(b"<b>no image</b>")
    for bad, values, text in [
        (None, dials, "Upload an image"),
        ({"path": None}, dials, "Upload an image"),
        ({"path": str(tmp_path / "no.png")}, dials, "PNG, JPEG"),
        (image, (*dials[:8], None), "the seed is empty"),
        (image, (0.5, 0.6, *dials[2:]), "gamma1=0.5 must be above gamma2=0.6"),
        (image, (float("nan"), *dials[1:]), "gamma1=nan"),
        (image, (*dials[:2], 300, *dials[3:]), "falls from simple to hard"),
    ]:
        seen = []
        with pytest.raises(gr.Error, match=text):
            collected(lambda now: runner.run(now, False), settings(bad, values), seen.append)
        # Nothing follows an error: it takes the place of what an earlier run said, and Stop has nothing to stop.
        assert text in seen[-1]["status"] and seen[-1]["stop"]["interactive"] is False


def test_a_single_patch_has_a_sheet_too(runner, dials, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    views = run(runner, {"path": str(tmp_path / "dot.png")}, dials)
    with Image.open(last(views, "final")) as final:
        assert final.size == (4, 4)
    assert isinstance(last(views, "shown"), Shown)


def test_groups_paint_into_the_panel_one_after_another(runner, image, dials):
    views = run(runner, image, dials)
    painted = [view for view in views if "final" in view]
    refined = [int((view["shown"].start > 0).sum()) for view in painted]
    assert [view["final"].suffix for view in painted] == [".jpg", ".jpg", ".png"]
    assert refined[0] < refined[1] < refined[2] == 9
    assert f"{refined[0]} of 9 patches are refined" in painted[0]["stale"] and painted[2]["stale"] == ""
    assert "s left" in last([view for view in views if "step" in view.get("status", "")], "status")


def test_stop_keeps_the_partial_picture_and_run_goes_on_from_it(runner, image, plan, dials, tiny_pipeline):
    now = settings(image, (*dials[:7], 50, 7))

    def watch(view):
        if "Hard: step 2 of 50" in view.get("status", ""):
            runner.stop(now)

    views = collected(lambda now: runner.run(now, False), now, watch)
    shown = last(views, "shown")
    refined = int((shown.start > 0).sum())
    assert f"Stopped: {refined} of 9 patches are refined" in views[-1]["status"]
    with Image.open(last(views, "final")) as partial:
        assert partial.size == (320, 256)
    assert f"{refined} of 9 patches are refined" in moved(runner, image, shown, dials)["stale"]
    again = run(runner, image, dials)
    assert f"{9 - refined} of 9 patches were rendered anew" in last(again, "status")
    full = tiny_pipeline(image["path"], plan, 7)
    expected = write_png(full.picture, last(again, "final").with_name("expected.png"))
    with Image.open(last(again, "final")) as ours, Image.open(expected) as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_a_second_run_renders_what_changed_and_the_cost_line_said_so(runner, image, plan, dials):
    shown = last(run(runner, image, dials), "shown")
    medium = int((shown.steps == 2).sum())
    other = (*dials[:6], 3, *dials[7:])  # medium patches get another N
    view = moved(runner, image, shown, other, place=6)
    assert f"Run renders {medium} of 9 patches anew: {3 * medium} evaluations, about <b>" in view["cost"]
    views = run(runner, image, other)
    assert f"{medium} of 9 patches were rendered anew" in last(views, "status")
    assert f"<td>{3 * medium}</td>" in last(views, "timing")
    assert "0 of 9 patches were rendered anew" in last(run(runner, image, other), "status")


def test_the_colour_fix_makes_the_picture_old_and_changes_no_patch(runner, image, dials):
    shown = last(run(runner, image, dials), "shown")
    text = runner.tuner.regrouped(settings(image, dials, shown, color_fix=False))["stale"]
    assert "colour fix was set the other way" in text and "0 of 9 patches" in text
    again = run(runner, image, dials, color_fix=False)
    assert "0 of 9 patches were rendered anew" in last(again, "status")
    assert last(again, "final").read_bytes() != shown.final.read_bytes()


@pytest.mark.parametrize("batch", [0, 257, 2.5, "8", float("nan")])
def test_a_patch_batch_out_of_range_is_refused(runner, image, dials, batch):
    with pytest.raises(gr.Error, match="patch batch"):
        run(runner, image, dials, batch=batch)


@pytest.mark.parametrize("batch", [None, 8])
def test_a_patch_batch_that_nobody_chose_is_what_suits_the_device(runner, image, dials, batch, monkeypatch):
    asked = []
    monkeypatch.setattr(runner.pipeline, "fitting_batch", lambda size=None: asked.append(size) or 64)
    run(runner, image, dials, batch=batch)
    assert asked == [batch, batch]  # in the analysis and in the refinement


def test_bar_table_and_histogram_show_the_same_run(runner, image, plan, dials):
    views = run(runner, image, dials)
    timing, histogram = last(views, "timing"), last(views, "histogram")
    widths = dict(re.findall(r'title="([^"]+): [\d.]+ s" style="width: ([\d.]+)%', timing))
    assert list(widths) == [
        "Encode", "Restore (GRM)", "Retrieve priors", "Simple", "Medium", "Hard", "Decode", "Colour fix"
    ]  # fmt: skip
    assert sum(map(float, widths.values())) == pytest.approx(100, abs=0.1)
    assert {f'data-group="{name}"' in histogram for name in ("simple", "medium", "hard")} == {True}
    assert f"γ₁ {plan.gamma1:.2f}" in histogram and f"γ₂ {plan.gamma2:.2f}" in histogram
    view = moved(runner, image, last(views, "shown"), (1.0, *dials[1:]))
    assert "γ₁ 1.00" in view["histogram"] and 'data-group="simple"' not in view["histogram"]


def test_the_uniform_baseline_says_what_is_saved(runner, image, plan, dials):
    views = run(runner, image, dials, uniform=True)
    steps = last(views, "shown").steps
    assert f"<b>{9 * 20:,}</b> network evaluations" in last(views, "baseline")
    assert f"<b>{9 * 20 - int(steps.sum())}</b> evaluations" in last(views, "baseline")
    with Image.open(last(views, "shown").uniform) as uniform, Image.open(last(views, "difference")["value"]) as map_:
        assert uniform.size == map_.size == (320, 256)
        assert json.loads(uniform.text["plan"])["steps"] == [20, 20, 20]
    again = run(runner, image, dials, uniform=True)
    assert not [view for view in again if "Uniform baseline: step" in view.get("status", "")]
