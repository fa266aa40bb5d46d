"""The file in which `/analyze` hands what it found to a client, who hands it back: safetensors, never a pickle.

It holds the input's pixels, the restored latent, its confidence and the patches', and a small grey picture for the
overlay: what the networks computed or what cannot be had again. A client can alter the file, so everything in it is
checked on the way back.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, Json, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchscaler.figures import preview_size
from patchscaler.images import OUTPUT_PER_INPUT, Limits, Picture, bicubic
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.results import Analysis, Restored

FORMAT = "PatchScaler analysis 2"
ANALYSIS_STAGES = ("encode", "restore", "retrieve", "decode")
MAX_LATENT = 1000.0  # latents have a deviation of about 1
MAX_SECONDS = 1e6
MAX_NOTES, NOTE_LENGTH = 8, 200  # `Picture.notes` are a few short sentences
WRONG = "This is not an analysis file from /analyze"


class AnalysisFileError(ValueError):
    """A file that is refused; the message names what is wrong with it and can be shown to a client."""


class Loaded(NamedTuple):
    """What a file says."""

    picture: Picture
    latents: Tensor  # C×h×w
    confidence: Tensor  # 1×h×w
    grid: PatchGrid
    patch_confidence: Tensor  # N
    grey: Image.Image  # the image under the overlay's colours
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
    """Write `path`, with the grey image for the overlay and the `fingerprint` of the weights in it."""
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
            facts = Facts.model_validate(file.metadata() or {})
            if facts.weights != weights:
                raise AnalysisFileError("The analysis was made with other weights. Run /analyze again.")
            headers = {name: _header(file, name) for name in file.keys()}
            grid, parts = _parts(headers, pipeline)
            tensors = {name: file.get_tensor(name) for name in parts}
    except ValidationError as error:
        first = error.errors()[0]
        place, found = ".".join(map(str, first["loc"])), str(first["input"])[:40]
        raise AnalysisFileError(f"{WRONG}: its metadata {place} is {found!r}: {first['msg']}") from error
    except (SafetensorError, OSError) as error:
        raise AnalysisFileError(f"{WRONG}: {str(error)[:120]}") from error
    for name, part in parts.items():
        values = tensors[name]
        if not ((values >= part.low) & (values <= part.high)).all():  # nor is NaN between them
            found = f"from {values.min().item():g} to {values.max().item():g}"
            raise AnalysisFileError(f"{WRONG}: {name} goes {found}; the limits are {part.low:g} and {part.high:g}")
    return Loaded(
        picture=Picture(tensors["rgb"], tensors.get("alpha"), tuple(facts.notes)),
        latents=tensors["latents"],
        confidence=tensors["confidence"],
        grid=grid,
        patch_confidence=tensors["patch_confidence"],
        grey=Image.fromarray(tensors["grey"].numpy()).convert("RGB"),
        seconds=facts.seconds,
    )


Seconds = Annotated[float, Field(strict=True, ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Note = Annotated[str, Field(max_length=NOTE_LENGTH)]


class Facts(BaseModel, extra="forbid"):
    """The file's metadata, each of them JSON."""

    format: Json[Literal[FORMAT]]
    weights: Json[str]  # their fingerprint
    seconds: Json[Annotated[dict[Literal[ANALYSIS_STAGES], Seconds], Field(min_length=len(ANALYSIS_STAGES))]]
    notes: Json[Annotated[list[Note], Field(max_length=MAX_NOTES)]]


class Part(NamedTuple):
    """What a tensor of the file must be: its type and shape, and the limits of its values."""

    kind: str
    shape: tuple[int, ...]
    low: float
    high: float


def _header(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor, without its values."""
    part = file.get_slice(name)
    return part.get_dtype(), tuple(part.get_shape())


def _parts(
    headers: dict[str, tuple[str, tuple[int, ...]]], pipeline: PatchScalerPipeline
) -> tuple[PatchGrid, dict[str, Part]]:
    """The grid, and what every tensor must be: all sizes follow from that of the input, and that one has limits."""
    rgb = headers.get("rgb", ("", ()))[1]
    if len(rgb) != 3 or min(rgb) < 1:
        raise AnalysisFileError(f"{WRONG}: rgb has shape {rgb}, not 3×H×W")
    height, width = rgb[1:]
    limits = Limits.from_environment()
    most = min(limits.input_pixels, limits.output_pixels // OUTPUT_PER_INPUT)
    if height * width > most:
        raise AnalysisFileError(f"{width}×{height} is {height * width:,} pixels; the limit is {most:,}")
    config = pipeline.transformer.config
    grid = PatchGrid.covering(SCALE * height, SCALE * width, config.size)
    parts = {
        "rgb": Part("F32", (3, height, width), -1, 1),
        "latents": Part("F32", (config.channels, grid.height, grid.width), -MAX_LATENT, MAX_LATENT),
        "confidence": Part("F32", (1, grid.height, grid.width), 0, 1),
        "patch_confidence": Part("F32", (len(grid),), 0, 1),
        "grey": Part("U8", preview_size(SCALE * width, SCALE * height)[::-1], 0, 255),
    }
    if "alpha" in headers:
        parts["alpha"] = Part("F32", (1, height, width), 0, 1)
    if headers.keys() != parts.keys():
        raise AnalysisFileError(f"{WRONG}: it holds {sorted(headers)[:8]}, not {sorted(parts)}")
    for name, part in parts.items():
        if headers[name] != part[:2]:
            found, wanted = (f"{kind} {'×'.join(map(str, shape))}" for kind, shape in (headers[name], part[:2]))
            raise AnalysisFileError(f"{WRONG}: {name} is {found}, not {wanted}")
    return grid, parts
