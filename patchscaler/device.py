"""Which device to run on and in which precision, how long it took, and what to do when its memory runs out."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")

DTYPES = ("float32", "bfloat16", "float16")


class OutOfMemory(MemoryError):
    """There is not enough memory even for the smallest pieces; the message says what helps."""


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or for None and "auto" the best of cuda, mps and cpu.

    Raises ValueError if the name is unknown or the device is not there: there is no silent fallback.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's ways of saying that it has no such device
        raise ValueError(f"device {name!r} is unknown or not available") from error
    return device


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The precision of that name, of PATCHSCALER_DTYPE where no name is given, or what suits the device.

    That is bfloat16 on a CPU or CUDA GPU that has instructions for it, else float32: both have the same range. Other
    processors emulate bfloat16 and are slower in it. Raises ValueError if the name is unknown.
    """
    name = name or os.environ.get("PATCHSCALER_DTYPE") or "auto"
    if name in DTYPES:
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(f"dtype {name!r} is none of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        with torch.cuda.device(device) if device.index is not None else nullcontext():  # it asks the current one
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether torch finds bfloat16 products in the CPU: AVX512-BF16, or AMX. Names as of torch 2.8 to 2.13."""
    queries = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(query is not None and query() for query in queries)


class Stopwatch:
    """Seconds by stage, counting what the device was asked to do and has not yet finished."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()  # 0 for a stage without a lap
        self.last = 0.0
        self.lap()

    def lap(self, stage: str | None = None) -> float:
        """Wait for the device; the seconds since the last lap, which are added to those of the stage."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if stage:
            self.seconds[stage] += seconds
        return seconds


def batch_for(device: torch.device) -> int:
    """How many patches to give a network at once: 64 on a CPU, 256 elsewhere.

    On a CPU twice as many already take a fifth longer per patch, as they no longer fit into its caches.
    """
    return 64 if device.type == "cpu" else 256


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by the exceptions of Python and CUDA or by the words of torch's other allocators."""
    if isinstance(error, OutOfMemory):
        return False  # everything was tried
    words = ("can't allocate memory", "not enough memory", "out of memory", "could not create a memory", "alloc_failed")
    is_word = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return is_word or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def halving(run: Callable[[int], Value], size: int, least: int, device: torch.device) -> Value:
    """`run(size)`, again with half the size each time that memory runs out, down to `least`.

    Raises OutOfMemory if `least` is too much as well.
    """
    while size > least:
        try:
            return run(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release(device)  # not within `except`: there the error still holds what `run` had made
        size = max(least, size // 2)
    with out_of_memory_errors(device):
        return run(size)


@contextmanager
def out_of_memory_errors(device: torch.device) -> Iterator[None]:
    """Turn what says that memory ran out into OutOfMemory, which says what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # it would keep what there was no memory for
        raise out_of_memory(device) from None


def raises_out_of_memory(method: Callable) -> Callable:
    """`out_of_memory_errors` for a method, or for a generator, of a pipeline and its device."""

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with out_of_memory_errors(self._execution_device):
            return method(self, *args, **options)

    @wraps(method)
    def iterate(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        with out_of_memory_errors(self._execution_device):
            yield from method(self, *args, **options)

    return iterate if isgeneratorfunction(method) else call


def out_of_memory(device: torch.device) -> OutOfMemory:
    advice = "close other programs, take a smaller image" + (", or use the CPU" if device.type != "cpu" else "")
    return OutOfMemory(f"not enough memory on {device}, even in the smallest pieces: {advice}")


def release(device: torch.device) -> None:
    """Give back what the device's allocator keeps for later."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
