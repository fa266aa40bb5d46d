"""What all training scripts share: options, budget, learning rate, moving average, checkpoints, log."""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from patchscaler.device import pick_dtype
from patchscaler.training.optimizer import MuonAdamW

WARMUP = 0.03  # part of the budget over which the learning rate rises
DECAY = 0.998  # of the moving average of the weights
CHECKPOINT_SECONDS = 120


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every training script takes."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="folder of tar shards or of images")
    options.add_argument("--out", type=Path, required=True, help="pipeline folder to write components into")
    options.add_argument(
        "--from", type=Path, dest="start", metavar="FOLDER",
        help="pipeline folder to start from: its weights, and what OUT lacks of the stages before",
    )  # fmt: skip
    options.add_argument("--config", choices=("compact", "paper"), default="compact")
    options.add_argument("--vae", help="take this diffusers autoencoder (folder or Hub id) and train none")
    options.add_argument("--minutes", type=float, default=30.0, help="time budget")
    options.add_argument("--steps", type=int, help="budget in steps instead of minutes")
    options.add_argument("--batch", type=int, help="samples per step")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dry-run", action="store_true", help="two steps on a few samples, no checkpoint")
    return options


def pool_size(args: argparse.Namespace, most: int) -> int:
    """Rows of a sample pool: `most`, fewer for budgets of a few minutes, so that drawing leaves time to train."""
    return min(most, 128 * max(1, int(args.minutes * most / 2560)))


def bf16(device: torch.device) -> torch.autocast:
    """Convolutions and products in bfloat16 where the device is faster in it; for the calls of networks alone.

    It needs no loss scaling.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(device) == torch.bfloat16)


def step_generator(seed: int, step: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on these numbers alone, so that a resumed run draws the same.

    Stream 0 is for the steps of training, 1 for validation.
    """
    return torch.Generator(device).manual_seed((seed << 40) ^ (stream << 32) ^ step)


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then a half cosine down to 2 % of the peak; `progress` in [0, 1]."""
    if progress < WARMUP:
        return peak * max(progress, 1e-3) / WARMUP
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))))


def fit(
    stage: str,
    model: nn.Module,
    loss: Callable[[nn.Module, int], dict[str, Tensor]],
    args: argparse.Namespace,
    *,
    batch: int,
    peak_rate: float,
) -> nn.Module:
    """Train `model` within the budget and return its exponential moving average.

    Args:
        stage: names the checkpoint `OUT/training/STAGE.pt` and the TensorBoard log beside it. A checkpoint
            that lies there is resumed; with a budget in steps the result equals that of a run never stopped.
        loss: (model, step) → named scalar tensors, of which `loss` is minimised. All of
            its randomness must come from `step_generator`.
        batch: samples per step, for the progress bar.
        peak_rate: highest learning rate.
    """
    folder = args.out / "training"
    model.to(memory_format=torch.channels_last)
    optimizer = MuonAdamW(model, peak_rate)
    average = AveragedModel(model, args.device, multi_avg_fn=_follow).eval().requires_grad_(False)
    state = {"step": 0, "elapsed": 0.0}
    checkpoint = folder / f"{stage}.pt"
    if checkpoint.exists() and not args.dry_run:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]

    def progress() -> float:
        if args.dry_run:
            return state["step"] / 2
        return state["step"] / args.steps if args.steps else state["elapsed"] / (60 * args.minutes)

    def save() -> None:
        if args.dry_run:
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = checkpoint.with_suffix(".tmp")
        weights = model.state_dict()
        torch.save({"model": weights, "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                    "state": state}, temporary)  # fmt: skip
        os.replace(temporary, checkpoint)

    log = None if args.dry_run else SummaryWriter(folder / "logs" / stage)
    bar = tqdm(desc=stage, unit=" samples", mininterval=5)
    saved_at = clock = time.perf_counter()
    while progress() < 1:
        rate = learning_rate(peak_rate, progress())
        optimizer.set_rate(rate)
        values = loss(model, state["step"])
        optimizer.zero_grad()
        values["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        average.update_parameters(model)
        if log and state["step"] % 20 == 0:
            figures = {name: float(value.detach()) for name, value in values.items()}
            for name, value in {**figures, "rate": rate}.items():
                log.add_scalar(name, value, state["step"])
            bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
        bar.update(batch)
        now = time.perf_counter()
        state["elapsed"], clock = state["elapsed"] + now - clock, now
        if now - saved_at > CHECKPOINT_SECONDS:
            save()
            saved_at = now
    bar.close()
    save()
    return average.module


@torch.no_grad()
def _follow(average: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
    """The moving average after a number of steps, by `DECAY`, less at the start, when the weights still move fast."""
    done = int(steps)
    torch._foreach_lerp_(average, current, 1 - min(DECAY, (1 + done) / (10 + done)))


def weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """What the `loss` of `fit` gives for a sum of weighted terms: the sum and, for the log, the terms themselves."""
    return {"loss": sum(weights[name] * value for name, value in terms.items()), **terms}


def save_component(model: nn.Module, folder: Path) -> None:
    """Write a model as fp16 safetensors, in shards below the Hub's 10 MB limit for files without LFS."""
    copy.deepcopy(model).to("cpu", torch.float16).save_pretrained(folder, max_shard_size="9MB")
