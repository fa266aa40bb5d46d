"""Which device to run on and in which precision, how long it took, and what to do when its memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from inspect import isgeneratorfunction
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value")

PINNED = 2**28  # bytes of a tensor above which its copies to and from a GPU are not pinned: no program gets that memory


class OutOfMemory(MemoryError):
    """There is not enough memory even for the smallest pieces; the message says what helps."""


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
        with torch.cuda.device(device) if device.index is not None else nullcontext():  # it asks the current one
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


class Stopwatch:
    """Seconds between laps, counting what the device was asked to do and has not yet finished."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = 0.0
        self.lap()

    def lap(self, wait: bool = True) -> float:
        """Without ``wait``, a GPU is left to its work, and only what the host did counts."""
        if wait:
            wait_for(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do: on CUDA on the current stream, others may go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


class Laps:
    """Seconds between marks in the work of a device, which does not wait for them: only `seconds` does."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self, stream: torch.cuda.Stream | None = None) -> None:
        """Here on the current stream of a CUDA device, or on another one."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream or torch.cuda.current_stream(self.device))
            self._marks.append(event)
            return
        wait_for(self.device)
        self._marks.append(time.perf_counter())

    def over(self) -> bool:
        """Whether the device has come to the last mark."""
        return self.device.type != "cuda" or self._marks[-1].query()

    def seconds(self) -> list[float]:
        """Those from each mark to the next, once the device has come to the last one."""
        pairs = zip(self._marks, self._marks[1:])
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


@cache
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """The one stream of a CUDA device for a use: torch keeps freed memory for the stream that had it."""
    return torch.cuda.Stream(device)


class HostCopies:
    """Copies to the CPU. Those of a CUDA GPU go beside its further work, on a stream of their own."""

    def __init__(self, device: torch.device):
        self.stream = side_stream(device, "copies to the CPU") if device.type == "cuda" else None

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, contiguous. Neither may be written to, nor this one read, before `wait` is over."""
        if self.stream is None:
            return tensor.cpu().contiguous()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.nbytes <= PINNED)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # or its memory would be given away before it is read
        return host

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """What a CUDA device is asked to do here, it does after all that came before and beside what comes next.

    Whoever uses the results waits for them first, and keeps till then what was taken from outside.
    """
    if device.type != "cuda":
        yield
        return
    stream = side_stream(device, "beside")
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, from the CPU to a CUDA GPU through pinned memory and without waiting for its earlier work."""
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.nbytes > PINNED:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def most_at_once(device: torch.device) -> int:
    """The largest batch of patches that is worth its memory: 1024 on a CUDA GPU.

    Elsewhere 64: on a CPU twice as many already take a fifth longer per patch, as they no longer fit into its caches.
    """
    return 1024 if device.type == "cuda" else 64


def fitting_batch(device: torch.device, each: int) -> int:
    """Patches of ``each`` bytes at once: the most that are worth it, on a CUDA GPU in half of its free memory."""
    most = most_at_once(device)
    if device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for later
    return max(1, min(most, free // 2 // each))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, by the exceptions of Python and CUDA or by the words of torch's other allocators."""
    if isinstance(error, OutOfMemory):
        return False  # everything was tried
    words = ("can't allocate memory", "not enough memory", "out of memory", "could not create a memory", "alloc_failed")
    is_word = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return is_word or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def halving(run: Callable[[int], Value], size: int, least: int, device: torch.device) -> Value:
    """``run(size)``, again with half the size each time that memory runs out, down to ``least``.

    Raises OutOfMemory if ``least`` is too much as well.
    """
    while size > least:
        try:
            return run(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release(device)  # here the error, which held what `run` had made, is gone
        size = max(least, size // 2)
    with advising(device):
        return run(size)


@contextmanager
def advising(device: torch.device) -> Iterator[None]:
    """Turn what says that memory ran out into OutOfMemory, which says what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # it would keep what there was no memory for
        raise out_of_memory(device) from None


def advised(method: Callable) -> Callable:
    """`advising` for a method, or for a generator, of a pipeline and its device."""

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with advising(self._execution_device):
            return method(self, *args, **options)

    @wraps(method)
    def iterate(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        with advising(self._execution_device):
            yield from method(self, *args, **options)

    return iterate if isgeneratorfunction(method) else call


def out_of_memory(device: torch.device) -> OutOfMemory:
    advice = "close other programs, take a smaller image" + (", or use the CPU" if device.type != "cpu" else "")
    return OutOfMemory(f"not enough memory on {device}, even in the smallest pieces: {advice}")


def release(device: torch.device) -> None:
    """Give back what the device's allocator keeps for later."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
