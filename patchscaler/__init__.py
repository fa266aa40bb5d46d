"""PatchScaler: x4 super-resolution of photographs that spends diffusion steps only where they are needed."""

from importlib import import_module
from typing import Any

from patchscaler.version import __version__

# The module of each name. It is imported when the name is first used: PyTorch and diffusers take seconds, and the
# command line has to be running by then, so that it can be stopped meanwhile.
_MODULES = {
    "CheckpointError": "loading",
    "ImageError": "images",
    "PatchScalerPipeline": "pipeline",
    "Picture": "images",
    "Progress": "results",
    "Result": "results",
    "SamplingPlan": "plan",
    "load_pipeline": "loading",
    "read_picture": "images",
    "to_pil": "images",
    "write_png": "images",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
