"""What a visitor has set, as the page's events receive it, and what of it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from patchscaler.plan import SamplingPlan
from patchscaler.ui import fragments
from patchscaler.ui.dials import MAX_BATCH, in_range, is_batch, plan_of, seed_of
from patchscaler.ui.errors import visible_error
from patchscaler.ui.views import ByHand, Shown

WRONG = "These settings do not work"


class Settings(NamedTuple):
    """The image, what is on the page, and every control; values are as the browser sent them."""

    image: dict | None  # Gradio's file data
    shown: Shown | None
    by_hand: ByHand
    color_fix: bool
    batch: Any
    dials: tuple[Any, ...]  # eight
    seed: Any

    @classmethod
    def of(cls, image: Any, shown: Any, by_hand: Any, color_fix: Any, batch: Any, *dials: Any) -> Settings:
        """From the values in the order in which the page lists them."""
        return cls(image, shown, by_hand, color_fix, batch, tuple(dials[:8]), dials[8])

    @property
    def source(self) -> str | None:
        return (self.image or {}).get("path")

    @property
    def usable(self) -> bool:
        """Whether the dials show a plan: not so while a visitor types, or before pushed neighbours have moved."""
        try:
            return in_range(self.dials) and plan_of(self.dials) is not None
        except ValueError:
            return False

    @property
    def plan(self) -> SamplingPlan:
        return plan_of(self.dials)

    @property
    def batch_size(self) -> int | None:
        """The patch batch; None, for what suits the device, if its field is empty or while something else is in it."""
        return checked_batch(self.batch) if is_batch(self.batch) else None


def checked_plan(dials: Any, seed: Any) -> tuple[SamplingPlan, int]:
    """The plan and the seed, or a gr.Error that says which value is wrong."""
    try:
        return plan_of(dials), seed_of(seed)
    except ValueError as error:
        raise visible_error(WRONG, str(error)) from error


def checked_batch(value: Any) -> int | None:
    """Patches at once, None for what suits the device, or a gr.Error."""
    if not is_batch(value):
        raise visible_error(WRONG, f"patch batch {value!r} is not a whole number from 1 to {MAX_BATCH}")
    return None if value is None else int(value)


def checked_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the choices that the page offers, or a gr.Error that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise visible_error(WRONG, f"{name}={str(value)[:80]!r} is none of {', '.join(choices)}")
    return value


def checked_flag(name: str, value: Any) -> bool:
    """What a checkbox gives, or a gr.Error."""
    if not isinstance(value, bool):
        raise visible_error(WRONG, f"{name}={str(value)[:80]!r} is neither true nor false")
    return value


def checked_source(image: dict | None) -> str:
    """The image's path, or a gr.Error if there is none."""
    source = (image or {}).get("path")
    if not source:
        raise visible_error("No image", fragments.NO_IMAGE)
    return source
