"""What a visitor has set, what the visitor's page holds, and what the server keeps of images: the session cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image
from torch import Tensor

from patchscaler.figures import grey_preview, qmap_overlay
from patchscaler.plan import PRESETS, SamplingPlan
from patchscaler.results import Analysis, Sampled
from patchscaler.ui.html import SettingsError, visible_error
from patchscaler.ui.networks import RunRequest

ByHand = dict[int, int]  # patch -> group
View = dict[str, Any]  # what the page is to show, by the names of its components

INSPECT = "inspect"  # what a click on the Qmap does, besides the groups' names
CUSTOM = "custom"  # the preset's name when the dials match none

# The dials: nine numbers that together are a sampling plan and a seed, everywhere in this order.
DIALS = ("gamma1", "gamma2", "start1", "start2", "start3", "steps1", "steps2", "steps3", "seed")
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
KEPT_PIXELS = 32_000_000  # of output, over all cached images: about 2 GB
KEPT_BYTES = 500_000_000  # of refined patches, over all visitors
WAIT_SECONDS = 20


# What a visitor's page holds


@dataclass(frozen=True, eq=False)
class Shown:
    """How the final picture on a visitor's page was made, and its file."""

    request: RunRequest
    start: Tensor  # LongTensor N, T of each patch; 0 where it is still the coarse one
    steps: Tensor  # LongTensor N
    final: Path
    report: dict  # of the run, or only its plan and seed while that is not finished
    uniform: Path | None = None

    @property
    def refined(self) -> int:
        """How many patches are refined."""
        return int((self.start > 0).sum())

    @property
    def complete(self) -> bool:
        return self.refined == len(self.start)


@dataclass(eq=False)
class PageState:
    """What a visitor's page holds besides its controls. Kept by Gradio for each session; events change it in place."""

    source: str | None = None  # the image whose pictures the panels show
    shown: Shown | None = None
    by_hand: ByHand = field(default_factory=dict)  # replaced and never changed, since runs hold it
    center: tuple[float, float] | None = None  # of the zoom, a pixel of the upscaled picture
    patch: int | None = None  # the one that is inspected
    opened: bool = False  # the source is the example that the page opened with, and no image was chosen yet

    def empty(self, source: str | None) -> None:
        """For another image, or for none."""
        self.__init__(source)


@dataclass(frozen=True)
class Settings:
    """All that an event is told: who asks, what the page holds, and every control as the browser sent it.

    Gradio's preprocessing is off, since its own decoding loses alpha and 16-bit grey and answers bad files with an
    error that says nothing. So the image is Gradio's file data, and no value is checked yet.
    """

    session: str | None
    page: PageState
    image: dict | None
    color_fix: Any
    batch: Any
    dials: tuple[Any, ...]  # eight
    seed: Any

    @classmethod
    def of(cls, session: str | None, page: PageState, image: Any, color_fix: Any, batch: Any, *dials: Any) -> Settings:
        """From the values in the order in which the page lists them."""
        return cls(session, page, image, color_fix, batch, tuple(dials[:8]), dials[8])

    @property
    def source(self) -> str | None:
        """The image's path; that of the example that the page opened with until another image is chosen."""
        return (self.image or {}).get("path") or (self.page.source if self.page.opened else None)

    def request(self) -> RunRequest:
        """What a run with these settings is to do. Raises SettingsError."""
        plan, seed, color_fix = plan_of(self.dials), seed_of(self.seed), flag_of("color_fix", self.color_fix)
        batch_size, session = batch_of(self.batch), self.session
        return RunRequest(self.source, plan, seed, self.page.by_hand, color_fix, batch_size, session=session)

    @property
    def plan(self) -> SamplingPlan | None:
        """The plan that the dials show; None while a visitor types, or before pushed neighbours have moved."""
        with suppress(SettingsError):
            return plan_of(self.dials) if in_range(self.dials) else None

    @property
    def batch_size(self) -> int | None:
        """The patch batch; None, for what suits the device, if its field is empty or while something else is in it."""
        with suppress(SettingsError):
            return batch_of(self.batch)


# The dials


def dials_of(plan: SamplingPlan) -> tuple[float, ...]:
    """The eight dials that show `plan`; the seed is no part of it."""
    return (plan.gamma1, plan.gamma2, *plan.start, *plan.steps)


def plan_of(dials: Sequence[Any]) -> SamplingPlan:
    """The plan that eight dials show. Raises SettingsError with what SamplingPlan says."""
    gamma1, gamma2, *rest = (_whole(value) for value in dials)
    try:
        return SamplingPlan(gamma1, gamma2, start=tuple(rest[:3]), steps=tuple(rest[3:]))
    except ValueError as error:
        raise SettingsError(str(error)) from error


def seed_of(value: Any) -> int:
    """A whole number in 0..2^53-1. Raises SettingsError for everything else, an emptied field too."""
    if value is None:
        raise SettingsError(f"the seed is empty; it is a whole number from 0 to {MAX_SEED}")
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise SettingsError(f"seed={value!r} is not a whole number from 0 to {MAX_SEED}")
    return value


def preset_of(plan: SamplingPlan) -> str:
    return next((name for name, preset in PRESETS.items() if preset == plan), CUSTOM)


def dial_view(plan: SamplingPlan, seed: int) -> View:
    """Dials and preset as they show a plan and a seed."""
    return {"preset": preset_of(plan), **dict(zip(DIALS, (*dials_of(plan), seed)))}


def in_range(dials: Sequence[Any]) -> bool:
    """Whether eight dials hold what sliders give: not so while a visitor empties a field or types 700 as 7."""
    return all(
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and (step < 1 or value == int(value))
        for value, (low, high, step) in zip(dials, RANGES)
    )


def enforce_order(dials: Sequence[float], moved: int) -> list[float]:
    """Eight dials with the neighbours of the one at `moved` pushed along: gamma1 > gamma2, T and N never falling.

    The seed, at 8, pushes nothing.
    """
    pushed = list(dials)
    if moved == 0:
        pushed[1] = min(pushed[1], round(pushed[0] - GAMMA_STEP, 2))
    elif moved == 1:
        pushed[0] = max(pushed[0], round(pushed[1] + GAMMA_STEP, 2))
    elif moved < 8:
        first = 2 if moved < 5 else 5
        for i in range(first, first + 3):
            pushed[i] = (min if i < moved else max)(pushed[i], pushed[moved])
    return pushed


def _whole(value: Any) -> Any:
    """Browsers make no difference between 8 and 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Other controls


def batch_of(value: Any) -> int | None:
    """Patches at once, 1..256, or None for what suits the device. Raises SettingsError."""
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 1 <= value <= MAX_BATCH or value != int(value):
        raise SettingsError(f"patch batch {value!r} is not a whole number from 1 to {MAX_BATCH}")
    return int(value)


def choice_of(name: str, value: Any, choices: Collection[str]) -> str:
    """One of the choices. Raises SettingsError."""
    if not isinstance(value, str) or value not in choices:
        raise SettingsError(f"{name}={str(value)[:80]!r} is none of {', '.join(choices)}")
    return value


def flag_of(name: str, value: Any) -> bool:
    """True or False. Raises SettingsError."""
    if not isinstance(value, bool):
        raise SettingsError(f"{name}={str(value)[:80]} is neither true nor false")
    return value


# The session cache


@dataclass(eq=False)
class CachedAnalysis:
    """What the networks found in an image: the same for all visitors, and none of their settings.

    `draw_priors` makes a picture of its priors.
    """

    analysis: Analysis
    draw_priors: Callable[[Analysis], Image.Image]

    @property
    def pixels(self) -> int:
        return self.analysis.coarse[0].numel()

    @cached_property
    def priors(self) -> Image.Image:
        """The sheet of the texture priors."""
        return self.draw_priors(self.analysis)

    @cached_property
    def grey(self) -> Image.Image:
        """The grey image under the Qmap's colours, drawn once and not for every move of a dial."""
        return grey_preview(self.analysis.coarse)

    def overlay(self, assignment: Tensor, by_hand: Collection[int] = ()) -> Image.Image:
        """The Qmap, with borders around the patches that were set by hand."""
        return qmap_overlay(self.analysis.coarse, self.analysis.grid, assignment, by_hand, self.grey)


class LRUCache:
    """Values by key. The least recently used go when all together are above the limit; the newest always stays."""

    def __init__(self, limit: int, size: Callable[[Any], int]) -> None:
        self._limit, self._size = limit, size
        self._values: OrderedDict[Any, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > 1 and sum(map(self._size, self._values.values())) > self._limit:
                self._values.popitem(last=False)


class SessionCache:
    """What need not be computed again: analyses, by file and for everybody, and a visitor's refined patches.

    Uploads and examples lie under names made from their content, so the file's path is the key.
    """

    def __init__(self, kept_pixels: int = KEPT_PIXELS, kept_bytes: int = KEPT_BYTES) -> None:
        self._known = LRUCache(kept_pixels, lambda known: known.pixels)
        self._sampled = LRUCache(kept_bytes, lambda sampled: sampled.patches.nbytes)
        self._opening: dict[str | None, tuple[CachedAnalysis, Sampled]] = {}

    def get(self, source: str | None) -> CachedAnalysis | None:
        return self._known.get(source) or self._opening.get(source, (None, None))[0]

    def put(self, source: str, known: CachedAnalysis) -> None:
        self._known.put(source, known)

    def sampled(self, session: str | None, source: str | None, uniform: bool = False) -> Sampled | None:
        """A visitor's latest refined patches of an image, or those of its uniform baseline: a run samples what changed.

        For those who have none of the image that the page opens with, what the server has.
        """
        opening = None if uniform else self._opening.get(source, (None, None))[1]
        return self._sampled.get((session, source, uniform)) or opening

    def keep(self, session: str | None, source: str, sampled: Sampled, uniform: bool = False) -> None:
        """Keep a visitor's refined patches of an image."""
        self._sampled.put((session, source, uniform), sampled)

    def open_with(self, source: str) -> None:
        """Have every visitor begin with this image as it is now, which is kept for as long as the server runs."""
        self._opening = {source: (self.get(source), self.sampled(None, source))}


_one_at_a_time = Lock()


@contextmanager
def whole_pictures() -> Iterator[None]:
    """For light events that hold whole pictures, which may take a GB or two: one works at a time, and the others wait.

    gr.Error after WAIT_SECONDS, or those that wait would keep the dials' threads.
    """
    if not _one_at_a_time.acquire(timeout=WAIT_SECONDS):
        raise visible_error("The server is busy", "Others look at large pictures closely. Try again in a moment.")
    try:
        yield
    finally:
        _one_at_a_time.release()
