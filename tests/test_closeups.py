"""Comparison, zoom, patch inspector, patch borders and export."""

from __future__ import annotations

import base64
import json
import re
from types import SimpleNamespace
from zipfile import ZipFile

import gradio as gr
import pytest
import torch
from PIL import Image
from visitor import click, closeups, last, run, settings

from patchscaler.plan import PRESETS
from patchscaler.ui import closeup, export
from patchscaler.ui.state import DIALS, dials_of


def test_a_clicked_patch_tells_its_confidence_group_and_priors(runner, image, dials):
    shown = last(run(runner, image, dials), "shown")
    view, page = click(runner, image, shown, dials, (310, 10))
    facts = view["facts"]
    analysis = runner.cache.get(image["path"]).analysis
    assert (page.patch, page.center, page.by_hand) == (2, (310, 10), {})  # 3 x 3 patches: the top right one
    assert f"<b>{analysis.patch_confidence[2]:.3f}</b>" in facts and f"N {shown.steps[2]}" in facts
    assert view["inspector"].count("<img") == 2 and "After" in view["inspector"]
    assert "qmap" not in view
    now = settings(image, dials)
    assert closeups(runner).inspected(now)["inspected"] == ""
    now.page.patch = page.patch
    priors = closeups(runner).inspected(now)["inspected"]
    assert priors.count("<img") == 1 + 3 and "y₀" in priors
    for similarity in analysis.priors.similarities[2].tolist():
        assert f"similarity {similarity:.3f}" in priors


def test_both_sides_of_the_zoom_show_the_same_place(runner, image, dials):
    shown = last(run(runner, image, dials), "shown")
    study = runner.cache.get(image["path"])
    for zoom, side in (("100 %", (320, 256)), ("400 %", (480, 480))):
        left, right = closeup.zoomed(study, shown, ("Final", "Coarse"), zoom, (319, 0))
        with Image.open(left) as a, Image.open(right) as b:
            assert a.size == b.size == side
    corner = closeup.side(study, shown, "Final", (200, 0, 320, 120))
    assert corner.tobytes() == closeup.side(study, shown, "Final").crop((200, 0, 320, 120)).tobytes()
    assert closeup.pair(study, shown, ("Final", "Uniform")) is None  # there is no baseline
    view = closeups(runner).compared(settings(image, dials, shown), "Bicubic input", "Final")
    with Image.open(view["compare"][1]) as final:
        assert final.size == (320, 256) and not view["no-side"]
    view = closeups(runner).compared(settings(image, dials, shown), "Final", "Uniform")
    assert view["compare"] is None and "Uniform with the uniform baseline" in view["no-side"]


@pytest.mark.parametrize(("center", "first"), [(0, 0), (50, 40), (100, 80)])
def test_a_window_stays_inside(center, first):
    assert closeup.window(center, 100, 20) == (first, first + 20)
    assert closeup.window(center, 7, 20) == (0, 7)


def test_a_click_on_the_overlay_of_a_strip_is_a_place_in_the_picture():
    analysis = SimpleNamespace(coarse=torch.zeros(1).expand(3, 20480, 4))
    known = SimpleNamespace(analysis=analysis, grey=Image.new("RGB", (1, 1024)))
    assert closeup.clicked(known, (0.1, 512)) == (2, 10240)


def test_patch_borders_are_drawn_over_the_panels(runner, image, dials):
    run(runner, image, dials)
    now = settings(image, dials)
    for other, on in ((now, False), (settings(None, dials), True)):
        assert closeups(runner).seams(other, on) == {"grid": ""}
    svg = base64.b64decode(re.search("base64,([^)]*)", closeups(runner).seams(now, True)["grid"])[1]).decode()
    assert 'viewBox="0 0 320 256"' in svg and "M96 0V256" in svg and "M0 64H320" in svg


def test_the_zip_holds_every_stage_and_a_report(runner, image, plan, dials):
    with pytest.raises(gr.Error, match="Run first"):
        export.packed(runner.cache, settings(image, dials))
    shown = last(run(runner, image, dials, by_hand={0: 2}, uniform=True), "shown")
    with ZipFile(export.packed(runner.cache, settings(image, dials, shown))["zip"]["value"]) as archive:
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
    ["?plan=1", "?seed=1", "?plan=.9,.7,400,700,1000,8,14,20", "?plan=.7,.9,400,700,1000,8,14,20&seed=0",
     "?plan=.9,.7,400,700,1000,8,14,99&seed=0", "?plan=nan,.7,400,700,1000,8,14,20&seed=0",
     "?plan=.9,.7,400,700,1000,8,14,20&seed=1e999", "?plan=<b>&seed=<b>",
     *(f"?plan=.9,.7,400,700,1000,8,14,20&seed=0&{more}" for more in ("color=2", "uniform=x", "batch=0", "batch=inf"))],
)  # fmt: skip
def test_a_link_that_does_not_work_changes_nothing_and_says_so(dials, query):
    view = export.linked(settings(None, dials), query)
    assert view.keys() == {"note"} and "The settings in this page's address are not valid" in view["note"]


@pytest.mark.parametrize("query", ["", "?", "?__theme=dark"])
def test_an_address_without_settings_changes_nothing(dials, query):
    assert export.linked(settings(None, dials), query) == {}


def test_a_link_restores_all_settings(dials):
    fast = {"preset": "fast", **dict(zip(DIALS, (*dials_of(PRESETS["fast"]), 5)))}
    query = f"?plan={','.join(map(str, dials_of(PRESETS['fast'])))}&seed=5"
    linked = export.linked(settings(None, dials), query)
    assert linked == {**fast, "color-fix": True, "uniform": False, "batch": None}
    linked = export.linked(settings(None, dials), f"{query}&color=0&uniform=1&batch=8&other=<b>")
    assert linked == {**fast, "color-fix": False, "uniform": True, "batch": 8}
