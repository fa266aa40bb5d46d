"""What runs cost on this machine, learned from those that there were."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

REMEMBERED = 8  # runs; the machine's load changes, so old ones are forgotten


class Call(NamedTuple):
    """The sampling of one group: calls of the network, the patches that these took in all, and how long it took."""

    calls: int
    evaluations: int
    seconds: float


class Calibration:
    """Rates of this machine: seconds per call of Patch-DiT, more per patch in it, and per output pixel of the rest.

    A call with few patches costs more per patch, so groups of different sizes tell the first two apart.
    """

    def __init__(self) -> None:
        self._groups: deque[Call] = deque(maxlen=3 * REMEMBERED)
        self._pixel: deque[float] = deque(maxlen=REMEMBERED)
        self._analysis: deque[float] = deque(maxlen=REMEMBERED)
        self._rates: tuple[float, float] | None = None

    def learn(self, groups: Iterable[Call], pixels: int, rest: float) -> None:
        """Take in a finished run: its groups, and the seconds of all else but the analysis, a picture per group."""
        sampled = [group for group in groups if group.evaluations and group.seconds > 0]
        self._pixel.append(rest / (pixels * max(1, len(sampled))))
        self._groups.extend(sampled)
        if self._groups:
            self._rates = _fit(np.array(self._groups))

    def learn_analysis(self, pixels: int, seconds: float) -> None:
        self._analysis.append(seconds / pixels)

    def seconds(self, evaluations: Any, pixels: int, calls: Any = 0, pictures: Any = 1) -> Any:
        """What a run over a known analysis is expected to take, or None before the first run.

        ``pictures``: one for each group that is sampled. Numbers or tensors.
        """
        if self._rates is None:
            return None
        return calls * self._rates[0] + evaluations * self._rates[1] + pictures * pixels * median(self._pixel)

    def analysis_seconds(self, pixels: int) -> float | None:
        """What the analysis of a picture with so many output pixels is expected to take, or None before the first."""
        return pixels * median(self._analysis) if self._analysis else None


def _fit(groups: np.ndarray) -> tuple[float, float]:
    """Seconds per call and per evaluation, neither below 0, with the least squared relative error over ``groups`` Gx3.

    Relative, so that a group that took long does not outweigh all others.
    """
    work, ones = groups[:, :2] / groups[:, 2:], np.ones(len(groups))
    both = np.linalg.lstsq(work, ones, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [(column @ ones) / (column @ column) for column in work.T]
    errors = [np.square(column * rate - 1).sum() for column, rate in zip(work.T, alone)]
    return (float(alone[0]), 0.0) if errors[0] < errors[1] else (0.0, float(alone[1]))
