"""What the tests of the command `upscale` share: quick options, an image to upscale, and what was written."""

import numpy as np
from PIL import Image

QUICK = ("--start", "40,70,100", "--steps", "1,2,3")


def save_image(path, mode="RGB", size=(40, 24)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def written(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())
