"""How much of what stage 2 changes is kept: rows, what people can ask for, and what the engine does with it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cleaners import save_bundle_that_cleans
from enlargers import CLEAN, COMPRESSED, DAMAGED
from tiny_models import CPU, RECIPE, pictures
from tiny_upscales import Stopping, levels, run_tiny, save_photo_of_strips

from dreamsr_cli import counting_pixels
from dreamsr_cli.blended import BlendedRows
from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import Engine, Order
from dreamsr_cli.errors import UsageError
from dreamsr_cli.images import open_photo
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.cleaner import PLEASING
from dreamsr_cli.planning import Plan
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.settings import Settings, check_settings
from dreamsr_cli.training.clean_steps import cleaned
from dreamsr_cli.training.grain_steps import finished
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "blended-cache"))


@pytest.fixture(scope="module", params=[DAMAGED, CLEAN, COMPRESSED], ids=["damaged", "clean", "compressed"])
def bundle(request, tmp_path_factory) -> Bundle:
    """Has a cleaner and an enlarger, and takes every photo for damaged, clean or compressed."""
    return save_bundle_that_cleans(tmp_path_factory.mktemp("blended") / "bundle", request.param)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Bundle:
    return save_bundle_that_cleans(tmp_path_factory.mktemp("blended") / "damaged", DAMAGED)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_photo_of_strips(tmp_path_factory.mktemp("photo") / "a.png")


run = partial(run_tiny, strength=0.5, color_fix="none", consistency=0.0)


def made_by(bundle: Bundle, source: Path, target: Path, **more) -> np.ndarray:
    run(bundle, source, target, **more)
    return levels(target)


def test_rows_lie_between_the_two_pictures(source) -> None:
    begun = EnlargedPhoto(open_photo(source), 128, 560)
    other_PQC = np.random.default_rng(0).random((560, 128, 3), np.float32)
    rows = BlendedRows(begun, lambda top, bottom: other_PQC[top:bottom], 0.25)
    expected_PQC = 0.75 * begun.read_rows(0, 560) + 0.25 * other_PQC
    assert rows.read_rows(100, 300).dtype == np.float32
    assert np.allclose(rows.read_rows(100, 300), expected_PQC[100:300], atol=1e-6)
    whole = BlendedRows(begun, lambda top, bottom: other_PQC[top:bottom], 1.0).read_rows(0, 560)
    assert np.array_equal(whole, other_PQC)


def test_a_result_is_between_what_it_begins_from_and_all_of_stage_2(bundle, source, tmp_path) -> None:
    none, half, all_of_it = (
        made_by(bundle, source, tmp_path / f"{amount}.png", texture=amount) for amount in (0.0, 0.5, 1.0)
    )
    assert np.abs(all_of_it - none).mean() > 2, "stage 2 changes nothing, so this shows nothing"
    inside = (all_of_it > 0) & (all_of_it < 255)
    assert inside.mean() > 0.5 and np.abs(half - (none + all_of_it) / 2)[inside].max() <= 1.01
    said = run(bundle, source, tmp_path / "said.png", texture=0.5).to_json()
    assert said["texture"] == 0.5


def test_without_any_of_it_stage_2_is_left_out(bundle, source, tmp_path) -> None:
    """What is left is the picture that texture would begin from, not the faithful one."""
    before = dict(bundle.opened)
    quick = made_by(bundle, source, tmp_path / "quick.png", texture=0.0)
    assert dict(bundle.opened) == before, "neither text encoder nor autoencoder nor restorer"
    faithful = made_by(bundle, source, tmp_path / "faithful.png", strength=0.0)
    looks = run(bundle, source, tmp_path / "again.png", texture=0.0).to_json()["looks"]
    assert np.array_equal(quick, faithful) == (looks != "damaged")


def test_the_bundle_says_how_much_and_people_may_say_otherwise(damaged, tiny_bundle) -> None:
    own = replace(damaged.config, defaults=replace(damaged.config.defaults, texture=0.5))
    half = Bundle(damaged.folder, own)
    assert check_settings(UpscaleConfig(), damaged).texture == 1
    assert check_settings(UpscaleConfig(), half).texture == 0.5
    assert check_settings(UpscaleConfig(texture=0.8), half).texture == 0.8
    # Stage 1 ends in a latent: there is nothing to blend with.
    assert check_settings(UpscaleConfig(removal=True), half).texture == 1
    plain = open_bundle(str(tiny_bundle))
    assert check_settings(UpscaleConfig(texture=1.0), plain).texture == 1
    for config, model, hint in (
        (UpscaleConfig(texture=0.5), plain, "leave --texture out"),
        (UpscaleConfig(texture=0.5, removal=True), half, "--removal"),
        (UpscaleConfig(texture=1.5), half, "use --texture 1"),
        (UpscaleConfig(texture=-0.1), half, "use --texture 0"),
    ):
        with pytest.raises(UsageError, match="--texture") as caught:
            check_settings(config, model)
        assert hint in (caught.value.hint or "")


@torch.no_grad()
def test_grain_is_trained_on_what_users_get(damaged) -> None:
    hq = pictures(2) / 2 + 0.5
    crops = Crops(3, hq, hq, ["a", "b"], ["", ""], lq=hq[..., ::4, ::4].contiguous(), looks=("damaged", "damaged"))

    def made(texture: float) -> torch.Tensor:
        own = replace(damaged.config, defaults=replace(damaged.config.defaults, texture=texture))
        ready = build_on(RECIPE, STAGES["grain"], Bundle(damaged.folder, own), None, CPU, torch.float32)
        if texture == 0:
            begun = cleaned(ready, crops, PLEASING).clamp(0, 1) * 2 - 1
            assert torch.allclose(finished(ready, RECIPE, crops), begun, atol=1e-6)
        return finished(ready, RECIPE, crops)

    none, half, whole = made(0.0), made(0.5), made(1.0)
    inside = whole.abs() < 1
    assert (whole - none).abs().mean() > 0.02 and inside.float().mean() > 0.5
    assert torch.allclose(half[inside], ((none + whole) / 2)[inside], atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bytes(damaged, source, tmp_path) -> None:
    whole = made_by(damaged, source, tmp_path / "whole.png", texture=0.5)
    with pytest.raises(KeyboardInterrupt):
        run(damaged, source, tmp_path / "made.png", Stopping("decode", 1), texture=0.5)
    assert not (tmp_path / "made.png").exists()
    assert np.array_equal(made_by(damaged, source, tmp_path / "made.png", texture=0.5), whole)


@pytest.mark.parametrize("fix", ["none", "wavelet"])
def test_the_plan_counts_what_is_run(bundle, source, tmp_path, monkeypatch, fix) -> None:
    def planned(texture: float) -> tuple[Plan, Settings]:
        base = UpscaleConfig(
            tile=64, overlap=16, steps=3, strength=0.5, color_fix=fix, consistency=0.0, texture=texture
        )
        order = Order(source, tmp_path / "planned.png")
        with Engine(bundle, base, OutputConfig()) as engine, engine.read(order, SilentProgress()) as job:
            return job.work, job.settings

    # First as for a photo that is too large for what the cleaner makes of it to be kept.
    with monkeypatch.context() as large:
        large.setattr(counting_pixels, "CLEANED_KEPT", 0)
        (whole, settings), (half, _), (none, _) = (planned(texture) for texture in (1.0, 0.5, 0.0))
    picture = "clean" if settings.cleaner else "enlarge"
    assert (whole.steps, half.steps, none.steps) == (3, 3, 0)
    assert half.calls["texture"] == whole.calls["texture"] > none.calls["texture"] == 0
    # Made once more beside decoding, unless the colours ask for it anyway.
    asked_anyway = settings.cleaner and fix == "wavelet"
    assert half.flops[picture] == (1 if asked_anyway else 2) * whole.flops[picture]
    assert none.flops[picture] > 0 and none.flops["decode"] == none.flops["encode"] == 0
    (kept_whole, _), (kept_half, _) = (planned(texture) for texture in (1.0, 0.5))
    assert kept_half.flops[picture] == (1 if settings.cleaner else 2) * kept_whole.flops[picture]
