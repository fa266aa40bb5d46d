"""What gpu.py checks and measures with: the pipeline on a device, clocks, comparisons, and a list of what was found."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # where the package is not installed

from patchscaler import devices, pipeline, predictors  # noqa: E402
from patchscaler.checkpoints import load_pipeline  # noqa: E402
from patchscaler.evaluation.bench import tiled  # noqa: E402
from patchscaler.grouping import SamplingPlan  # noqa: E402
from patchscaler.records import Result  # noqa: E402

PLANS = {"paper": SamplingPlan.paper(), "uniform": SamplingPlan.uniform(), "fast": SamplingPlan.fast()}


class Checks:
    """The machine, the pipeline, and what was found so far."""

    def __init__(self, device: torch.device, weights: Path, image: Path, out: Path | None) -> None:
        self.device, self.weights, self.image, self.out = device, weights, image, out
        self.cuda = device.type == "cuda"
        self.pipeline = load_pipeline(weights, device)
        self.small, self.large = tiled(image, 1), tiled(image, 4 if self.cuda else 2)
        self.rate = float("nan")  # FLOP/s of a large bf16 product
        self.work = float("nan")  # FLOPs of Patch-DiT for one patch
        self.lines: list[str] = []
        self.failed = 0

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def check(self, what: str, passed: bool) -> None:
        self.failed += not passed
        self.say(f"{what}: {'ok' if passed else 'FAILED'}")

    def close(self, what: str, one: torch.Tensor, other: torch.Tensor, most: float) -> None:
        """Of pictures in [-1, 1]: their difference in grey levels, on average at most so much."""
        difference = (one.float().cpu() - other.float().cpu()).abs() * 127.5
        mean, largest = difference.mean().item(), difference.max().item()
        self.check(f"{what}: mean {mean:.4f}, most {largest:.2f} grey levels, at most {most}", mean <= most)

    def equal(self, what: str, one: torch.Tensor, other: torch.Tensor) -> None:
        count = int((one.cpu() != other.cpu()).sum())
        self.check(f"{what}: {count} of {one.numel()} values differ", count == 0)

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def refined(self, analysis, plan=PLANS["paper"], **options) -> Result:
        *_, result = self.pipeline.refine(analysis, plan, **options)
        return result

    def timed(self, call: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
        """Median seconds."""
        seconds = []
        for _ in range(warm + repeats):
            self.settle()
            began = time.perf_counter()
            call()
            self.settle()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[warm:])

    def evaluations(self, network, count: int) -> tuple[Callable[[], torch.Tensor], torch.Tensor, torch.Tensor, list]:
        """One evaluation of ``count`` random patches, and its inputs: x_t NxCxVxV, prompt NxLxD, prompt keys."""
        config, tokens = network.config, self.pipeline.texture_encoder.config
        x_t = torch.randn(count, config.channels, config.size, config.size, device=self.device)
        length = tokens.top_k * (tokens.size // tokens.patch) ** 2
        prompt = torch.randn(count, length, config.prompt_width, device=self.device)
        keys, t = network.prompt_keys(prompt), torch.tensor([500], device=self.device)
        return lambda: network(x_t, x_t, t, keys), x_t, prompt, keys


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """As if there were but one stream, and no pinned memory for what comes back."""
    before = devices.HostCopies.__init__, pipeline.beside
    devices.HostCopies.__init__ = lambda self, device: setattr(self, "stream", None)
    pipeline.beside = lambda device: nullcontext()
    try:
        yield
    finally:
        devices.HostCopies.__init__, pipeline.beside = before


@contextmanager
def replaying(network) -> Iterator[None]:
    predictors.record(network)
    try:
        yield
    finally:
        predictors.forget(network)
