"""Memory modes: weights in fewer bits through the libraries' own backends, and what may run where.

torchao keeps int8 and float8 weights and multiplies in the network's precision (it runs on a CPU too); bitsandbytes
keeps NF4 and needs a CUDA or XPU device in diffusers. The transformer and T5 are quantized; embedders, norms, the
ControlNet, the LoRA and the autoencoder stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dreamsr_cli.config import OFFLOADS, QUANTIZATIONS
from dreamsr_cli.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch

BACKENDS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""The library that each kind of quantization needs (extra `quantize`)."""
DEVICES = {"int8": ("cpu", "cuda", "xpu"), "fp8": ("cpu", "cuda", "xpu"), "nf4": ("cuda", "xpu")}
"""Kinds of device on which each is known to run."""
NOT_QUANTIZED = ("x_embedder", "context_embedder", "time_text_embed", "norm_out")
"""Small layers of the transformer that everything passes through."""


@dataclass(frozen=True)
class MemoryMode:
    """How a phase's networks are kept."""

    quantize: str = "none"
    """Weights of transformer and T5: one of `QUANTIZATIONS`."""
    offload: str = "none"
    """"model": the networks of a phase take turns on the device; "block": their blocks do (diffusers' group
    offload)."""


PLAIN = MemoryMode()
"""Every weight as it is, on the device."""


def installed(quantize: str) -> bool:
    """Whether the backend of this kind of quantization is there."""
    return quantize == "none" or find_spec(BACKENDS[quantize]) is not None


def cannot_run(mode: MemoryMode, kind: str) -> str:
    """Why this mode can't run on that kind of device ("cpu", "cuda", ...), "" if it can. Whether its backend is
    installed is another question."""
    if mode.quantize != "none" and kind not in DEVICES[mode.quantize]:
        if mode.quantize == "nf4":
            return f"diffusers' bitsandbytes backend quantizes on a CUDA or XPU device only, this is {kind}"
        return f"torchao's weights are not known to run on {kind}"
    if mode.quantize == "nf4" and mode.offload == "block":
        return "bitsandbytes' NF4 weights can't be moved block by block"
    return ""


def check_mode(mode: MemoryMode, device: torch.device) -> None:
    """Raise `UsageError` for a mode that can't run there, `DeviceError` where its backend isn't installed."""
    for flag, value, known in (("quantize", mode.quantize, QUANTIZATIONS), ("offload", mode.offload, OFFLOADS)):
        if value not in known:
            raise UsageError(f"--{flag} {value} is not known", f"use one of: {', '.join(known)}")
    if reason := cannot_run(mode, device.type):
        other = "--offload model" if not cannot_run(MemoryMode(mode.quantize), device.type) else "--quantize int8"
        other = other if device.type in DEVICES["int8"] else "--quantize none"
        raise UsageError(f"--quantize {mode.quantize}: {reason}", f"use {other}")
    if not installed(mode.quantize):
        backend = BACKENDS[mode.quantize]
        message = f"--quantize {mode.quantize} needs {backend}, which is not installed"
        raise DeviceError(message, "pip install 'dreamsr[quantize]', or leave out --quantize")


def library_config(library: str, quantize: str, dtype: torch.dtype, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the library "diffusers" or "transformers"; `skip` names modules left alone."""
    if quantize == "none":
        return {}
    import diffusers
    import transformers

    if quantize == "nf4":
        cls: Any = diffusers.BitsAndBytesConfig if library == "diffusers" else transformers.BitsAndBytesConfig
        made = cls(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(skip) or None,
        )
    else:
        torchao = import_module("torchao.quantization")
        cls = diffusers.TorchAoConfig if library == "diffusers" else transformers.TorchAoConfig
        kind = torchao.Int8WeightOnlyConfig() if quantize == "int8" else torchao.Float8WeightOnlyConfig()
        made = cls(kind, modules_to_not_convert=list(skip) or None)
    return {"quantization_config": made}
