"""What is installed: the package with its weights from a checkout or an sdist, and the versions that were tested."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from patchscaler.loading import CheckpointError, load_pipeline

ROOT = Path(__file__).parent.parent


def listed(name: str) -> list[Requirement]:
    """The requirements in a file that hold for this Python."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_the_tested_versions_are_those_that_a_space_installs():
    pins = {requirement.name: requirement.specifier for requirement in listed("requirements.txt")}
    for name, specifier in pins.items():
        assert Version(version(name)) in specifier, name
        exact = [part for part in specifier if part.operator == "==" and "*" not in part.version]
        assert exact or name == "torch" or sys.version_info < (3, 11), name
    assert all(offered in pins["torch"] for offered in ("2.8.0", "2.11.0"))  # by ZeroGPU
    (tested,) = (requirement for requirement in listed("constraints.txt") if requirement.name == "torch")
    assert Version(version("torch")) in tested.specifier
    assert str(tested.specifier).startswith("==") and Version(version("torch")).public in pins["torch"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a package is built from, without anything that an earlier build left."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("patchscaler", "assets/weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_upscales_from_any_folder(checkout, tmp_path):
    pip = ("-m", "pip", "--disable-pip-version-check")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    python("-c", build, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    wheels = []
    for name, place in (("whole", checkout), ("again", sdist)):
        python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / name, place, cwd=tmp_path)
        wheels += (tmp_path / name).glob("*.whl")
    wheel, again = wheels
    inside = contents(wheel)
    assert inside == contents(again)

    metadata = next(text for name, text in inside.items() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(metadata.decode())
    code = [path.relative_to(ROOT) for path in (ROOT / "patchscaler").rglob("*") if path.is_file()]
    missing = {path.as_posix() for path in code if "__pycache__" not in path.parts} - inside.keys()
    assert not missing
    pins = {requirement.name: requirement for requirement in listed("requirements.txt")}
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    needed = {requirement.name: requirement for requirement in needed if "extra" not in str(requirement.marker)}
    assert needed.keys() == pins.keys()
    for name in needed.keys() - {"torch"}:
        assert Version(version(name)) in needed[name].specifier, name

    installed, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    python(*pip, "install", "--no-deps", "--no-compile", "--target", installed, wheel, cwd=empty)
    Image.new("RGB", (12, 8), "teal").save(empty / "a.png")
    quick = ("--plan", "fast", "--device", "cpu")
    where = {"PYTHONPATH": str(installed)}
    file = python("-c", "import patchscaler; print(patchscaler.__file__)", cwd=empty, **where)
    assert file.startswith(str(installed))
    python("-m", "patchscaler", "upscale", "a.png", "-o", "out", *quick, cwd=empty, **where)
    with Image.open(empty / "out" / "a.png") as image:
        assert image.size == (48, 32)


def test_a_hub_id_behind_a_socks_proxy_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="owner/name is no folder, and the Hub does not give it"):
        load_pipeline("owner/name", "cpu")


def test_without_weights_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("patchscaler.loading.DEFAULT_WEIGHTS", tmp_path / "none")
    with pytest.raises(CheckpointError, match="no weights at .*none: install PatchScaler from a checkout or its git"):
        load_pipeline(tmp_path / "none")
