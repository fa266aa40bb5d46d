"""Export: picture files, a ZIP of every stage, and settings that links and PNGs of the page restore."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qs
from zipfile import ZIP_STORED, ZipFile

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from patchscaler.images import Picture, read_png_text, write_png
from patchscaler.plan import SamplingPlan, assign
from patchscaler.results import Result
from patchscaler.ui import html
from patchscaler.ui.html import SettingsError, visible_error
from patchscaler.ui.state import (
    CachedAnalysis,
    SessionCache,
    Settings,
    Shown,
    View,
    batch_of,
    dial_view,
    dials_of,
    in_range,
    plan_of,
    seed_of,
    whole_pictures,
)


def save_preview(image: Image.Image, name: str) -> Path:
    """A JPEG: for looking at, and far quicker to make than a PNG, which only transparency needs."""
    if image.mode == "RGBA":
        path = new_folder() / f"{name}.png"
        image.save(path, compress_level=1)
    else:
        path = new_folder() / f"{name}.jpg"
        image.convert("RGB").save(path, quality=92, subsampling=0)
    return path


def save_final(result: Result, source: str, name: str = "x4") -> Path:
    """The lossless PNG, made once, with its plan, seed and colour fix inside."""
    return write_png(result.picture, new_folder() / f"{stem(source)}_{name}.png", result.png_text())


def stem(source: str) -> str:
    """The image's name without anything that a file name should not have."""
    return re.sub(r"[^\w.-]+", "_", Path(source).stem)[:80] or "image"


def new_folder() -> Path:
    """A folder that Gradio serves from, and empties after a while."""
    folder = Path(get_upload_folder()) / secrets.token_hex(20)
    folder.mkdir(parents=True)
    return folder


# Writes what `linked` reads: the settings, never the image.
LINK = """(...values) => {
  const [dials, [colorFix, uniform, batch]] = [values.slice(0, 9), values.slice(9)];
  const settings = {plan: dials.slice(0, 8).join(","), seed: dials[8], color: +colorFix, uniform: +uniform};
  if (batch !== null) settings.batch = batch;
  const query = Object.entries(settings).map(([name, value]) => `${name}=${value}`).join("&");
  if (dials.every(value => value !== null)) history.replaceState(null, "", `${window.location.pathname}?${query}`);
}"""


def linked(now: Settings, query: Any) -> View:
    """Dials, preset, colour fix, baseline and patch batch from the page's address; a note on one that is not valid.

    Plan and seed must be there, the rest may; an address with neither has no settings.
    """
    values = {name: texts[0] for name, texts in parse_qs(str(query).removeprefix("?")).items()}
    if not {"plan", "seed"} & values.keys():
        return {}
    try:
        dials = tuple(float(text) for text in values["plan"].split(","))
        plan, seed = plan_of(dials), seed_of(float(values["seed"]))
        if not in_range(dials):
            raise SettingsError("a dial is out of its range")
        switch = {"0": False, "1": True}
        color_fix, uniform = switch[values.get("color", "1")], switch[values.get("uniform", "0")]
        batch = batch_of(float(values["batch"]) if "batch" in values else None)
    except (KeyError, ValueError, OverflowError):
        return {"note": html.BAD_LINK}
    return {**dial_view(plan, seed), "color-fix": color_fix, "uniform": uniform, "batch": batch}


def restored(source: str) -> View:
    """The settings in a PNG of the page, the API or the command line, and a note on them; nothing for other files."""
    text = read_png_text(source)
    try:
        plan, seed = SamplingPlan.from_json(text["plan"]), seed_of(int(text["seed"]))
        by_hand = len(json.loads(text.get("by_hand", "{}")).keys())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}
    settings = html.describe(plan, seed)
    if not in_range(dials_of(plan)):
        return {"note": f"<p>PatchScaler made this image with {settings}, which is beyond these dials.</p>"}
    note = f"PatchScaler made this image, and its settings are restored: {settings}."
    if by_hand:
        note += f" Not so {by_hand} of its patches that were set by hand: they belong to the image it was made from."
    color_fix = text.get("color_fix") != "off"
    return {"note": f"<p>{note} Run upscales it once more.</p>", "color-fix": color_fix, **dial_view(plan, seed)}


def packed(cache: SessionCache, now: Settings) -> View:
    """The ZIP of all stages of the final picture."""
    known, shown = cache.get(now.source), now.page.shown
    if known is None or shown is None or not shown.final.is_file():
        raise visible_error("Nothing to pack", "Run first: there is no final picture, or it is too old.")
    with whole_pictures():
        return {"zip": gr.update(value=str(stages_zip(known, shown)), visible=True)}


def stages_zip(known: CachedAnalysis, shown: Shown) -> Path:
    """All stages of the shown picture as lossless PNGs, with a report. FileNotFoundError if it is gone."""
    analysis, request, name = known.analysis, shown.request, stem(shown.request.source)
    path = new_folder() / f"{name}_patchscaler.zip"
    assignment = assign(analysis.patch_confidence, request.plan, request.by_hand)
    report = {
        "image": name,
        "complete": shown.complete,
        "color_fix": request.color_fix,
        **shown.report,
        "by_hand": {str(index): group for index, group in request.by_hand.items()},
        "patches": [
            {"left": patch.left, "top": patch.top, "confidence": confidence, "group": group, "start": start, "steps": n}
            for patch, confidence, group, start, n in zip(
                analysis.grid.patches,
                analysis.patch_confidence.tolist(),
                assignment.tolist(),
                shown.start.tolist(),
                shown.steps.tolist(),
            )
        ],
    }
    # PNGs are compressed already.
    with TemporaryDirectory() as folder, ZipFile(path, "w", ZIP_STORED) as archive:
        for stage, pixels in (("bicubic", analysis.bicubic), ("coarse", analysis.coarse)):
            archive.write(write_png(Picture(pixels), Path(folder) / f"{stage}.png"), f"{stage}.png")
        for stage, image in (("qmap", known.overlay(assignment, request.by_hand)), ("priors", known.priors)):
            image.save(Path(folder) / f"{stage}.png")
            archive.write(Path(folder) / f"{stage}.png", f"{stage}.png")
        archive.write(shown.final, f"final{shown.final.suffix}")
        if shown.uniform:
            archive.write(shown.uniform, "uniform.png")
        archive.writestr("report.json", json.dumps(report, indent=2))
    return path
