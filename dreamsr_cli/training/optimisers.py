"""What turns gradients into better weights: float32 masters, AdamW and Muon, the learning rate, the average that ships.

The forward and backward pass run on weights of the compute dtype (bfloat16 on this project's machines: elementwise
work halves); the optimizer updates float32 masters, whose running average is what a bundle ships.
"""

from __future__ import annotations

import importlib
import re
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dreamsr_cli.errors import UsageError
from dreamsr_cli.training.distributed import fill, here, whole
from dreamsr_cli.training.recipe import OptimRecipe, Recipe

TEXT_PATH = ("text_encoder.", "context_attention.")
"""Names of the parameters that only text goes through: they learn with `optim.text` times the learning rate."""
HIDDEN = re.compile(
    r"((transformer|controlnet)\..*blocks\.\d+\.(?!norm)(?!.*lora_)|refiner\.blocks\.|cleaner\.\w+\.at_).*weight"
)
"""Names of the parameters that Muon is for, where they are matrices or kernels: those between two hidden layers of a
block. Not modulation, embeddings and LoRA (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""

GAINS = ("_LC",)
"""Ends of the names of what has two axes but is no matrix: a gain per layer and channel doesn't decay either."""


class Masters:
    """Float32 copies of the trained parameters with an averaged twin (none for a `decay` of 0); the networks hold the
    compute dtype."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.names = list(parameters)
        self._live = list(parameters.values())
        # Contiguous, also where a network's kernels are channels-last: Muon takes them as matrices.
        self.master = [
            nn.Parameter(p.detach().float().clone(memory_format=torch.contiguous_format)) for p in self._live
        ]
        self.average = [m.detach().clone() for m in self.master] if decay else []
        self.decay = decay

    @torch.no_grad()
    def take_gradients(self, largest_norm: float) -> float:
        """Move gradients to the masters in float32, clip their global norm, and return the norm before."""
        for live, master in zip(self._live, self.master, strict=True):
            # Laid out as the master is: fused AdamW walks through memory, and would mix up a channels-last kernel's.
            master.grad = None if live.grad is None else live.grad.float().contiguous()
            live.grad = None
        norm = nn.utils.clip_grad_norm_([m for m in self.master if m.grad is not None], largest_norm)
        return float(whole(norm))

    @torch.no_grad()
    def publish(self, step: int) -> None:
        """After an optimizer step: update the average and copy the masters into the networks."""
        if self.average:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([here(a) for a in self.average], [here(m) for m in self.master], weight)
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """The networks hold the masters' values."""
        torch._foreach_copy_([here(p) for p in self._live], [here(m) for m in self.master])

    @torch.no_grad()
    def show_average(self) -> None:
        """The networks hold what will ship, for validation; `restore` ends that."""
        torch._foreach_copy_([here(p) for p in self._live], [here(s) for s in self.shipped()])

    def shipped(self) -> list[Tensor]:
        """The averages, or the masters where none is kept."""
        return self.average or list(self.master)


class Learner:
    """The parts that learn in one kind of step: masters and optimizers of their own.

    AdamW, and with `optim.kind = "muon"` Muon for `HIDDEN`. `UsageError` for Muon on sharded parameters.
    """

    def __init__(self, named: dict[str, nn.Parameter], optim: OptimRecipe) -> None:
        def group(item: tuple[str, nn.Parameter]) -> tuple[bool, bool, bool]:
            name, parameter = item
            hidden = optim.kind == "muon" and parameter.ndim > 1 and HIDDEN.fullmatch(name) is not None
            return hidden, parameter.ndim < 2 or name.endswith(GAINS), name.startswith(TEXT_PATH)

        # Sorted by group, since the optimizer's order is the masters' order.
        named = dict(sorted(named.items(), key=group))
        self.masters = Masters(named, optim.ema)
        self._flat: dict[nn.Parameter, nn.Parameter] = {}
        adamw, muon = [], []
        for (hidden, plain, text), members in groupby(zip(named, self.masters.master, strict=True), key=group):
            (muon if hidden else adamw).append(
                {
                    "params": [self._matrix(master) if hidden else master for _, master in members],
                    "weight_decay": 0.0 if plain else optim.weight_decay,  # only matrices decay
                    "factor": optim.text if text else 1.0,
                }
            )
        self.optimizers = [_adamw(adamw, optim)] if adamw else []
        if muon:
            # Updates as long as AdamW's, so that one learning rate fits both (Liu et al. 2025).
            self.optimizers.append(torch.optim.Muon(muon, lr=optim.lr, adjust_lr_fn="match_rms_adamw"))

    def _matrix(self, master: nn.Parameter) -> nn.Parameter:
        """The master as Muon takes it: a kernel's memory as a matrix, a row for each output."""
        if isinstance(master, DTensor):
            raise UsageError("Muon doesn't know sharded weights", "--set optim.kind=adamw")
        if master.ndim > 2:
            self._flat[master] = nn.Parameter(master.detach().view(len(master), -1))
        return self._flat.get(master, master)

    def update(self, lr: float, step: int) -> None:
        """One optimizer step from the masters' gradients."""
        for master, flat in self._flat.items():
            flat.grad = None if master.grad is None else master.grad.flatten(1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            optimizer.step()
        self.masters.publish(step)

    def state(self, master: nn.Parameter) -> dict[str, Any]:
        """The optimizer's moments of a master, {} before its first step."""
        known = self._flat.get(master, master)
        return next((o.state[known] for o in self.optimizers if known in o.state), {})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint, whole: weights, their averages, and the optimizer's moments, by full name."""
        masters = self.masters
        moments: dict[str, Tensor] = {}
        for name, parameter in zip(masters.names, masters.master, strict=True):
            for key, value in self.state(parameter).items():
                moments[f"{name}|{key}"] = whole(value) if isinstance(value, Tensor) else torch.tensor(float(value))
        return {
            "weights": {n: whole(m) for n, m in zip(masters.names, masters.master, strict=True)},
            "average": {n: whole(a) for n, a in zip(masters.names, masters.average, strict=False)},
            "optimizer": moments,
        }

    def restore(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`; `saved` may hold the parameters of other learners too."""
        masters = self.masters
        for index, (name, master) in enumerate(zip(masters.names, masters.master, strict=True)):
            fill(master, saved["weights"][name])
            if masters.average:
                fill(masters.average[index], saved["average"][name])
        masters.restore()
        by_name = dict(zip(masters.names, masters.master, strict=True))
        owners = {p: o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for key, value in saved["optimizer"].items():
            name, moment = key.split("|")
            if name in by_name:
                known = self._flat.get(by_name[name], by_name[name])
                owners[known].state[known][moment] = _like_moment(value, moment, known, owners[known])


def _like_moment(value: Tensor, moment: str, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    if moment == "step":
        # bitsandbytes counts in Python, a fused AdamW on the parameter's device.
        fused = optimizer.defaults.get("fused")
        return int(value) if fused is None else value.to(parameter.device, copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    made = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    fill(made, value)
    return made


def _adamw(groups: list[dict[str, Any]], optim: OptimRecipe) -> torch.optim.Optimizer:
    if not optim.eight_bit:
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    try:
        optimizers: Any = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise UsageError(
            "optim.eight_bit needs bitsandbytes", "pip install bitsandbytes, or --set optim.eight_bit=false"
        ) from error
    return optimizers.AdamW8bit(groups, lr=optim.lr, betas=optim.betas)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine decay to `final` of the peak at the recipe's last step."""
    optim = recipe.optim
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = min(1.0, (step - optim.warmup) / max(1, recipe.steps - optim.warmup))
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
    return optim.lr * (optim.final + (1 - optim.final) * cosine)
