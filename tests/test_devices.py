from __future__ import annotations

import time

import pytest
import torch

from patchscaler import devices


@pytest.fixture(autouse=True)
def forget_measurement():
    devices._measured_cpu_dtype.cache_clear()
    yield
    devices._measured_cpu_dtype.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_takes_the_best_there_is(monkeypatch, name, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)  # it may not be there
    assert devices.pick_device(name) == torch.device(expected)


def test_a_named_device_is_taken_as_it_is():
    assert devices.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["bogus", "", "cuda:99", "cpu:x"])
def test_unknown_and_missing_devices_are_refused(name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        devices.pick_device(name)


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda_takes_bf16_where_the_gpu_has_it(monkeypatch, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert devices.pick_dtype(torch.device("cuda")) is expected


def test_mps_takes_float32():
    assert devices.pick_dtype(torch.device("mps")) is torch.float32


@pytest.mark.parametrize(("bf16", "expected"), [(0.5, torch.bfloat16), (0.9, torch.float32)])
def test_cpu_takes_bf16_only_if_clearly_faster(monkeypatch, bf16, expected):
    monkeypatch.setattr(devices, "_seconds", lambda dtype: bf16 if dtype is torch.bfloat16 else 1)
    assert devices.pick_dtype(torch.device("cpu")) is expected


def test_cpu_is_measured_once_and_quickly():
    start = time.perf_counter()
    first = devices.pick_dtype(torch.device("cpu"))
    assert time.perf_counter() - start < 3  # 0.3 s on a machine that does nothing else
    assert first in (torch.bfloat16, torch.float32)
    assert devices.pick_dtype(torch.device("cpu")) is first
    assert devices._measured_cpu_dtype.cache_info().misses == 1


def test_copies_to_the_host_are_whole_and_contiguous_as_soon_as_they_were_waited_for():
    host = devices.HostCopies(torch.device("cpu"))
    turned = torch.randn(4, 3).T
    copy = host.take(turned)
    host.wait()
    assert copy.is_contiguous() and torch.equal(copy, turned)


def test_what_a_cpu_does_is_over_at_once():
    laps = devices.Laps(torch.device("cpu"))
    time.sleep(0.02)
    laps.mark()
    with devices.beside(torch.device("cpu")):
        time.sleep(0.01)
    laps.mark()
    assert laps.over()
    first, second = laps.seconds()
    assert first >= 0.02 and second >= 0.01


def test_the_largest_batch_of_a_gpu_is_known_without_one():
    assert devices.most_at_once(torch.device("cuda")) == 1024 and devices.most_at_once(torch.device("cpu")) == 64
