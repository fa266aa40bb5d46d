"""Which files of a folder are inputs, what their outputs are called, and which existing files these may replace.

Every output of the command line records what it was made of: the SHA-256 of the input's bytes, the plan, the seed, and
whether the colours were fixed. A PNG has them in its text chunks, a TIFF in its description. So an output of the same
input is recognised, whatever it is called.
"""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGEDESCRIPTION, TiffImageFile

from patchscaler.images import FORMATS
from patchscaler.large import is_large
from patchscaler.loading import sha256
from patchscaler.options import UsageError
from patchscaler.plan import SamplingPlan

MAX_NAME = 255  # bytes of a file's name that file systems take
# Of image files that are not read, unless Pillow and FORMATS have them.
OTHER_IMAGES = frozenset(
    ".heic .heif .hif .avif .jxl .jxr .jp2 .j2k .jpx .psd .psb .tga .dds .ico .icns .exr .hdr .pcx .pbm .pgm .ppm .pnm "
    ".qoi .sgi .svg .eps .wmf .emf .xbm .xpm .xcf .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw".split()
)


class Record(NamedTuple):
    """What an output was made of, as it says itself."""

    input_sha256: str
    plan: dict
    seed: int
    color_fix: bool

    @classmethod
    def of(cls, source: Path, plan: SamplingPlan, seed: int, color_fix: bool) -> Record:
        """That of an output yet to be made. Raises OSError."""
        return cls(sha256(source), json.loads(plan.to_json()), seed, color_fix)


@dataclass(frozen=True)
class Task:
    """An image and the files that are made of it."""

    source: Path
    output: Path
    stages: dict[str, Path]  # empty unless they are wanted

    def paths(self) -> list[Path]:
        return [self.output, *self.stages.values()]

    def is_finished(self, plan: SamplingPlan, seed: int, color_fix: bool) -> bool:
        """Whether every file is there, of this input, plan, seed and colour fix."""
        records = [record_of(path) for path in self.paths()]
        if None in records or not self.source.is_file():
            return False
        made_of = Record.of(self.source, plan, seed, color_fix)
        return all(record == made_of for record in records)


def plan_tasks(
    inputs: Sequence[Path],
    out: Path,
    stages: Sequence[str],
    report: Path | None,
    recursive: bool,
    suffix: str,
    large: bool,
    overwrite: bool,
) -> tuple[list[Task], list[Path]]:
    """What is to be made of the inputs, and the image files that are skipped.

    `stages` are made too, but for a picture that `large` allows to be too large. UsageError if a file would be lost.
    """
    if report and not report.parent.is_dir() and report.parent.resolve() != out.resolve():
        raise UsageError(f"the report's folder {report.parent} does not exist")
    sources, skipped = _sources(inputs, out.resolve(), recursive)
    taken = {_key(source): f"the input {source}" for source in sources}
    if report:
        claim(taken, report, _key(report), "the report")
        if report.exists() and not overwrite and not _is_report(report):
            raise UsageError(f"{report} exists and is not a report; --overwrite replaces it")
    tasks = []
    for source, stem in zip(sources, output_stems([*sources.values()], suffix), strict=True):
        in_bands = large and is_large(source)
        output = out / f"{stem}{'.tif' if in_bands else '.png'}"
        task = Task(source, output, {} if in_bands else {stage: out / f"{stem}.{stage}.png" for stage in stages})
        claim(taken, output, _key(output), f"the output of {source}")
        for stage, path in task.stages.items():
            claim(taken, path, _key(path), f"the {stage} stage of {source}")
        if not overwrite:
            _refuse_to_replace(task)
        tasks.append(task)
    return tasks, skipped


def _sources(inputs: Sequence[Path], out: Path, recursive: bool) -> tuple[dict[Path, str], list[Path]]:
    """The images meant, each with its name relative to the folder named, and the other image files in such folders.

    What PatchScaler wrote into the output folder is not an input again, where that is the folder named or lies in it.
    """
    sources, skipped = {}, []
    for path in inputs:
        if not path.is_dir():
            found = [(path, path.name)]
        else:
            images, others = sort_out(listed(path, recursive))
            found = [(path / name, name) for name in images if not _is_own(path / name, out)]
            if not found:
                raise UsageError(no_image(path, [path / name for name in others]))
            skipped += [path / name for name in others]
        for file, name in found:
            if file in sources:
                raise UsageError(f"{file} is named twice")
            sources[file] = name
    return sources, skipped


def _is_own(file: Path, out: Path) -> bool:
    """Whether PatchScaler wrote a file into the output folder."""
    return file.resolve().is_relative_to(out) and record_of(file) is not None


def claim(taken: dict[str, str], place: Path | str, key: str, owner: str) -> None:
    """Note in `taken` whose file a path or URL is; `key` is the same for all names of one file.

    UsageError if it is another's already, a folder, or of a name that is longer than file systems take.
    """
    length = len(os.fsencode(posixpath.basename(str(place))))
    if length > MAX_NAME:
        raise UsageError(f"{place}: the output's name would have {length} bytes; the limit is {MAX_NAME}")
    if os.path.isdir(place):
        raise UsageError(f"{place} is a folder")
    if key in taken:
        raise UsageError(f"{place} would be both {taken[key]} and {owner}")
    taken[key] = owner


def _key(path: Path) -> str:
    """One name for one file, on file systems that ignore case too."""
    return folded(str(path.resolve()))


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
        return all("input" in entry for entry in (content if isinstance(content, list) else [content]))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _refuse_to_replace(task: Task) -> None:
    """UsageError if a file of the task is there already and is not an earlier output of the same input."""
    there = [path for path in task.paths() if os.path.lexists(path)]
    if there and task.source.is_file():  # a missing one will be said when it is to be read
        made_of = sha256(task.source)
        for path in there:
            own_record(path, record_of(path), task.source, made_of)


def listed(folder: Path, recursive: bool = False) -> list[str]:
    """The files in a folder, or in it and its subfolders, by relative name with "/". Links to folders are not followed.

    Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    names = []
    for place, _, files in os.walk(folder, onerror=fail):
        names += [(Path(place) / file).relative_to(folder).as_posix() for file in files]
        if not recursive:
            break
    return sorted(name for name in names if (folder / name).is_file())


def sort_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The images among the files of a folder, and the image files of kinds that are not read.

    Names with a part that begins with a dot, such as the "._photo.jpg" of macOS, are in neither.
    """
    kinds = Image.registered_extensions()
    images, others = [], []
    for name in names:
        extension = posixpath.splitext(name)[1].lower()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if kinds.get(extension) in FORMATS:
            images.append(name)
        elif extension in OTHER_IMAGES:
            others.append(name)
    return images, others


def why_skipped(name: str) -> str:
    extension = posixpath.splitext(name)[1].lower()
    hint = "; save them as JPEG or PNG, or install pillow-heif" if extension in (".heic", ".heif", ".hif") else ""
    return f"skipped, as {extension} files are not read{hint}"


def no_image(folder: str | Path, others: Iterable[str | Path]) -> str:
    """What is said of a folder without any image to read."""
    also = "".join(f"; {file}: {why_skipped(str(file))}" for file in others)
    return f"no {', '.join(FORMATS)} file in the folder {folder}{also}"


def output_stems(names: Sequence[str], suffix: str) -> list[str]:
    """NAME + suffix for each image NAME.EXT. With a suffix, NAME_EXT + suffix for those of one NAME."""
    stems = [posixpath.splitext(name) for name in names]
    count = Counter(folded(stem) for stem, _ in stems)
    alike = [suffix and count[folded(stem)] > 1 for stem, _ in stems]
    return [f"{stem}{'_' + end[1:] if both else ''}{suffix}" for (stem, end), both in zip(stems, alike)]


def folded(name: str) -> str:
    """One key for names that are one file on file systems that ignore case or how accents are encoded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_record(file: BinaryIO) -> Record | None:
    """The record in a PNG or TIFF that PatchScaler wrote; None for any other file. No pixels are decoded."""
    try:
        is_png = file.read(4) == b"\x89PNG"
        file.seek(0)
        # Not by Image.open, which refuses what --large writes as too large.
        if not is_png:
            return Record(**json.loads(TiffImageFile(file).tag_v2[IMAGEDESCRIPTION]))
        text = PngImageFile(file).info
        plan, color_fix = json.loads(text["plan"]), text.get("color_fix") != "off"
        return Record(text["input_sha256"], plan, int(text["seed"]), color_fix)
    except Exception:  # whatever it is, it is not one of ours
        return None


def record_of(path: Path) -> Record | None:
    """`read_record` of a file on disk, if there is one."""
    try:
        with path.open("rb") as file:
            return read_record(file)
    except OSError:
        return None


def own_record(output: str | Path, record: Record | None, source: str | Path, input_sha256: str) -> Record:
    """The record of an output that is there. UsageError if it was not made of that input."""
    if record is None or record.input_sha256 != input_sha256:
        raise UsageError(
            f"{output} exists and is not PatchScaler's output of {source}; "
            "--suffix _x4 writes beside it, --overwrite replaces it"
        )
    return record


def make_writable(folder: Path) -> None:
    """Make a folder unless it is there. UsageError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be written to: {error.strerror}") from error
