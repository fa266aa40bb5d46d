"""The page's dials: nine numbers that together are a sampling plan and a seed.

Their order is everywhere gamma1, gamma2, T of the three groups, N of the three groups, seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchscaler.plan import PRESETS, SamplingPlan

CUSTOM = "custom"  # the preset's name when the dials match none
GAMMA_STEP = 0.01
# Lowest, highest and step of each dial but the seed. No N is above the lowest T, so that N <= T always holds.
RANGES = (
    (GAMMA_STEP, 1, GAMMA_STEP),
    (0, 1 - GAMMA_STEP, GAMMA_STEP),
    *[(50, 1000, 10)] * 3,
    *[(1, 50, 1)] * 3,
)
MAX_SEED = 2**53 - 1  # the largest whole number that a browser keeps exact
MAX_BATCH = 256  # patches at once


def dials_of(plan: SamplingPlan) -> tuple[float, ...]:
    """The eight dials that show `plan`; the seed is no part of it."""
    return (plan.gamma1, plan.gamma2, *plan.start, *plan.steps)


def plan_of(dials: Sequence[Any]) -> SamplingPlan:
    """The plan that eight dials show. Raises ValueError as SamplingPlan does."""
    gamma1, gamma2, *rest = (_whole(value) for value in dials)
    return SamplingPlan(gamma1, gamma2, start=tuple(rest[:3]), steps=tuple(rest[3:]))


def seed_of(value: Any) -> int:
    """A whole number in 0..2^53-1. Raises ValueError for everything else, an emptied field too."""
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise ValueError(f"seed={value!r} is not a whole number from 0 to {MAX_SEED}")
    return value


def preset_of(plan: SamplingPlan) -> str:
    return next((name for name, preset in PRESETS.items() if preset == plan), CUSTOM)


def in_range(dials: Sequence[Any]) -> bool:
    """Whether eight dials hold what sliders give: not so while a visitor empties a field or types 700 as 7."""
    return all(
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and (step < 1 or value == int(value))
        for value, (low, high, step) in zip(dials, RANGES)
    )


def is_batch(value: Any) -> bool:
    """Whether a value of the patch batch's field is one, or None: what suits the device."""
    return value is None or isinstance(value, (int, float)) and 1 <= value <= MAX_BATCH and value == int(value)


def hold_order(dials: Sequence[float], moved: int) -> list[float]:
    """Eight dials with the neighbours of the one at `moved` pushed along: gamma1 > gamma2, T and N never falling.

    The seed, at 8, pushes nothing.
    """
    held = list(dials)
    if moved == 0:
        held[1] = min(held[1], round(held[0] - GAMMA_STEP, 2))
    elif moved == 1:
        held[0] = max(held[0], round(held[1] + GAMMA_STEP, 2))
    elif moved < 8:
        first = 2 if moved < 5 else 5
        for i in range(first, first + 3):
            held[i] = (min if i < moved else max)(held[i], held[moved])
    return held


def _whole(value: Any) -> Any:
    """Browsers make no difference between 8 and 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
