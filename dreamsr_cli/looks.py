"""What a photo looks like settles what nobody said: whether it was damaged, or only has too few pixels.

A damaged photo goes through stage 1. A clean one has nothing to be removed: the bundle's enlarger takes the place of
stage 1, and the result is made to agree with the photo (docs/method.md).
"""

from __future__ import annotations

import dataclasses

from dreamsr_cli.images import Photo
from dreamsr_cli.models.cleanliness import Cleanliness, chance_of_clean
from dreamsr_cli.settings import Settings

LEAST_CHANCE = 0.6
"""Below this chance of being clean a photo has no say: damage that comes back costs more than a clean photo gains, and
few photos lie between."""
LEAST_FACTOR = 2.0
"""Enlarged by less, the photo's say would leave hardly any room for texture; at its own size none."""


def settle_looks(
    photo: Photo, width: int, settings: Settings, judge: Cleanliness | None
) -> tuple[Settings, str | None]:
    """Settings for this photo, to become `width` pixels wide, with `consistency`, `enlarger` and `removal` settled; and
    a sentence for people where it looks clean. A function of photo, settings and judge alone; `judge`
    None: nobody can tell."""
    info, amount, sentence = photo.info, settings.consistency, None
    large = width >= LEAST_FACTOR * info.width
    if amount is None:
        chance = 0.0
        if large and judge is not None:
            chance = chance_of_clean(judge, photo.read_rows, info.height, info.width)
        amount = chance if chance >= LEAST_CHANCE else 0.0
        if amount:
            sentence = f"looks clean ({chance:.0%}), so the result keeps to it"
    # Who says that it agrees this far says that it is clean.
    enlarger = settings.enlarger is None and large and amount >= LEAST_CHANCE
    removal = settings.removal and not enlarger
    return dataclasses.replace(settings, consistency=amount, enlarger=enlarger, removal=removal), sentence
