"""Loading a pipeline from a folder or the Hugging Face Hub, strictly: nothing missing, nothing left over."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import snapshot_download

from patchscaler.device import pick_device, pick_dtype
from patchscaler.pipeline import PatchScalerPipeline

# Where an installed package has them, and where a checkout does.
_INSTALLED, _CHECKED_OUT = Path(__file__).parent / "weights", Path(__file__).parent.parent / "assets" / "weights"
DEFAULT_WEIGHTS = (_INSTALLED if _INSTALLED.is_dir() else _CHECKED_OUT) / "compact"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CHECKSUMS = "SHA256SUMS"  # as `sha256sum` writes and checks it


class CheckpointError(ValueError):
    """A pipeline folder that is incomplete, damaged or not one of ours; the message says what is wrong."""


def load_pipeline(
    source: str | Path = DEFAULT_WEIGHTS,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    devices: Sequence[str | torch.device] = (),
) -> PatchScalerPipeline:
    """Load what `PatchScalerPipeline.save_pretrained` wrote, ready to run.

    `source` is a folder or a Hub id "owner/name". Device and dtype are the best there are unless given: see
    `pick_device` and `pick_dtype`.
    Only safetensors are read, only classes of this package and of diffusers are built, and a missing or
    unexpected component or weight, or an unknown config key, raises CheckpointError, where diffusers would only warn.
    So does a file that is not as the folder's SHA256SUMS has it; a folder without that list is taken as it is.

    Of several `devices`, in place of `device`, the first runs everything, the others refine patches too.
    """
    if devices and device is not None:
        raise ValueError("both device and devices are given")
    device, *others = map(pick_device, devices or [device])
    dtype = dtype if isinstance(dtype, torch.dtype) else pick_dtype(device, dtype)
    folder = _folder(source)
    _check_checksums(folder)
    kinds = _component_classes(folder / PatchScalerPipeline.config_name)
    with _no_bars():
        components = {name: load_component(folder / name, kind, dtype) for name, kind in kinds.items()}
    try:
        pipeline = PatchScalerPipeline(**components).to(device)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    pipeline.refine_on(others)
    return pipeline


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without diffusers' progress bar for each component in several files: all of them take a second."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def write_checksums(folder: Path) -> None:
    """List the files of a pipeline folder in its SHA256SUMS, against which `load_pipeline` checks them."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in _pipeline_files(folder)]
    (folder / CHECKSUMS).write_text("".join(lines))


def _check_checksums(folder: Path) -> None:
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CHECKSUMS} cannot be read: {error}") from error
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = _pipeline_files(folder)
    _refuse_differences(f"{folder}: files of {CHECKSUMS}", listed.keys() - set(found), set(found) - listed.keys())
    for name in found:
        if sha256(folder / name) != listed[name]:
            raise CheckpointError(f"{folder / name} was altered or cut off: it is not as {CHECKSUMS} has it")


def _pipeline_files(folder: Path) -> list[str]:
    """All that is loaded from a pipeline folder, by relative path; not the model card, nor what training keeps."""
    parts = inspect.signature(PatchScalerPipeline).parameters
    files = [folder / PatchScalerPipeline.config_name]
    files += [file for part in parts for kind in ("*.json", "*.safetensors") for file in (folder / part).glob(kind)]
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if source == DEFAULT_WEIGHTS:
        raise CheckpointError(
            f"this installation has no weights at {source}: install PatchScaler from a checkout or its git URL, "
            "which bring them along, or name a pipeline folder or Hub id"
        )
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source} is neither a folder nor a Hub id like owner/name")
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", CHECKSUMS]))
    except (OSError, ValueError, ImportError) as error:  # ImportError: a SOCKS proxy needs a package
        raise CheckpointError(f"{source} is no folder, and the Hub does not give it: {error}") from error


def _component_classes(index_file: Path) -> dict[str, type]:
    """What model_index.json says that each component is."""
    try:
        entries = json.loads(index_file.read_text())
        entries = {name: tuple(entry) for name, entry in entries.items() if not name.startswith("_")}
    except FileNotFoundError as error:
        raise CheckpointError(f"{index_file.parent} is not a pipeline folder: it has no {index_file.name}") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index_file} cannot be read: {error}") from error
    expected = inspect.signature(PatchScalerPipeline).parameters.keys()
    _refuse_differences(f"{index_file}: components", expected - entries.keys(), entries.keys() - expected)
    return {name: _component_class(name, entry) for name, entry in entries.items()}


def _component_class(name: str, entry: tuple) -> type:
    try:
        module, class_name = entry
        if module == "diffusers" or module.startswith("patchscaler.models."):
            kind = getattr(import_module(module), class_name)
            if issubclass(kind, (ModelMixin, SchedulerMixin)):
                return kind
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} is {entry}, which is not a class that can be loaded: {error}") from error
    raise CheckpointError(f"{name} is {entry}, not a model or scheduler of patchscaler.models or diffusers")


def load_component(folder: Path, kind: type, dtype: torch.dtype) -> torch.nn.Module | SchedulerMixin:
    """A model or scheduler of class `kind` from a folder. CheckpointError for missing or unexpected keys or weights."""
    try:
        config = {key for key in kind.load_config(folder) if not key.startswith("_")}
        if not kind.__module__.startswith("diffusers.models."):  # AutoencoderTiny saves a key it does not take
            _refuse_differences(f"{folder}: config keys", (), config - inspect.signature(kind).parameters.keys())
        if issubclass(kind, SchedulerMixin):
            return kind.from_pretrained(folder)
        # Low memory use needs accelerate, for whose absence diffusers has a warning per model.
        options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": False}
        model, info = kind.from_pretrained(folder, **options)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
    _refuse_differences(f"{folder}: weights", info["missing_keys"], info["unexpected_keys"])
    return model


def _refuse_differences(what: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    if missing or unexpected:
        raise CheckpointError(f"{what}: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
