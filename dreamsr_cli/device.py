"""Which device and which precision: `auto` measured by what the processor can do, never silently another than asked
for."""

from __future__ import annotations

import torch

from dreamsr_cli.cpu_precision import WORTH, bf16_gain
from dreamsr_cli.errors import DeviceError, UsageError
from dreamsr_cli.ranks import this_place

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, XPU or MPS where present, else the CPU. Raises `DeviceError` if it
    isn't there. Of several processes each gets a card of its own."""
    if name == "auto":
        if torch.cuda.is_available():
            return _own_card("cuda")
        if torch.xpu.is_available():
            return _own_card("xpu")
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
    if device.index is not None and this_place().world > 1:
        raise UsageError(
            f"--device {name}: several processes can't share one card",
            f"use --device {device.type}: each takes its own",
        )
    return _own_card(device.type) if device.type in ("cuda", "xpu") and device.index is None else device


def _own_card(kind: str) -> torch.device:
    """The device `kind`, which from now on means the card of this process."""
    place = this_place()
    if place.world > 1:
        backend = torch.cuda if kind == "cuda" else torch.xpu
        if place.local_rank >= backend.device_count():
            raise DeviceError(
                f"process {place.local_rank} of this machine has no card: there are {backend.device_count()}",
                f"start torchrun with --nproc-per-node {backend.device_count()}, or add --device cpu",
            )
        backend.set_device(place.local_rank)
    return torch.device(kind)


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
