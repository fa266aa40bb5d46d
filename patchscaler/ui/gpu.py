"""All that needs the device, as one generator, which on a ZeroGPU Space runs in another process for a stated time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import spaces
import torch
from torch import Tensor

from patchscaler.images import Picture
from patchscaler.patches import PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.results import Restored, Sampled
from patchscaler.ui.calibration import Calibration
from patchscaler.ui.errors import explain
from patchscaler.ui.views import ByHand, work

# Seconds of a ZeroGPU device: the most that one call asks for, and what it asks for besides the work, since the
# first call in a process moves the weights to the device.
MOST_SECONDS = 120
START_SECONDS = 10
MARGIN = 2  # a call that outlasts its seconds is ended from outside
# Until runs have been measured: seconds per network evaluation of a patch, and per output pixel. Set high.
EVALUATION_SECONDS, PIXEL_SECONDS = 1e-3, 1e-6


@dataclass(frozen=True)
class Order:
    """What a run is to do."""

    source: str
    plan: SamplingPlan
    seed: int
    by_hand: ByHand
    color_fix: bool = True
    batch_size: int | None = None  # what suits the device
    uniform: bool = False  # also render the baseline
    live: bool = True  # for the page: take over what is known, and give the picture after every group
    refine: bool = True  # or end with the analysis


class Baseline(NamedTuple):
    """An event of the uniform baseline's run, which follows the plan's."""

    event: Any


def zero_gpu() -> bool:
    """Whether devices are lent for stated seconds, which count against the visitor."""
    return bool(spaces.config.Config.zero_gpu)


class Networks:
    """`run` is the generator, behind `spaces.GPU`: off ZeroGPU that is the same function.

    There what goes in and out is pickled. ZeroGPU keeps a process for every decorated function, so there is one
    for all kinds of work.
    """

    def __init__(self, pipeline: PatchScalerPipeline, calibration: Calibration) -> None:
        self._pipeline = pipeline
        self._calibration = calibration
        self.run = spaces.GPU(self.here, duration=self.seconds)

    def here(
        self,
        order: Order | Tensor,
        known: Picture | Restored | None = None,
        earlier: Sampled | None = None,
        uniform: Sampled | None = None,
    ) -> Iterator[Any]:
        """Yield the Analysis and the sheet of priors of a Picture, and then the events of its refinement.

        `earlier` and `uniform` are patches of the last runs of the plan and of the baseline. For a Tensor, the
        latents of priors, it gives their images. Errors are made visible here: ZeroGPU hands on no others.
        """
        try:
            if isinstance(order, Tensor):
                yield self._pipeline.decode_priors(order)
            else:
                yield from self._ordered(order, known, earlier, uniform)
        except Exception as error:
            raise explain(error) from error

    def _ordered(
        self, order: Order, known: Picture | Restored, earlier: Sampled | None, uniform: Sampled | None
    ) -> Iterator[Any]:
        if isinstance(known, Picture):
            known = self._pipeline.analyze(known, order.batch_size)
            yield known
            yield self._pipeline.draw_priors(known)
        if not order.refine:
            return
        common = {"seed": order.seed, "batch_size": order.batch_size, "color_fix": order.color_fix}
        for event in self._pipeline.refine(
            known, order.plan, **common, by_hand=order.by_hand, earlier=earlier, partial=order.live
        ):
            yield event
        if order.uniform:
            done = event.sampled if uniform is None or uniform.seed != order.seed else uniform
            for event in self._pipeline.refine(known, SamplingPlan.uniform(), **common, earlier=done):
                yield Baseline(event)

    def seconds(
        self,
        order: Order | Tensor,
        known: Picture | Restored | None = None,
        earlier: Sampled | None = None,
        uniform: Sampled | None = None,
    ) -> int:
        """For how long `here` with these arguments may need the device, from what runs on it took before.

        The patches of a Picture are not grouped yet: they count as hard ones, the dearest, and a picture is counted
        for every group.
        """
        if isinstance(order, Tensor):
            return START_SECONDS
        picture = known if isinstance(known, Picture) else known.picture
        height, width = SCALE * picture.height, SCALE * picture.width
        expected = 0.0
        if isinstance(known, Picture):
            analysis = self._calibration.analysis_seconds(height * width)
            expected += height * width * PIXEL_SECONDS if analysis is None else analysis
            count = len(PatchGrid.covering(height, width, self._pipeline.transformer.config.size))
            groups = torch.full((count,), len(GROUPS) - 1)
        else:
            groups = assign(known.patch_confidence, order.plan, order.by_hand)
        runs = [(order.plan, earlier, order.live)] * order.refine
        runs += [(SamplingPlan.uniform(), uniform, False)] * order.uniform
        for plan, done, partial in runs:
            todo = work(done, plan, order.seed, groups, order.batch_size or self._calibration.at_once)
            if isinstance(known, Picture):  # any group may turn out to have patches
                todo = todo._replace(calls=todo.calls + sum(plan.steps[:-1]), pictures=len(GROUPS))
            pictures = todo.pictures if partial else 1
            refined = self._calibration.seconds(todo.evaluations, height * width, todo.calls, pictures)
            if refined is None:
                refined = todo.evaluations * EVALUATION_SECONDS + pictures * height * width * PIXEL_SECONDS
            expected += refined
        return min(MOST_SECONDS, math.ceil(START_SECONDS + MARGIN * expected))
