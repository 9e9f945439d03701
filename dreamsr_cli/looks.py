"""What a photo looks like settles what nobody said: whether it was damaged, or only has too few pixels.

A damaged photo goes through the bundle's cleaner, or where it has none through stage 1. A clean one has nothing to be
removed: the bundle's enlarger takes the place of both, and the result is made to agree with the photo. So it is for a
photo that is clean but for a fair JPEG, only that the result agrees with what the enlarger made of it: its pixels would
bring the JPEG back (docs/method.md).
"""

from __future__ import annotations

import dataclasses

from dreamsr_cli.config import AUTO
from dreamsr_cli.images import Photo
from dreamsr_cli.models.cleanliness import Cleanliness, chances_of_looks
from dreamsr_cli.settings import Settings

LEAST_CLEAN = 0.5
"""From this chance of being clean on a photo is taken for clean: clean ones come to 0.7 and more, others hardly ever
this far (docs/mini.md, row 35)."""
LEAST_UNDAMAGED = 0.9
"""Below this chance of being clean or compressed a photo goes through stage 1: a damaged photo that doesn't loses more
than a JPEG gains (docs/mini.md, row 35)."""
LEAST_FACTOR = 2.0
"""Enlarged by less, the photo's say would leave hardly any room for texture; at its own size none."""


def settle_looks(
    photo: Photo, width: int, settings: Settings, judge: Cleanliness | None
) -> tuple[Settings, str | None]:
    """Settings for this photo, to become `width` pixels wide, with `looks`, `consistency`, `enlarger`, `cleaner`,
    `texture` and `removal` settled; and a sentence for people where the photo was judged to be better than damaged. A
    function of photo, settings and judge alone; `judge` None: nobody can tell."""
    info = photo.info
    large = width >= LEAST_FACTOR * info.width
    chances: dict[str, float] = {settings.looks: 1.0}
    if settings.looks == AUTO:
        chances = {"damaged": 1.0}
        if large and judge is not None:
            chances = chances_of_looks(judge, photo.read_rows, info.height, info.width)
    looks = _looks(chances)
    enlarger = looks != "damaged" if settings.enlarger is None else settings.enlarger
    cleaner = looks == "damaged" if settings.cleaner is None else settings.cleaner
    amount = settings.consistency
    if amount is None:
        keeps = {"clean": chances.get("clean", 0.0), "compressed": float(enlarger)}
        amount = keeps.get(looks, 0.0) if large else 0.0
    if looks == "compressed" and enlarger and not (settings.strength and settings.texture):
        amount = 0.0  # the result is what it would keep to
    settled = dataclasses.replace(
        settings,
        looks=looks,
        consistency=amount,
        enlarger=enlarger,
        cleaner=cleaner,
        texture=settings.texture if enlarger or cleaner else 1.0,
        removal=settings.removal and not enlarger and not cleaner,
    )
    sentence = None
    if settings.looks == AUTO and looks != "damaged":
        sentence = _sentence(settled, chances)
    return settled, sentence


def _looks(chances: dict[str, float]) -> str:
    """Which of `LOOKS` is likely enough."""
    clean, compressed = chances.get("clean", 0.0), chances.get("compressed", 0.0)
    if clean >= LEAST_CLEAN:
        return "clean"
    return "compressed" if clean + compressed >= LEAST_UNDAMAGED else "damaged"


def _sentence(settled: Settings, chances: dict[str, float]) -> str:
    chance, found = chances["clean"], "looks clean"
    if settled.looks == "compressed":
        chance, found = min(1.0, chance + chances["compressed"]), "looks clean but for its JPEG"
    follows = ["stage 1 is left out"] * bool(settled.enlarger) + ["the result keeps to it"] * bool(settled.consistency)
    return f"{found} ({chance:.0%})" + (f", so {' and '.join(follows)}" if follows else "")
