"""What the autoencoder is worth alone.

python -m patchscaler.evaluation.components --images DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from patchscaler.evaluation.metrics import psnr_rgb, to_8bit
from patchscaler.evaluation.pairs import MAX_TRUTH_PIXELS, find_images, read_image
from patchscaler.evaluation.tables import table
from patchscaler.images import ImageError
from patchscaler.loading import DEFAULT_WEIGHTS, CheckpointError, load_pipeline
from patchscaler.models import decode_latents, encode_latents
from patchscaler.patches import LATENT_PIXELS
from patchscaler.pipeline import PatchScalerPipeline


@torch.inference_mode()
def autoencoder_psnr(pipeline: PatchScalerPipeline, folder: Path) -> dict[str, float]:
    """RGB PSNR in dB, per image of the folder, of what the autoencoder makes of it, as an 8-bit file holds it."""
    psnr = {}
    for path in find_images(folder).values():
        image = read_image(path, MAX_TRUTH_PIXELS).rgb[None]
        height, width = (side - side % LATENT_PIXELS for side in image.shape[-2:])  # whole cells
        if not min(height, width):
            raise ImageError(f"{path} is {image.shape[3]}×{image.shape[2]}; the autoencoder needs 8×8 at least")
        image = image[..., :height, :width]  # 1×3×H×W
        latents = encode_latents(pipeline.vae, image.to(pipeline.device))  # 1×C×h×w
        psnr[path.name] = psnr_rgb(to_8bit(decode_latents(pipeline.vae, latents)[0].cpu()), image[0])
    return psnr


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of images for the autoencoder")
    add("--weights", default=DEFAULT_WEIGHTS, help="pipeline folder or Hub id (default: the repository's)")
    args = parser.parse_args(argv)
    try:
        psnr = autoencoder_psnr(load_pipeline(args.weights), args.images)
    except (CheckpointError, FileNotFoundError) as error:
        parser.error(str(error))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    row = [f"`{args.images}`", str(len(psnr)), f"{sum(psnr.values()) / len(psnr):.2f} dB"]
    print("\n".join(table(["autoencoder", "images", "RGB PSNR"], [row])))


if __name__ == "__main__":
    main()
