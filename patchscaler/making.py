"""What is said when the networks give no numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """The networks gave NaN or infinity; the message says where."""


def require_finite(name: str, values: Tensor) -> None:
    """Raise NotFiniteError, which calls them ``name``, if values are NaN or infinite."""
    if not torch.isfinite(values).all():
        raise NotFiniteError(f"{name} has values that are NaN or infinite; try dtype=torch.float32")
