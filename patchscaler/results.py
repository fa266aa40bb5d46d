"""What the pipeline's methods return and yield. All of it is on the CPU and pickles.

N patches, C channels, H W pixels, h w latents, V patch side, L tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from patchscaler.images import Picture
from patchscaler.patches import PatchGrid
from patchscaler.plan import SamplingPlan
from patchscaler.retrieval import Priors
from patchscaler.version import __version__

STAGES = ("encode", "restore", "retrieve", "refine", "decode", "color")


class NotFiniteError(RuntimeError):
    """The networks gave NaN or infinity; the message says where."""


def require_finite(name: str, values: Tensor) -> None:
    """Raise NotFiniteError, which calls them `name`, if values are NaN or infinite."""
    if not torch.isfinite(values).all():
        raise NotFiniteError(f"{name} has values that are NaN or infinite; try dtype=torch.float32")


@dataclass(frozen=True, eq=False)
class Restored:
    """What refinement needs of a picture, on the CPU in float32.

    H W are the sides of the upscaled picture; h w are those of the latent, whose 8h × 8w pixels may reach
    beyond H and W. `seconds` has encode, restore, retrieve and decode (of the coarse image).
    """

    picture: Picture
    latents: Tensor  # y0 C×h×w, the restored latent
    grid: PatchGrid
    patch_confidence: Tensor  # N in [0, 1], the mean over each patch
    prompt: Tensor | None  # N×L×D; None: refinement looks the priors up again
    bicubic: Tensor  # 3×H×W in [-1, 1]
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class Analysis(Restored):
    """All that is known of a picture before sampling, on the CPU in float32, so that it can be kept and sent."""

    confidence: Tensor  # 1×h×w in [0, 1]
    priors: Priors
    coarse: Tensor  # 3×H×W in [-1, 1]

    def restored(self) -> Restored:
        """The part that refinement needs, in less than half the bytes, for where they are sent."""
        return Restored(**{field.name: getattr(self, field.name) for field in fields(Restored)})


@dataclass(frozen=True)
class Progress:
    """One denoising step of one batch is done. `done` and `total` count evaluations, in patches."""

    group: int  # index into GROUPS
    step: int  # 1..steps
    steps: int
    patches: int  # in this batch
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Sampled:
    """Refined patches and how each was made, on the CPU: what a later run of the same image may take over."""

    patches: Tensor  # N×C×V×V, the x0 of every sampled patch; y0 where it is not sampled yet
    start: Tensor  # LongTensor N, T of each patch; 0 where it is not sampled yet
    steps: Tensor  # LongTensor N
    seed: int
    seconds: Tensor  # float32 N, each patch's share of what the sampling of its batch took, in whichever run that was

    def differs(self, start: Tensor, steps: Tensor, seed: int) -> Tensor:
        """Which patches would have to be sampled for these T, N and seed: BoolTensor N."""
        if seed != self.seed:
            return torch.ones(len(start), dtype=torch.bool)
        return (self.start != start) | (self.steps != steps)


@dataclass(frozen=True, eq=False)
class Partial:
    """The picture after `group` is finished: later groups' patches are coarse, or those of an earlier run."""

    group: int  # index into GROUPS
    picture: Picture
    sampled: Sampled


@dataclass(frozen=True)
class GroupReport:
    """What one group cost. `seconds` is time at work, of several devices the sum, without what the reader of the
    events took.

    `evaluations` counts those made in this run: patches taken from an earlier one need none.
    """

    name: str
    patches: int
    start: int
    steps: int
    evaluations: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Result:
    """The upscaled picture, on the CPU, and how it came about.

    `seconds` has encode, restore, retrieve, refine (by the clock, however many devices work), decode (coarse and
    final) and color; their sum is the time of the whole run, of which encode to the coarse decode come from the
    analysis.
    """

    picture: Picture
    plan: SamplingPlan
    seed: int
    assignment: Tensor  # LongTensor N, indices into GROUPS
    groups: list[GroupReport]
    seconds: dict[str, float]
    device: str
    dtype: str
    sampled: Sampled
    rendered: Tensor  # BoolTensor N, the patches sampled in this run
    color_fix: bool  # whether the colours are those of the input
    by_hand: dict[int, int] = field(default_factory=dict)  # patch -> group, where a person overrode Eq. 2

    def png_text(self) -> dict[str, str]:
        """What the lossless PNG carries in its text chunks, for `write_png`."""
        software = f"PatchScaler {__version__}"
        text = {"Software": software, "plan": self.plan.to_json(), "seed": str(self.seed)}
        if not self.color_fix:
            text["color_fix"] = "off"
        if self.by_hand:
            text["by_hand"] = json.dumps(self.by_hand)
        return text

    def report(self) -> dict:
        """Everything but the pixels, as values that JSON can hold."""
        return describe_run(self.plan, self.seed, self.color_fix, self.device, self.dtype, self.groups, self.seconds)


def describe_run(
    plan: SamplingPlan,
    seed: int,
    color_fix: bool,
    device: str,
    dtype: str,
    groups: Sequence[GroupReport],
    seconds: dict[str, float],
) -> dict:
    """A run as values that JSON can hold."""
    return {
        "version": __version__,
        "plan": asdict(plan),
        "seed": seed,
        "color_fix": color_fix,
        "device": device,
        "dtype": dtype,
        "groups": [asdict(group) for group in groups],
        "stages": seconds,
    }
