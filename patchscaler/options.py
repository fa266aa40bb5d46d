"""Options that several commands share, and the error for arguments that no command can carry out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from patchscaler.device import DTYPES
from patchscaler.loading import DEFAULT_WEIGHTS
from patchscaler.plan import PRESETS, SamplingPlan
from patchscaler.sampling import check_seed


class UsageError(ValueError):
    """The arguments cannot be carried out; nothing was run or written."""


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    """--seed, --device, --dtype, --weights and --batch-size."""
    add = parser.add_argument
    add("--seed", type=seed, default=0, help="whole number from 0 to 2^63 - 1 (default: 0)")
    add("--device", help="auto, cpu, cuda or mps (default: the fastest there is)")
    dtype = os.environ.get("PATCHSCALER_DTYPE")  # here, so that it holds for the workers of a cluster too
    add("--dtype", choices=DTYPES, default=dtype, help="precision (default: PATCHSCALER_DTYPE, or by the device)")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the bundled weights)")
    add("--batch-size", type=positive, help="patches at once (default: 64 on a CPU, 256 elsewhere)")


def add_plan_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan", type=plan, default="paper", help=f"{', '.join(PRESETS)} or FILE.json (default: paper)"
    )


def plan(text: str) -> SamplingPlan:
    """A preset by its name, or the plan in a JSON file."""
    if text in PRESETS:
        return PRESETS[text]
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(PRESETS)} nor a file")
    try:
        return SamplingPlan.from_json(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def seed(text: str) -> int:
    value = int(text)
    try:
        check_seed(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
