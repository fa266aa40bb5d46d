from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from conftest import make_tiny_pipeline
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from patchscaler import loading
from patchscaler.images import Picture
from patchscaler.loading import CHECKSUMS, CheckpointError, load_pipeline, write_checksums
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan

PLAN = SamplingPlan(0.95, 0.75, start=(200, 500, 900), steps=(1, 2, 3))
PICTURE = Picture(torch.linspace(-1, 1, 3 * 33 * 34).view(3, 33, 34))
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def load(folder):
    return load_pipeline(folder, device="cpu", dtype=torch.float32)


def test_model_index_is_pinned(saved):
    """Where a class is defined is part of every checkpoint: moving a file breaks those already saved."""
    index = json.loads((saved / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if name != "_diffusers_version"} == {
        "_class_name": "PatchScalerPipeline",
        "grm": ["patchscaler.models.grm", "GRM"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "texture_classifier": ["patchscaler.models.texture_classifier", "TextureClassifier"],
        "texture_encoder": ["patchscaler.models.texture_encoder", "TextureEncoder"],
        "texture_memory": ["patchscaler.models.texture_memory", "TextureMemory"],
        "transformer": ["patchscaler.models.patch_dit", "PatchDiT"],
        "vae": ["patchscaler.models.autoencoder", "CompactAutoencoder"],
    }


@pytest.mark.parametrize("loader", [load, PatchScalerPipeline.from_pretrained], ids=["strict", "diffusers"])
def test_round_trip_gives_the_same_output(tiny_pipeline, saved, loader):
    expected = tiny_pipeline(PICTURE, PLAN).picture.rgb
    assert torch.equal(loader(saved)(PICTURE, PLAN).picture.rgb, expected)


def test_dtype_and_mode_of_what_is_loaded(saved):
    half = load_pipeline(saved, device="cpu", dtype=torch.bfloat16)
    for name, component in half.components.items():
        for parameter in component.parameters() if isinstance(component, torch.nn.Module) else ():
            assert parameter.dtype == torch.bfloat16, name
    assert not half.transformer.training
    expected = load(saved).to(torch.bfloat16)(PICTURE, PLAN).picture.rgb
    assert torch.equal(half(PICTURE, PLAN).picture.rgb, expected)
    assert torch.get_default_dtype() == torch.float32


def test_a_scheduler_of_other_betas_is_refused(copied):
    edit_json(copied / "scheduler" / "scheduler_config.json", beta_schedule="scaled_linear")
    with pytest.raises(CheckpointError, match="scheduler \\(scaled_linear betas.* Patch-DiT was trained with has abar"):
        load(copied)


def test_half_precision_files_load_in_any_dtype(tmp_path, tiny_pipeline):
    make_tiny_pipeline().to(torch.float16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "transformer" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    pipeline = load(tmp_path)
    assert pipeline.transformer.dtype == torch.float32
    difference = pipeline(PICTURE, PLAN).picture.rgb - tiny_pipeline(PICTURE, PLAN).picture.rgb
    assert difference.abs().mean() < 0.01


def test_device_and_dtype_are_picked(saved, monkeypatch):
    monkeypatch.setattr(loading, "pick_dtype", lambda device, name: torch.float32)
    pipeline = load_pipeline(str(saved))
    assert pipeline.transformer.dtype == torch.float32
    with pytest.raises(ValueError, match="nonsense"):
        load_pipeline(saved, device="nonsense")


@pytest.mark.parametrize("component", ["vae", "grm", "transformer", "texture_encoder", "texture_memory"])
def test_a_missing_weight_is_named(copied, component):
    tensors = load_file(copied / component / WEIGHTS)
    key = sorted(tensors)[0]
    del tensors[key]
    save_file(tensors, copied / component / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{component}: weights: missing \['{key}'\], unexpected \[\]"):
        load(copied)


def test_an_unexpected_weight_is_named(copied):
    tensors = load_file(copied / "grm" / WEIGHTS)
    save_file({**tensors, "extra.weight": torch.zeros(1)}, copied / "grm" / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"grm: weights: missing \[\], unexpected \['extra.weight'\]"):
        load(copied)


def test_a_weight_of_another_shape(copied):
    edit_json(copied / "grm" / "config.json", widths=[16, 32])
    with pytest.raises(CheckpointError, match="grm cannot be loaded"):
        load(copied)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("path", ["grm/config.json", "scheduler/scheduler_config.json"])
def test_an_unknown_config_key_is_named(copied, path):
    edit_json(copied / path, colour="blue")
    with pytest.raises(CheckpointError, match=r"config keys: missing \[\], unexpected \['colour'\]"):
        load(copied)


def test_a_cut_off_file(copied):
    file = copied / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="vae cannot be loaded"):
        load(copied)


def test_pickles_are_never_read(copied):
    tensors = load_file(copied / "grm" / WEIGHTS)
    (copied / "grm" / WEIGHTS).unlink()
    torch.save(tensors, copied / "grm" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="grm cannot be loaded"):
        load(copied)


@pytest.fixture
def summed(copied):
    write_checksums(copied)
    return copied


def test_checksums_are_those_of_every_file_that_is_loaded(summed):
    (summed / "README.md").write_text("the card may change")
    (summed / "training").mkdir()
    (summed / "training" / "grm.json").write_text("{}")
    assert isinstance(load(summed), PatchScalerPipeline)
    lines = (summed / CHECKSUMS).read_text().splitlines()
    assert len(lines) == 1 + 6 * 2 + 1  # model_index.json, six models of config and weights, the scheduler
    digest = hashlib.sha256((summed / "grm" / WEIGHTS).read_bytes()).hexdigest()
    assert f"{digest}  grm/{WEIGHTS}" in lines


@pytest.mark.parametrize("place", [0, 100, -1])
@pytest.mark.parametrize("name", [f"transformer/{WEIGHTS}", "vae/config.json", "model_index.json"])
def test_one_flipped_bit_is_found_and_its_file_named(summed, name, place):
    data = bytearray((summed / name).read_bytes())
    data[place] ^= 1
    (summed / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} was altered or cut off"):
        load(summed)


def test_a_file_that_was_cut_off_is_named(summed):
    file = summed / "texture_memory" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"texture_memory/{WEIGHTS} was altered or cut off"):
        load(summed)


def test_files_that_are_missing_or_not_on_the_list_are_named(summed):
    (summed / "grm" / WEIGHTS).unlink()
    (summed / "vae" / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"missing \['grm/{WEIGHTS}'\], unexpected \['vae/more.safetensors'\]"):
        load(summed)


def test_checksums_that_are_no_text_are_refused(summed):
    (summed / CHECKSUMS).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=f"{CHECKSUMS} cannot be read"):
        load(summed)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["os", "system"], "not a model or scheduler of"),
        (["patchscaler.models.nothing", "GRM"], "which is not a class that can be loaded"),
        (["patchscaler.models.grm", "Nothing"], "which is not a class that can be loaded"),
        (["diffusers", "DiffusionPipeline"], "not a model or scheduler of"),
        (["diffusers", "logging"], "which is not a class that can be loaded"),
        ([None, None], "which is not a class that can be loaded"),
        (["patchscaler.models.grm"], "which is not a class that can be loaded"),
    ],
)
def test_other_classes_are_refused(copied, entry, message):
    edit_json(copied / "model_index.json", grm=entry)
    with pytest.raises(CheckpointError, match=f"grm is .*{message}"):
        load(copied)


def test_components_must_be_those_of_the_pipeline(copied, tmp_path):
    edit_json(copied / "model_index.json", text_encoder=["diffusers", "AutoencoderKL"])
    with pytest.raises(CheckpointError, match=r"components: missing \[\], unexpected \['text_encoder'\]"):
        load(copied)
    (copied / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(copied)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="empty is not a pipeline folder: it has no model_index.json"):
        load(empty)


def test_hub_ids_are_downloaded(saved, monkeypatch):
    asked = {}

    def download(source, **options):
        asked.update(options, source=source)
        return str(saved)

    monkeypatch.setattr(loading, "snapshot_download", download)
    assert isinstance(load("someone/patchscaler"), PatchScalerPipeline)
    assert asked == {"source": "someone/patchscaler", "allow_patterns": ["*.json", "*.safetensors", CHECKSUMS]}


def test_neither_folder_nor_hub_id(tmp_path, monkeypatch):
    for source in (tmp_path / "nothing", "a/b/c", "nothing", "/nothing", "./nothing", "nothing/"):
        with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
            load(source)

    def fail(source, **options):
        raise FileNotFoundError("offline")

    monkeypatch.setattr(loading, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="someone/else is no folder.*offline"):
        load("someone/else")


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny])
def test_diffusers_autoencoders_round_trip(kind, tmp_path):
    if kind is AutoencoderKL:
        vae = kind(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            norm_num_groups=2,
        )
    else:
        vae = kind(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    pipeline = make_tiny_pipeline(vae)
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.vae) is kind
    expected = pipeline(PICTURE, PLAN).picture.rgb
    assert torch.equal(loaded(PICTURE, PLAN).picture.rgb, expected)
