"""Several images at once, a first look at one, settings from a PNG, and the warming up."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path
from zipfile import ZipFile

import gradio as gr
import pytest
from corpus import png
from PIL import Image
from visitor import collected, last, run, settings

from patchscaler.images import read_picture, read_png_text
from patchscaler.ui import run as runs
from patchscaler.ui.batch import Batch
from patchscaler.ui.state import DIALS


@pytest.fixture
def files(image, tmp_path):
    """An image, one that is none, and the first again."""
    (tmp_path / "bad.png").write_bytes(b"<b>no image</b>")
    return [image, {"path": str(tmp_path / "bad.png"), "orig_name": "<bad>.png"}, image]


def run_all(batch, files, dials, stop_at=None):
    now = settings(None, dials)

    def watch(view):
        if stop_at and stop_at in view["batch-status"]:
            batch.stop_all(now)

    return collected(lambda now: batch.run_all(now, files), now, watch)


def test_a_bad_file_is_reported_and_the_rest_go_on(runner, files, dials, image):
    views = run_all(Batch(runner), files, dials)
    assert "2 of 3 images are upscaled, 1 was refused" in views[-1]["batch-status"]
    assert any("Image 1 of 3" in (said := view["batch-status"]) and "step 3 of 3" in said for view in views)
    outcomes = last(views, "outcomes")
    assert "&lt;bad&gt;.png" in outcomes and "PNG, JPEG" in outcomes and "<bad>" not in outcomes
    assert len(last(views, "gallery")) == 2
    with ZipFile(last(views, "batch-zip")) as archive:
        assert archive.namelist() == ["some_picture_x4.png", "some_picture_x4_2.png", "report.json"]
        report = json.loads(archive.read("report.json"))["images"]
        assert archive.read("some_picture_x4.png") == last(run(runner, image, dials), "final").read_bytes()
    assert [entry.get("file") for entry in report] == ["some_picture_x4.png", None, "some_picture_x4_2.png"]
    assert not runner.cache.get("other")


def test_the_gallery_shows_transparency(runner, dials, tmp_path):
    path = tmp_path / "logo.png"
    picture = Image.new("RGBA", (16, 16), (200, 40, 40, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 16))
    picture.save(path)
    views = run_all(Batch(runner), [{"path": str(path)}], dials)
    ((preview, _),) = last(views, "gallery")
    with Image.open(preview) as shown:
        assert shown.getpixel((4, 32))[3] == 0 and shown.getpixel((60, 32))[3] == 255


def test_no_two_names_in_the_zip_differ_in_case_alone(runner, image, dials, tmp_path):
    upper = tmp_path / "SOME Picture.png"
    upper.write_bytes(Path(image["path"]).read_bytes())
    views = run_all(Batch(runner), [image, {"path": str(upper)}], dials)
    with ZipFile(last(views, "batch-zip")) as archive:
        names = archive.namelist()
    assert names[:2] == ["some_picture_x4.png", "SOME_Picture_x4_2.png"]
    assert len({name.casefold() for name in names}) == len(names)


def test_a_stopped_batch_keeps_what_is_finished(runner, files, dials):
    views = run_all(Batch(runner), files, dials, stop_at="Image 3 of 3")
    assert "Stopped: 1 of 3 images are upscaled, 1 was refused" in views[-1]["batch-status"]
    with ZipFile(last(views, "batch-zip")) as archive:
        assert len(archive.namelist()) == 2


def test_no_files_and_too_many_are_refused(runner, image, dials):
    for files in (None, [], [image] * 17):
        with pytest.raises(gr.Error, match="1 to 16"):
            run_all(Batch(runner), files, dials)


# A PNG that the page made


RESTORED = {"preset", *DIALS, "color-fix"}


def new_image(runner, path):
    now = settings(path and {"path": str(path)}, (0,) * 9)
    now.page.source = "another"
    return runner.new_image(now)


def test_a_png_of_the_page_restores_its_settings(runner, image, dials):
    dials = (0.9, 0.1, 100, 200, 300, 1, 2, 3, 7)
    final = last(run(runner, image, dials, by_hand={0: 2}, color_fix=False), "final")
    view = new_image(runner, final)
    restored = {"preset": "custom", **dict(zip(DIALS, dials)), "color-fix": False}
    assert {name: view.get(name) for name in RESTORED} == restored
    note = view["note"]
    assert "settings are restored" in note and "seed 7" in note and "1 of its patches" in note
    for other in (image["path"], None):
        assert not new_image(runner, other).keys() & RESTORED


def test_a_plan_beyond_the_dials_is_named_and_not_restored(runner, tmp_path, dials, tiny_pipeline, picture):
    from patchscaler.images import write_png
    from patchscaler.plan import SamplingPlan

    result = tiny_pipeline(picture, SamplingPlan(0.9, 0.1, (1, 2, 3), (1, 1, 1)))
    path = write_png(result.picture, tmp_path / "made.png", result.png_text())
    assert read_png_text(path)["seed"] == "0"
    view = new_image(runner, path)
    assert "beyond these dials" in view["note"] and not view.keys() & RESTORED


GOOD = {"plan": '{"gamma1": 0.9, "gamma2": 0.1, "start": [100, 100, 100], "steps": [1, 1, 1]}', "seed": "5"}


@pytest.mark.parametrize(
    "text",
    [{"plan": "[" * 100_000}, {"plan": GOOD["plan"].replace("0.9", "NaN")}, {"plan": "{}"}, {"seed": "9" * 5000},
     {"plan": GOOD["plan"].replace("100", "9" * 4000)}, {"seed": "inf"}, {"by_hand": '{"a":' * 50_000},
     {"by_hand": '"<script>alert(1)</script>"'}],
)  # fmt: skip
def test_texts_that_the_page_never_wrote_set_nothing(runner, tmp_path, text):
    for chunks, works in (([GOOD], True), ([{**GOOD, **text}], False)):
        texts = [(b"tEXt", f"{key}\0{value}".encode()) for each in chunks for key, value in each.items()]
        (tmp_path / "x.png").write_bytes(png(1, 1, 8, 0, b"\0\0", *texts))
        view = new_image(runner, tmp_path / "x.png")
        assert bool(view.keys() & RESTORED) == works and "script" not in str(view)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_bomb_in_place_of_the_settings_is_not_unpacked(runner, tmp_path, kind):
    head = {b"zTXt": b"plan\0\0", b"iTXt": b"plan\0\1\0\0\0", b"iCCP": b"plan\0\0"}[kind]
    (tmp_path / "x.png").write_bytes(png(1, 1, 8, 0, b"\0\0", (kind, head + zlib.compress(bytes(100_000_000), 1))))
    tracemalloc.start()
    view = new_image(runner, tmp_path / "x.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # a file is read into a buffer of the largest file's size
    assert not view.keys() & RESTORED


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"no image"])
def test_no_text_is_read_from_what_is_no_png(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    assert read_png_text(tmp_path / "x.png") == {} and read_png_text(tmp_path / "none.png") == {}


# A first look


def look(runner, image, dials):
    return collected(runner.look, settings(image, dials))


def test_a_look_gives_the_groups_and_the_cost_before_any_run(runner, image, dials, tmp_path):
    first = look(runner, image, dials)
    assert "network evaluations, by the groups" in last(first, "cost")  # nothing is known yet of what it takes
    assert not any("coarse" in view for view in first) and runner.cache.get(image["path"]) is None
    with Image.open(image["path"]) as picture:
        picture.rotate(180).save(tmp_path / "other.png")
    run(runner, {"path": str(tmp_path / "other.png")}, dials)
    views = look(runner, image, dials)
    assert "Run renders 9 of 9 patches anew" in last(views, "cost") and "about <b>" in last(views, "cost")
    for name in ("coarse", "qmap", "priors"):
        with Image.open(last(views, name)) as panel:
            panel.load()
    assert "Press Run" in last(views, "status")
    assert "9 of 9 patches were rendered anew" in last(run(runner, image, dials), "status")


def test_a_look_decodes_the_image_once(runner, image, dials, monkeypatch):
    runner.calibration.learn_analysis(1000, 1e-6)  # quick enough to be done at once
    decoded = []
    monkeypatch.setattr(runs, "read_picture", lambda source: decoded.append(source) or read_picture(source))
    assert any("qmap" in view for view in look(runner, image, dials))
    assert decoded == [image["path"]]


def test_a_look_at_a_bad_file_says_so_at_once(runner, files, dials):
    with pytest.raises(gr.Error, match="PNG, JPEG"):
        look(runner, files[1], dials)
    assert look(runner, None, dials) == []
