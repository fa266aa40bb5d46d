"""Uploads and results do not stay: what is older than an hour is deleted, a killed server's leavings too."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

SWEEP_SECONDS, KEPT_SECONDS = 600, 3600  # how often, and what is older goes


@asynccontextmanager
async def sweeping(app: Any) -> AsyncIterator[None]:
    """While the server runs, delete what it no longer needs, a killed server's leavings too.

    Gradio's own `delete_cache` forgets what it has made when its process ends, and never deletes folders.
    """

    async def sweep_now_and_then() -> None:
        while True:
            kept = [path for block in app.get_blocks().blocks.values() for path in block.keep_in_cache]
            await asyncio.to_thread(sweep, upload_folder(), KEPT_SECONDS, kept)
            await asyncio.sleep(SWEEP_SECONDS)

    task = asyncio.create_task(sweep_now_and_then())
    try:
        yield
    finally:
        task.cancel()


def sweep(folder: Path, seconds: float, kept: Collection[str] = ()) -> None:
    """Delete the files and folders right in `folder` that have been as they are for so long, but for those of `kept`.

    `kept` are paths of files, such as the page's examples.
    """
    keep = {parent for path in kept for parent in (Path(path), *Path(path).parents)}
    for entry in folder.iterdir():
        if entry in keep:
            continue
        with suppress(FileNotFoundError):  # somebody else was quicker
            newest = max(path.lstat().st_mtime for path in (entry, *(entry.iterdir() if entry.is_dir() else ())))
            if time.time() - newest > seconds:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()


def upload_folder() -> Path:
    """Where Gradio puts uploads and results; made if it is not there."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder
