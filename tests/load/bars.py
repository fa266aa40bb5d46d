"""How quickly the page answers, with the repository's weights: python tests/load/bars.py [PART ...].

Parts, all of them unless some are named:
  regroup   a drag of gamma 1 over a 512×512 output, through HTTP: 95th percentile of the seconds to an answer
  coarse    in Chromium, from the click on Run to the coarse image, 128×128 input, loaded models
  rerun     a run after gamma 1 has moved a tenth of the patches, against a full run; whether the pixels are the same
  large     overlay and inspector for a 2048×2048 output
  estimate  the seconds that the page expects for each example after three runs or more, against what the run takes
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageChops
from soak import ROOT, Visitor, serve

sys.path.insert(0, str(ROOT / "tests"))
from visitor import click, closeups, collected, last, moved, run, settings  # noqa: E402

EXAMPLES = sorted((ROOT / "examples").glob("*.png"))
PHOTO = next(path for path in EXAMPLES if "astronaut" in path.name)
WEIGHTS = ROOT / "assets/weights/compact"
PAPER = (0.95, 0.75, 400, 700, 1000, 8, 14, 20)


def regroup(folder: Path) -> None:
    server, address = serve(str(WEIGHTS), folder / "uploads", folder / "log.txt")
    try:
        visitor = Visitor(address, 0)
        visitor.upload(PHOTO)
        visitor.run()
        seconds = []
        for place in range(200):
            began = time.perf_counter()
            assert visitor.light("regrouped", round(0.6 + place % 40 / 100, 2))
            seconds.append(time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait(60)
    middle, p95 = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    print(f"regroup: median {1000 * middle:.0f} ms, 95th percentile {1000 * p95:.0f} ms")


def coarse(folder: Path) -> None:
    from playwright.sync_api import sync_playwright
    from test_page import CHROMIUM, FLAGS

    shown = "document.querySelector('#coarse img')?.naturalWidth > 0"
    server, address = serve(str(WEIGHTS), folder / "uploads", folder / "log.txt")
    try:
        with sync_playwright() as playwright:
            page = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_page()
            seconds = []
            for path in EXAMPLES[1:4]:  # each new to the server
                page.goto(address)
                page.set_input_files("#input input[type=file]", path)
                page.locator("#run:enabled").click()
                began = time.perf_counter()
                page.wait_for_function(shown, polling=20)
                seconds.append(time.perf_counter() - began)
    finally:
        server.terminate()
        server.wait(60)
    print("coarse: " + ", ".join(f"{value:.2f} s" for value in seconds))


def rerun(runner, dials=(*PAPER, 0)) -> None:
    image = {"path": str(PHOTO)}
    run(runner, image, dials)
    known = runner.cache.get(image["path"])
    confidence = known.analysis.patch_confidence.sort().values
    count = len(confidence)
    # Thresholds on the dial's grid, with gamma 1 moved down past about a tenth of the patches.
    above = [round(k / 100, 2) for k in range(76, 100)]
    simple = {gamma: int((confidence > gamma).sum()) for gamma in above}
    tenth = min(above, key=lambda gamma: (abs(simple[gamma] - simple[0.95] - count / 10), -gamma))
    full, part = [], []
    for seed in (1, 2, 3):
        run(runner, image, (*PAPER, seed))
        views = run(runner, image, (tenth, *PAPER[1:], seed))
        part.append(refine_seconds(views))
        again = last(views, "final")
        views = run(runner, image, (tenth, *PAPER[1:], seed), session="another")  # as if it had never been run
        full.append(refine_seconds(views))
        with Image.open(again) as ours, Image.open(last(views, "final")) as theirs:
            same = ImageChops.difference(ours, theirs).getbbox() is None
        assert same, "the pixels differ"
    share = statistics.median(part) / statistics.median(full)
    print(f"rerun: {simple[tenth] - simple[0.95]} of {count} patches, {share:.2f} of the refine time, same pixels")


def refine_seconds(views) -> float:
    """Seconds of refinement in a run's report."""
    return last(views, "shown").report["stages"]["refine"]


def large(runner, folder: Path) -> None:
    path = folder / "large.png"
    with Image.open(PHOTO) as photo:
        photo.resize((512, 512)).save(path)
    image, dials = {"path": str(path)}, (0.95, 0.75, 100, 200, 300, 1, 1, 1, 0)
    shown = last(run(runner, image, dials), "shown")
    overlay, inspector, priors = [], [], []
    for place in range(20):
        began = time.perf_counter()
        moved(runner, image, shown, (round(0.8 + place / 100, 2), *dials[1:]))
        overlay.append(time.perf_counter() - began)
        began = time.perf_counter()
        _, page = click(runner, image, shown, dials, (50 * place + 20, 500))
        inspector.append(time.perf_counter() - began)
        began = time.perf_counter()
        now = settings(image, dials)
        now.page.patch = page.patch
        closeups(runner).inspected(now)
        priors.append(time.perf_counter() - began)
    for name, seconds in (("overlay", overlay), ("inspector", inspector), ("its priors", priors)):
        print(f"large: {name} median {1000 * statistics.median(seconds):.0f} ms, most {1000 * max(seconds):.0f} ms")


def estimate(runner) -> None:
    for path in EXAMPLES[:3]:
        run(runner, {"path": str(path)}, (*PAPER, 0))
    for path in EXAMPLES:
        image = {"path": str(path)}
        collected(runner.look, settings(image, (*PAPER, 5)))
        cost = moved(runner, image, None, (*PAPER, 5), place=8)["cost"]
        expected = float(re.search(r"about <b>([\d.]+) s", cost)[1])
        views = run(runner, image, (*PAPER, 5))
        took = float(re.search(r"Done in ([\d.]+) s", last(views, "status"))[1])
        print(f"estimate: {path.stem}: {expected:.1f} s, took {took:.1f} s, {expected / took - 1:+.0%}")


def main(parts: list[str]) -> None:
    parts = parts or ["regroup", "coarse", "rerun", "large", "estimate"]
    with tempfile.TemporaryDirectory() as folder:
        runner = None
        for part in parts:
            if part in ("regroup", "coarse"):
                {"regroup": regroup, "coarse": coarse}[part](Path(folder))
                continue
            if runner is None:
                from patchscaler.loading import load_pipeline
                from patchscaler.ui.run import Runner

                runner = Runner(load_pipeline(WEIGHTS))
                runner.first_run(str(EXAMPLES[0]))
            {"rerun": rerun, "estimate": estimate}[part](runner) if part != "large" else large(runner, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
