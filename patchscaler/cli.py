"""Upscale files and folders: `python -m patchscaler upscale INPUT... -o OUT`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from patchscaler import files
from patchscaler.device import pick_device, pick_dtype
from patchscaler.figures import qmap_overlay
from patchscaler.images import ImageError, Picture, picture_from_pil, read_picture, write_png, written_whole
from patchscaler.large import Bands, is_large, write_tiff
from patchscaler.loading import CheckpointError, load_pipeline, sha256
from patchscaler.options import UsageError, add_pipeline_options, add_plan_option, positive
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Progress

STAGE_PICTURES = ("coarse", "qmap", "priors")
LARGE_PIXELS = 64_000_000  # of the input: what --large takes, as this is held in memory
PRIOR_ROWS = 8  # patches on the priors sheet, from the least to the most confident


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `upscale`."""
    upscale = commands.add_parser("upscale", help="upscale image files and folders by 4")
    upscale.set_defaults(run=run)
    add = upscale.add_argument
    add("inputs", nargs="+", type=_place, metavar="INPUT", help="an image file, or a folder of them")
    add("-o", "--out", type=_place, required=True, help="folder for NAME.png, the output of NAME.jpg or any other")
    add("--recursive", action="store_true", help="take the images in subfolders too, into subfolders of the same names")
    add(
        "--suffix",
        type=_suffix,
        default="",
        metavar="_x4",
        help="write NAME_x4.png; where images differ in their extensions alone, NAME_jpg_x4.png and NAME_png_x4.png",
    )
    add(
        "--skip-existing", action="store_true", help="leave out what has its output of this plan and seed (ray: always)"
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace any file; else nothing is run if an output would replace what is not an output of its input",
    )
    add_plan_option(upscale)
    add("--gamma1", type=float, help="confidence above which a patch is simple")
    add("--gamma2", type=float, help="confidence up to which a patch is hard")
    add("--start", type=_three, metavar="T1,T2,T3", help="start time of simple, medium, hard: 1 to 1000")
    add("--steps", type=_three, metavar="N1,N2,N3", help="sampling steps of simple, medium, hard")
    add_pipeline_options(upscale)
    add("--devices", type=lambda text: text.split(","), metavar="A,B", help="in place of --device: refine on several")
    add("--compile", action="store_true", help="compile Patch-DiT first: pays for many images, needs a C++ compiler")
    add("--save-stages", action="store_true", help="also write NAME.coarse.png, .qmap.png, .priors.png")
    add("--no-color-fix", dest="color_fix", action="store_false", help="keep the decoder's colours, not the input's")
    add("--report", type=Path, metavar="FILE.json", help="also write plan, groups and timings as JSON")
    add("--quiet", action="store_true", help="no progress and no line for what went well")
    add("--large", action="store_true", help="take larger pictures too, in bands, and write these as NAME.tif")
    add("--engine", choices=("local", "ray"), default="local", help="ray: many images on many workers (extra cluster)")
    add("--workers", type=positive, help="ray: pipelines at once (default: one per GPU, or per two cores)")
    add("--address", help="ray: of a cluster, as for ray.init (default: Ray on this machine)")


def run(args: argparse.Namespace) -> int:
    """Upscale what the arguments name. Returns 0, or 1 if any input failed; raises UsageError."""
    if args.engine == "ray":
        return _run_on_ray(args)
    try:
        if args.workers or args.address:
            raise UsageError("--workers and --address need --engine ray")
        for place in (*args.inputs, args.out):
            if isinstance(place, str):
                raise UsageError(f"{place} needs --engine ray")
        plan = _plan(args)
        tasks, skipped = files.plan_tasks(
            args.inputs,
            args.out,
            STAGE_PICTURES if args.save_stages else (),
            args.report,
            recursive=args.recursive,
            suffix=args.suffix,
            large=args.large,
            overwrite=args.overwrite,
        )
        made_by = plan, args.seed, args.color_fix
        finished = [task for task in tasks if args.skip_existing and task.is_finished(*made_by)]
        devices = [pick_device(name) for name in args.devices or [args.device]]
        dtype = pick_dtype(devices[0], args.dtype)
        if args.devices and args.device:
            raise UsageError("--device and --devices are both given")
        for folder in dict.fromkeys((args.out, *(task.output.parent for task in tasks))):
            files.make_writable(folder)
        if args.report:
            files.make_writable(args.report.parent)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error

    reports, failed = [], 0
    for source in skipped:
        reason = files.why_skipped(source.name)
        print(f"{source}: {reason}", file=sys.stderr)
        reports.append({"input": str(source), "skipped": reason})
    for task in finished:
        reports.append({"input": str(task.source), "output": str(task.output), "skipped": "its output is finished"})
        if not args.quiet:
            print(f"{task.source}: its output {task.output} is finished")
    waiting = [task for task in tasks if task not in finished]
    if waiting:
        try:
            pipeline = load_pipeline(args.weights, dtype=dtype, devices=devices)
        except CheckpointError as error:
            raise UsageError(str(error)) from error
        if args.compile:
            pipeline.compile()

    for number, task in enumerate(waiting, 1):
        # Whatever goes wrong with one file (unreadable, too large, out of memory, disk full) ends that file only.
        try:
            upscale = _upscale_large if task.output.suffix == ".tif" else _upscale
            report = upscale(pipeline, task, plan, args, f"[{number}/{len(waiting)}] {task.source.name}")
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed |= _complain(str(task.source), error)
            reports.append({"input": str(task.source), "error": str(error) or type(error).__name__})
            if isinstance(error, ImageError) and not args.large and is_large(task.source):
                print("--large takes larger pictures", file=sys.stderr)
        else:
            reports.append(report)
    if args.report:
        one = len(args.inputs) == 1 and not args.inputs[0].is_dir()
        try:
            with written_whole(args.report) as file:
                file.write_text(json.dumps(reports[0] if one else reports, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            failed |= _complain(str(args.report), error)
    return failed


def _run_on_ray(args: argparse.Namespace) -> int:
    if args.save_stages or args.report or args.large:
        raise UsageError("--save-stages, --report and --large need --engine local; manifest.json has the groups")
    if args.devices or args.compile:
        raise UsageError("--devices and --compile need --engine local; each worker has a device of its own")
    try:
        from patchscaler import cluster  # here, because Ray is an extra
    except ImportError as error:
        raise UsageError(f"--engine ray needs the extra cluster: {error}") from error
    try:
        weights = str(Path(args.weights).resolve()) if Path(args.weights).is_dir() else args.weights
        job = cluster.Job(_plan(args), args.seed, weights, args.batch_size, args.color_fix, args.dtype)
        places = [str(place) for place in args.inputs]
        counts = cluster.run(
            places,
            str(args.out),
            job,
            args.workers,
            args.device,
            args.address,
            (lambda line: None) if args.quiet else print,
            recursive=args.recursive,
            suffix=args.suffix,
            overwrite=args.overwrite,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (OSError, RuntimeError) as error:
        return _complain(str(args.out), error)
    if not args.quiet:
        print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(counts["failed"] > 0)


def _place(text: str) -> Path | str:
    """A path, or a URL such as s3://bucket/folder as it is."""
    return text if "://" in text else Path(text)


def _suffix(text: str) -> str:
    if any(sign in text for sign in '/\\\0:*?"<>|'):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of a file's name")
    return text


def _three(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers A,B,C")
    return values


def _plan(args: argparse.Namespace) -> SamplingPlan:
    """The preset or file, with the values that other options give in place of its own."""
    given = {name: getattr(args, name) for name in ("gamma1", "gamma2", "start", "steps")}
    return dataclasses.replace(args.plan, **{name: value for name, value in given.items() if value is not None})


def _upscale(
    pipeline: PatchScalerPipeline, task: files.Task, plan: SamplingPlan, args: argparse.Namespace, title: str
) -> dict:
    """Upscale one file, write its pictures, and return its report. `title` is that of the progress bar."""
    began = time.perf_counter()
    picture = _read(task.source)
    made_of = sha256(task.source)
    analysis = pipeline.analyze(picture, args.batch_size)
    with _bar(args, f"{title}, {len(analysis.grid)} patches", "step") as bar:
        for event in pipeline.refine(analysis, plan, args.seed, args.batch_size, args.color_fix):
            if isinstance(event, Progress):
                bar.total = event.total
                bar.update(event.done - bar.n)
    result = event
    text = {**result.png_text(), "input_sha256": made_of}
    if task.stages:
        pictures = {
            "coarse": Picture(analysis.coarse),
            "qmap": picture_from_pil(qmap_overlay(analysis.coarse, analysis.grid, result.assignment)),
            "priors": picture_from_pil(pipeline.draw_priors(analysis, PRIOR_ROWS)),
        }
        for stage, path in task.stages.items():
            write_png(pictures[stage], path, text)
    write_png(result.picture, task.output, text)  # the last, so that all is there once this is
    return _done(task, result.picture.width, result.picture.height, began, args, result.report())


def _upscale_large(
    pipeline: PatchScalerPipeline, task: files.Task, plan: SamplingPlan, args: argparse.Namespace, title: str
) -> dict:
    """`_upscale` in bands, which are written as they come. Stages are not kept."""
    began = time.perf_counter()
    picture = _read(task.source, LARGE_PIXELS)
    bands = Bands(pipeline, picture, plan, args.seed, args.batch_size, args.color_fix)
    shape = (bands.height, bands.width, 3 if picture.alpha is None else 4)
    text = json.dumps(files.Record.of(task.source, plan, args.seed, args.color_fix)._asdict())
    with _bar(args, title, "row", bands.height) as bar:

        def watched() -> Iterator[np.ndarray]:
            for band in bands:
                yield band
                bar.update(len(band))

        write_tiff(watched(), task.output, shape, text)
    return _done(task, bands.width, bands.height, began, args, bands.report())


def _read(source: Path, max_input_pixels: int | None = None) -> Picture:
    picture = read_picture(source, max_input_pixels)
    for note in picture.notes:
        print(f"{source}: {note}", file=sys.stderr)
    return picture


def _bar(args: argparse.Namespace, title: str, unit: str, total: int | None = None) -> tqdm:
    """A progress bar, on a terminal only, removed when it is done."""
    return tqdm(total=total, desc=title, unit=unit, leave=False, disable=args.quiet or None)


def _done(task: files.Task, width: int, height: int, began: float, args: argparse.Namespace, report: dict) -> dict:
    if not args.quiet:
        print(f"{task.source} -> {task.output}  {width}×{height}  {time.perf_counter() - began:.1f} s", flush=True)
    return {"input": str(task.source), "output": str(task.output), **report}


def _complain(what: str, error: Exception) -> int:
    print(f"{what}: {error or type(error).__name__}", file=sys.stderr)
    return 1
