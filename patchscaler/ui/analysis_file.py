"""The file in which `/analyze` hands what it found to a client, who hands it back: safetensors, never a pickle.

It holds the input's pixels, the restored latent, its confidence and the patches', and a small grey picture for the
overlay: what the networks computed or what cannot be had again. A client can alter the file, so everything in it is
checked on the way back.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchscaler.figures import preview_size
from patchscaler.images import OUTPUT_PER_INPUT, Limits, Picture, bicubic
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.results import Analysis, Restored

FORMAT = "PatchScaler analysis 2"
STAGES = ("encode", "restore", "retrieve", "decode")
MOST_LATENT = 1000.0  # latents have a deviation of about 1
MOST_SECONDS = 1e6
MOST_NOTES, NOTE_LENGTH = 8, 200  # `Picture.notes` are a few short sentences
WRONG = "This is no analysis file that /analyze gave"


class AnalysisFileError(ValueError):
    """A file that is refused; the message names what is wrong with it and can be shown to a client."""


class Loaded(NamedTuple):
    """What a file says."""

    picture: Picture
    latents: Tensor  # Cxhxw
    confidence: Tensor  # 1xhxw
    grid: PatchGrid
    patch_confidence: Tensor  # N
    grey: Image.Image  # the ground of the overlay
    seconds: dict[str, float]

    def restored(self) -> Restored:
        """The same for refinement, which looks the priors up again: that takes a fiftieth of its time."""
        upscaled = bicubic(self.picture.visible_rgb()[None], SCALE)[0]
        found = self.latents, self.grid, self.patch_confidence
        return Restored(self.picture, *found, None, upscaled, self.seconds)


def fingerprint(pipeline: PatchScalerPipeline) -> str:
    """A hash of the weights that make an analysis: with others, its latent would mean something else."""
    digest = hashlib.sha256()
    for model in (pipeline.vae, pipeline.grm):
        for name, values in sorted(model.state_dict().items()):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_analysis(analysis: Analysis, grey: Image.Image, weights: str, path: Path) -> Path:
    """Write `path`, with the ground of the overlay and the `fingerprint` of the weights in it."""
    picture = analysis.picture
    tensors = {
        "rgb": picture.rgb,
        "latents": analysis.latents,
        "confidence": analysis.confidence,
        "patch_confidence": analysis.patch_confidence,
        "grey": torch.from_numpy(np.array(grey.convert("L"))),
    }
    if picture.alpha is not None:
        tensors["alpha"] = picture.alpha
    facts = {"format": FORMAT, "weights": weights, "seconds": analysis.seconds, "notes": picture.notes}
    save_file(
        {name: values.contiguous() for name, values in tensors.items()},
        path,
        {name: json.dumps(value) for name, value in facts.items()},
    )
    return path


def read_analysis(path: str | Path, pipeline: PatchScalerPipeline, weights: str) -> Loaded:
    """The inverse of `write_analysis`, for a pipeline and its `fingerprint`.

    Sizes are checked against the environment's limits before any tensor is read. Raises AnalysisFileError for
    whatever does not belong, naming the value and the limit.
    """
    try:
        with safe_open(path, "pt") as file:
            seconds, notes = _facts(file.metadata() or {}, weights)
            shapes = {name: _header(file, name) for name in file.keys()}
            grid = _check_shapes(shapes, pipeline)
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise AnalysisFileError(f"{WRONG}: {str(error)[:120]}") from error
    _check_range("rgb", tensors["rgb"], -1, 1)
    _check_range("latents", tensors["latents"], -MOST_LATENT, MOST_LATENT)
    for name in ("confidence", "patch_confidence"):
        _check_range(name, tensors[name], 0, 1)
    if "alpha" in tensors:
        _check_range("alpha", tensors["alpha"], 0, 1)
    return Loaded(
        picture=Picture(tensors["rgb"], tensors.get("alpha"), notes),
        latents=tensors["latents"],
        confidence=tensors["confidence"],
        grid=grid,
        patch_confidence=tensors["patch_confidence"],
        grey=Image.fromarray(tensors["grey"].numpy()).convert("RGB"),
        seconds=seconds,
    )


def _facts(metadata: dict[str, str], weights: str) -> tuple[dict[str, float], tuple[str, ...]]:
    """Seconds and notes, once the file is known to be one of ours, for these weights."""
    names = {"format", "weights", "seconds", "notes"}
    if metadata.keys() != names:
        raise AnalysisFileError(f"{WRONG}: its metadata are {sorted(metadata)[:8]}, not {sorted(names)}")
    try:
        facts = {name: json.loads(text) for name, text in metadata.items()}
    except (ValueError, RecursionError) as error:
        raise AnalysisFileError(f"{WRONG}: its metadata are no JSON") from error
    if facts["format"] != FORMAT:
        raise AnalysisFileError(f"The file's format is {str(facts['format'])[:40]!r}; it must be {FORMAT!r}")
    if facts["weights"] != weights:
        raise AnalysisFileError("The analysis was made with other weights. Run /analyze again.")
    seconds, notes = facts["seconds"], facts["notes"]
    if not isinstance(seconds, dict) or seconds.keys() != set(STAGES) or not all(map(_is_time, seconds.values())):
        raise AnalysisFileError(f"{WRONG}: its seconds are not one number for each of {', '.join(STAGES)}")
    if not isinstance(notes, list) or len(notes) > MOST_NOTES or not all(map(_is_note, notes)):
        raise AnalysisFileError(f"{WRONG}: its notes are not at most {MOST_NOTES} texts of {NOTE_LENGTH} letters")
    return {stage: float(seconds[stage]) for stage in STAGES}, tuple(notes)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST_SECONDS


def _is_note(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= NOTE_LENGTH


def _header(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor, without its values."""
    part = file.get_slice(name)
    return part.get_dtype(), tuple(part.get_shape())


def _check_shapes(shapes: dict[str, tuple[str, tuple[int, ...]]], pipeline: PatchScalerPipeline) -> PatchGrid:
    """All sizes follow from that of the input, and that one has limits. Returns the grid."""
    rgb = shapes.get("rgb", ("", ()))[1]
    if len(rgb) != 3 or min(rgb) < 1:
        raise AnalysisFileError(f"{WRONG}: rgb has shape {rgb}, not 3xHxW")
    height, width = rgb[1:]
    limits = Limits.from_environment()
    most = min(limits.input_pixels, limits.output_pixels // OUTPUT_PER_INPUT)
    if height * width > most:
        raise AnalysisFileError(f"{width}×{height} is {height * width:,} pixels; the limit is {most:,}")
    config = pipeline.transformer.config
    grid = PatchGrid.covering(SCALE * height, SCALE * width, config.size)
    expected = {
        "rgb": ("F32", (3, height, width)),
        "latents": ("F32", (config.channels, grid.height, grid.width)),
        "confidence": ("F32", (1, grid.height, grid.width)),
        "patch_confidence": ("F32", (len(grid),)),
        "grey": ("U8", preview_size(SCALE * width, SCALE * height)[::-1]),
    }
    if "alpha" in shapes:
        expected["alpha"] = ("F32", (1, height, width))
    if shapes.keys() != expected.keys():
        raise AnalysisFileError(f"{WRONG}: it holds {sorted(shapes)[:8]}, not {sorted(expected)}")
    for name, wanted in expected.items():
        if shapes[name] != wanted:
            found, wanted = (f"{kind} {'x'.join(map(str, shape))}" for kind, shape in (shapes[name], wanted))
            raise AnalysisFileError(f"{WRONG}: {name} is {found}, not {wanted}")
    return grid


def _check_range(name: str, values: Tensor, low: float, high: float) -> None:
    if not ((values >= low) & (values <= high)).all():  # nor is NaN between them
        found = f"from {values.min().item():g} to {values.max().item():g}"
        raise AnalysisFileError(f"{WRONG}: {name} goes {found}; the limits are {low:g} and {high:g}")
