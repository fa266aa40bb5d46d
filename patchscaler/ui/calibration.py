"""What runs cost on this machine, learned from those that there were."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

REMEMBERED = 8  # runs; the machine's load changes, so old ones are forgotten
FADING = 0.85  # weight of a measurement against the next one


class Call(NamedTuple):
    """The sampling of one group: calls of the network, the patches that these took in all, and how long it took."""

    calls: int
    evaluations: int
    seconds: float


class Calibration:
    """Rates of this machine: seconds per call of Patch-DiT and more per patch in it; for all else, per output pixel of
    each picture, and more per pixel of the last.

    A call with few patches costs more per patch, and the last picture, which is finished and saved without loss, more
    than those of the groups before it. So different groups and runs tell the rates apart.
    """

    def __init__(self, at_once: int = 64) -> None:
        """``at_once``: patches in a call where nobody has chosen."""
        self.at_once = at_once
        self._groups: deque[Call] = deque(maxlen=3 * REMEMBERED)
        self._rest: deque[tuple[int, int, float]] = deque(maxlen=REMEMBERED)
        self._analysis: deque[float] = deque(maxlen=REMEMBERED)
        self._rates: tuple[float, float] | None = None
        self._rest_rates = (0.0, 0.0)

    def learn(self, groups: Iterable[Call], pixels: int, rest: float, pictures: int = 1) -> None:
        """Take in a finished run: its groups, and the seconds of all else but the analysis, for so many pictures."""
        self._groups.extend(group for group in groups if group.evaluations and group.seconds > 0)
        if rest > 0:
            self._rest.append((pictures * pixels, pixels, rest))
        if self._groups:
            self._rates = _fit(np.array(self._groups))
        if self._rest:
            self._rest_rates = _fit(np.array(self._rest))

    def learn_analysis(self, pixels: int, seconds: float) -> None:
        self._analysis.append(seconds / pixels)

    def seconds(self, evaluations: Any, pixels: int, calls: Any = 0, pictures: Any = 1) -> Any:
        """What a run over a known analysis is expected to take, or None before the first run.

        ``pictures``: one for each group that is sampled. Numbers or tensors.
        """
        if self._rates is None:
            return None
        each, last = self._rest_rates
        return calls * self._rates[0] + evaluations * self._rates[1] + pixels * (pictures * each + last)

    def analysis_seconds(self, pixels: int) -> float | None:
        """What the analysis of a picture with so many output pixels is expected to take, or None before the first."""
        return pixels * median(self._analysis) if self._analysis else None


def _fit(measured: np.ndarray) -> tuple[float, float]:
    """Seconds for one of each of two kinds of work, neither below 0, with the least squared relative error.

    ``measured`` Mx3 has the amounts of both and the seconds, the latest last, which weighs most. Relative, so that what
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
