"""How large a picture may be, and the errors that say so."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields

MAX_INPUT_PIXELS = 4_000_000
OUTPUT_PER_INPUT = 16  # pixels, at 4 times the width and height


class ImageError(ValueError):
    """An image that is refused; the message names the value and the limit and can be shown to a visitor."""


class LimitError(ValueError):
    """A limit in the environment that cannot be; the message names the variable."""


def limit_from_environment(name: str, default: int) -> int:
    """The whole number in an environment variable, or the default if it is empty or not set.

    Raises LimitError for anything but a whole number of at least 1.
    """
    text = os.environ.get(name)
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise LimitError(f"{name}={text!r} is not a whole number from 1 to {10**18 - 1}")
    return int(text)


@dataclass(frozen=True)
class Limits:
    """How large a picture may be before and after upscaling, in pixels, and its file, in bytes."""

    input_pixels: int = MAX_INPUT_PIXELS
    output_pixels: int = OUTPUT_PER_INPUT * MAX_INPUT_PIXELS
    file_bytes: int = 20 * 2**20

    @classmethod
    def from_environment(cls) -> Limits:
        """The defaults, or what PATCHSCALER_MAX_INPUT_PIXELS, _OUTPUT_PIXELS and _FILE_BYTES put in their place.

        Raises LimitError for a setting that is not a whole number of at least 1.
        """
        names = {field.name: f"PATCHSCALER_MAX_{field.name.upper()}" for field in fields(cls)}
        return cls(**{field: limit_from_environment(name, getattr(cls, field)) for field, name in names.items()})

    def check(self, width: int, height: int) -> None:
        """Raise ImageError for a picture with too many pixels, or with none."""
        pixels = width * height
        if pixels > self.input_pixels:
            raise ImageError(f"{width}×{height} is {pixels:,} pixels; the limit is {self.input_pixels:,}")
        if OUTPUT_PER_INPUT * pixels > self.output_pixels:
            output = f"{OUTPUT_PER_INPUT * pixels:,} pixels after upscaling"
            raise ImageError(f"{width}×{height} would be {output}; the limit is {self.output_pixels:,}")
        if pixels == 0:
            raise ImageError(f"{width}×{height} has no pixels; at least 1×1 is needed")
