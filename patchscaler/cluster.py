"""Many images on many workers: `python -m patchscaler upscale SRC -o OUT --engine ray`.

Each Ray actor holds one pipeline. The driver hands out one image at a time, so that a slow image or a dead worker
holds up nothing but itself. SRC and OUT are paths or URLs that fsspec knows; pixels never pass through the driver.

Why not Ray Data: measured with Ray 2.60, it keeps the same promises but takes as much code. By default it starts an
image that kills its worker, and a worker that dies while it loads, again and again until nothing has moved for half
an hour, and the run fails; the arguments that bound this are announced to go in Ray 2.64, so that an actor of ours has
to count. An image costs 23 ms besides its pixels in place of 3 (5,000 images, 2 workers, 2 cores), and its three helper
processes hold 0.3 GB.
"""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
import ray
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayError, RayTaskError

from patchscaler import files
from patchscaler.images import ImageError, Limits, read_picture, write_png, written_whole
from patchscaler.loading import CheckpointError, load_pipeline
from patchscaler.options import UsageError
from patchscaler.plan import SamplingPlan

MANIFEST = "manifest.json"
ATTEMPTS = 2  # an image on which so many workers died is given up
SAVE_EVERY = 5.0  # seconds between two writings of the manifest


@dataclass(frozen=True)
class Job:
    """What every image of a run is given. Two runs of equal jobs may share a folder."""

    plan: SamplingPlan
    seed: int
    weights: str
    batch_size: int | None = None
    color_fix: bool = True
    dtype: str | None = None  # what suits the device

    def describe(self) -> dict:
        """What decides the pixels, as the manifest records it."""
        facts = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return json.loads(json.dumps(facts))


class Worker:
    """One pipeline on one device, in a process of its own."""

    def load(self, job: Job, device: str | None) -> None:
        self.pipeline = load_pipeline(job.weights, device, job.dtype)

    def upscale(self, source: str, output: str, job: Job, repeated: bool) -> dict:
        """The manifest's entry for one image. `repeated`: a worker died on it, perhaps after it was written."""
        begin = time.perf_counter()
        try:
            with fetched(source) as copy:
                picture = read_picture(copy)
                made_of = files.Record.of(copy, job.plan, job.seed, job.color_fix)
                if repeated and record_of(output) == made_of:
                    return {"status": "done"}
            result = self.pipeline(picture, job.plan, job.seed, job.batch_size, job.color_fix)
            with stored(output) as file:
                write_png(result.picture, file, {**result.png_text(), "input_sha256": made_of.input_sha256})
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # this image's fault, or its size's
            return {"status": "failed", "error": str(error) or type(error).__name__}
        return {
            "status": "done",
            "seconds": time.perf_counter() - begin,
            "pixels": result.picture.height * result.picture.width,
            "groups": [asdict(group) for group in result.groups],
            "notes": list(picture.notes),
            "process": os.getpid(),
        }


class Manifest:
    """OUT/manifest.json: the job, and for each image where it went and how that ended."""

    def __init__(self, folder: str, job: Job, overwrite: bool = False):
        """Read what an earlier run left, unless `overwrite`. UsageError if that was another job, whose images are not
        to be taken for ours."""
        self.path = posixpath.join(folder, MANIFEST)
        self.content = {"job": job.describe(), "images": {}}
        fs, path = url_to_fs(self.path)
        self.resumed = not overwrite and fs.exists(path)
        self.saved = 0.0
        if self.resumed:
            try:
                with fs.open(path, "rb") as file:
                    earlier = json.load(file)
                same = earlier["job"] == self.content["job"]
                self.content["images"] = dict(earlier["images"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{self.path} cannot be read: {error}") from error
            if not same and self.content["images"]:
                what = "plan, seed, weights, colour fix or precision"
                raise UsageError(f"{self.path} is of another {what}; choose another folder or --overwrite")

    def record(self, source: str, entry: dict) -> None:
        self.content["images"][source] = entry
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        with stored(self.path) as file:
            file.write_text(json.dumps(self.content, indent=1))
        self.saved = time.monotonic()


def run(
    inputs: Sequence[str],
    out: str,
    job: Job,
    workers: int | None = None,
    device: str | None = None,
    address: str | None = None,
    say: Callable[[str], None] = print,
    kind: type[Worker] = Worker,
    recursive: bool = False,
    suffix: str = "",
    overwrite: bool = False,
) -> dict[str, int]:
    """Upscale images and folders of them into OUT/NAME.png, and count what is "done", "failed" and "found".

    Found are the images that an earlier run of the same job left in OUT; they are not made again, unless `overwrite`,
    which also replaces any other file. Without an `address`, Ray runs on this machine, for as long as this call.
    Raises UsageError before anything is run, for bad weights too, and RuntimeError if no worker can load the pipeline.
    """
    fs, path = url_to_fs(out)
    out = path if isinstance(fs, LocalFileSystem) else out  # absolute, as workers may stand elsewhere
    outputs, skipped = plan_outputs(inputs, out, recursive, suffix)
    manifest = Manifest(out, job, overwrite)
    found = [] if overwrite else _found(outputs, manifest, job)
    for folder in sorted({posixpath.dirname(output) for output in outputs.values()}):
        if isinstance(fs, LocalFileSystem):
            files.make_writable(Path(folder))
        else:
            fs.makedirs(url_to_fs(folder)[1], exist_ok=True)
    for source in skipped:
        manifest.content["images"][source] = {"status": "skipped", "error": files.why_skipped(source)}
        say(f"{source}: {files.why_skipped(source)}")
    manifest.save()
    waiting = {source: outputs[source] for source in outputs if source not in found}
    counts = {"done": 0, "failed": 0, "found": len(found)}
    if not waiting:
        return counts
    _start_ray(address)
    try:
        _work(waiting, job, *_worker_pool(kind, workers, device), manifest, counts, say)
    finally:
        manifest.save()
        ray.shutdown()
    return counts


def _found(outputs: dict[str, str], manifest: Manifest, job: Job) -> list[str]:
    """The sources whose outputs are there, all of them "done" in the manifest then.

    UsageError for an output that is there and is not one of its source.
    """
    there: set[str] = set()
    for folder in {posixpath.dirname(output) for output in outputs.values()}:
        fs, path = url_to_fs(folder)  # listed, as to ask for each file would take long on an object store
        there.update(fs.ls(path, detail=False) if fs.isdir(path) else ())
    found = []
    for source, output in outputs.items():
        if url_to_fs(output)[1] not in there:
            continue
        if manifest.content["images"].get(source, {}).get("status") != "done":
            # It may be of a driver that died before saying so, of another job, or somebody's photograph.
            try:
                with fetched(source) as copy:
                    made_of = files.Record.of(copy, job.plan, job.seed, job.color_fix)
            except (OSError, ImageError):  # a worker will say so, and write nothing
                continue
            record = files.own_record(output, record_of(output), source, made_of.input_sha256)
            if not manifest.resumed or record != made_of:
                continue
            manifest.content["images"][source] = {"output": output, "status": "done"}
        found.append(source)
    return found


def plan_outputs(
    inputs: Sequence[str], out: str, recursive: bool = False, suffix: str = ""
) -> tuple[dict[str, str], list[str]]:
    """Source -> OUT/NAME.png of every image, and the image files that are not read.

    UsageError if there is no image, or if two outputs would be one file, or one an input.
    """
    sources: dict[str, str] = {}
    skipped: list[str] = []
    for place in inputs:
        images, others = find_images(place, out, recursive)
        sources |= images
        skipped += others
    outputs: dict[str, str] = {}
    taken = {_identity(source): f"the input {source}" for source in sources}
    for source, stem in zip(sources, files.output_stems([*sources.values()], suffix), strict=True):
        outputs[source] = output = posixpath.join(out, f"{stem}.png")
        files.claim(taken, output, _identity(output), f"the output of {source}")
    return outputs, skipped


def find_images(place: str, out: str, recursive: bool = False) -> tuple[dict[str, str], list[str]]:
    """The image named, or those in the folder named: each with its name relative to that; and what is not read there.

    What PatchScaler wrote into `out` is left out of a folder. UsageError if there is no image.
    """
    try:
        fs, path = url_to_fs(place)
        if not fs.isdir(path):
            return {_full(fs, path): posixpath.basename(path)}, []
        if isinstance(fs, LocalFileSystem):
            names = files.listed(Path(path), recursive)
        else:
            entries = fs.find(path, maxdepth=None if recursive else 1, detail=True)
            names = sorted(posixpath.relpath(name, path) for name, entry in entries.items() if entry["type"] == "file")
    except (OSError, ValueError, ImportError) as error:  # ImportError names the package that a protocol needs
        raise UsageError(f"{place}: {error}") from error
    images, others = ({_full(fs, posixpath.join(path, name)): name for name in part} for part in files.sort_out(names))
    ours = posixpath.join(_identity(out), "")
    images = {file: name for file, name in images.items() if not (_identity(file).startswith(ours) and record_of(file))}
    if not images:
        raise UsageError(files.no_image(place, others))
    return images, list(others)


def _full(fs: AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def record_of(output: str) -> files.Record | None:
    """`files.record_of` of a file wherever it lies."""
    try:
        with fsspec.open(output, "rb") as file:
            return files.read_record(file)
    except OSError:
        return None


@contextmanager
def fetched(source: str) -> Iterator[Path]:
    """A file wherever it lies, as one on disk. Raises ImageError if it is larger than the limit, unless it is here."""
    fs, path = url_to_fs(source)
    if isinstance(fs, LocalFileSystem):
        yield Path(path)
        return
    limit = Limits.from_environment().file_bytes
    with fs.open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ImageError(f"the file is too large; the limit is {limit:,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "input"
        copy.write_bytes(data)
        yield copy


@contextmanager
def stored(place: str) -> Iterator[Path]:
    """A file on disk to write to, which then appears at a place whole: renamed on disk; one upload elsewhere."""
    fs, path = url_to_fs(place)
    if isinstance(fs, LocalFileSystem):
        with written_whole(Path(path)) as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output"
        yield file
        fs.put_file(str(file), path)


def _identity(place: str) -> str:
    fs, path = url_to_fs(place)
    return files.folded(os.path.realpath(path) if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path))


def _start_ray(address: str | None) -> None:
    """Join the cluster, or start Ray here. The limits on images go along; on a cluster, so must the package."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("PATCHSCALER_MAX_")}
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        root = str(Path(__file__).parent.parent)
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    try:
        ray.init(address or "local", runtime_env={"env_vars": settings}, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"cannot reach Ray at {address or 'this machine'}: {error}") from error


def _worker_pool(
    kind: type[Worker], count: int | None, device: str | None
) -> tuple[int, ActorClass, str | None]:
    """How many workers to have, what makes one, and the device that each is to load the pipeline on.

    They get a GPU each if there are any and no other device is asked for, else the cores in equal shares.
    """
    cluster = ray.cluster_resources()
    cpus, gpus = int(cluster.get("CPU", 1)), int(cluster.get("GPU", 0))
    on_gpu = device == "cuda" or (device in (None, "auto") and gpus > 0)
    most = gpus if on_gpu else cpus
    count = count or (gpus if on_gpu else max(1, cpus // 2))
    if count > most:
        raise UsageError(f"{count} workers need {count} {'GPUs' if on_gpu else 'cores'}; Ray has {most}")
    largest = int(max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]))
    share = max(1, min(cpus // count, largest))  # Ray gives a worker that many threads, by OMP_NUM_THREADS
    return count, ray.remote(kind).options(num_cpus=share, num_gpus=int(on_gpu)), "cuda" if on_gpu else device


def _work(
    outputs: dict[str, str],
    job: Job,
    count: int,
    actor: ActorClass,
    device: str | None,
    manifest: Manifest,
    counts: dict[str, int],
    say: Callable[[str], None],
) -> None:
    """Give each of `count` workers an image at a time until none is left, and replace those that die."""
    waiting = deque(outputs)
    attempts = dict.fromkeys(outputs, 0)
    starts = 0  # in a row that failed
    running: dict[ray.ObjectRef, tuple[ActorHandle, str | None]] = {}
    idle: list[ActorHandle] = []
    begin, pixels, ended = time.monotonic(), 0, 0

    def start() -> None:
        worker = actor.remote()
        running[worker.load.remote(job, device)] = worker, None

    for _ in range(count):
        start()
    while ended < len(outputs):
        (finished,), _ = ray.wait(list(running), num_returns=1)
        worker, source = running.pop(finished)
        try:
            entry = ray.get(finished)
            idle.append(worker)
            starts = 0
        except RayTaskError as error:  # what Worker did not expect
            if source is None:
                kind = UsageError if isinstance(error.cause, CheckpointError) else RuntimeError
                raise kind(f"a worker cannot load the pipeline: {error.cause}") from error
            entry = {"status": "failed", "error": str(error.cause)}
            idle.append(worker)
        except RayError as error:  # the worker died
            starts += source is None
            if starts >= ATTEMPTS:
                raise RuntimeError(f"workers die while they load the pipeline: {error}") from error
            start()
            if source is not None and attempts[source] < ATTEMPTS:
                say(f"{source}: its worker died; trying again")
                waiting.appendleft(source)
                source = None
            entry = {"status": "failed", "error": f"{ATTEMPTS} workers died on it"}
        if source is not None:
            manifest.record(source, {"output": outputs[source], "attempts": attempts[source], **entry})
            counts[entry["status"]] += 1
            ended, pixels = ended + 1, pixels + entry.get("pixels", 0)
            seconds = time.monotonic() - begin
            pace = f"{ended / seconds:.2f} images/s, {pixels / 1e6 / seconds:.2f} MP/s"
            left = f"{seconds / ended * (len(outputs) - ended):.0f} s left"
            failed = entry["status"] == "failed"
            how = f": {entry['error']}" if failed else f" -> {outputs[source]}  {entry.get('seconds', 0):.1f} s"
            say(f"[{ended}/{len(outputs)}] {source}{how}  ({pace}, {left})")
        while idle and waiting:
            worker, source = idle.pop(), waiting.popleft()
            attempts[source] += 1
            call = worker.upscale.remote(source, outputs[source], job, attempts[source] > 1)
            running[call] = worker, source
