"""One process or many: Hugging Face accelerate finds devices and processes, wraps the networks and joins gradients.

Several processes are started by `torchrun` or `accelerate launch`; both set what accelerate reads. Without them there
is one process. Sharding (FSDP2) is chosen by accelerate's own config file (docs/training.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dreamsr_cli.errors import DeviceError, UsageError

MIXED = {torch.float32: "no", torch.bfloat16: "bf16"}


class Worked(nn.Module):
    """Networks as one module whose forward pass is any function of them: what DDP and FSDP2 wrap, so that their hooks
    see every step and every validation."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns; it calls the networks."""
        return work()


class Team:
    """The processes that train together, seen from one of them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Join the processes (or be alone) on `device`, computing in `dtype`. Raises `UsageError` for a dtype that
        needs loss scaling, `DeviceError` where accelerate's config asks for what this trainer doesn't do."""
        if dtype not in MIXED:
            raise UsageError("training in float16 isn't supported", "use --precision bf16 or fp32")
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone:
            # A program may train twice, in different precisions.
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=MIXED[dtype],
            device_placement=False,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise DeviceError(
                f"accelerate is configured for {kind.value}", "use a config with FSDP2 (recipes/), or DDP"
            )
        self.sharded = kind == DistributedType.FSDP
        self.device = device if alone else self.accelerator.device
        self.dtype = dtype
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wrap(self, modules: dict[str, nn.Module]) -> Callable[[Callable[[], Any]], Any]:
        """A callable that runs a function of the networks; gradients of a backward pass are averaged over the
        processes. Call it once `requires_grad` is what it will be."""
        worked = Worked(modules)
        if self.sharded:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            # The trainer keeps float32 masters itself; accelerate must not raise the live weights to float32 as well.
            mixed, self.accelerator.state._mixed_precision = self.accelerator.state._mixed_precision, "no"
            fsdp2_prepare_model(self.accelerator, worked)
            self.accelerator.state._mixed_precision = mixed
            return worked
        return self.accelerator.prepare_model(worked, device_placement=False) if self.world > 1 else worked

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of the forward pass."""
        return self.accelerator.autocast() if self.dtype != torch.float32 else nullcontext()

    def accumulating(self, worked: Any, last: bool) -> AbstractContextManager[Any]:
        """Around all passes of a step but the `last`: gradients stay in this process."""
        return nullcontext() if last or self.world == 1 else self.accelerator.no_sync(worked)

    def mean(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """The terms averaged over the processes (the same keys everywhere), as numbers."""
        if not terms:
            return {}
        values = torch.stack([v.detach().float().reshape(()) for v in terms.values()])
        if self.world > 1:
            values = torch.as_tensor(self.accelerator.reduce(values, "mean"))
        return dict(zip(terms, values.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        if self.world == 1:
            return flag
        one = torch.tensor([float(flag)], device=self.device)
        return bool(torch.as_tensor(self.accelerator.reduce(one, "sum")) > 0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """For networks that aren't wrapped: replace each gradient by its mean over the processes, in one message."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.as_tensor(self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean"))
        for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(piece.view_as(gradient))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Close the process group."""
        if self.world > 1:
            self.accelerator.end_training()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all processes where it is sharded: a call that all of them make."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def here(tensor: Tensor) -> Tensor:
    """This process' piece of a tensor, sharing its memory; all of it where it isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy whole `values` into `target`, sharded as `target` is."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(values.detach().to(target.device), target.device_mesh, target.placements))
    else:
        target.copy_(values)


def share_of(batch: int, rank: int, world: int, accumulate: int) -> tuple[int, int]:
    """(first global index, crops per pass) of one process; its passes follow one another. Raises `UsageError` unless
    the batch divides evenly."""
    if batch % (world * accumulate):
        fit = max(1, round(batch / (world * accumulate))) * world * accumulate
        raise UsageError(
            f"batch {batch} can't be shared by {world} processes times {accumulate} accumulated passes",
            f"use a batch of {fit} in data.crops, or another --set accumulate",
        )
    return rank * (batch // world), batch // (world * accumulate)
