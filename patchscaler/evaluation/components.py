"""What the parts of a pipeline are worth alone: its autoencoder and its confidence; and how images are read for that.

python -m patchscaler.evaluation.components --images DIR

N patches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from patchscaler import files
from patchscaler.evaluation.metrics import psnr_rgb
from patchscaler.evaluation.tables import table
from patchscaler.images import ImageError, Picture, read_picture
from patchscaler.limits import MAX_INPUT_PIXELS
from patchscaler.loading import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.models import decode_latents, encode_latents
from patchscaler.patches import LATENT_PIXELS, PatchGrid
from patchscaler.pipeline import SCALE, PatchScalerPipeline

MAX_TRUTH_PIXELS = SCALE**2 * MAX_INPUT_PIXELS


@torch.inference_mode()
def autoencoder_psnr(pipeline: PatchScalerPipeline, folder: Path) -> dict[str, float]:
    """RGB PSNR in dB, per image of the folder, of what the autoencoder makes of it, as an 8-bit file holds it."""
    psnr = {}
    for path in find_images(folder).values():
        image = read_image(path, MAX_TRUTH_PIXELS).rgb[None]
        height, width = (side - side % LATENT_PIXELS for side in image.shape[-2:])  # whole cells
        if not min(height, width):
            raise ImageError(f"{path} is {image.shape[3]}x{image.shape[2]}; the autoencoder needs 8x8 at least")
        image = image[..., :height, :width]  # 1x3xHxW
        latents = encode_latents(pipeline.vae, image.to(pipeline.device))  # 1xCxhxw
        psnr[path.name] = psnr_rgb(to_8bit(decode_latents(pipeline.vae, latents)[0].cpu()), image[0])
    return psnr


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors of N, in [-1, 1]; NaN if one is constant. ModuleNotFoundError without scipy."""
    from scipy.stats import spearmanr  # of the extra `eval`

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def patch_errors(image: Tensor, truth: Tensor, grid: PatchGrid) -> Tensor:
    """Mean squared error in the pixels of each patch: two images 3xHxW -> N in the grid's order.

    H and W may be less than the grid's, as they are for an output that was padded to whole patches.
    """
    error = (image - truth).square().mean(0)  # HxW
    return torch.stack([patch.pixels(error).mean() for patch in grid.patches])


def find_images(folder: Path) -> dict[str, Path]:
    """Stem -> file of the images directly in a folder, by name. FileNotFoundError if there is none."""
    images, others = files.sort_out(files.listed(folder))
    if not images:
        raise FileNotFoundError(files.no_image(folder, others))
    found: dict[str, Path] = {}
    for path in (folder / name for name in images):
        if found.setdefault(path.stem, path) != path:
            raise ValueError(f"{found[path.stem]} and {path} have one stem")
    return found


def read_image(path: Path, max_input_pixels: int = MAX_INPUT_PIXELS) -> Picture:
    """`read_picture`, with the file named in the ImageError."""
    try:
        return read_picture(path, max_input_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def to_8bit(image: Tensor) -> Tensor:
    """What an 8-bit file of the image, of any shape and in [-1, 1], gives back."""
    return ((image + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of images for the autoencoder")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    args = parser.parse_args(argv)
    try:
        psnr = autoencoder_psnr(load_pipeline(args.weights), args.images)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    row = [f"`{args.images}`", str(len(psnr)), f"{sum(psnr.values()) / len(psnr):.2f} dB"]
    print("\n".join(table(["autoencoder", "images", "RGB PSNR"], [row])))


if __name__ == "__main__":
    main()
