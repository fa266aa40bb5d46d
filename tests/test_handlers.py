"""The work behind the page, without a browser."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import gradio as gr
import pytest
import torch
from PIL import Image

from patchscaler.grouping import PRESETS, SamplingPlan, assign
from patchscaler.images import read_picture, write_png
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import compare
from patchscaler.ui import handlers as module
from patchscaler.ui.budget import thresholds_within
from patchscaler.ui.calibration import Calibration
from patchscaler.ui.dials import MAX_SEED, RANGES, dials_of, hold_order, in_range, plan_of, preset_of, seed_of
from patchscaler.ui.errors import explain, visible_error
from patchscaler.ui.handlers import Handlers
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.studies import Studies, Study
from patchscaler.ui.views import DialView, Shown

PLAIN = ({}, True, 64, False)  # no patch by hand, colour fix, patch batch, no baseline
VISITOR = gr.Request(session_hash="visitor")


@pytest.fixture(autouse=True)
def upload_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))


@pytest.fixture(scope="session")
def plan(tiny_pipeline, picture):
    """A quick plan under which no group is empty, though random weights judge all patches nearly alike."""
    confidence = tiny_pipeline.analyze(picture).patch_confidence.sort().values.tolist()
    return SamplingPlan(confidence[5], confidence[1], (100, 200, 300), (1, 2, 3))


@pytest.fixture(scope="session")
def dials(plan):
    return (*dials_of(plan), 7)


@pytest.fixture
def handlers(tiny_pipeline):
    return Handlers(tiny_pipeline)


@pytest.fixture
def image(picture, tmp_path):
    return {"path": str(write_png(picture, tmp_path / "some picture.png"))}


def run(handlers, image, dials, by_hand=None, color_fix=True, batch=64, uniform=False):
    settings = (by_hand or {}, color_fix, batch, uniform)

    async def collect():
        return [view async for view in handlers.run(VISITOR, image, *settings, *dials)]

    return asyncio.run(collect())


def last(views, name):
    return next(value for view in reversed(views) if (value := getattr(view, name)) is not module.SKIP)


# Dials


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
    held = hold_order(dials, moved)
    assert held[moved] == dials[moved]
    plan_of(held)  # raises if anything crossed
    assert hold_order(held, 8) == held
    pushed = {i for i in range(8) if held[i] != dials[i]}
    assert pushed <= ({0, 1} if moved < 2 else {2, 3, 4} if moved < 5 else {5, 6, 7})


@pytest.mark.parametrize("value", [None, True, 0.5, -1, MAX_SEED + 1, "3", float("nan"), float("inf")])
def test_a_seed_that_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match="seed="):
        seed_of(value)


def test_a_seed_may_come_as_a_whole_float():
    assert [seed_of(0), seed_of(5.0), seed_of(MAX_SEED)] == [0, 5, MAX_SEED]


# A run


def test_a_run_shows_the_analysis_before_the_result(handlers, image, dials):
    views = run(handlers, image, dials)
    first = {
        name: next(i for i, view in enumerate(views) if getattr(view, name) is not module.SKIP)
        for name in ("coarse", "qmap", "priors", "final")
    }
    assert first["coarse"] == first["qmap"] < first["priors"] < first["final"]
    for name in first:
        with Image.open(last(views, name)) as panel:
            panel.load()
    assert "Done in" in last(views, "status")
    assert last(views, "timing").count('<th scope="row">') == 3 + 1 + 6
    steps = [view.status for view in views if view.status is not module.SKIP and "<progress" in view.status]
    assert len(steps) == 1 + 2 + 3 and "step 3 of 3" in steps[-1]


def test_the_final_png_is_what_the_pipeline_gives_and_says_how(handlers, image, plan, dials, tiny_pipeline):
    path = last(run(handlers, image, dials), "final")
    result = tiny_pipeline(image["path"], plan, 7)
    expected = write_png(result.picture, path.with_name("expected.png"))
    assert path.name == "some_picture_x4.png"
    with Image.open(path) as ours, Image.open(expected) as theirs:
        assert ours.tobytes() == theirs.tobytes()
        assert SamplingPlan.from_json(ours.text["plan"]) == plan and ours.text["seed"] == "7"


def test_another_plan_for_the_same_image_needs_no_second_analysis(handlers, image, plan, dials, monkeypatch):
    calls = []
    analyze = PatchScalerPipeline.analyze
    monkeypatch.setattr(PatchScalerPipeline, "analyze", lambda *args: calls.append(1) or analyze(*args))
    run(handlers, image, dials)
    views = run(handlers, image, (*dials_of(replace(plan, steps=(1, 1, 1))), 8))
    assert len(calls) == 1
    assert "reused" in last(views, "timing")
    assert last(views, "priors").is_file() and last(views, "coarse").is_file()


def test_a_stopped_run_says_so_last_and_only_the_visitors_own_run_stops(handlers, image, dials):
    async def collect():
        views = []
        async for view in handlers.run(VISITOR, image, *PLAIN, *dials[:5], 30, 40, 50, dials[8]):
            views.append(view)
            if view.status is not module.SKIP and "step 2 of 30" in view.status:
                handlers.stop(gr.Request(session_hash="somebody else"))
            if view.status is not module.SKIP and "step 5 of 30" in view.status:
                handlers.stop(VISITOR)
        return views

    views = asyncio.run(collect())
    assert "Stopped" in views[-1].status and "step 5 of 30" in views[-2].status
    assert "Done in" in last(run(handlers, image, dials), "status")


def test_a_run_that_waits_for_its_turn_can_be_stopped(handlers, image, dials):
    async def collect():
        other = handlers.jobs.stream(lambda: iter(time.sleep(0.1) for _ in range(30)))
        await anext(other)  # somebody else's job has the thread
        views = []
        async for view in handlers.run(VISITOR, image, *PLAIN, *dials):
            views.append(view)
            handlers.stop(VISITOR)
        await other.aclose()
        return views

    began = time.perf_counter()
    views = asyncio.run(collect())
    assert ["Waiting" in views[0].status, "Stopped" in views[1].status, len(views)] == [True, True, 2]
    assert time.perf_counter() - began < 3


def test_pictures_that_come_in_behind_another_image_are_taken_away(handlers, image):
    assert handlers.settle(image, image["path"]) == module.RunView()
    assert handlers.settle(image, "another").coarse is None
    assert handlers.settle(None, image["path"]).source is None


def test_what_is_wrong_with_a_request_is_said(handlers, image, dials, tmp_path):
    (tmp_path / "no.png").write_bytes(b"<b>no image</b>")
    for bad, values, text in [
        (None, dials, "Upload an image"),
        ({"path": None}, dials, "Upload an image"),
        ({"path": str(tmp_path / "no.png")}, dials, "PNG, JPEG"),
        (image, (*dials[:8], None), "seed=None"),
        (image, (0.5, 0.6, *dials[2:]), "gamma1=0.5 must be above gamma2=0.6"),
        (image, (float("nan"), *dials[1:]), "gamma1=nan"),
        (image, (*dials[:2], 300, *dials[3:]), "falls from simple to hard"),
    ]:
        with pytest.raises(gr.Error, match=text):
            run(handlers, bad, values)


def test_errors_of_the_machine_are_named_and_shown_as_text():
    assert "memory" in explain(torch.OutOfMemoryError("CUDA")).message
    assert "KeyError" in explain(KeyError("<script>")).message
    assert explain(gr.Error("as it is")).message == "as it is"
    assert "&lt;b&gt;" in visible_error("", "<b>").message


# Moved dials


def moved(handlers, image, shown, dials, place=0):
    values = handlers.dial_moved(place, image, shown, {}, True, *dials)
    return dict(zip(DialView._fields, (values[:8], *values[8:])))


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
    assert view["dials"][1] == 0.69 and all(view["dials"][i] is module.SKIP for i in (0, 2, 3, 4, 5, 6, 7))
    assert view["qmap"] is module.SKIP
    assert handlers.preset_chosen("uniform", None, None, {}, True, *dials)[:8] == dials_of(SamplingPlan.uniform())
    assert handlers.preset_chosen("custom", None, None, {}, True, *dials)[:8] == dials[:8]


@pytest.mark.parametrize("typed", [None, 7, 100.5, 5000, float("nan"), "400"])
def test_a_field_that_is_being_typed_into_changes_nothing(handlers, image, dials, typed):
    shown = last(run(handlers, image, dials), "shown")
    view = handlers.dial_moved(2, image, shown, {}, True, *dials[:2], typed, *dials[3:])
    assert all(value is module.SKIP for value in view)
    assert handlers.refresh(image, shown, {}, True, *dials[:2], typed, *dials[3:])[9] is module.SKIP


# Jobs and kept studies


def test_a_job_whose_reader_leaves_stops_at_its_next_item_and_never_two_run_at_once():
    jobs, running, most, produced = Jobs(), [], [], []

    def job():
        running.append(1)
        most.append(len(running))
        try:
            for i in range(1000):
                time.sleep(0.005)
                produced.append(i)
                yield i
        finally:
            running.pop()

    def short():
        yield "next"

    async def join_and_leave():
        for _ in range(20):
            stream = jobs.stream(job)
            assert await anext(stream) == 0
            await stream.aclose()
        return await anext(jobs.stream(short))

    assert asyncio.run(join_and_leave()) == "next"
    assert max(most) == 1 and not running
    assert len(produced) <= 20 * 3


@pytest.mark.parametrize("fault", [SystemExit, KeyboardInterrupt, MemoryError])
def test_no_fault_in_a_job_ends_the_thread(fault):
    jobs = Jobs()

    def job(error):
        yield 1
        if error:
            raise error

    async def read(error):
        return [item async for item in jobs.stream(lambda: job(error))]

    with pytest.raises((RuntimeError, MemoryError)):
        asyncio.run(read(fault()))
    assert asyncio.run(read(None)) == [1]


def test_the_oldest_studies_go_first_and_the_newest_always_stays(tiny_pipeline, image):
    analysis = tiny_pipeline.analyze(read_picture(image["path"]))
    study = Study(analysis, tiny_pipeline.draw_priors(analysis))
    pixels = analysis.coarse[0].numel()
    studies = Studies(kept_pixels=2 * pixels)
    for name in "abc":
        studies.put(name, study)
        studies.get("a")  # in use, so "b" is the one that goes
    assert [studies.get(name) is not None for name in "abc"] == [True, False, True]
    small = Studies(kept_pixels=1)
    small.put("a", study)
    assert small.get("a") is study


def test_a_single_patch_has_a_sheet_too(handlers, dials, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    views = run(handlers, {"path": str(tmp_path / "dot.png")}, dials)
    with Image.open(last(views, "final")) as final:
        assert final.size == (4, 4)
    assert isinstance(last(views, "shown"), Shown)


# Streaming, and only what changed


def test_groups_paint_into_the_panel_one_after_another(handlers, image, dials):
    views = run(handlers, image, dials)
    painted = [view for view in views if view.final is not module.SKIP]
    refined = [int((view.shown.start > 0).sum()) for view in painted]
    assert [path.suffix for path in (view.final for view in painted)] == [".jpg", ".jpg", ".png"]
    assert refined[0] < refined[1] < refined[2] == 9
    assert f"{refined[0]} of 9 patches are refined" in painted[0].stale and painted[2].stale == ""
    assert "s left" in last([view for view in views if "step" in str(view.status)], "status")


def test_stop_keeps_the_partial_picture_and_run_goes_on_from_it(handlers, image, plan, dials, tiny_pipeline):
    async def collect():
        views = []
        async for view in handlers.run(VISITOR, image, *PLAIN, *dials[:7], 50, 7):
            views.append(view)
            if "Hard: step 2 of 50" in str(view.status):
                handlers.stop(VISITOR)
        return views

    views = asyncio.run(collect())
    shown = last(views, "shown")
    refined = int((shown.start > 0).sum())
    assert f"Stopped: {refined} of 9 patches are refined" in views[-1].status
    with Image.open(last(views, "final")) as partial:
        assert partial.size == (320, 256)
    assert f"{refined} of 9 patches are refined" in moved(handlers, image, shown, dials)["stale"]
    again = run(handlers, image, dials)
    assert f"{9 - refined} of 9 patches were rendered anew" in last(again, "status")
    full = tiny_pipeline(image["path"], plan, 7)
    expected = write_png(full.picture, last(again, "final").with_name("expected.png"))
    with Image.open(last(again, "final")) as ours, Image.open(expected) as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_a_second_run_renders_what_changed_and_the_cost_line_said_so(handlers, image, plan, dials):
    shown = last(run(handlers, image, dials), "shown")
    medium = int((shown.steps == 2).sum())
    other = (*dials[:6], 3, *dials[7:])  # medium patches get another N
    view = moved(handlers, image, shown, other, place=6)
    assert f"Run renders {medium} of 9 patches anew: {3 * medium} evaluations, about <b>" in view["cost"]
    views = run(handlers, image, other)
    assert f"{medium} of 9 patches were rendered anew" in last(views, "status")
    assert f"<td>{3 * medium}</td>" in last(views, "timing") and "<td>–</td>" in last(views, "timing")
    assert "0 of 9 patches were rendered anew" in last(run(handlers, image, other), "status")


def test_the_colour_fix_makes_the_picture_old_and_changes_no_patch(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    text = handlers.regrouped(image, shown, {}, False, *dials)[12]
    assert "colour fix was set the other way" in text and "0 of 9 patches" in text
    again = run(handlers, image, dials, color_fix=False)
    assert "0 of 9 patches were rendered anew" in last(again, "status")
    assert last(again, "final").read_bytes() != shown.final.read_bytes()


@pytest.mark.parametrize("batch", [None, 0, 257, 2.5, "8", float("nan")])
def test_a_patch_batch_out_of_range_is_refused(handlers, image, dials, batch):
    with pytest.raises(gr.Error, match="patch batch"):
        run(handlers, image, dials, batch=batch)


# Timing


def test_expected_seconds_are_the_median_of_what_runs_took():
    calibration = Calibration()
    assert calibration.seconds(10, 100) is None
    for each in (1, 2, 30):
        calibration.learn(10, 10 * each, 100, 100 * each)
    calibration.learn(0, 0.0, 100, 200)  # a run that sampled nothing tells about the rest only
    assert calibration.seconds(5, 7) == 5 * 2 + 7 * 2


def test_bar_table_and_histogram_show_the_same_run(handlers, image, plan, dials):
    views = run(handlers, image, dials)
    timing, histogram = last(views, "timing"), last(views, "histogram")
    widths = dict(re.findall(r'width="([\d.]+)" height="10.00" fill="[^"]+" data-part="([^"]+)"', timing))
    assert set(widths.values()) == {
        "Encode", "Restore (GRM)", "Retrieve priors", "Simple", "Medium", "Hard", "Decode", "Colour fix"
    }  # fmt: skip
    assert sum(map(float, widths)) == pytest.approx(100, abs=0.1)
    assert {f'data-group="{name}"' in histogram for name in ("simple", "medium", "hard")} == {True}
    assert f"γ₁ {plan.gamma1:.2f}" in histogram and f"γ₂ {plan.gamma2:.2f}" in histogram
    view = moved(handlers, image, last(views, "shown"), (1.0, *dials[1:]))
    assert "γ₁ 1.00" in view["histogram"] and 'data-group="simple"' not in view["histogram"]


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


# The baseline


def test_the_uniform_baseline_says_what_is_saved(handlers, image, plan, dials):
    views = run(handlers, image, dials, uniform=True)
    steps = last(views, "shown").steps
    assert f"<b>{9 * 20:,}</b> network evaluations" in last(views, "baseline")
    assert f"<b>{9 * 20 - int(steps.sum())}</b> evaluations" in last(views, "baseline")
    with Image.open(last(views, "shown").uniform) as uniform, Image.open(last(views, "difference")["value"]) as map_:
        assert uniform.size == map_.size == (320, 256)
        assert json.loads(uniform.text["plan"])["steps"] == [20, 20, 20]
    again = run(handlers, image, dials, uniform=True)
    assert not [view for view in again if "Uniform baseline: step" in str(view.status)]


# Looking closely


def click(handlers, image, shown, dials, at, mode="inspect", by_hand=None):
    event = gr.SelectData(None, {"index": at, "value": None})
    facts, patch, center, hand, *view = handlers.clicked(event, mode, image, shown, by_hand or {}, True, *dials)
    return facts, patch, center, hand, dict(zip(DialView._fields, (view[:8], *view[8:])))


def test_a_clicked_patch_tells_its_confidence_group_and_priors(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    facts, patch, center, hand, view = click(handlers, image, shown, dials, (310, 10))
    analysis = handlers.studies.get(image["path"]).analysis
    assert patch == (image["path"], 2) and center == (310, 10) and hand == {}  # 3 x 3 patches: the top right one
    assert f"<b>{analysis.patch_confidence[2]:.3f}</b>" in facts and f"N {shown.steps[2]}" in facts
    assert facts.count("<img") == 3 and "After" in facts and view["qmap"] is module.SKIP
    priors = asyncio.run(handlers.inspected(patch))
    assert priors.count("<img") == 3
    for similarity in analysis.priors.similarities[2].tolist():
        assert f"similarity {similarity:.3f}" in priors


def test_priors_are_decoded_once(handlers, image, dials, monkeypatch):
    run(handlers, image, dials)
    first = asyncio.run(handlers.inspected((image["path"], 4)))
    monkeypatch.delattr(PatchScalerPipeline, "decode_priors")
    assert asyncio.run(handlers.inspected((image["path"], 4))) == first
    assert asyncio.run(handlers.inspected(None)) == ""


def test_a_patch_is_put_into_another_group_by_hand_and_back(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    index = int((shown.steps == 1).nonzero()[0])
    patch = handlers.studies.get(image["path"]).analysis.grid.patches[index]
    at = (8 * patch.left + 64, 8 * patch.top + 64)
    facts, _, _, hand, view = click(handlers, image, shown, dials, at, "hard")
    assert hand == {index: 2} and "set by hand" in facts
    assert "1 of 9 patches" in view["stale"] and "Run renders 1 of 9" in view["cost"]
    views = run(handlers, image, dials, by_hand=hand)
    assert last(views, "shown").steps[index] == 3 and "1 of 9 patches were rendered anew" in last(views, "status")
    by_hand, *rest = handlers.reset_by_hand(image, last(views, "shown"), True, *dials)
    assert by_hand == {} and "1 of 9 patches" in rest[12]


def test_both_sides_of_the_zoom_show_the_same_place(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    study = handlers.studies.get(image["path"])
    for zoom, side in (("100 %", (320, 256)), ("400 %", (480, 480))):
        left, right = compare.zoomed(study, shown, ("Final", "Coarse"), zoom, (319, 0))
        with Image.open(left) as a, Image.open(right) as b:
            assert a.size == b.size == side
    corner = compare.side(study, shown, "Final", (200, 0, 320, 120))
    assert corner.tobytes() == compare.side(study, shown, "Final").crop((200, 0, 320, 120)).tobytes()
    assert compare.pair(study, shown, ("Final", "Uniform")) is None  # there is no baseline
    with Image.open(handlers.compared(image, shown, "Bicubic input", "Final")[1]) as final:
        assert final.size == (320, 256)


@pytest.mark.parametrize(("center", "first"), [(0, 0), (50, 40), (100, 80)])
def test_a_window_stays_inside(center, first):
    assert compare.window(center, 100, 20) == (first, first + 20)
    assert compare.window(center, 7, 20) == (0, 7)


def test_patch_borders_are_drawn_over_the_panels(handlers, image, dials):
    run(handlers, image, dials)
    assert handlers.seams(image, False) == "" and handlers.seams(None, True) == ""
    svg = base64.b64decode(re.search("base64,([^)]*)", handlers.seams(image, True))[1]).decode()
    assert 'viewBox="0 0 320 256"' in svg and "M96 0V256" in svg and "M0 64H320" in svg


# Time budget, and what to take home


def test_the_budget_is_kept_and_nearly_spent(plan):
    confidence = torch.rand(60, generator=torch.Generator().manual_seed(1))
    plan = SamplingPlan.paper()
    for budget in (500, 700, 1000, 1190):
        gammas = thresholds_within(confidence, plan, budget)
        fitted = replace(plan, gamma1=gammas[0], gamma2=gammas[1])
        spent = fitted.evaluations(assign(confidence, fitted).bincount(minlength=3).tolist())
        assert 0.9 * budget < spent <= budget
    assert assign(confidence, replace(plan, gamma1=0.01, gamma2=0.0)).sum() <= 1
    cheapest = thresholds_within(confidence, plan, -5)
    assert (confidence <= cheapest[0]).sum() == (confidence <= 0.01).sum()
    # What is spent already is spent: the present thresholds are kept when they fit.
    now = plan.evaluations(assign(confidence, plan).bincount(minlength=3).tolist())
    assert thresholds_within(confidence, plan, now) == (plan.gamma1, plan.gamma2)
    everything_hard = thresholds_within(confidence, plan, 20, dict.fromkeys(range(59), 2))
    assert everything_hard[0] <= 0.01 or confidence[59] > everything_hard[0]


def test_the_budget_moves_the_thresholds_after_the_first_run(handlers, image, dials):
    before = (5.0, image, None, {}, True, *dials)
    assert all(value is module.SKIP for value in handlers.budget_set(*before))
    run(handlers, image, dials)
    known = handlers.budget_known(image, {}, *dials)
    assert known["interactive"] and known["minimum"] < known["maximum"]
    handlers.calibration.learn(1, 1.0, 1, 0.0)  # any rates: nothing may fit into no time, everything into an hour
    for seconds, group in ((-1.0, "simple"), (3600.0, "hard")):
        view = dict(zip(DialView._fields, ((values := handlers.budget_set(seconds, *before[1:]))[:8], *values[8:])))
        gamma1, gamma2 = view["dials"][:2]
        counts = assign(
            handlers.studies.get(image["path"]).analysis.patch_confidence,
            plan_of((gamma1, gamma2, *dials[2:8])),
        ).bincount(minlength=3)
        assert counts[("simple", "medium", "hard").index(group)] == 9
        assert f"<b>{9}</b>" in view["legend"]


def test_the_zip_holds_every_stage_and_a_report(handlers, image, plan, dials):
    with pytest.raises(gr.Error, match="Run first"):
        handlers.packed(image, None)
    shown = last(run(handlers, image, dials, by_hand={0: 2}, uniform=True), "shown")
    with ZipFile(handlers.packed(image, shown)["value"]) as archive:
        stages = ("bicubic", "coarse", "final", "priors", "qmap", "uniform")
        assert sorted(archive.namelist()) == sorted([*(f"{stage}.png" for stage in stages), "report.json"])
        assert archive.read("final.png") == shown.final.read_bytes()
        report = json.loads(archive.read("report.json"))
        for stage in stages:
            with Image.open(archive.open(f"{stage}.png")) as picture:
                picture.load()
    assert report["seed"] == 7 and report["by_hand"] == {"0": 2} and report["complete"]
    assert [patch["steps"] for patch in report["patches"]] == shown.steps.tolist()


@pytest.mark.parametrize(
    "query",
    ["", "?plan=1", "?seed=1", "?plan=.9,.7,400,700,1000,8,14,20", "?plan=.7,.9,400,700,1000,8,14,20&seed=0",
     "?plan=.9,.7,400,700,1000,8,14,99&seed=0", "?plan=nan,.7,400,700,1000,8,14,20&seed=0",
     "?plan=.9,.7,400,700,1000,8,14,20&seed=1e999", "?plan=<b>&seed=<b>"],
)  # fmt: skip
def test_a_link_that_does_not_work_changes_nothing(handlers, query):
    assert all(value is module.SKIP for value in handlers.linked(query))


def test_a_link_restores_plan_and_seed(handlers):
    assert handlers.linked("?plan=0.95,0.75,400,700,1000,4,7,10&seed=5") == (
        "fast", *dials_of(PRESETS["fast"]), 5
    )  # fmt: skip
