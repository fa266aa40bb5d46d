"""Patch-adaptive Group Sampling: which patches are simple, medium or hard, and what each group is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from torch import Tensor

GROUPS = ("simple", "medium", "hard")
MAX_TIMESTEP = 1000  # of the diffusion


def _check_group_values(name: str, values: tuple[int, ...], limits: tuple[int, ...]) -> None:
    if not isinstance(values, tuple) or len(values) != len(GROUPS):
        raise ValueError(f"{name}={values!r} is not a tuple of {len(GROUPS)} whole numbers")
    for group, value, limit in zip(GROUPS, values, limits, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ValueError(f"{name}={value!r} of the {group} group is not a whole number in 1..{limit}")
    if list(values) != sorted(values):
        raise ValueError(f"{name}={values} falls from simple to hard")


@dataclass(frozen=True)
class SamplingPlan:
    """Confidence thresholds and, per group from simple to hard, where sampling starts and in how many steps.

    1 >= gamma1 > gamma2 >= 0; `start` (the T_i of the paper) lies in 1..1000 and `steps` (N_i) in
    1..T_i; neither may fall from simple to hard. Anything else raises ValueError.
    """

    gamma1: float
    gamma2: float
    start: tuple[int, int, int]
    steps: tuple[int, int, int]

    def __post_init__(self) -> None:
        for name in ("gamma1", "gamma2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is not a number in [0, 1]")
        if self.gamma1 <= self.gamma2:
            raise ValueError(f"gamma1={self.gamma1} must be above gamma2={self.gamma2}")
        _check_group_values("start", self.start, (MAX_TIMESTEP,) * len(GROUPS))
        _check_group_values("steps", self.steps, self.start)

    @classmethod
    def paper(cls) -> SamplingPlan:
        """The configuration of the paper: each group walks the same grid of 50 timesteps per step."""
        return cls(0.95, 0.75, start=(400, 700, 1000), steps=(8, 14, 20))

    @classmethod
    def fast(cls) -> SamplingPlan:
        """The paper's starts in one step each."""
        return cls(0.95, 0.75, start=(400, 700, 1000), steps=(1, 1, 1))

    @classmethod
    def balanced(cls) -> SamplingPlan:
        """The paper's starts in two steps each."""
        return cls(0.95, 0.75, start=(400, 700, 1000), steps=(2, 2, 2))

    @classmethod
    def uniform(cls) -> SamplingPlan:
        """Every patch treated as hard: the baseline that grouping is measured against."""
        return cls(0.95, 0.75, start=(1000, 1000, 1000), steps=(20, 20, 20))

    def evaluations(self, counts: Sequence[int]) -> int:
        """Network evaluations, in patches, for `counts` patches in the simple, medium and hard group."""
        if len(counts) != len(GROUPS):
            raise ValueError(f"got {len(counts)} counts for {len(GROUPS)} groups")
        return sum(steps * int(count) for steps, count in zip(self.steps, counts, strict=True))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SamplingPlan:
        """The inverse of `to_json`. Unknown or missing keys raise ValueError."""
        data = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"a plan has exactly the keys {sorted(names)}, got {data!r}")
        for name in ("start", "steps"):
            if isinstance(data[name], list):
                data[name] = tuple(data[name])
        return cls(**data)


def times_and_steps(plan: SamplingPlan, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """T and N of every patch, two LongTensors N, for its group in `assignment`, a LongTensor N."""
    return tuple(assignment.new_tensor(values)[assignment] for values in (plan.start, plan.steps))


PRESETS = {
    "paper": SamplingPlan.paper(),
    "fast": SamplingPlan.fast(),
    "balanced": SamplingPlan.balanced(),
    "uniform": SamplingPlan.uniform(),
}


def assign(confidence: Tensor, plan: SamplingPlan, by_hand: Mapping[int, int] | None = None) -> Tensor:
    """Eq. 2: the group of each patch from its mean confidence.

    simple (0) in (gamma1, 1], medium (1) in (gamma2, gamma1], hard (2) in [0, gamma2]. `confidence` N in
    [0, 1]; anything else, NaN too, raises ValueError. `by_hand` sets the group of single patches in place of
    that. Returns a LongTensor N.
    """
    if not ((confidence >= 0) & (confidence <= 1)).all():
        low, high = confidence.min().item(), confidence.max().item()
        raise ValueError(f"confidence from {low} to {high} is outside [0, 1]")
    groups = (confidence <= plan.gamma1).long() + (confidence <= plan.gamma2).long()
    for index, group in (by_hand or {}).items():
        if not (0 <= index < len(groups) and 0 <= group < len(GROUPS)):
            raise ValueError(f"patch {index} in group {group}: there are {len(groups)} patches, {len(GROUPS)} groups")
        groups[index] = group
    return groups
