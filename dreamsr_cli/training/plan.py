"""What a training run will be, before it is one: parameters, memory by part, steps, samples (`train --dry-run`).

Networks are built on the meta device from their configs; nothing is loaded or downloaded. Estimates of memory count
what the trainer keeps (memory.py) and leave `memory.RESERVE` of a card free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.training.adversarial import gan_weight
from dreamsr_cli.training.memory import (
    RESERVE,
    SPARE,
    WAYS,
    PartMemory,
    StepMemory,
    largest_block_bytes,
    part_memory,
    step_memory,
)
from dreamsr_cli.training.part_configs import MetaNetworks, build_meta, configs_for
from dreamsr_cli.training.recipe import Recipe, for_ablation
from dreamsr_cli.training.stages import Stage

CARDS = ((24, 1), (48, 1), (80, 1), (80, 8))
"""(memory as the card is sold, number of cards) that the recipes are planned for."""
USABLE = 0.985
"""Share of a card's GiB that a driver shows."""
_OUTSIDE = ("vae", "perceptual", "discriminator", "cleanliness", "enlarger", "grain", "cleaner")
"""Parts that every card holds in full, however the others are spread."""


@dataclass(frozen=True)
class CardPlan:
    """One way to run the stage on some cards. Bytes."""

    card: int
    """Memory of one card that can be used; 0: it isn't known."""
    cards: int
    way: str
    """One of `memory.WAYS`."""
    crops: int
    """Crops of the largest size per pass of one card."""
    accumulate: int
    """Passes per optimizer step."""
    parts: dict[str, int]
    """On one card, during the backward pass: what each part holds there, activations and reserve."""
    backward: int
    """Their sum."""
    optimizer: int
    """On one card during the optimizer's step, when activations are gone and gradients are float32."""
    host: int
    """In the memory of one host, for all of its cards: shares that are kept there."""

    @property
    def peak(self) -> int:
        """Most on one card."""
        return max(self.backward, self.optimizer)

    @property
    def fits(self) -> bool:
        """Whether the card holds it; True where its memory isn't known."""
        return not self.card or self.peak <= self.card


@dataclass(frozen=True)
class TrainingPlan:
    """What `--dry-run` says."""

    stage: str
    recipe: str
    model: str
    precision: str
    steps: int
    samples: int
    """Crops over all steps."""
    batch: int
    """Crops per optimizer step of the largest plan."""
    sides: tuple[int, ...]
    """Sides of the crops, the largest last."""
    parameters: dict[str, int]
    trained: dict[str, int]
    lora_modules: int
    """Linear layers with an adapter."""
    memory: tuple[PartMemory, ...]
    """By part, before anything is spread."""
    activations: tuple[StepMemory, ...]
    """By kind of step, for one crop of the largest size."""
    plans: tuple[CardPlan, ...]
    photos: int | None = None
    """Photos or pairs to train on; None where the data were not opened."""

    def to_json(self) -> dict[str, Any]:
        """One plain JSON object; bytes and parameters are whole numbers."""
        plans = [{**asdict(plan), "peak": plan.peak, "fits": plan.fits} for plan in self.plans]
        return {"plan": 1, **asdict(self), "plans": plans}

    def table(self) -> str:
        """For people, in gigabytes (10^9 bytes)."""
        sides = " and ".join(f"{side} px" for side in self.sides)
        lines = [
            f"stage {self.stage}, recipe {self.recipe}, model {self.model}, {self.precision}",
            f"{self.steps:,} steps of {self.batch} crops ({sides}): {self.samples:,} samples"
            + ("" if self.photos is None else f" from {self.photos:,} photos"),
            "",
            f"{'part':<20}{'parameters':>16}{'trained':>16}",
        ]
        lines += [f"{name:<20}{n:>16,}{self.trained.get(name, 0):>16,}" for name, n in self.parameters.items()]
        if self.trained.get("lora"):
            lines.append(f"(the LoRA sits on {self.lora_modules} linear layers)")
        lines += ["", f"{'GB by part, whole':<20}" + "".join(f"{n:>11}" for n in _COLUMNS)]
        for part in self.memory:
            figures = (part.weights, part.masters, part.average, part.moments, part.gradients)
            lines.append(f"{part.name:<20}" + "".join(f"{_gb(n):>11}" for n in figures))
        for step in self.activations:
            lines.append(
                f"activations of one crop of {self.sides[-1]} px, {step.kind} step: networks {_gb(step.kept)}, "
                f"decoder and perceptual {_gb(step.decoder)}, one block again {_gb(step.block)} GB"
            )
        for plan in self.plans:
            lines += ["", *_plan_lines(plan)]
        return "\n".join(lines)


_COLUMNS = ("weights", "masters", "average", "moments", "gradients")


def training_plan(
    recipe: Recipe,
    stage: Stage,
    *,
    recipe_name: str = "",
    model: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cards: Sequence[tuple[int, int]] | None = None,
    way: str | None = None,
    photos: int | None = None,
) -> TrainingPlan:
    """The plan of `stage` with `recipe`.

    `model`: bundle of stages with a prior, as `--model` takes it. `cards`: (bytes of one card, number of cards), each
    planned for; None: `CARDS` for a model of more than a billion parameters, else one device of unknown memory. `way`:
    how to spread the parts; None: the first of `memory.WAYS` that fits. `photos`: items to train on, for the table.
    Raises `WeightsError` where a bundle's config files are missing, `ConfigError` for an unknown way.
    """
    if way is not None and way not in WAYS:
        raise ConfigError(f"{way!r} is no way to spread memory", f"use one of {', '.join(WAYS)}")
    recipe = for_ablation(recipe, stage.name)
    perceptual = recipe.loss.perceptual if stage.compares else "none"
    networks = build_meta(configs_for(recipe, stage, model), dtype, perceptual, recipe.loss.gan_sees)
    itemsize = dtype.itemsize
    parameters, trained = networks.parameters(), _trained(networks, stage)
    if not gan_weight(recipe, stage):
        parameters.pop("discriminator", None)
        trained.pop("discriminator", None)
    optim = recipe.optim
    parts = tuple(
        part_memory(name, n, trained.get(name, 0), itemsize, optim.eight_bit, bool(optim.ema))
        for name, n in parameters.items()
        if name != "text_encoder" or networks.text_encoder is not None
    )
    sides = tuple(sorted(_sides(recipe)))
    steps = tuple(step_memory(networks, kind, sides[-1], recipe.checkpointing) for kind in stage.learners)
    if cards is None:
        large = parameters["transformer"] > 1_000_000_000
        cards = [(round(size * 2**30 * USABLE), number) for size, number in CARDS] if large else [(0, 1)]
    batch = max(crop.batch for crop in recipe.data.crops)
    plans = tuple(
        _best(networks, stage, parts, steps, batch, recipe.accumulate, card, number, way, itemsize)
        for card, number in cards
    )
    return TrainingPlan(
        stage=stage.name,
        recipe=recipe_name or recipe.name,
        model=networks.configs.name,
        precision={torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype)),
        steps=recipe.steps,
        samples=round(recipe.steps * sum(crop.batch * crop.share for crop in recipe.data.crops)),
        batch=batch,
        sides=sides,
        parameters=parameters,
        trained={name: n for name, n in trained.items() if n},
        lora_modules=networks.lora_modules,
        memory=parts,
        activations=steps,
        plans=plans,
        photos=photos,
    )


def _sides(recipe: Recipe) -> set[int]:
    sides = {crop.size for crop in recipe.data.crops}
    if recipe.data.full_photo and recipe.data.full_crop:
        sides.add(recipe.data.full_crop)
    return sides


def _trained(networks: MetaNetworks, stage: Stage) -> dict[str, int]:
    """Trained parameters by part of `MetaNetworks.parameters`."""
    whole = networks.parameters()
    learn: dict[str, int] = {}
    for name in stage.trains:
        part, _, inner = name.partition(".")
        if part != "refiner":
            learn[part] = learn.get(part, 0) + (networks.inside(part, inner) if inner else whole.get(part, 0))
    if "refiner" in stage.trains:
        learn["vae"] = networks.refiner_parameters()
    if stage.removes:
        learn["discriminator"] = whole["discriminator"]
    return learn


def _best(
    networks: MetaNetworks,
    stage: Stage,
    parts: tuple[PartMemory, ...],
    steps: tuple[StepMemory, ...],
    batch: int,
    accumulate: int,
    card: int,
    cards: int,
    way: str | None,
    itemsize: int,
) -> CardPlan:
    """The first way that fits, with as many crops per pass as fit; the last one where none does."""
    share = max(1, batch // cards)
    most = max(1, share // accumulate)
    sizes = [n for n in range(most, 0, -1) if share % n == 0] if card else [most]
    made = None
    for one in (way,) if way else WAYS:
        if one == "sharded" and cards == 1:
            continue
        for crops in sizes:
            made = _on_card(networks, stage, parts, steps, share, crops, card, cards, one, itemsize)
            if made.fits:
                return made
    assert made is not None
    return made


def _on_card(
    networks: MetaNetworks,
    stage: Stage,
    parts: tuple[PartMemory, ...],
    steps: tuple[StepMemory, ...],
    share: int,
    crops: int,
    card: int,
    cards: int,
    way: str,
    itemsize: int,
) -> CardPlan:
    spread = {"whole": 1, "sharded": cards, "offload": cards}[way]
    held: dict[str, int] = {}
    host = 0
    # in a joint step one network learns; the others' gradients are not there
    parts_of = [{name.partition(".")[0] for name in names} for names in stage.learners.values()]
    learners = [names | {"vae"} if "refiner" in names else names for names in parts_of]
    gradients = wide = 0
    for names in learners:
        gradients = max(gradients, sum(p.gradients for p in parts if p.name in names))
        wide = max(wide, sum(p.wide_gradients for p in parts if p.name in names))
    for part in parts:
        outside = part.name in _OUTSIDE or way == "whole"
        if way == "offload" and not outside:
            host += part.resident
            continue
        held[part.name] = part.resident if outside else math.ceil(part.resident / spread)
    if way == "offload":
        # one host holds the shares of all its cards, and their gradients
        host += max(gradients, wide)
        gradients = wide = 0
    held["gradients"] = math.ceil(gradients / spread)
    if way != "whole":
        # the block at work, the next one on its way, and a block's gradients
        held["gathered blocks"] = 3 * largest_block_bytes(networks, itemsize) + _loose(networks) * itemsize
    activations = round(max(step.peak for step in steps) * crops * SPARE)
    held["activations"] = activations
    held["reserve"] = RESERVE if card else 0
    backward = sum(held.values())
    optimizer = backward - activations - held["gradients"] + math.ceil(wide / spread)
    return CardPlan(card, cards, way, crops, math.ceil(share / crops), held, backward, optimizer, host)


def _loose(networks: MetaNetworks) -> int:
    """Parameters outside of the blocks, which stay gathered while the networks work."""
    modules = [networks.transformer, networks.controlnet]
    blocks = [
        *networks.transformer.transformer_blocks,
        *networks.transformer.single_transformer_blocks,
        *networks.controlnet.transformer_blocks,
    ]
    whole = sum(p.numel() for module in modules for p in module.parameters())
    return whole - sum(p.numel() for block in blocks for p in block.parameters())


def _plan_lines(plan: CardPlan) -> list[str]:
    many = f"{plan.cards} cards" if plan.cards > 1 else "one card" if plan.card else "one device"
    size = f" with {_gb(plan.card)} GB to use" + (" each" if plan.cards > 1 else "") if plan.card else ""
    how = {
        "whole": "every card holds everything" if plan.cards > 1 else "everything on it",
        "sharded": "FSDP2: each card holds its share",
        "offload": "FSDP2 with offload: parts lie in the host's memory",
    }[plan.way]
    passes = f"{plan.accumulate} passes of {plan.crops}" if plan.accumulate > 1 else f"one pass of {plan.crops}"
    lines = [
        f"{many}{size}: {how}; {passes} {'crop' if plan.crops == 1 else 'crops'} per card and step"
        + (f" (--set accumulate={plan.accumulate})" if plan.card else "")
    ]
    lines.append("  " + ", ".join(f"{name} {_gb(n)}" for name, n in plan.parts.items() if n >= 5_000_000))
    verdict = "" if not plan.card else ": fits" if plan.fits else ": DOES NOT FIT"
    host = f"; host {_gb(plan.host)} GB" if plan.host else ""
    optimizer = f"; optimizer's step {_gb(plan.optimizer)} GB"
    lines.append(f"  backward pass {_gb(plan.backward)} GB{optimizer}{host}{verdict}")
    return lines


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f}"
