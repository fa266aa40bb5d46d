"""What is measured on: folders of images to upscale and of their truths, read, analysed and scored pair by pair."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from patchscaler import files
from patchscaler.device import pick_device
from patchscaler.evaluation import outputs
from patchscaler.evaluation.metrics import to_8bit
from patchscaler.evaluation.scores import Scorer
from patchscaler.images import ImageError, Picture, read_picture
from patchscaler.limits import MAX_INPUT_PIXELS
from patchscaler.loading import load_pipeline
from patchscaler.options import UsageError, add_pipeline_options, positive
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS
from patchscaler.results import Analysis, Result

MAX_TRUTH_PIXELS = SCALE**2 * MAX_INPUT_PIXELS
MEASURES = "All measures on 8-bit images, no border cut."

Pair = tuple[Path, Path | None]  # an input, and its truth


def find_images(folder: Path) -> dict[str, Path]:
    """Stem → file of the images directly in a folder, by name. FileNotFoundError if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of images {folder}")
    images, others = files.sort_out(files.listed(folder))
    if not images:
        raise FileNotFoundError(files.no_image(folder, others))
    found: dict[str, Path] = {}
    for path in (folder / name for name in images):
        if found.setdefault(path.stem, path) != path:
            raise ValueError(f"{found[path.stem]} and {path} have one stem")
    return found


def find_pairs(lr: Path, hr: Path | None) -> list[Pair]:
    """The images of `lr` by name, each with the one of its stem in `hr`; FileNotFoundError if there is none."""
    lows, highs = find_images(lr), find_images(hr) if hr else {}
    for stem, low in lows.items():
        if hr and stem not in highs:
            raise FileNotFoundError(f"no image {stem} in {hr} for {low}")
    return [(low, highs.get(stem)) for stem, low in lows.items()]


def read_image(path: Path, max_input_pixels: int = MAX_INPUT_PIXELS) -> Picture:
    """`read_picture`, with the file named in the ImageError."""
    try:
        return read_picture(path, max_input_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def read_truth(path: Path, bicubic: Tensor) -> Tensor:
    """The true image 3×H×W, which must be as large as the enlarged input; ImageError if it is not."""
    truth = read_image(path, MAX_TRUTH_PIXELS).rgb
    if truth.shape != bicubic.shape:
        sizes = [f"{image.shape[2]}×{image.shape[1]}" for image in (truth, bicubic)]
        raise ImageError(f"{path} is {sizes[0]}; {SCALE} times its input is {sizes[1]}")
    return truth


def analyses(
    pipeline: PatchScalerPipeline, pairs: Sequence[Pair], batch_size: int | None = None
) -> Iterator[tuple[str, Analysis, Tensor | None]]:
    """The name, the analysis and the truth 3×H×W, if there is one, of each pair.

    ImageError names an image that is unreadable, or not four times its input.
    """
    for low, high in tqdm(pairs, unit="image", disable=None):  # a bar on a terminal only
        analysis = pipeline.analyze(read_image(low), batch_size)
        yield low.stem, analysis, None if high is None else read_truth(high, analysis.bicubic)


def score(scorer: Scorer, name: str, image: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Values of an image as an 8-bit file holds it. ImageError with its name if it is too small for a measure."""
    try:
        return scorer(to_8bit(image), truth)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error


def score_patches(
    scorer: Scorer, name: str, images: Mapping[str, Tensor], truth: Tensor, grid: PatchGrid, assignment: Tensor
) -> Iterator[tuple[str, dict[str, float]]]:
    """What each patch is, "GROUP: METHOD", and its values; the images are methods → 3×H×W.

    A patch is cut out of the finished image and scored like a small image of its own: nothing outside of it counts,
    and all groups are scored at one size. So values are those of patches, not parts of the whole image's value.
    """
    for patch, group in zip(grid.patches, assignment.tolist()):
        for method, image in images.items():
            yield f"{GROUPS[group]}: {method}", score(scorer, name, patch.pixels(image), patch.pixels(truth))


def coarse_costs(analysis: Analysis) -> dict[str, float]:
    return {"evaluations": 0, "seconds": sum(analysis.seconds[stage] for stage in ("encode", "restore", "decode"))}


def costs(result: Result) -> dict[str, float]:
    """Evaluations of Patch-DiT, and seconds of a whole run, analysis and all."""
    return {
        "evaluations": sum(group.evaluations for group in result.groups),
        "seconds": sum(result.seconds.values()),
    }


def describe_setup(pipeline: PatchScalerPipeline, pairs: Sequence[Pair], seed: int) -> str:
    about = f"Images: {len(pairs)} of `{pairs[0][0].parent}`, seed {seed}, {pipeline.device}"
    return f"{about}, {pipeline.transformer.dtype}. {MEASURES}"


def add_options(parser: argparse.ArgumentParser, hr_required: bool = True) -> None:
    """--lr, --hr, --limit and the options of pipelines."""
    add = parser.add_argument
    add("--lr", type=Path, required=True, help="folder of images to upscale")
    add("--hr", type=Path, required=hr_required, help="folder of the true images, of the same names")
    add("--limit", type=positive, help="only the first images, by name")
    add_pipeline_options(parser)


def measure_pairs(
    args: argparse.Namespace,
    measure: Callable[..., str],
    marks: Callable[[Sequence[Pair]], Mapping[str, str]] | None = None,
    **options: object,
) -> int:
    """Print what `measure(pipeline, pairs, seed=, batch_size=, **options)` says, and return the exit status.

    `marks` gives the files that it writes, as `outputs.prepare` takes them, unless it only prints. UsageError, before
    anything is measured, for a folder or device that does not exist, a file that would be lost, and bad weights.
    """
    try:
        pairs, device = find_pairs(args.lr, args.hr)[: args.limit], pick_device(args.device)
        if marks:
            outputs.prepare(args.out, marks(pairs), args.overwrite)
        pipeline = load_pipeline(args.weights, device, args.dtype)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    try:
        print(measure(pipeline, pairs, seed=args.seed, batch_size=args.batch_size, **options), end="")
    except (OSError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
