"""What a visitor can keep: a ZIP of every stage, and a link that restores the settings."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs
from zipfile import ZIP_STORED, ZipFile

from patchscaler.figures import qmap_overlay
from patchscaler.grouping import assign
from patchscaler.images import Picture, write_png
from patchscaler.ui.dials import in_range, plan_of, seed_of
from patchscaler.ui.studies import Study
from patchscaler.ui.views import Shown, new_folder, stem

# Writes what `restored` reads: the settings, never the image.
LINK = """(...dials) => {
  const query = `?plan=${dials.slice(0, 8).join(",")}&seed=${dials[8]}`;
  if (dials.every(value => value !== null)) history.replaceState(null, "", window.location.pathname + query);
}"""


def restored(query: str) -> tuple[float, ...] | None:
    """The nine dials in a link's query, or None if it has none that work."""
    values = parse_qs(query.removeprefix("?"))
    try:
        dials = tuple(float(text) for text in values["plan"][0].split(","))
        seed = seed_of(float(values["seed"][0]))
        plan_of(dials)
    except (KeyError, ValueError, OverflowError):
        return None
    return (*dials, seed) if in_range(dials) else None


def stages_zip(study: Study, shown: Shown) -> Path:
    """All stages of the shown picture as lossless PNGs, with a report. FileNotFoundError if it is gone."""
    analysis, name = study.analysis, stem(shown.source)
    path = new_folder() / f"{name}_patchscaler.zip"
    assignment = assign(analysis.patch_confidence, shown.plan, shown.by_hand)
    overlay = qmap_overlay(analysis.coarse, analysis.grid, assignment, by_hand=shown.by_hand)
    report = {
        "image": name,
        "complete": shown.complete,
        "color_fix": shown.color_fix,
        **shown.report,
        "by_hand": {str(index): group for index, group in shown.by_hand.items()},
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
        for stage, image in (("qmap", overlay), ("priors", study.priors)):
            image.save(Path(folder) / f"{stage}.png")
            archive.write(Path(folder) / f"{stage}.png", f"{stage}.png")
        archive.write(shown.final, f"final{shown.final.suffix}")
        if shown.uniform:
            archive.write(shown.uniform, "uniform.png")
        archive.writestr("report.json", json.dumps(report, indent=2))
    return path
