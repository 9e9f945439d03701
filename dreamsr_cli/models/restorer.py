"""The networks of both stages on their device, and the ways to do with less of its memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.flux_control import FluxControl
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.restoration_lora import RestorationLoRA

CPU = torch.device("cpu")


@dataclass
class Restorer:
    """The networks of both stages: what the sampler calls."""

    dit: ConditionedDiT
    controlnet: MMControlNet | FluxControl
    lora: RestorationLoRA | None
    device: torch.device
    """Where batches of tiles go."""
    offload: str = "none"
    """How the networks share the device just now: "none", "model" or "block"."""
    _turns: Turns | None = field(default=None, repr=False)

    def place(self, offload: str = "none") -> None:
        """Put the networks where `offload` says. Block by block is the last way: from it there is none back."""
        if self.offload == "block" or offload == self.offload != "none":
            return
        if self._turns is not None:
            self._turns.end()
            self._turns = None
        if offload == "none":
            self.dit.to(self.device)
            self.controlnet.to(self.device)
        elif offload == "model":
            # The cross-attention serves both: its keys and values are made right after the ControlNet.
            if self.dit.context_attention is not None:
                self.dit.context_attention.to(self.device)
            self._turns = Turns({self.dit: self.dit.transformer, self.controlnet: self.controlnet}, self.device)
        else:
            for module in (self.dit, self.controlnet):
                offload_blocks(module, blocks_of(module), self.device)
        self.offload = offload


class Turns:
    """Networks that take turns on a device: when one is called, its weights come and the others' go to RAM.

    `weights` names for each module that is called the one whose weights move with it.
    """

    def __init__(self, weights: dict[nn.Module, nn.Module], device: torch.device) -> None:
        self._weights, self._device = weights, device
        self.present: nn.Module | None = None
        for module in weights.values():
            module.to(CPU)
        self._handles = [called.register_forward_pre_hook(self._make_room) for called in weights]

    def _make_room(self, called: nn.Module, _: Any) -> None:
        if called is self.present:
            return
        if self.present is not None:
            self._weights[self.present].to(CPU)
        self._weights[called].to(self._device)
        self.present = called

    def end(self) -> None:
        """Leave the weights where they are, and move them no more."""
        for handle in self._handles:
            handle.remove()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks inside a ConditionedDiT or a ControlNet: almost all of its weights."""
    return [
        block
        for name, blocks in module.named_modules()
        if name.split(".")[-1] in ("transformer_blocks", "single_transformer_blocks")
        for block in blocks.children()
    ]


def offload_blocks(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Keep the weights of `blocks` in RAM and bring each block to the device while it runs (diffusers' group offload);
    everything else in `module` goes to the device."""
    from diffusers.hooks import apply_group_offloading

    module.to(CPU)
    # Our walk calls the blocks, not the transformer's forward, on which diffusers hangs what isn't in a block.
    holder = nn.Module()
    waiting = nn.ModuleList(blocks)
    holder.add_module("blocks", waiting)
    for rest in _outside(module, {id(block) for block in waiting}):
        rest.to(device)
    apply_group_offloading(holder, onload_device=device, offload_type="block_level", num_blocks_per_group=1)


def _outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    """The largest modules below `module` that hold none of `blocks`."""
    for child in module.children():
        if id(child) in blocks:
            continue
        if any(id(inner) in blocks for inner in child.modules()):
            yield from _outside(child, blocks)
        else:
            yield child
