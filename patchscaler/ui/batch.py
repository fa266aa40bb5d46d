"""The tab for several images: one after the other with the same settings, a gallery and a ZIP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_STORED, ZipFile

import gradio as gr
from PIL import Image

from patchscaler.figures import PREVIEW_SIDE
from patchscaler.images import read_picture, to_pil
from patchscaler.plan import GROUPS
from patchscaler.results import Progress, Result
from patchscaler.ui import html
from patchscaler.ui.export import new_folder, save_final, save_preview, stem
from patchscaler.ui.html import explain, visible_error
from patchscaler.ui.jobs import StopEvents
from patchscaler.ui.networks import RunRequest
from patchscaler.ui.run import Runner
from patchscaler.ui.server import MAX_FILES
from patchscaler.ui.state import Settings, View


class Outcome(NamedTuple):
    """What became of a file."""

    name: str
    text: str
    picture: Path | None = None
    preview: Path | None = None
    report: dict | None = None


class Batch:
    """The tab's events. Every file is a job of its own, so other visitors' runs come in between."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._batches = StopEvents()

    async def run_all(self, now: Settings, files: list | None) -> AsyncIterator[View]:
        """Upscale file by file. A bad one is reported and the rest go on; Stop keeps what is finished."""
        files, same = files or [], replace(now.request(), by_hand={}, live=False)
        if not 1 <= len(files) <= MAX_FILES:
            raise visible_error("Too many images" if files else "No images", f"1 to {MAX_FILES} are taken.")
        with self._batches.of(now.session) as stop:
            outcomes: list[Outcome] = []
            waiting, stoppable = html.status("Waiting for the pipeline…", 0, len(files)), gr.update(interactive=True)
            yield {"batch-status": waiting, "gallery": [], "outcomes": "", "batch-zip": None, "stop-all": stoppable}
            for place, file in enumerate(files):
                request, name = replace(same, source=file["path"]), Path(file.get("orig_name") or file["path"]).name
                said = f"Image {place + 1} of {len(files)}, {name}"
                try:
                    async for event in self._runner.jobs.stream(partial(self._upscaled, request, name), stop):
                        if isinstance(event, Outcome):
                            outcomes.append(event)
                        elif isinstance(event, Progress):
                            step = f"{said}: {GROUPS[event.group]}, step {event.step} of {event.steps}"
                            yield {"batch-status": html.status(step, place + event.done / event.total, len(files))}
                except Exception as error:
                    visible = explain(error)
                    outcomes.append(Outcome(name, f"{visible.title}: {visible.message}"))
                if stop.is_set():
                    break
                yield {"batch-status": html.status(said, place + 1, len(files)), **_so_far(outcomes)}
            yield {
                "batch-status": html.status(_summary(outcomes, len(files), stop.is_set())),
                **_so_far(outcomes),
                "batch-zip": _zip(outcomes),
                "stop-all": gr.update(interactive=False),
            }

    def stop_all(self, now: Settings) -> None:
        """Have the visitor's batch stop at its next step."""
        self._batches.stop(now.session)

    def _upscaled(self, request: RunRequest, name: str) -> Iterator[Progress | Outcome | None]:
        """A file's progress, and last its Outcome. Nothing of it is cached: no dial will be turned for it."""
        for event in self._runner.networks.run(request, read_picture(request.source)):
            if isinstance(event, Result):
                picture = save_final(event, request.source)
                preview = to_pil(event.picture)
                preview.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
                seconds = sum(event.seconds.values())
                size = f"{event.picture.width} × {event.picture.height} pixels in {seconds:.1f} s"
                text = " ".join([size, *event.picture.notes])
                yield Outcome(name, text, picture, save_preview(preview, stem(request.source)), event.report())
            else:
                yield event if isinstance(event, Progress) else None


def _so_far(outcomes: list[Outcome]) -> View:
    entries = "".join(
        f'<li class="{"done" if outcome.picture else "failed"}"><b>{escape(outcome.name)}</b>: '
        f"{escape(outcome.text)}</li>"
        for outcome in outcomes
    )
    previews = [(str(outcome.preview), outcome.name) for outcome in outcomes if outcome.preview]
    return {"gallery": previews, "outcomes": f'<ul class="outcomes">{entries}</ul>'}


def _summary(outcomes: list[Outcome], total: int, stopped: bool) -> str:
    done = sum(outcome.picture is not None for outcome in outcomes)
    failed = len(outcomes) - done
    text = f"{'Stopped' if stopped else 'Done'}: {done} of {total} images are upscaled"
    return f"{text}, {failed} {'was' if failed == 1 else 'were'} refused." if failed else f"{text}."


def _zip(outcomes: list[Outcome]) -> str | None:
    """The finished pictures under names of their own, and what became of every file; None if none is finished."""
    if not any(outcome.picture for outcome in outcomes):
        return None
    path, taken, report = new_folder() / "patchscaler.zip", set(), []
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for outcome in outcomes:
            entry = {"name": outcome.name, "outcome": outcome.text}
            if outcome.picture:
                base, number = outcome.picture.stem, 1
                # Where case makes no difference, two such names would be one file.
                while (name := f"{base}{'' if number == 1 else f'_{number}'}.png").casefold() in taken:
                    number += 1
                taken.add(name.casefold())
                archive.write(outcome.picture, name)
                entry |= {"file": name, **outcome.report}
            report.append(entry)
        archive.writestr("report.json", json.dumps({"images": report}, indent=2))
    return str(path)
