"""Cancellation: long loops ask here, piece by piece, whether they may go on; their caller sets the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextmanager
def cancellable(check: Callable[[], None]) -> Iterator[None]:
    """In this block, and in this thread only, `check_cancelled` calls `check`, which raises if the work is to end."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def check_cancelled() -> None:
    """Raises what the check raises. Without one, work goes on."""
    check = _check.get()
    if check:
        check()
