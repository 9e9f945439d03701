"""Bytes that a forward pass keeps for its backward pass, counted on the meta device: no memory, no arithmetic.

Autograd tells what it saves through its hooks, so frozen weights, LoRA, checkpointing and dtypes count as they are.
Attention is replaced by what a flash kernel saves (queries, keys, values, output and one number per row): the meta
device would run the textbook formula and save its N x N matrices. Axes: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Flash(torch.autograd.Function):
    """Shapes and saved tensors of a flash attention; no values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _FlashInstead(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))]
            return _Flash.apply(*named)
        return func(*args, **kwargs)


def saved_bytes(forward: Callable[[], Any], modules: Iterable[nn.Module]) -> int:
    """Bytes of all tensors that autograd keeps when `forward()` runs on the meta device; each storage counts once, and
    the weights and buffers of `modules`, which are there anyway, don't."""
    weights = {
        tensor.untyped_storage()._cdata for module in modules for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), x)  # holding x keeps the address from being used again
        return x

    with _FlashInstead(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        made = forward()
        del made
    return sum(size for size, _ in kept.values())
