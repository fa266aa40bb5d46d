"""The work behind the page, without a browser."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from dataclasses import replace

import gradio as gr
import pytest
import torch
from PIL import Image

from patchscaler.grouping import PRESETS, SamplingPlan, assign
from patchscaler.images import read_picture, write_png
from patchscaler.pipeline import PatchScalerPipeline, Progress, Result
from patchscaler.ui import handlers as module
from patchscaler.ui.dials import MAX_SEED, RANGES, dials_of, hold_order, in_range, plan_of, preset_of, seed_of
from patchscaler.ui.handlers import Handlers, Shown, explain
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.studies import Studies, Study

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


def run(handlers, image, dials):
    async def collect():
        return [view async for view in handlers.run(VISITOR, image, *dials)]

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
        async for view in handlers.run(VISITOR, image, *dials[:5], 30, 40, 50, dials[8]):
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
        async for view in handlers.run(VISITOR, image, *dials):
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
    assert "&lt;b&gt;" in module.visible_error("", "<b>").message


# Moved dials


def moved(handlers, image, shown, dials, place=0):
    values = handlers.dial_moved(place, image, shown, *dials)
    return dict(zip(("dials", "preset", "qmap", "legend", "cost", "stale"), (values[:8], *values[8:])))


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
    hard = (shown.assignment == 2).sum().item()
    assert f"{hard} of 9 patches" in moved(handlers, image, shown, (*dials[:7], 50, 7), place=7)["stale"]
    assert moved(handlers, {"path": "other"}, shown, dials, place=8)["stale"] == ""


def test_dials_push_each_other_and_presets_set_them_before_any_image(handlers, dials):
    view = moved(handlers, None, None, (0.7, 0.75, *dials[2:]), place=0)
    assert view["dials"][1] == 0.69 and all(view["dials"][i] is module.SKIP for i in (0, 2, 3, 4, 5, 6, 7))
    assert view["qmap"] is module.SKIP
    assert handlers.preset_chosen("uniform", None, None, *dials)[:8] == dials_of(SamplingPlan.uniform())
    assert handlers.preset_chosen("custom", None, None, *dials)[:8] == dials[:8]


@pytest.mark.parametrize("typed", [None, 7, 100.5, 5000, float("nan"), "400"])
def test_a_field_that_is_being_typed_into_changes_nothing(handlers, image, dials, typed):
    shown = last(run(handlers, image, dials), "shown")
    view = handlers.dial_moved(2, image, shown, *dials[:2], typed, *dials[3:])
    assert all(value is module.SKIP for value in view)
    assert handlers.refresh(image, shown, *dials[:2], typed, *dials[3:])[9] is module.SKIP


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


def test_everything_that_crosses_to_a_zerogpu_process_pickles(handlers, image, plan):
    arguments = (image["path"], None, plan, 7)
    events = list(handlers._networks(*pickle.loads(pickle.dumps(arguments))))
    analysis, sheet, *steps, result = pickle.loads(pickle.dumps(events))
    assert all(isinstance(step, Progress) for step in steps) and isinstance(result, Result)
    again = list(handlers._networks(image["path"], analysis, plan, 7))[-1]
    assert torch.equal(again.picture.rgb, result.picture.rgb)
    assert json.dumps(result.report()) and sheet.size


def test_a_single_patch_has_a_sheet_too(handlers, dials, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    views = run(handlers, {"path": str(tmp_path / "dot.png")}, dials)
    with Image.open(last(views, "final")) as final:
        assert final.size == (4, 4)
    assert isinstance(last(views, "shown"), Shown)
