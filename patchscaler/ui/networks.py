"""What the page runs on the device, as one generator that on ZeroGPU asks for a GPU, and the seconds it may take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import spaces
import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from patchscaler.images import Picture
from patchscaler.models import decode_latents
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign, times_and_steps
from patchscaler.results import Analysis, Restored, Sampled
from patchscaler.ui.html import explained

REMEMBERED = 8  # runs; the machine's load changes, so old ones are forgotten
FADING = 0.85  # weight of a measurement against the next one


@dataclass(frozen=True)
class RunRequest:
    """What a run is to do."""

    source: str
    plan: SamplingPlan
    seed: int
    by_hand: dict[int, int]  # patch -> group
    color_fix: bool = True
    batch_size: int | None = None  # what suits the device
    live: bool = True  # for the page: take over what the visitor has, and give the picture after every group
    refine: bool = True  # or end with the analysis
    session: str | None = None  # the visitor's


class Call(NamedTuple):
    """The sampling of one group: calls of the network, the patches that these took in all, and how long it took."""

    calls: int
    evaluations: int
    seconds: float


class Work(NamedTuple):
    """What a run has to do. Numbers, or tensors for many runs at once."""

    evaluations: Any  # of the network, counted in patches
    calls: Any = 0  # of the network, each with a batch of patches
    pictures: Any = 1  # decoded


class Calibration:
    """Rates of this machine: seconds per call of Patch-DiT and more per patch in it; for all else, per output pixel of
    each picture, and more per pixel of the last.

    A call with few patches costs more per patch, and the last picture, which is finished and saved without loss, more
    than those of the groups before it. So different groups and runs tell the rates apart.
    """

    def __init__(self, at_once: int = 64) -> None:
        """`at_once`: patches in a call unless another number is chosen."""
        self.at_once = at_once
        self._groups: deque[Call] = deque(maxlen=3 * REMEMBERED)
        self._rest: deque[tuple[int, int, float]] = deque(maxlen=REMEMBERED)
        self._analysis: deque[float] = deque(maxlen=REMEMBERED)
        self._rates: tuple[float, float] | None = None
        self._rest_rates = (0.0, 0.0)

    def learn(self, groups: Iterable[Call], pixels: int, rest: float, pictures: int = 1) -> None:
        """Take in a finished run: its groups, and the seconds of all else but the analysis, for its pictures."""
        self._groups.extend(group for group in groups if group.evaluations and group.seconds > 0)
        if rest > 0:
            self._rest.append((pictures * pixels, pixels, rest))
        if self._groups:
            self._rates = _fit(np.array(self._groups))
        if self._rest:
            self._rest_rates = _fit(np.array(self._rest))

    def learn_analysis(self, pixels: int, seconds: float) -> None:
        self._analysis.append(seconds / pixels)

    def work(self, request: RunRequest, assignment: Tensor, earlier: Sampled | None = None) -> tuple[Work, int]:
        """What a requested run has to do after `earlier`, with the patches in these groups; how many it samples."""
        plan, seed, batch_size = request.plan, request.seed, request.batch_size or self.at_once
        start, steps = times_and_steps(plan, assignment)
        to_sample = torch.ones(len(steps), dtype=torch.bool) if earlier is None else earlier.differs(start, steps, seed)
        groups = assignment[to_sample].bincount(minlength=len(GROUPS)).tolist()
        calls = sum(n * -(-count // batch_size) for n, count in zip(plan.steps, groups))
        pictures = max(1, sum(count > 0 for count in groups)) if request.live else 1
        return Work(int(steps[to_sample].sum()), calls, pictures), sum(groups)

    def seconds(self, work: Work, pixels: int) -> Any:
        """What that is expected to take over a known analysis, or None before the first run."""
        if self._rates is None:
            return None
        each, last = self._rest_rates
        sampling = work.calls * self._rates[0] + work.evaluations * self._rates[1]
        return sampling + pixels * (work.pictures * each + last)

    def analysis_seconds(self, pixels: int) -> float | None:
        """What an analysis is expected to take, by the pixels of the output, or None before the first."""
        return pixels * median(self._analysis) if self._analysis else None


def _fit(measured: np.ndarray) -> tuple[float, float]:
    """Seconds for one of each of two kinds of work, neither below 0, with the least squared relative error.

    `measured` M×3 has the amounts of both and the seconds, the latest last, which weighs most. Relative, so that what
    took long does not outweigh the others.
    """
    weights = FADING ** np.arange(len(measured))[::-1]
    work = weights[:, None] * measured[:, :2] / measured[:, 2:]
    both = np.linalg.lstsq(work, weights, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [(column @ weights) / (column @ column) for column in work.T]
    errors = [np.square(column * rate - weights).sum() for column, rate in zip(work.T, alone)]
    return (float(alone[0]), 0.0) if errors[0] < errors[1] else (0.0, float(alone[1]))


# Seconds of a ZeroGPU device: the most that one call asks for, and what it asks for besides the work, since the
# first call in a process moves the weights to the device.
MAX_GPU_SECONDS = 120
START_SECONDS = 5
MARGIN = 2  # a call that outlasts its seconds is ended from outside
# Until runs have been measured: seconds per network evaluation of a patch, and per output pixel. Those of a GPU with a
# fifth of an H100's speed: a first call asks for about as much as later ones, so that a small quota is enough for it.
EVALUATION_SECONDS, PIXEL_SECONDS = 2e-4, 2e-7


def zero_gpu() -> bool:
    """Whether GPUs are allocated for stated seconds, which count against the visitor."""
    return bool(spaces.config.Config.zero_gpu)


class Networks:
    """`run` is the generator, behind `spaces.GPU`: off ZeroGPU that is the same function.

    There what goes in and out is pickled. ZeroGPU keeps a process for every decorated function, so there is one
    for all kinds of work.
    """

    def __init__(self, pipeline: PatchScalerPipeline, calibration: Calibration, gpu_on_demand: bool = True) -> None:
        self._pipeline = pipeline
        self._calibration = calibration
        self._vae, self._memory = _on_cpu(pipeline.vae), _on_cpu(pipeline.texture_memory)
        self.run = spaces.GPU(self.here, duration=self.seconds) if gpu_on_demand else self.here

    @torch.inference_mode()
    def prior_images(self, indices: Tensor) -> Tensor:
        """Images K×3×H×W in [-1, 1] of K rows of the texture memory: on the CPU, so no GPU is asked or waited for."""
        return decode_latents(self._vae, self._memory.patches(indices))

    def draw_priors(self, analysis: Analysis) -> Image.Image:
        """The sheet of the pipeline; on the CPU."""
        return self._pipeline.draw_priors(analysis, prior_images=self.prior_images)

    def here(self, request: RunRequest, known: Picture | Restored, earlier: Sampled | None = None) -> Iterator[Any]:
        """Yield the Analysis of a Picture, and then the events of the refinement.

        `earlier` are patches of it to take over. Errors are made visible here: ZeroGPU passes on no others.
        """
        with explained():
            if isinstance(known, Picture):
                known = self._pipeline.analyze(known, request.batch_size)
                # From another process the prompt, which is most of the bytes, is not sent: refinement makes it again.
                yield replace(known, prompt=None) if zero_gpu() else known
            if request.refine:
                settings = request.plan, request.seed, request.batch_size, request.color_fix, request.by_hand
                yield from self._pipeline.refine(known, *settings, earlier, partial=request.live)

    def seconds(self, request: RunRequest, known: Picture | Restored, earlier: Sampled | None = None) -> int:
        """For how long `here` with these arguments may need the device, from what runs on it took before.

        The patches of a Picture are not grouped yet: they count as hard ones, which cost most, and a picture is
        counted for every group.
        """
        picture = known if isinstance(known, Picture) else known.picture
        height, width = SCALE * picture.height, SCALE * picture.width
        pixels, expected = height * width, 0.0
        if isinstance(known, Picture):
            analysis = self._calibration.analysis_seconds(pixels)
            expected += pixels * PIXEL_SECONDS if analysis is None else analysis
            count = len(PatchGrid.covering(height, width, self._pipeline.transformer.config.size))
            groups = torch.full((count,), len(GROUPS) - 1)
        else:
            groups = assign(known.patch_confidence, request.plan, request.by_hand)
        if request.refine:
            work, _ = self._calibration.work(request, groups, earlier)
            if isinstance(known, Picture):  # any group may turn out to have patches
                pictures = len(GROUPS) if request.live else 1
                work = work._replace(calls=work.calls + sum(request.plan.steps[:-1]), pictures=pictures)
            refined = self._calibration.seconds(work, pixels)
            if refined is None:
                refined = work.evaluations * EVALUATION_SECONDS + work.pictures * pixels * PIXEL_SECONDS
            expected += refined
        return min(MAX_GPU_SECONDS, math.ceil(START_SECONDS + MARGIN * expected))


def _on_cpu(model: ModelMixin) -> ModelMixin:
    """The model itself if it is on the CPU, else a float32 copy there."""
    if model.device.type == "cpu":
        return model
    copy = type(model).from_config(model.config)
    copy.load_state_dict({name: values.cpu() for name, values in model.state_dict().items()})
    return copy.eval()
