"""Pairs of inputs and truths that no training saw, as files, for the commands that measure on folders.

python -m patchscaler.training.held_out --data DIR -o OUT [--count 96] [--size 256]

The truths are crops of the held-out images; the inputs are degraded as those of the training are. OUT/lr and OUT/hr are
what `evaluate`, `sweep` and `ceilings` take.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from patchscaler.images import Picture, write_png
from patchscaler.training.data import ImageBank
from patchscaler.training.degradation import degrade
from patchscaler.training.pairs import SHARES


def write_pairs(bank: ImageBank, out: Path, count: int, size: int, seed: int = 0) -> None:
    """Write `count` crops of `size` pixels to hr/000.png ... and their inputs, a quarter of that, to lr/000.png ...

    Each kind of `SHARES` degrades its share of them, drawn crop by crop. ValueError if 4 does not divide `size`,
    FileExistsError if there are files in lr or hr.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds, shares = list(SHARES), torch.tensor([*SHARES.values()])
    for folder in (out / "lr", out / "hr"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} has files already; choose another folder")
    for index in range(count):
        truth, _ = bank.crops(1, size, generator)  # 1×3×size×size
        kind = kinds[torch.multinomial(shares, 1, generator=generator).item()]
        pair = {"lr": degrade(truth, generator, kind), "hr": truth}
        for name, image in pair.items():
            write_png(Picture(image[0].cpu()), out / name / f"{index:03}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="tar shards or a folder of images, as for the training")
    add("-o", "--out", type=Path, required=True, help="folder for lr and hr, in which no files are yet")
    add("--count", type=int, default=96, help="pairs (default: 96)")
    add("--size", type=int, default=256, help="pixels along a side of a truth (default: 256)")
    args = parser.parse_args(argv)
    try:
        write_pairs(ImageBank(args.data, part="held-out"), args.out, args.count, args.size)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
