"""What runs cost on this machine, learned from those that there were."""

from __future__ import annotations

from collections import deque
from statistics import median

REMEMBERED = 8  # runs; the machine's load changes, so old ones are forgotten


class Calibration:
    """Two rates: seconds per network evaluation of a patch, and seconds per output pixel for all else of a run."""

    def __init__(self) -> None:
        self._evaluation: deque[float] = deque(maxlen=REMEMBERED)
        self._pixel: deque[float] = deque(maxlen=REMEMBERED)

    def learn(self, evaluations: int, sampling: float, pixels: int, rest: float) -> None:
        """Take in a finished run: seconds of ``sampling`` for its evaluations, and of the ``rest``."""
        if evaluations:
            self._evaluation.append(sampling / evaluations)
        self._pixel.append(rest / pixels)

    def seconds(self, evaluations: int, pixels: int) -> float | None:
        """What a run over a known analysis is expected to take, or None before the first run."""
        if not self._evaluation:
            return None
        return evaluations * median(self._evaluation) + pixels * median(self._pixel)

    def evaluations(self, seconds: float, pixels: int) -> float | None:
        """The inverse of `seconds`: how many evaluations fit; below 0 if not even the rest does."""
        if not self._evaluation:
            return None
        return (seconds - pixels * median(self._pixel)) / median(self._evaluation)
