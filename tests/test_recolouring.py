"""Good crops in other colours: the same lines and textures, for the samples that are asked for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_data import save_photos

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.training.crop_samples import CropSettings, make_sample
from dreamsr_cli.training.photos import PhotoSource
from dreamsr_cli.training.recipe import load_recipe
from dreamsr_cli.training.recolouring import GAMMA, PALER, recoloured
from dreamsr_cli.training.step_crops import crop_settings

SETTINGS = CropSettings(crop=32, p_full=0.0, words=False, preset="bicubic", usm=False)


def test_colours_change_and_what_is_shown_does_not() -> None:
    slope = torch.linspace(0.05, 0.95, 64).repeat(16, 1)
    crop_CPQ = torch.stack([slope, slope.flip(1), torch.full_like(slope, 0.3)])
    falling, orders, spans = set(), set(), []
    for seed in range(60):
        made = recoloured(crop_CPQ, np.random.default_rng(seed))
        assert made.shape == crop_CPQ.shape and made.min() >= 0 and made.max() <= 1
        steps = made.diff(dim=2)
        # Each channel still rises, falls or is flat all along, whichever of the three it is now.
        kinds = tuple("flat" if bool((s == 0).all()) else "up" if bool((s > 0).all()) else "down" for s in steps)
        assert sorted(kinds) == ["down", "flat", "up"]
        orders.add(kinds)
        falling.add(made[kinds.index("flat")].mean().item() > 0.3)
        spans.append((made.max() - made.min()).item())
    assert len(orders) == 6 and falling == {True, False}
    assert min(spans) < 0.9 * PALER + 0.05 and max(spans) > 0.8 and GAMMA > 1
    again = [recoloured(crop_CPQ, np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_a_share_of_the_crops_is_recoloured_before_they_are_degraded(tmp_path) -> None:
    source, half = (
        PhotoSource(save_photos(tmp_path / "in"), tmp_path / "cache", 1, smallest=32),
        replace(SETTINGS, recoloured=0.5),
    )
    pairs = [(make_sample(source, SETTINGS, step, 0), make_sample(source, half, step, 0)) for step in range(24)]
    same = [np.array_equal(plain.hq_CPQ, made.hq_CPQ) for plain, made in pairs]
    assert 5 <= sum(same) <= 19
    for plain, made in pairs:
        assert made.origin == plain.origin
        # The bad crop shows the colours of the good one that goes with it.
        assert abs(made.lq_CPQ.mean((1, 2)) - made.hq_CPQ.mean((1, 2))).max() < 6
    assert all(
        np.array_equal(plain.lq_CPQ, made.lq_CPQ) == alike for (plain, made), alike in zip(pairs, same, strict=True)
    )


def test_it_is_for_crops_without_words() -> None:
    with pytest.raises(ConfigError, match="no longer look as their texts say") as error:
        replace(SETTINGS, recoloured=0.5, words=True)
    assert error.value.hint == "--set data.words=false"
    with pytest.raises(ConfigError, match=r"recoloured = 1\.5 is not a share"):
        replace(SETTINGS, recoloured=1.5)
    recipe = load_recipe("mini", ["data.recoloured=0.4", "data.words=false"])
    assert crop_settings(recipe, 0).recoloured == 0.4
    assert crop_settings(recipe, 0, held_out=True).recoloured == 0
