"""Upscale files and folders: ``python -m patchscaler upscale INPUT... -o OUT``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from patchscaler.device import pick_device, pick_dtype
from patchscaler.figures import qmap_overlay
from patchscaler.images import (
    FORMATS,
    OUTPUT_PER_INPUT,
    ImageError,
    Limits,
    Picture,
    picture_from_pil,
    read_picture,
    write_png,
)
from patchscaler.large import Bands, write_tiff
from patchscaler.loading import CheckpointError, load_pipeline
from patchscaler.options import UsageError, add_pipeline_options, add_plan_option, positive
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Analysis, Progress, Result

STAGES = ("coarse", "qmap", "priors")
LARGE_PIXELS = 64_000_000  # of the input: what --large takes, as this is held in memory
PRIOR_ROWS = 8  # patches on the priors sheet


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `upscale`."""
    upscale = commands.add_parser("upscale", help="upscale image files and folders by 4")
    upscale.set_defaults(run=run)
    add = upscale.add_argument
    add("inputs", nargs="+", type=_place, metavar="INPUT", help="an image file, or a folder of them")
    add("-o", "--out", type=_place, required=True, help="folder for NAME.png")
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
        if args.large and find_spec("tifffile") is None:
            raise UsageError("--large needs the extra large: pip install tifffile")
        plan = _plan(args)
        sources = _sources(args.inputs)
        outputs = _outputs(sources, args)
        devices = [pick_device(name) for name in args.devices or [args.device]]
        dtype = pick_dtype(devices[0], args.dtype)
        if args.devices and args.device:
            raise UsageError("--device and --devices are both given")
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    try:
        pipeline = load_pipeline(args.weights, dtype=dtype, devices=devices)
    except CheckpointError as error:
        return _complain(str(args.weights), error)

    if args.compile:
        pipeline.compile()

    reports, failed = [], 0
    for source, output in zip(sources, outputs, strict=True):
        # Whatever befalls one file (unreadable, too large, out of memory, disk full) ends that file only.
        try:
            upscale = _upscale_large if output.suffix == ".tif" else _upscale
            reports.append(upscale(pipeline, source, output, plan, args))
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed |= _complain(str(source), error)
            if isinstance(error, ImageError) and not args.large and _is_large(source):
                print("--large takes larger pictures", file=sys.stderr)
    if args.report and reports:
        one = len(args.inputs) == 1 and not args.inputs[0].is_dir()
        try:
            _write_text(args.report, json.dumps(reports[0] if one else reports, indent=2) + "\n")
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
        counts = cluster.run(places, str(args.out), job, args.workers, args.device, args.address)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (OSError, RuntimeError) as error:
        return _complain(str(args.out), error)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(counts["failed"] > 0)


def _place(text: str) -> Path | str:
    """A path, or a URL such as s3://bucket/folder as it is."""
    return text if "://" in text else Path(text)


def _three(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers A,B,C")
    return values


def _plan(args: argparse.Namespace) -> SamplingPlan:
    """The preset or file, with the single values given beside it put in its place."""
    given = {name: getattr(args, name) for name in ("gamma1", "gamma2", "start", "steps")}
    return dataclasses.replace(args.plan, **{name: value for name, value in given.items() if value is not None})


def _sources(inputs: list[Path]) -> list[Path]:
    """The files meant: a folder stands for the images directly in it, by name."""
    sources = []
    for path in inputs:
        found = [path]
        if path.is_dir():
            kinds = Image.registered_extensions()
            found = sorted(file for file in path.iterdir() if kinds.get(file.suffix.lower()) in FORMATS)
            if not found:
                raise UsageError(f"no {', '.join(FORMATS)} file in the folder {path}")
        sources += found
    return sources


def _outputs(sources: list[Path], args: argparse.Namespace) -> list[Path]:
    """``out/NAME.png`` or .tif for each source. Refuses whatever would overwrite an input or another output."""
    out, report = args.out, args.report
    if report and not report.parent.is_dir() and report.parent.resolve() != out.resolve():
        raise UsageError(f"the report's folder {report.parent} does not exist")
    taken = {_key(source): f"the input {source}" for source in sources}
    if report:
        _claim(taken, report, "the report")
    outputs = []
    for source in sources:
        large = args.large and _is_large(source)
        outputs.append(out / f"{source.stem}{'.tif' if large else '.png'}")
        _claim(taken, outputs[-1], f"the output of {source}")
        for stage in STAGES if args.save_stages and not large else ():
            _claim(taken, out / f"{source.stem}.{stage}.png", f"the {stage} stage of {source}")
    return outputs


def _is_large(source: Path) -> bool:
    """Whether a picture is too large to be held upscaled, as its header has it."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            pixels = image.width * image.height
    except Exception:  # whatever it is, reading it will say so
        return False
    limits = Limits.from_environment()
    return pixels > limits.input_pixels or OUTPUT_PER_INPUT * pixels > limits.output_pixels


def _claim(taken: dict[str, str], path: Path, owner: str) -> None:
    if _key(path) in taken:
        raise UsageError(f"{path} would be both {taken[_key(path)]} and {owner}")
    taken[_key(path)] = owner


def _key(path: Path) -> str:
    """One name for one file, on file systems that ignore case too."""
    return str(path.resolve()).casefold()


def _upscale(
    pipeline: PatchScalerPipeline, source: Path, output: Path, plan: SamplingPlan, args: argparse.Namespace
) -> dict:
    """Upscale one file, write its pictures, and return its report."""
    began = time.perf_counter()
    picture = read_picture(source)
    for note in picture.notes:
        print(f"{source}: {note}", file=sys.stderr)
    analysis = pipeline.analyze(picture, args.batch_size)
    result = _refine(pipeline, analysis, plan, args)
    write_png(result.picture, output, result.png_text())
    if args.save_stages:
        _write_stages(pipeline, analysis, result, output)
    size = f"{result.picture.width}x{result.picture.height}"
    print(f"{source} -> {output}  {size}  {time.perf_counter() - began:.1f} s")
    return {"input": str(source), "output": str(output), **result.report()}


def _upscale_large(
    pipeline: PatchScalerPipeline, source: Path, output: Path, plan: SamplingPlan, args: argparse.Namespace
) -> dict:
    """`_upscale` in bands, which are written as they come. Stages are not kept."""
    began = time.perf_counter()
    picture = read_picture(source, LARGE_PIXELS)
    for note in picture.notes:
        print(f"{source}: {note}", file=sys.stderr)
    bands = Bands(pipeline, picture, plan, args.seed, args.batch_size, args.color_fix)
    shape = (bands.height, bands.width, 3 if picture.alpha is None else 4)
    text = json.dumps({"plan": json.loads(plan.to_json()), "seed": args.seed, "color_fix": args.color_fix})
    write_tiff(_shown(bands), output, shape, text)
    print(f"{source} -> {output}  {bands.width}x{bands.height}  {time.perf_counter() - began:.1f} s")
    return {"input": str(source), "output": str(output), **bands.report()}


def _shown(bands: Bands) -> Iterator[np.ndarray]:
    """The bands, with their progress where someone may watch."""
    rows = 0
    for band in bands:
        yield band
        rows += len(band)
        if sys.stderr.isatty():
            end = "" if rows < bands.height else "\r\033[K"
            print(f"\r{rows}/{bands.height} rows{end}", end="", file=sys.stderr, flush=True)


def _refine(pipeline: PatchScalerPipeline, analysis: Analysis, plan: SamplingPlan, args: argparse.Namespace) -> Result:
    show = sys.stderr.isatty()
    for event in pipeline.refine(analysis, plan, args.seed, args.batch_size, args.color_fix):
        if show and isinstance(event, Progress):
            print(f"\r{event.done}/{event.total} evaluations", end="", file=sys.stderr, flush=True)
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return event


def _write_stages(pipeline: PatchScalerPipeline, analysis: Analysis, result: Result, output: Path) -> None:
    pictures = {
        "coarse": Picture(analysis.coarse),
        "qmap": picture_from_pil(qmap_overlay(analysis.coarse, analysis.grid, result.assignment)),
        "priors": picture_from_pil(pipeline.draw_priors(analysis, PRIOR_ROWS)),
    }
    for stage in STAGES:
        write_png(pictures[stage], output.with_name(f"{output.stem}.{stage}.png"))


def _write_text(path: Path, text: str) -> None:
    """Write through a temporary file beside it, so that the file is whole or absent."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _complain(what: str, error: Exception) -> int:
    print(f"{what}: {error or type(error).__name__}", file=sys.stderr)
    return 1
