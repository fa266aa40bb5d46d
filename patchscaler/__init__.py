"""PatchScaler: x4 super-resolution of photographs that spends diffusion steps only where they are needed."""

from patchscaler.images import ImageError, Picture, read_picture, to_pil, write_png
from patchscaler.loading import CheckpointError, load_pipeline
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Progress, Result

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ImageError",
    "PatchScalerPipeline",
    "Picture",
    "Progress",
    "Result",
    "SamplingPlan",
    "load_pipeline",
    "read_picture",
    "to_pil",
    "write_png",
]
