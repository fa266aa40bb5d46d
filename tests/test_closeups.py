"""Comparison, zoom, patch inspector and patch borders; what a visitor takes home."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from zipfile import ZipFile

import gradio as gr
import pytest
from PIL import Image
from visitor import click, last, run

from patchscaler.grouping import PRESETS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import closeup
from patchscaler.ui.state import SKIP, dials_of


def test_a_clicked_patch_tells_its_confidence_group_and_priors(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    picked = click(handlers, image, shown, dials, (310, 10))
    facts, patch = picked["facts"], picked["patch"]
    analysis = handlers.studies.get(image["path"]).analysis
    assert patch == (image["path"], 2)  # 3 x 3 patches: the top right one
    assert picked["center"] == (310, 10) and picked["by_hand"] == {}
    assert f"<b>{analysis.patch_confidence[2]:.3f}</b>" in facts and f"N {shown.steps[2]}" in facts
    assert picked["inspector"].count("<img") == 2 and "After" in picked["inspector"]
    assert picked["view"]["qmap"] is SKIP
    priors = asyncio.run(handlers.inspected(patch))
    assert priors.count("<img") == 1 + 3 and "y₀" in priors
    for similarity in analysis.priors.similarities[2].tolist():
        assert f"similarity {similarity:.3f}" in priors


def test_priors_are_decoded_once(handlers, image, dials, monkeypatch):
    run(handlers, image, dials)
    first = asyncio.run(handlers.inspected((image["path"], 4)))
    monkeypatch.delattr(PatchScalerPipeline, "decode_priors")
    assert asyncio.run(handlers.inspected((image["path"], 4))) == first
    assert asyncio.run(handlers.inspected(None)) == ""


def test_both_sides_of_the_zoom_show_the_same_place(handlers, image, dials):
    shown = last(run(handlers, image, dials), "shown")
    study = handlers.studies.get(image["path"])
    for zoom, side in (("100 %", (320, 256)), ("400 %", (480, 480))):
        left, right = closeup.zoomed(study, shown, ("Final", "Coarse"), zoom, (319, 0))
        with Image.open(left) as a, Image.open(right) as b:
            assert a.size == b.size == side
    corner = closeup.side(study, shown, "Final", (200, 0, 320, 120))
    assert corner.tobytes() == closeup.side(study, shown, "Final").crop((200, 0, 320, 120)).tobytes()
    assert closeup.pair(study, shown, ("Final", "Uniform")) is None  # there is no baseline
    with Image.open(handlers.compared(image, shown, "Bicubic input", "Final")[1]) as final:
        assert final.size == (320, 256)


@pytest.mark.parametrize(("center", "first"), [(0, 0), (50, 40), (100, 80)])
def test_a_window_stays_inside(center, first):
    assert closeup.window(center, 100, 20) == (first, first + 20)
    assert closeup.window(center, 7, 20) == (0, 7)


def test_patch_borders_are_drawn_over_the_panels(handlers, image, dials):
    run(handlers, image, dials)
    assert handlers.seams(image, False) == "" and handlers.seams(None, True) == ""
    svg = base64.b64decode(re.search("base64,([^)]*)", handlers.seams(image, True))[1]).decode()
    assert 'viewBox="0 0 320 256"' in svg and "M96 0V256" in svg and "M0 64H320" in svg


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
     "?plan=.9,.7,400,700,1000,8,14,20&seed=1e999", "?plan=<b>&seed=<b>",
     *(f"?plan=.9,.7,400,700,1000,8,14,20&seed=0&{more}" for more in ("color=2", "uniform=x", "batch=0", "batch=inf"))],
)  # fmt: skip
def test_a_link_that_does_not_work_changes_nothing(handlers, query):
    assert all(value is SKIP for value in handlers.linked(query))


def test_a_link_restores_all_settings(handlers):
    fast = ("fast", *dials_of(PRESETS["fast"]), 5)
    assert handlers.linked("?plan=0.95,0.75,400,700,1000,4,7,10&seed=5") == (*fast, True, False, None)
    linked = handlers.linked("?plan=0.95,0.75,400,700,1000,4,7,10&seed=5&color=0&uniform=1&batch=8&other=<b>")
    assert linked == (*fast, False, True, 8)
