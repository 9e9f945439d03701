"""The parts beside the method's, for stages on a bundle that is there: those that a stage trains or needs, each from
where it starts, from its base, or fresh."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.models.autoencoder import Autoencoder, PatchAutoencoder, Refiner
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.cleaner import Cleaner
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.models.enlarger import Enlarger, fingerprint
from dreamsr_cli.models.grain import Grain
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.stages import ENLARGER, GRAIN, JUDGE, Stage


class PartsBeside(NamedTuple):
    """None for what a stage neither trains nor needs."""

    cleanliness: Cleanliness | None
    enlarger: Enlarger | None
    grain: Grain | None
    cleaner: Cleaner | None


def parts_beside(
    recipe: Recipe, stage: Stage, base: Bundle, start: Bundle | None, autoencoder: Autoencoder
) -> PartsBeside:
    """Judge, enlarger, grain and cleaner of a stage on `base`, which may start from those of `start`. On the CPU,
    float32. Raises `UsageError` for an enlarger of FLUX's autoencoder, `ConfigError` where a part doesn't fit."""
    cleanliness = enlarger = grain = None
    if JUDGE[0] in stage.trains:
        cleanliness = (None if recipe.fresh else (start or base).open_cleanliness()) or Cleanliness()
    if ENLARGER[0] in stage.trains:
        if not isinstance(autoencoder, PatchAutoencoder):
            raise UsageError("FLUX's autoencoder has no refiner that could become an enlarger", "use --model mini")
        known = None if recipe.fresh else _known_enlarger(start or base, autoencoder.refiner)
        enlarger = known or Enlarger.of(autoencoder.refiner, recipe.sizes.enlarger_rank)
    if GRAIN[0] in stage.trains:
        grain = (None if recipe.fresh else (start or base).open_grain()) or Grain()
        # Undamaged crops get grain as undamaged photos do: on what the enlarger made of them.
        enlarger = base.open_enlarger()
    elif stage.pleases and recipe.loss.cleaner_seen == "finished":
        grain = base.open_grain()
    cleaner = _cleaner(recipe, stage, start or base) if stage.cleans else base.open_cleaner()
    return PartsBeside(cleanliness, enlarger, grain, cleaner)


def _cleaner(recipe: Recipe, stage: Stage, source: Bundle) -> Cleaner:
    """The cleaner of `source`, or a fresh one; with its second manner in the stage that trains that."""
    pleases = stage.pleases
    known = None if recipe.fresh and not pleases else source.open_cleaner()
    if known is None and pleases:
        raise ConfigError(
            f"{source.config.name} has no cleaner that could learn a second manner", "train --stage cleaner first"
        )
    found = known or Cleaner(recipe.sizes.cleaner_widths, recipe.sizes.cleaner_blocks)
    if pleases:
        if recipe.fresh:
            found.pleasing = None
        found.learn_to_please()
    found.deepen(recipe.sizes.cleaner_deepen)
    found.look(recipe.sizes.cleaner_views or found.config["views"])
    return found


def _known_enlarger(source: Bundle, refiner: Refiner) -> Enlarger | None:
    """The enlarger of `source`, brought to `refiner` where it was made for that bundle's own."""
    known = source.open_enlarger()
    if known is None or known.config["refiner"] == fingerprint(refiner):
        return known
    theirs = source.open_autoencoder(torch.device("cpu"), torch.float32)
    if not isinstance(theirs, PatchAutoencoder) or known.config["refiner"] != fingerprint(theirs.refiner):
        raise ConfigError(f"the enlarger of {source.config.name} fits another refiner", "--set fresh=true")
    try:
        return known.refitted(theirs.refiner, refiner)
    except ValueError as error:
        raise ConfigError(f"the enlarger of {source.config.name}: {error}", "--set fresh=true") from error
