"""Long loops ask here, piece by piece, whether their work is still wanted; whoever started the work answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_answer: ContextVar[Callable[[], None] | None] = ContextVar("answer", default=None)


@contextmanager
def answering(answer: Callable[[], None]) -> Iterator[None]:
    """In this block, and in this thread only, `still_wanted` is answered: by an exception if the work is to end."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def still_wanted() -> None:
    """Raises what the answer raises. Without anybody to answer, work goes on."""
    answer = _answer.get()
    if answer:
        answer()
