"""Which device and which precision: `auto` measured by what the processor can do, never silently another than asked
for."""

from __future__ import annotations

import torch

from dreamsr_cli.cpu_precision import WORTH, bf16_gain
from dreamsr_cli.errors import DeviceError, UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, XPU or MPS where present, else the CPU. Raises `DeviceError` if it
    isn't there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.xpu.is_available():
            return torch.device("xpu")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no such device", "use auto, cpu, cuda, cuda:0, mps or xpu") from error
    present = {
        "cpu": lambda: True,
        "cuda": lambda: torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if device.type not in present:
        raise UsageError(f"--device {name}: not supported", "use auto, cpu, cuda, cuda:0, mps or xpu")
    if not present[device.type]():
        raise DeviceError(f"--device {name}: not present on this machine", "use --device auto or --device cpu")
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """dtype of the networks; "auto" is bfloat16 where the device multiplies it natively (a CPU also measurably faster),
    else float32."""
    if precision != "auto":
        if precision not in PRECISIONS:
            raise UsageError(f"--precision {precision}: not known", f"use auto, {', '.join(PRECISIONS)}")
        if precision == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16 is for GPUs", "use --precision bf16 or fp32 on a CPU")
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() and bf16_gain() >= WORTH else torch.float32
    return torch.bfloat16 if device.type == "xpu" else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether matrix products run in bfloat16 hardware (AMX or AVX512-BF16, or Arm's); emulated bfloat16 would be
    slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `--precision` takes."""
    return next(name for name, value in PRECISIONS.items() if value == dtype)
