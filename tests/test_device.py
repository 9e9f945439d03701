"""Devices and precisions: what was asked for, or an error that says what to type."""

from __future__ import annotations

import pytest
import torch

from dreamsr_cli import cpu_precision, device
from dreamsr_cli.device import PRECISIONS, choose_device, choose_dtype, dtype_name
from dreamsr_cli.errors import DeviceError, UsageError

CPU = torch.device("cpu")


def machine(monkeypatch, *present: str, cuda_devices: int = 1) -> None:
    """Pretend that these accelerators, and no others, are here: torch is asked, not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in present)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices if "cuda" in present else 0)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in present)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in present)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [((), "cpu"), (("cuda",), "cuda"), (("xpu",), "xpu"), (("mps",), "mps"), (("cuda", "xpu", "mps"), "cuda")],
)
def test_auto_takes_an_accelerator_if_there_is_one(monkeypatch, present, chosen) -> None:
    machine(monkeypatch, *present)
    assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1", "mps", "xpu"])
def test_a_device_that_is_there_is_taken_as_named(monkeypatch, name) -> None:
    machine(monkeypatch, "cuda", "mps", "xpu", cuda_devices=2)
    assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu"])
def test_a_device_that_is_not_there_is_an_error_never_another_one(monkeypatch, name) -> None:
    machine(monkeypatch)
    with pytest.raises(DeviceError, match=f"--device {name}.*--device cpu"):
        choose_device(name)


def test_a_gpu_beyond_the_last_is_not_there(monkeypatch) -> None:
    machine(monkeypatch, "cuda", cuda_devices=2)
    with pytest.raises(DeviceError, match="cuda:2"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["toaster", "", "cuda:x", "meta", "CPU"])
def test_what_is_no_device_is_a_usage_error(name) -> None:
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
    ],
)
def test_auto_precision_of_a_cpu_is_bfloat16_only_where_it_is_native(monkeypatch, capability, dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability)
    monkeypatch.setattr(device, "bf16_gain", lambda: 2.0)
    assert choose_dtype("auto", CPU) == dtype
    monkeypatch.setattr(device, "bf16_gain", lambda: 0.9)
    assert choose_dtype("auto", CPU) == torch.float32


def test_the_gain_of_bfloat16_is_measured_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path))
    gain = cpu_precision.bf16_gain()
    assert gain > 0
    monkeypatch.setattr(cpu_precision, "measure_bf16_gain", lambda: gain + 1)
    assert cpu_precision.bf16_gain() == pytest.approx(gain, abs=1e-3)
    torch.set_num_threads(2)
    assert cpu_precision.bf16_gain() == pytest.approx(gain + 1)
    (tmp_path / cpu_precision.FILE).write_text("nonsense")
    assert cpu_precision.bf16_gain() == pytest.approx(gain + 1)


@pytest.mark.parametrize(
    ("name", "native", "dtype"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("xpu", False, torch.bfloat16),
        ("mps", False, torch.float32),
    ],
)
def test_auto_precision_of_accelerators(monkeypatch, name, native, dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert choose_dtype("auto", torch.device(name)) == dtype


def test_this_machines_answer_agrees_with_what_torch_reports() -> None:
    assert choose_dtype("auto", CPU) in (torch.bfloat16, torch.float32)
    assert device._cpu_has_bf16() or choose_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_named_precision_is_taken_and_named_back(name) -> None:
    assert choose_dtype(name, torch.device("cuda")) == PRECISIONS[name]
    assert dtype_name(PRECISIONS[name]) == name


@pytest.mark.parametrize("name", ["fp16", "fp8", "float32", ""])
def test_precisions_a_cpu_cannot_have_are_refused(name) -> None:
    with pytest.raises(UsageError, match="--precision"):
        choose_dtype(name, CPU)
