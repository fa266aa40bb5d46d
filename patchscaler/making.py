"""What a device is still at work on: a picture whose pixels are on their way, and whether they are numbers at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchscaler.devices import HostCopies, Laps
from patchscaler.images import Picture


class NotFiniteError(RuntimeError):
    """The networks gave NaN or infinity; the message says where."""


def all_finite(values: Tensor) -> Tensor:
    """Whether no value is NaN or infinite, as a tensor that a GPU need not be waited for."""
    return torch.isfinite(values).all()


def require_finite(name: str, finite: Tensor) -> None:
    """Raise NotFiniteError unless ``finite``, which `all_finite` gave for what is called ``name``."""
    if not finite:
        raise NotFiniteError(f"{name} has values that are NaN or infinite; try dtype=torch.float32")


@dataclass(frozen=True, eq=False)
class Made:
    """A picture and the patches that it is made of, NxCxVxV, on the CPU: to be read after `wait`."""

    picture: Picture
    patches: Tensor
    source: Tensor  # the patches on the device, kept for as long as it reads them
    finite: dict[str, Tensor]
    host: HostCopies
    laps: Laps

    def over(self) -> bool:
        """Whether `wait` would not take any time."""
        return self.laps.over()

    def wait(self) -> tuple[float, float]:
        """The seconds of merging and decoding, and of the colours. Raises NotFiniteError."""
        self.host.wait()
        for name, finite in self.finite.items():
            require_finite(name, finite)
        decode, color = self.laps.seconds()
        return decode, color
