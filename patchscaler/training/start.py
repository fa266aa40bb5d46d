"""What a stage of training starts from: new weights, or those of a pipeline folder (`--from`)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import ModelMixin

from patchscaler.loading import load_pipeline
from patchscaler.pipeline import PatchScalerPipeline


def component(args: argparse.Namespace, name: str) -> Path:
    """Where a component lies that a stage builds on: in OUT, else in the pipeline folder of `--from`."""
    own = args.out / name
    return args.start / name if args.start and not own.exists() else own


def start_pipeline(args: argparse.Namespace) -> PatchScalerPipeline | None:
    """The pipeline of `--from`, in float32 on the CPU and loaded as strictly as any; None without that option."""
    return load_pipeline(args.start, device="cpu", dtype=torch.float32) if args.start else None


def take_weights(model: ModelMixin, start: ModelMixin) -> None:
    """Give a new `model` the weights of `start`; ValueError if that is of another class or config.

    What is measured by the training (η, the statistics of latents) is None in a new model's config and may differ.
    """
    if type(model) is not type(start):
        raise ValueError(f"training of {type(model).__name__} cannot start from {type(start).__name__}")
    for key, wanted in model.config.items():
        if key.startswith("_") or wanted is None:
            continue
        if _plain(start.config[key]) != _plain(wanted):
            found = f"{type(start).__name__} has {key}={start.config[key]}"
            raise ValueError(f"{found}, the one to be trained has {key}={wanted}")
    model.load_state_dict(start.state_dict())


def _plain(value: object) -> object:
    """Tuples of a config come back from its file as lists."""
    return list(value) if isinstance(value, tuple) else value
