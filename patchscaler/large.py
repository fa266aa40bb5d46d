"""Pictures of any size, from top to bottom: memory is that of a band, and the pixels are those of a whole run.

They may be written as tiled TIFF while they are made.

Each stage makes the rows that the next one asks for, and drops those that are no longer needed.
C channels, H W pixels of the upscaled picture, h w latents, N patches, R rows, V patch side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tifffile import TiffWriter
from torch import Tensor

from patchscaler.color import REACH, colored
from patchscaler.device import Stopwatch, out_of_memory_errors
from patchscaler.images import FORMATS, Picture, bicubic, to_pil, written_whole
from patchscaler.limits import OUTPUT_PER_INPUT, Limits
from patchscaler.patches import LATENT_PIXELS, Patch, PatchGrid, blend
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.results import STAGES, GroupReport, describe_run, require_finite
from patchscaler.sampling import Patches, make_batches, noise_generator
from patchscaler.tiles import Local

BAND = 64  # cells, of 8 pixels, that a stage makes at once; whole tiles of a file
PATCHES = 256  # at least as many are sampled at once, to fill batches
NOISE = 2**20  # values drawn at once
TIFF_TILE = 256  # pixels along the side of a tile of a file
MARGIN = 4  # rows of the input, more than bicubic interpolation looks away


class Rows:
    """Rows C×R×W of one stage. They are asked for from top to bottom, and those above are dropped."""

    def __init__(self, height: int, make: Callable[[int], Tensor]) -> None:
        """`make(first)` gives the rows from `first` on, as many as it likes, but at least one."""
        self.height = height
        self._make = make
        self._first = 0
        self._kept: Tensor | None = None

    def get(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, or what there are of them. `first` must not fall from call to call."""
        first, last = max(0, first), min(self.height, last)
        kept, end = [], self._first
        if self._kept is not None:
            kept, end = [self._kept], self._first + self._kept.shape[1]
        while end < last:
            kept.append(self._make(end))
            end += kept[-1].shape[1]
        self._kept = torch.cat(kept, dim=1)[:, first - self._first :].clone()
        self._first = first
        return self._kept[:, : last - first]


class Bands:
    """A picture upscaled x4 in bands of rows: iterate over it once, then ask for its `report`.

    The pixels are those of the pipeline called with the same arguments, but for the rounding of sums. Of the picture
    only the input is held in memory; the noise of the whole latent lies in a temporary file of C/16 bytes for each
    pixel.

    Raises ValueError for an autoencoder that sees the whole picture at once.
    """

    def __init__(
        self,
        pipeline: PatchScalerPipeline,
        picture: Picture,
        plan: SamplingPlan,
        seed: int = 0,
        batch_size: int | None = None,
        color_fix: bool = True,
    ) -> None:
        self.pipeline, self.picture, self.plan, self.seed = pipeline, picture, plan, seed
        self.color_fix = color_fix
        self.rgb, self.grey = picture.visible_rgb(), picture.is_grey()
        self.batch_size = pipeline.fitting_batch(batch_size)
        self.device = pipeline._execution_device
        self.channels = pipeline.transformer.config.channels
        self.height, self.width = SCALE * picture.height, SCALE * picture.width
        self.grid = PatchGrid.covering(self.height, self.width, pipeline.transformer.config.size)
        self.counts, self.spent = torch.zeros(len(GROUPS), dtype=torch.long), torch.zeros(len(GROUPS))
        self.clock = Stopwatch(self.device)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[np.ndarray]:
        """Bands R×W×3 or R×W×4 of 8 bits. Raises OutOfMemory and, for NaN, RuntimeError."""
        with out_of_memory_errors(self.device), TemporaryFile() as noise:
            self._draw(noise)
            upscaled = Rows(LATENT_PIXELS * self.grid.height, self._upscaled)
            encoded = self._stage("encode", self.pipeline.encoding, upscaled, 3)
            restored = self._stage("restore", self.pipeline.restoring, encoded, self.channels)
            sampled = self._sampled(restored, noise)
            refined = Rows(self.grid.height, lambda first: next(sampled))
            decoded = self._stage("decode", self.pipeline.decoding, refined, self.channels)
            reference = Rows(LATENT_PIXELS * self.grid.height, self._upscaled)  # far behind the first
            step = LATENT_PIXELS * BAND
            for top in range(0, self.height, step):
                yield self._finished(top, min(top + step, self.height), decoded, reference)

    def report(self) -> dict:
        """As that of a Result."""
        counts, spent = self.counts.tolist(), self.spent.tolist()
        evaluations = [steps * count for steps, count in zip(self.plan.steps, counts)]
        groups = [*map(GroupReport, GROUPS, counts, self.plan.start, self.plan.steps, evaluations, spent)]
        dtype = str(self.pipeline.transformer.dtype).removeprefix("torch.")
        seconds = {name: self.clock.seconds[name] for name in STAGES}
        return describe_run(self.plan, self.seed, self.color_fix, str(self.device), dtype, groups, seconds)

    def _upscaled(self, first: int) -> Tensor:
        """Rows of the bicubic picture, filled up to the size of the grid: 3×R×8w."""
        last = min(first + LATENT_PIXELS * BAND, LATENT_PIXELS * self.grid.height)
        rows = _bicubic_rows(self.rgb.to(self.device), min(first, self.height - 1), min(last, self.height))
        beyond = (0, LATENT_PIXELS * self.grid.width - self.width, 0, last - first - rows.shape[1])
        return F.pad(rows, beyond, mode="replicate")

    def _stage(self, name: str, local: Local, source: Rows, channels: int) -> Rows:
        """What a network makes of the rows of another stage, of `channels`, with those around them that it sees."""
        reach = local.reach(channels, self.device)
        if reach is None:
            raise ValueError(f"{type(local.network).__name__} sees the whole picture; it cannot {name} it in bands")

        def make(begin: int) -> Tensor:
            first = begin // local.after
            last = min(first + BAND, self.grid.height)
            above, below = max(0, first - reach), min(self.grid.height, last + reach)
            values = source.get(above * local.before, below * local.before)
            self.clock.lap()  # the stages before have counted theirs
            rows = self.pipeline.by_tiles(local, values[None])[0]
            require_finite(f"the result of the stage {name}", rows)
            self.clock.lap(name)
            return rows[:, (first - above) * local.after : (last - above) * local.after]

        return Rows(self.grid.height * local.after, make)

    def _sampled(self, restored: Rows, noise: BinaryIO) -> Iterator[Tensor]:
        """Refine some rows of patches at a time, and give those rows C×R×w of the latent that no later patch covers."""
        columns = len({patch.left for patch in self.grid.patches})
        most = columns * -(-PATCHES // columns)
        sums = torch.zeros(self.channels + 1, 0, self.grid.width, device=self.device)  # the last is that of the weights
        for begin in range(0, len(self.grid), most):
            patches = self.grid.patches[begin : begin + most]
            top, bottom = patches[0].top, patches[-1].top + self.grid.size
            end = self.grid.patches[begin + most].top if begin + most < len(self.grid) else bottom
            window = restored.get(top, bottom)
            x0 = self._sample(patches, window, self._noise(noise, top, bottom))
            sums = F.pad(sums, (0, 0, 0, bottom - top - sums.shape[1]))  # after the rows that earlier patches cover
            blend(patches, x0, sums[:-1], sums[-1], top)
            yield sums[:-1, : end - top] / sums[-1, : end - top]
            sums = sums[:, end - top :]

    def _sample(self, patches: tuple[Patch, ...], restored: Tensor, noise: Tensor) -> Tensor:
        """x0 N×C×V×V of patches in a window of the restored latent and confidence, (C+1)×R×w, and its noise C×R×w."""
        top = patches[0].top

        def cut(values: Tensor) -> Tensor:
            return torch.stack([patch.cells(values, top) for patch in patches])

        self.clock.lap()
        y0, confidence = cut(restored).split([self.channels, 1], dim=1)  # N×C×V×V, N×1×V×V
        assignment = assign(confidence.mean((1, 2, 3)).cpu(), self.plan)  # N
        _, prompt = self.pipeline.prompt(y0, self.batch_size)
        self.clock.lap("retrieve")
        x0 = torch.empty_like(y0)
        task = Patches(y0, cut(noise).to(y0.device), prompt, x0, seconds=torch.zeros(len(patches)))
        for _ in self.pipeline.sample(task, make_batches(assignment, self.plan, self.batch_size)):
            pass
        self.spent.index_add_(0, assignment, task.seconds)
        self.counts += assignment.bincount(minlength=len(GROUPS))
        self.clock.lap("refine")
        return x0

    def _finished(self, top: int, bottom: int, pictures: Rows, reference: Rows) -> np.ndarray:
        above, below = max(0, top - REACH), min(self.height, bottom + REACH)
        decoded, upscaled = (rows.get(above, below)[..., : self.width] for rows in (pictures, reference))
        self.clock.lap()
        rgb = colored(decoded, upscaled, self.color_fix, self.grey)[:, top - above : bottom - above]
        alpha = self.picture.alpha
        if alpha is not None:
            alpha = _bicubic_rows(alpha, top, bottom).clamp(0, 1)
        self.clock.lap("color")
        return np.asarray(to_pil(Picture(rgb, alpha)))

    def _draw(self, file: BinaryIO) -> None:
        """The noise of a whole run, C×h×w float32. Drawn in pieces, which are multiples of 16, it is the same."""
        generator = noise_generator(self.seed)
        left = self.channels * self.grid.height * self.grid.width
        while left:
            count = left if left < 2 * NOISE else NOISE
            file.write(torch.randn(count, generator=generator).numpy())
            left -= count

    def _noise(self, file: BinaryIO, first: int, last: int) -> Tensor:
        """Rows of the noise: C×R×w."""
        rows = np.empty((self.channels, last - first, self.grid.width), np.float32)
        for channel, values in enumerate(rows):
            file.seek(values.itemsize * self.grid.width * (channel * self.grid.height + first))
            file.readinto(values)
        return torch.from_numpy(rows)


def _bicubic_rows(image: Tensor, first: int, last: int) -> Tensor:
    """Rows of a picture C×H×W upscaled x4: C×R×4W."""
    top = max(0, first // SCALE - MARGIN)
    rows = bicubic(image[None, :, top : -(-last // SCALE) + MARGIN], SCALE)[0]
    return rows[:, first - SCALE * top : last - SCALE * top]


def is_large(source: Path) -> bool:
    """Whether a picture is too large to be held upscaled, according to its header."""
    try:
        with Image.open(source, formats=FORMATS) as image:
            pixels = image.width * image.height
    except Exception:  # whatever it is, reading it will say so
        return False
    limits = Limits.from_environment()
    return pixels > limits.input_pixels or OUTPUT_PER_INPUT * pixels > limits.output_pixels


def write_tiff(
    bands: Iterable[np.ndarray], path: str | Path, shape: tuple[int, int, int], description: str = ""
) -> Path:
    """Write bands of rows R×W×S of 8 bits, from top to bottom, as one TIFF of H×W×S, and return its path.

    S is 3 for RGB or 4 for RGBA. R is a multiple of TIFF_TILE, but for the last band. Tiles are compressed without
    loss; above 2 GB the file is a BigTIFF. It appears whole or not at all. Whatever `bands` raise ends the writing.
    """
    path, big = Path(path), np.prod(shape, dtype=np.int64) > 2**31
    with written_whole(path) as place, TiffWriter(place, bigtiff=big) as file:
        file.write(
            _tiles(bands, shape[1]),
            shape=shape,
            dtype=np.uint8,
            tile=(TIFF_TILE, TIFF_TILE),
            photometric="rgb",
            extrasamples=["unassalpha"] if shape[2] == 4 else None,
            compression="zlib",
            predictor=True,
            description=description,
            metadata=None,
            software="PatchScaler",
        )
    return path


def _tiles(bands: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Tiles from left to right and from top to bottom. Those at the right and the bottom are filled up with zeros."""
    for band in bands:
        for top in range(0, len(band), TIFF_TILE):
            for left in range(0, width, TIFF_TILE):
                tile = band[top : top + TIFF_TILE, left : left + TIFF_TILE]
                yield np.pad(tile, [(0, TIFF_TILE - tile.shape[0]), (0, TIFF_TILE - tile.shape[1]), (0, 0)])
