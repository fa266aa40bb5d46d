"""What a visitor is told when something goes wrong."""

from __future__ import annotations

import logging
from html import escape

import gradio as gr
import torch

from patchscaler.images import ImageError
from patchscaler.results import NotFiniteError
from patchscaler.ui.jobs import JobError

log = logging.getLogger(__name__)

MOST_TEXT = 400  # letters


def explain(error: Exception) -> gr.Error:
    """The error a visitor sees: Gradio hands on no other text than that of its own error."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, ImageError):
        return visible_error("This image was refused", str(error))
    if isinstance(error, JobError):
        return visible_error("The run was not finished", str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return visible_error("Out of memory", "There is not enough memory for this image. Try a smaller one.")
    log.error("a run failed", exc_info=error)
    if isinstance(error, NotFiniteError):
        return visible_error("The run failed", "The networks gave values that are NaN or infinite. Try another seed.")
    return visible_error("The run failed", f"{type(error).__name__}; the server's log has the details.")


def visible_error(title: str, text: str) -> gr.Error:
    """Gradio shows both as HTML."""
    return gr.Error(escape(shortened(text)), title=escape(title), print_exception=False)


def shortened(text: str) -> str:
    """A message may name a value of any length that somebody sent."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
