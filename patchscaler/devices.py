"""Which device to run on, and in which precision."""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or for None and "auto" the best of cuda, mps and cpu.

    Raises ValueError if the name is unknown or the device is not there: nothing falls back in silence.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's ways of saying that it has no such device
        raise ValueError(f"device {name!r} is unknown or not available") from error
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes fast in it, else float32. Both have the same range."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return _measured_cpu_dtype() if device.type == "cpu" else torch.float32


@cache
def _measured_cpu_dtype() -> torch.dtype:
    """bfloat16 if it is clearly faster than float32 here, measured once per process in at most about 0.3 s.

    CPUs with bf16 instructions run convolutions about twice as fast in it; the others emulate it and are
    slower than in float32. Names and flags do not tell the two apart on every platform, so the clock decides.
    """
    return torch.bfloat16 if _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32) else torch.float32


@torch.inference_mode()
def _seconds(dtype: torch.dtype, budget: float = 0.1) -> float:
    """The shortest time for one convolution and one matrix product like those of the models."""
    image = torch.ones(1, 96, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.ones(96, 96, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    tokens, weight = torch.ones(256, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + budget
    for _ in range(10):
        start = time.perf_counter()
        F.conv2d(image, kernel, padding=1)
        F.linear(tokens, weight)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best
