from __future__ import annotations

import platform
import time
from pathlib import Path

import pytest
import torch

from patchscaler import device


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_takes_the_best_there_is(monkeypatch, name, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)  # it may not be there
    assert device.pick_device(name) == torch.device(expected)


def test_a_named_device_is_taken_as_it_is():
    assert device.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["bogus", "", "cuda:99", "cpu:x"])
def test_unknown_and_missing_devices_are_refused(name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        device.pick_device(name)


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda_takes_bf16_where_the_gpu_has_it(monkeypatch, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert device.pick_dtype(torch.device("cuda")) is expected


def test_mps_takes_float32():
    assert device.pick_dtype(torch.device("mps")) is torch.float32


@pytest.mark.parametrize("named", ["avx512_bf16", "amx_tile"])
def test_a_cpu_takes_bf16_if_it_has_instructions_for_it(monkeypatch, named):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == named, raising=False)
    assert device.pick_dtype(torch.device("cpu")) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, f"_is_{named}_supported", lambda: False)
    assert device.pick_dtype(torch.device("cpu")) is torch.float32
    for name in ("avx512_bf16", "amx_tile"):  # as in a torch that cannot be asked
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported")
    assert device.pick_dtype(torch.device("cpu")) is torch.float32


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or "x86" not in platform.machine(), reason="Linux on x86 only")
def test_the_precision_is_that_of_the_processor():
    flags = Path("/proc/cpuinfo").read_text()
    has = "avx512_bf16" in flags or "amx_tile" in flags
    assert device.pick_dtype(torch.device("cpu")) is (torch.bfloat16 if has else torch.float32)


def test_a_precision_is_taken_by_name_from_the_call_or_the_environment(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("PATCHSCALER_DTYPE", "float16")
    assert device.pick_dtype(cpu) is torch.float16
    assert device.pick_dtype(cpu, "float32") is torch.float32  # what is asked for comes first
    monkeypatch.setenv("PATCHSCALER_DTYPE", "float8")
    with pytest.raises(ValueError, match="dtype 'float8' is none of auto, float32, bfloat16, float16"):
        device.pick_dtype(cpu)


def test_a_stopwatch_adds_up_stages_and_drops_what_is_none():
    clock = device.Stopwatch(torch.device("cpu"))
    for stage in ("a", None, "b", "a"):
        time.sleep(0.02)
        assert clock.lap(stage) >= 0.02
    assert clock.seconds.keys() == {"a", "b"} and clock.seconds["c"] == 0
    assert 0.04 <= clock.seconds["a"] and 0.02 <= clock.seconds["b"] < clock.seconds["a"]
