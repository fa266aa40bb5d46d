"""Train everything in order: python -m patchscaler.training.weights --data DIR --out DIR --minutes 40

Autoencoder, texture classifier, GRM, texture memory, Patch-DiT: each gets its share of the minutes that are left. Run
it again after an interruption: it goes on in the stage where it was cut off. With `--from` every network starts from
its weights in that pipeline folder; the texture memory is always built from the data. OUT is then a pipeline folder
with a model card, and OUT/training, which is not part of it, may be deleted.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from patchscaler.loading import load_component, write_checksums
from patchscaler.models import GRM, PatchDiT, TextureClassifier, TextureEncoder, TextureMemory, load_autoencoder
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.training import autoencoder, build_memory, grm, patch_dit, texture_classifier
from patchscaler.training.data import image_bank
from patchscaler.training.fit import parser
from patchscaler.training.patch_dit import make_scheduler

Stage = Callable[[argparse.Namespace], dict[str, float]]
# name → (function, share of the minutes)
STAGES: dict[str, tuple[Stage, float]] = {
    "autoencoder": (autoencoder.train, 0.25),
    "texture_classifier": (texture_classifier.train, 0.03),
    "grm": (grm.train, 0.33),
    "build_memory": (build_memory.build, 0.02),
    "patch_dit": (patch_dit.train, 0.37),
}
COMPONENTS = {
    "grm": GRM,
    "transformer": PatchDiT,
    "texture_classifier": TextureClassifier,
    "texture_encoder": TextureEncoder,
    "texture_memory": TextureMemory,
}


def run(args: argparse.Namespace) -> None:
    """Run the stages that have not ended yet, then write model_index.json and the model card."""
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    images = len(image_bank(args.data, torch.device(args.device)))
    records = {name: _read(args.out, name) for name in STAGES}
    # what finished and interrupted stages used counts, so that all runs together keep to the minutes
    started_minutes = {name: 0.0 if records[name] else _elapsed(args.out, name) for name in STAGES}
    spent = sum(record.get("minutes", 0.0) for record in records.values()) + sum(started_minutes.values())
    budget = args.minutes - spent
    for name, (stage, _) in STAGES.items():
        if records[name] and not args.dry_run:
            continue
        left = budget - (time.perf_counter() - began) / 60
        shares = [share for other, (_, share) in STAGES.items() if not records[other]]
        minutes = (left + started_minutes[name]) * STAGES[name][1] / sum(shares)
        started = time.perf_counter()
        figures = stage(argparse.Namespace(**{**vars(args), "minutes": max(0.1, minutes)}))
        took = (time.perf_counter() - started) / 60 + started_minutes[name]
        records[name] = {"minutes": took, "figures": figures}
        path = _record(args.out, name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records[name], indent=2))
    assemble(args.out)
    (args.out / "README.md").write_text(model_card(args, records, images))
    print(f"{args.out} is a pipeline folder: python -m patchscaler upscale IMAGE -o DIR --weights {args.out}")


def assemble(out: Path) -> None:
    """Write the model_index.json that makes a pipeline of the components in `out`, and the checksums of it all."""
    models = {name: load_component(out / name, kind, torch.float32) for name, kind in COMPONENTS.items()}
    PatchScalerPipeline(load_autoencoder(out / "vae"), **models, scheduler=make_scheduler()).save_config(out)
    write_checksums(out)


def model_card(args: argparse.Namespace, records: dict[str, dict], images: int) -> str:
    """The card beside the weights: data, time, hardware and what each stage measured on held-out images."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    origin = f"from the weights in `{args.start}`" if args.start else "from scratch"
    lines = [
        "---", "license: apache-2.0", "library_name: diffusers", "pipeline_tag: image-to-image",
        "tags: [super-resolution, patchscaler]", "---", "",
        f"# PatchScaler weights, configuration `{args.config}`", "",
        f"Trained {origin} by `python -m patchscaler.training.weights`.", "",
        "Where the training goes beyond the paper, which names no loss for Patch-DiT but x₀ prediction: GRM and",
        "Patch-DiT are trained through the frozen decoder on L1 of the pixels and on a feature distance in",
        "EfficientNet-Lite0 and -Lite1 (Lite2, by which `evaluate` measures, is never trained against); Patch-DiT's",
        "inputs are those of sampling, its own predictions among them.", "",
        "| | |", "|---|---|",
        f"| date | {date.today()} |",
        f"| data | {images} training images; one in twenty held out, one in ten others for the texture memory |",
        f"| hardware | {device}, {platform.machine()} |",
        f"| seed | {args.seed} |", "",
        "| stage | minutes |", "|---|---|",
        *(f"| {name} | {record['minutes']:.1f} |" for name, record in records.items()), "",
        "Measured by the training itself, on held-out images:", "",
        "| figure | value |", "|---|---|",
        *(f"| {name} | {value:.4g} |" for record in records.values() for name, value in record["figures"].items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _record(out: Path, name: str) -> Path:
    return out / "training" / f"{name}.json"


def _read(out: Path, name: str) -> dict:
    path = _record(out, name)
    return json.loads(path.read_text()) if path.exists() else {}


def _elapsed(out: Path, name: str) -> float:
    """Minutes that an interrupted stage had trained for when it wrote its last checkpoint."""
    path = out / "training" / f"{name}.pt"
    return torch.load(path, weights_only=True, mmap=True)["state"]["elapsed"] / 60 if path.exists() else 0.0


if __name__ == "__main__":
    run(parser(__doc__).parse_args())
