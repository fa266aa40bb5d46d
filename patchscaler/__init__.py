"""PatchScaler: x4 super-resolution of photographs that spends diffusion steps only where they are needed."""

from patchscaler.images import ImageError, Picture, read_picture, to_pil, write_png
from patchscaler.loading import CheckpointError, load_pipeline
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan
from patchscaler.results import Progress, Result
from patchscaler.version import __version__

__all__ = [
    "CheckpointError",
    "ImageError",
    "PatchScalerPipeline",
    "Picture",
    "Progress",
    "Result",
    "SamplingPlan",
    "__version__",
    "load_pipeline",
    "read_picture",
    "to_pil",
    "write_png",
]
