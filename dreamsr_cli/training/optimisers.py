"""What turns gradients into better weights: float32 masters, AdamW, the learning rate, the average that ships.

The forward and backward pass run on weights of the compute dtype (bfloat16 on this project's machines: elementwise
work halves); the optimizer updates float32 masters, whose running average is what a bundle ships.
"""

from __future__ import annotations

import importlib
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dreamsr_cli.errors import UsageError
from dreamsr_cli.training.distributed import fill, here, whole
from dreamsr_cli.training.recipe import OptimRecipe, Recipe

TEXT_PATH = ("text_encoder.", "context_attention.")
"""Names of the parameters that only text goes through: they learn with `optim.text` times the learning rate."""


class Masters:
    """Float32 copies of the trained parameters with an averaged twin (none for a `decay` of 0); the networks hold the
    compute dtype."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.names = list(parameters)
        self._live = list(parameters.values())
        self.master = [nn.Parameter(p.detach().float().clone()) for p in self._live]
        self.average = [m.detach().clone() for m in self.master] if decay else []
        self.decay = decay

    @torch.no_grad()
    def take_gradients(self, largest_norm: float) -> float:
        """Move gradients to the masters in float32, clip their global norm, and return the norm before."""
        for live, master in zip(self._live, self.master, strict=True):
            master.grad = None if live.grad is None else live.grad.float()
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
    """The parts that learn in one kind of step: masters and an AdamW of their own."""

    def __init__(self, named: dict[str, nn.Parameter], optim: OptimRecipe) -> None:
        def group(item: tuple[str, nn.Parameter]) -> tuple[bool, bool]:
            name, parameter = item
            return parameter.ndim < 2, name.startswith(TEXT_PATH)

        # Sorted by group, since the optimizer's order is the masters' order.
        named = dict(sorted(named.items(), key=group))
        self.masters = Masters(named, optim.ema)
        groups, self._factors = [], []
        for (plain, text), members in groupby(zip(named, self.masters.master, strict=True), key=group):
            decay = 0.0 if plain else optim.weight_decay  # only matrices decay
            groups.append({"params": [master for _, master in members], "weight_decay": decay})
            self._factors.append(optim.text if text else 1.0)
        self.optimizer = _adamw(groups, optim)

    def update(self, lr: float, step: int) -> None:
        """One optimizer step from the masters' gradients."""
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = lr * factor
        self.optimizer.step()
        self.masters.publish(step)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint, whole: weights, their averages, and the optimizer's moments, by full name."""
        masters = self.masters
        moments: dict[str, Tensor] = {}
        for name, parameter in zip(masters.names, masters.master, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
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
        for key, value in saved["optimizer"].items():
            name, moment = key.split("|")
            if name in by_name:
                self.optimizer.state[by_name[name]][moment] = _like_moment(value, moment, by_name[name], self.optimizer)


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
