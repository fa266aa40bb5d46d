"""The folder that a measurement is written into, in which only files of earlier measurements are replaced."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from patchscaler.files import make_writable
from patchscaler.options import UsageError

PNG_TEXT = {"Software": "PatchScaler evaluation"}
PNG_MARK = "Software\0PatchScaler evaluation"  # the same as it stands in the file
HEAD = 8192  # bytes of a file in which its mark is looked for


def add_options(parser: argparse.ArgumentParser, names: str) -> None:
    """-o and --overwrite."""
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, help=f"folder for {names}")
    add("--overwrite", action="store_true", help="replace any file; else only those of an earlier run are replaced")


def prepare(out: Path, marks: Mapping[str, str], overwrite: bool) -> None:
    """Make the folder, unless it is there, for files of the given names; each name comes with its mark.

    The mark is a text near the beginning of every such file that the command writes. UsageError for a file that is
    there without it, unless `overwrite`, and for a folder that cannot be written to.
    """
    for name, mark in marks.items():
        path = out / name
        if path.is_dir():
            raise UsageError(f"{path} is a folder")
        if os.path.lexists(path) and not overwrite and mark.encode() not in _head(path):
            raise UsageError(f"{path} exists and is not of an earlier run of this command; --overwrite replaces it")
    make_writable(out)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD).replace(b"\r\n", b"\n")  # as Windows ends lines
    except OSError:
        return b""
