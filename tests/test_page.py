"""The page as a visitor meets it: app.py in a process of its own, and Chromium."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from patchscaler.images import read_picture, write_png
from patchscaler.plan import SamplingPlan

pytestmark = pytest.mark.slow  # a server and a browser

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.png"))
# A browser of the system comes before Playwright's own, which CI need not download.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 120_000  # ms; the networks share the machine with whatever else CI does


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "server.txt"


@pytest.fixture(scope="module")
def address(tiny_pipeline, tmp_path_factory, log):
    """The page over tiny random weights."""
    folder = tmp_path_factory.mktemp("page")
    tiny_pipeline.save_pretrained(folder / "weights")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "PATCHSCALER_WEIGHTS": str(folder / "weights"),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env={**os.environ, **settings}, stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(address, server, log)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(PATIENCE // 500):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address)
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    pytest.fail(f"no answer from {address}: {log.read_text()}")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """128×128 that is none of the examples, which run as they are chosen."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    with Image.open(EXAMPLES[0]) as example:
        example.resize((128, 128)).rotate(180).save(path)
    return path


@pytest.fixture
def page(address, log):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        yield page
        browser.close()
        assert errors == [] and "Traceback" not in log.read_text()


def counts(page: Page) -> list[int]:
    """Patches in each group, as the legend says."""
    return [int(text) for text in page.locator("#legend b").all_inner_texts()]


def wait_for_image(page: Page, panel: str) -> None:
    """Until the panel shows one image that the browser could decode; a run may still put another in its place."""
    page.wait_for_function(
        """panel => {
            const images = [...document.querySelectorAll(`#${panel} img`)]
            return images.length == 1 && images[0].complete && images[0].naturalWidth > 0
        }""",
        arg=panel,
    )


def test_the_page_opens_with_an_example_and_a_click_runs_another(page):
    # 1. Nothing was clicked yet.
    for panel in ("coarse", "qmap", "priors", "final"):
        wait_for_image(page, panel)
    for pair in ("compare", "zoom"):
        page.wait_for_function(f"document.querySelectorAll('#{pair} img').length == 2")
    rows = page.locator("#timing table.groups tbody tr")
    assert [int(text) for text in rows.locator("td:nth-child(2)").all_inner_texts()] == counts(page)
    assert float(page.locator("#timing table.groups tfoot td:nth-child(6)").inner_text()) > 0
    expect(page.locator("#status")).to_contain_text("Done in")
    expect(page.locator("#run")).to_be_enabled()

    # 2. It is a run like any other: a threshold regroups it, and a patch can be looked at.
    page.locator("#gamma1 input[type=range]").focus()
    page.locator("#gamma1 input[type=range]").press("Home")
    expect(page.locator("#stale")).to_contain_text("older plan")
    page.locator("#number input").fill("0")
    expect(page.locator("#inspected img")).to_have_count(1 + 3)

    # 3. A click on another example runs it.
    page.get_by_role("button", name="Example: coffee").click()
    expect(page.locator("#stale")).to_be_empty()
    with Image.open(next(path for path in EXAMPLES if "coffee" in path.name)) as small:
        page.wait_for_function(f"document.querySelector('#final img')?.naturalWidth == {4 * small.width}")
    expect(page.locator("#status")).to_contain_text("Done in")
    expect(page.locator("#stop")).to_be_disabled()


def test_upload_run_and_drag(page, photo):
    # 1. Upload and run.
    expect(page.get_by_role("button", name="Example: astronaut")).to_be_visible()  # named for screen readers
    expect(page.locator("#status")).to_have_attribute("aria-live", "polite")
    page.set_input_files("#input input[type=file]", photo)
    expect(page.locator("#status")).to_contain_text("Press Run")
    page.locator("#run").click()
    expect(page.locator("#timing table.groups")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("Done in")

    # 2. Four pictures, the last of them the lossless file itself.
    for panel in ("coarse", "qmap", "priors", "final"):
        wait_for_image(page, panel)
    with Image.open(photo) as small:
        assert page.locator("#final img").evaluate("image => image.naturalWidth") == 4 * small.width
    response = page.request.get(page.locator("#final img").get_attribute("src"))
    assert response.body().startswith(b"\x89PNG") and SamplingPlan.paper().to_json().encode() in response.body()

    # 3. The timing of three groups, whose patches are those of the legend.
    rows = page.locator("#timing table.groups tbody tr")
    expect(rows).to_have_count(3)
    assert [int(text) for text in rows.locator("td:nth-child(2)").all_inner_texts()] == counts(page)
    assert page.locator("#timing table.stages tbody tr").count() == 6

    assert page.locator("#timing .bar span").count() == 8
    assert page.locator("#histogram .threshold").count() == 2

    # 4. Drag gamma 1 to its end: groups and cost follow, gamma 2 keeps below, and the picture is called old.
    before, cost = counts(page), page.locator("#cost").inner_text()
    overlay = page.locator("#qmap img").get_attribute("src")
    slider = page.locator("#gamma1 input[type=range]")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#stale")).to_contain_text("older plan")
    expect(page.locator("#gamma2 input[type=number]")).to_have_value("0")
    expect(page.locator("#qmap img")).not_to_have_attribute("src", overlay)
    assert counts(page) != before and sum(counts(page)) == sum(before)
    assert page.locator("#cost").inner_text() != cost
    expect(page.locator("#histogram")).to_contain_text("γ₁ 0.01")
    expect(page.get_by_label("Preset")).to_have_value("Custom")

    # 5. The preset brings the dials back, and with them the picture is the latest; another seed makes it old again.
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="Paper").click()
    expect(page.locator("#stale")).not_to_contain_text("older plan")
    assert counts(page) == before
    page.locator("#seed input").fill("1")
    expect(page.locator("#stale")).to_contain_text("seed 0")


def test_a_page_without_an_image_and_with_a_bad_one(page, photo, tmp_path):
    height = "button => button.getBoundingClientRect().height"
    before = {name: page.locator(f"#{name}").evaluate(height) for name in ("run", "stop")}
    page.set_input_files("#input input[type=file]", photo)
    expect(page.locator("#status")).to_contain_text("Press Run")
    page.locator("#input").get_by_label(re.compile("Clear|Remove")).first.click()
    expect(page.locator("#status")).to_contain_text("Upload an image")
    expect(page.locator("#run")).to_be_disabled()
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#input input[type=file]", tmp_path / "text.png")
    expect(page.locator("#status")).to_contain_text("This image was refused")
    page.locator("#run").click()
    expect(page.locator(".toast-body").last).to_contain_text("This image was refused: not a readable")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#run")).to_have_text("Run")
    assert {name: page.locator(f"#{name}").evaluate(height) for name in ("run", "stop")} == before


def test_what_is_typed_beyond_a_range_is_clamped_and_said(page):
    cost = page.locator("#cost").inner_text()
    for name, typed, values in [("steps1", "999", ["50", "50", "50"]), ("start3", "5", ["50", "50", "50"])]:
        kind = name[:-1]
        page.locator(f"#{name} input[type=number]").fill(typed)
        page.locator(f"#{name} input[type=number]").press("Tab")
        for place, value in enumerate(values, 1):
            expect(page.locator(f"#{kind}{place} input[type=number]")).to_have_value(value)
        expect(page.get_by_label("Preset")).to_have_value("Custom")
        expect(page.locator("#stale")).to_contain_text("older plan")
    expect(page.locator("#cost")).not_to_have_text(cost)
    page.locator("#number input").fill("9999")
    expect(page.locator("#facts")).to_contain_text("There is no patch 9999: there are")
    page.locator("#seed input").fill("")
    page.locator("#run").click()
    expect(page.locator("#status")).to_contain_text("the seed is empty")


def test_stop_and_run_again(page, tmp_path):
    with Image.open(EXAMPLES[0]) as small:  # large enough that the run lasts until Stop is clicked
        small.resize((400, 400)).save(tmp_path / "large.png")
    page.locator("#steps1 input[type=number]").fill("50")
    expect(page.locator("#steps3 input[type=number]")).to_have_value("50")  # pushed along
    page.set_input_files("#input input[type=file]", tmp_path / "large.png")
    page.locator("#run").click()  # while the image is being looked at; what follows that look must leave Stop alone
    expect(page.locator("#status")).to_contain_text(re.compile(r"step \d+ of 50"))
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#stop")).to_be_disabled()
    page.locator("#steps3 input[type=number]").fill("1")
    expect(page.locator("#steps2 input[type=number]")).to_have_value("1")  # pushed along, else the plan is refused
    page.locator("#run").click()
    expect(page.locator("#status")).to_contain_text("Done in")


def test_look_closely_spend_more_and_take_home(page, photo):
    # 1. A quick run, by a link's settings.
    page.goto(f"{page.url}?plan=0.6,0.5,100,200,300,1,2,3&seed=4")
    expect(page.locator("#steps3 input[type=number]")).to_have_value("3")
    page.set_input_files("#input input[type=file]", photo)
    page.locator("#run").click()
    expect(page.locator("#status")).to_contain_text("seed 4. 25 of 25 patches were rendered anew")
    for pair in ("compare", "zoom"):
        page.wait_for_function(f"document.querySelectorAll('#{pair} img').length == 2")

    # 2. A click on the Qmap shows the patch there, and moves the zoom.
    zoom = page.locator("#zoom img").first.get_attribute("src")
    click_corner(page)
    expect(page.locator("#inspector")).to_contain_text("Patch 24, pixels 384, 384 to 512, 512")
    expect(page.locator("#inspected img")).to_have_count(1 + 3)
    assert page.locator("#qmap .image-frame").evaluate("e => getComputedStyle(e, '::before').content") != "none"
    expect(page.locator("#zoom img").first).not_to_have_attribute("src", zoom)

    # 3. By hand into another group: one patch would change, and one is rendered.
    group = page.locator("#inspector p").inner_text()
    other = "hard" if "simple" in group or "medium" in group else "simple"
    page.get_by_label(f"Make {other}").check()
    click_corner(page)
    expect(page.locator("#inspector")).to_contain_text(f"{other}, set by hand")
    expect(page.locator("#stale")).to_contain_text("1 of 25 patches would change")
    expect(page.locator("#cost")).to_contain_text("Run renders 1 of 25 patches anew")
    page.locator("#run").click()
    expect(page.locator("#status")).to_contain_text("1 of 25 patches were rendered anew")
    page.locator("#reset").click()
    expect(page.locator("#stale")).to_contain_text("1 of 25 patches would change")

    # 4. The brush: a stroke through the middle takes the patches under it, as it goes on.
    box = overlay_box(page)
    page.mouse.move(box["x"] + 0.05 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
    expect(page.locator("#stale")).to_contain_text("would change")
    page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
    page.mouse.up()
    expect(page.locator("#stale")).to_contain_text("6 of 25 patches would change")
    page.locator("#reset").click()
    expect(page.locator("#stale")).to_contain_text("1 of 25 patches would change")

    # 5. Patch borders, budget, link and ZIP.
    assert page.locator("#final .image-frame").evaluate("e => getComputedStyle(e, '::after').content") == "none"
    page.locator("#seams input").check()
    page.wait_for_function(
        "getComputedStyle(document.querySelector('#final .image-frame'), '::after').content != 'none'"
    )
    budget = page.locator("#budget input[type=range]")
    budget.focus()
    budget.press("Home")
    expect(page.locator("#gamma1 input[type=number]")).not_to_have_value("0.6")
    assert counts(page)[0] == max(counts(page))
    page.wait_for_function("!location.search.includes('plan=0.6,')")
    page.locator("#pack").click()
    expect(page.locator("#zip")).to_contain_text(".zip")

    # 6. On a phone the table of the groups is whole.
    page.set_viewport_size({"width": 390, "height": 900})
    right = "e => e.getBoundingClientRect().right"
    assert page.locator("#timing table.groups").evaluate(right) <= page.locator("#timing").evaluate(right) + 1


def overlay_box(page: Page) -> dict[str, float]:
    """Where the square overlay lies in the middle of its panel."""
    page.locator("#qmap").scroll_into_view_if_needed()
    box = page.locator("#qmap img").bounding_box()
    side = min(box["width"], box["height"])
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    return {"x": left, "y": top, "width": side, "height": side}


def click_corner(page: Page) -> None:
    box = overlay_box(page)
    page.mouse.click(box["x"] + 0.95 * box["width"], box["y"] + 0.95 * box["height"])


def test_a_file_that_is_no_image_is_refused_by_name(page, tmp_path):
    (tmp_path / "not.png").write_bytes(b"text")
    page.set_input_files("#input input[type=file]", tmp_path / "not.png")
    page.locator("#run").click()
    expect(page.locator("#status")).to_contain_text("PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF")


def test_several_images_of_which_one_is_bad(page, address, tmp_path):
    page.goto(f"{address}?plan=0.6,0.5,100,200,300,1,2,3&seed=4")
    expect(page.locator("#steps3 input[type=number]")).to_have_value("3")
    (tmp_path / "bad.png").write_bytes(b"text")
    page.get_by_role("tab", name="Several images").click()
    page.set_input_files("#files input[type=file]", [small(tmp_path), tmp_path / "bad.png"])
    page.locator("#run-all").click()
    expect(page.locator("#batch-status")).to_contain_text("Done: 1 of 2 images are upscaled, 1 was refused.")
    expect(page.locator("#outcomes")).to_contain_text("bad.png: This image was refused")
    expect(page.locator("#outcomes")).to_contain_text("small.png: 160 × 160 pixels")
    page.wait_for_function("document.querySelector('#gallery img')?.naturalWidth == 160")
    expect(page.locator("#batch-zip")).to_contain_text(".zip")


def test_a_png_of_the_page_restores_its_settings_and_the_baseline_shows_where_it_differs(page, tmp_path):
    plan = SamplingPlan(0.6, 0.5, (100, 200, 300), (1, 2, 3))
    path = write_png(read_picture(small(tmp_path)), tmp_path / "made.png", {"plan": plan.to_json(), "seed": "7"})
    page.set_input_files("#input input[type=file]", path)
    expect(page.locator("#note")).to_contain_text("its settings are restored")
    expect(page.locator("#seed input")).to_have_value("7")
    expect(page.locator("#steps3 input[type=number]")).to_have_value("3")
    page.locator("#uniform input").check()
    page.locator("#run").click()
    expect(page.locator("#baseline")).to_contain_text("Saved:")
    page.locator("#difference").scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('#difference img')?.naturalWidth == 160")


def small(folder: Path) -> Path:
    with Image.open(EXAMPLES[0]) as example:
        example.resize((40, 40)).save(folder / "small.png")
    return folder / "small.png"


def test_dark_mode_has_light_text_on_dark_ground(page, address):
    page.goto(f"{address}?__theme=dark")
    expect(page.locator("body.dark #run")).to_be_visible()
    brightness = """(selector) => {
      const element = document.querySelector(selector);
      return ["backgroundColor", "color"].map(
        name => Math.max(...getComputedStyle(element)[name].match(/[0-9.]+/g).slice(0, 3).map(Number)));
    }"""
    ground, text = page.evaluate(brightness, ".gradio-container")
    assert ground < 60 < 200 < text
    assert page.evaluate(brightness, "#heading h1")[1] > 200


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_nothing_is_cut_off(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    expect(page.locator("#run")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
