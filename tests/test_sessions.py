"""Session cache: analyses are shared; refined patches and their seconds belong to the session that ran them."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace

from PIL import Image
from visitor import closeups, collected, last, run, settings

from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.ui.state import SessionCache, dials_of


def groups_of(timing: str) -> dict[str, dict[str, str]]:
    """The rows of the table of groups."""
    table = timing[timing.index('<table class="groups">') : timing.index('<table class="stages">')]
    columns = ("patches", "start", "steps", "evaluations", "seconds", "each")
    rows = re.findall(r"<tr><th scope=\"row\">(?:<span.*?</span>)?(\w+)</th>(.*?)</tr>", table)
    return {name.lower(): dict(zip(columns, re.findall("<td>(.*?)</td>", cells))) for name, cells in rows}


def test_what_one_visitor_rendered_is_not_anothers(runner, image, dials):
    run(runner, image, dials, session="first")
    views = run(runner, image, dials, session="second")
    assert "9 of 9 patches were rendered anew" in last(views, "status")
    assert "reused" not in str(groups_of(last(views, "timing")))


def test_another_visitors_seed_evicts_nothing(runner, image, dials):
    run(runner, image, dials, session="first")
    run(runner, image, (*dials[:8], 8), session="second")
    assert "0 of 9 patches were rendered anew" in last(run(runner, image, dials, session="first"), "status")
    for session, anew in (("first", 0), ("second", 9)):
        assert f"Run renders {anew} of 9" in runner.tuner.regrouped(settings(image, dials, session=session))["cost"]


def test_a_second_run_says_what_each_group_cost_and_that_it_was_reused(runner, image, plan, dials):
    timings = [last(run(runner, image, dials), "timing") for _ in range(2)]
    assert ["coarse reused" in timing for timing in timings] == [False, True]  # of the decoding
    first, second = map(groups_of, timings)
    for index, name in enumerate(GROUPS):
        row = second[name]
        assert int(row["evaluations"]) == plan.steps[index] * int(row["patches"]) > 0
        assert "reused" in row["seconds"] and "reused" not in first[name]["seconds"]
        assert float(row["seconds"].split()[0]) == float(first[name]["seconds"]) and row["each"] == first[name]["each"]


def test_a_group_of_which_some_patches_were_reused_says_so(runner, image, dials):
    run(runner, image, dials)
    confidence = runner.cache.get(image["path"]).analysis.patch_confidence
    simple = int(confidence.argmax())
    rows = groups_of(last(run(runner, image, dials, by_hand={simple: 2}), "timing"))
    count = int(rows["hard"]["patches"])
    assert f"{count - 1} of {count} reused" in rows["hard"]["seconds"]
    assert "reused" in rows["simple"]["seconds"] and "reused" in rows["medium"]["seconds"]


def test_every_visitor_begins_with_the_example_that_was_run_at_start_up(runner, image, dials):
    opened, page = runner.first_run(image["path"])
    known = runner.cache.get(image["path"])
    for name in ("coarse", "qmap", "priors", "final"):
        with Image.open(opened[name]) as panel:
            panel.load()
    assert len(opened["compare"]) == len(opened["zoom"]) == 2
    assert sum(int(row["patches"]) for row in groups_of(opened["timing"]).values() if row["start"]) == 9
    paper = (*dials_of(SamplingPlan.paper()), 0)
    for session in ("first", "second"):
        now = replace(settings(None, paper, session=session), page=deepcopy(page))
        view = runner.tuner.regrouped(now)
        assert "Run renders 0 of 9" in view["cost"] and view["stale"] == ""
        assert runner.new_image(now) == {}  # as the browser tells of the image that was there from the first
    # A visitor's own run of it is that visitor's.
    collected(lambda now: runner.run(now, False), replace(now, seed=1))
    for session, anew in (("first", 9), ("second", 0)):
        other = settings(image, (*paper[:8], 1), session=session)
        assert f"Run renders {anew} of 9" in runner.tuner.regrouped(other)["cost"]
    # Another image leaves it behind, and it stays for the next visitor.
    assert runner.new_image(replace(now, image={"path": "another"}))["final"] is None and not now.page.opened
    runner.cache._known._values.clear()
    assert runner.cache.get(image["path"]) is known


def test_the_cache_of_refined_patches_is_bounded(tiny_pipeline, picture, plan):
    *_, result = tiny_pipeline.refine(tiny_pipeline.analyze(picture), plan)
    cache = SessionCache(kept_bytes=2 * result.sampled.patches.nbytes)
    for session in "abc":
        cache.keep(session, "image", result.sampled)
        cache.sampled("a", "image")  # in use, so "b" is the one that goes
    assert [cache.sampled(session, "image") is not None for session in "abc"] == [True, False, True]


def test_inspected_patches_are_not_kept(runner, image, dials):
    run(runner, image, dials)
    known = runner.cache.get(image["path"])
    before = set(vars(known))
    now = settings(image, dials)
    for now.page.patch in range(9):
        assert closeups(runner).inspected(now)["inspected"].count("<img") == 1 + 3
    assert set(vars(known)) == before
