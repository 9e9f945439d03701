"""Upscaling damaged photos with a bundle that has a cleaner: it takes the place of stage 1."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cleaners import cleaned_rows, save_bundle_that_cleans
from enlargers import CLEAN, DAMAGED, planes
from PIL import Image
from tiny_models import CPU
from tiny_upscales import Stopping, levels, save_photo_of_strips
from tiny_upscales import run_tiny as run

from dreamsr_cli import counting_pixels
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import Engine, Order
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.images import open_photo
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.cleaner import FAITHFUL, PLEASING, CleanedRows
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.settings import check_settings, for_unseen


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cleaner-cache"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Bundle:
    """Takes every photo for damaged."""
    return save_bundle_that_cleans(tmp_path_factory.mktemp("bundles") / "damaged", DAMAGED)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_photo_of_strips(tmp_path_factory.mktemp("photo") / "a.png")


def made_by_the_cleaner(bundle: Bundle, source: Path, manner: str) -> np.ndarray:
    network = bundle.open_cleaner()
    assert network is not None
    return cleaned_rows(network, manner, open_photo(source).read_rows(0, 140), 560, 128).read_rows(0, 560) * 255


@pytest.mark.parametrize("color_fix", ["wavelet", "adain", "none"])
def test_without_texture_a_damaged_photo_is_the_cleaners(damaged, source, tmp_path, color_fix) -> None:
    """Whatever the colour fix: the photo's own colours would bring its noise back."""
    said = run(damaged, source, tmp_path / "made.png", strength=0.0, color_fix=color_fix).to_json()
    assert (said["looks"], said["cleaner"], said["enlarger"], said["removal"]) == ("damaged", True, False, False)
    assert said["consistency"] == 0.0
    expected = made_by_the_cleaner(damaged, source, FAITHFUL)
    assert np.abs(levels(tmp_path / "made.png") - expected).max() <= 0.51 + (color_fix == "adain")


@torch.no_grad()
def test_texture_starts_from_the_second_manner(damaged, source, tmp_path) -> None:
    """With next to no texture the result is what the autoencoder makes of that."""
    run(damaged, source, tmp_path / "made.png", strength=1e-5, color_fix="none")
    made, autoencoder = levels(tmp_path / "made.png"), damaged.open_autoencoder(CPU, torch.float32)

    def error(manner: str) -> float:
        rgb_BCPQ = planes(made_by_the_cleaner(damaged, source, manner)) / 127.5 - 1
        expected = autoencoder.decode(autoencoder.encode(rgb_BCPQ))[0].permute(1, 2, 0).clamp(-1, 1).numpy()
        return float(np.abs(made - (expected + 1) * 127.5).mean())

    assert error(PLEASING) < 1 < error(FAITHFUL)


def test_colours_are_those_of_the_cleaned_photo(damaged, source, tmp_path) -> None:
    run(damaged, source, tmp_path / "fixed.png", strength=0.3)
    run(damaged, source, tmp_path / "free.png", strength=0.3, color_fix="none")
    pleasing = made_by_the_cleaner(damaged, source, PLEASING)
    cubic = np.asarray(Image.open(source).resize((128, 560), Image.Resampling.BICUBIC), np.float32)
    fixed, free = (levels(tmp_path / f"{name}.png").mean((0, 1)) for name in ("fixed", "free"))
    wanted, photo = pleasing.mean((0, 1)), cubic.mean((0, 1))
    assert np.abs(wanted - photo).max() > 2, "the cleaner leaves colours as they are, so this shows nothing"
    assert np.abs(fixed - wanted).max() < 0.5 * np.abs(fixed - photo).max()
    assert np.abs(fixed - wanted).max() < np.abs(free - wanted).max()


@pytest.mark.parametrize("removal", [True, False])
def test_who_asks_for_stage_1_or_for_none_gets_that(damaged, source, tmp_path, removal) -> None:
    said = run(damaged, source, tmp_path / "made.png", removal=removal, strength=0.0).to_json()
    assert (said["cleaner"], said["enlarger"], said["removal"]) == (False, False, removal)


def test_photos_that_look_clean_get_the_enlarger(source, damaged, tmp_path) -> None:
    clean = save_bundle_that_cleans(tmp_path / "clean", CLEAN)
    for bundle, looks in ((clean, "auto"), (damaged, "clean")):
        said = run(bundle, source, tmp_path / "made.png", strength=0.0, looks=looks).to_json()
        assert (said["cleaner"], said["enlarger"], said["removal"]) == (False, True, False)
    said = run(clean, source, tmp_path / "made.png", strength=0.0, looks="damaged").to_json()
    assert (said["cleaner"], said["enlarger"]) == (True, False)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_plan_has_the_cleaner_in_the_place_of_stage_1(damaged, source, tmp_path, strength) -> None:
    output, order, found = OutputConfig(), Order(source, tmp_path / "a.png"), []
    for removal in (None, True):
        config = UpscaleConfig(tile=64, overlap=16, steps=2, precision="fp32", strength=strength, removal=removal)
        with Engine(damaged, config, output) as engine, engine.read(order, SilentProgress()) as job:
            work = job.work
            assert set(work.calls) == set(work.flops) == set(work.moved)
            found.append(work)
    with_it, without = found
    # 140 rows are two strips, which are kept for the colours.
    assert with_it.calls["clean"] == 2 and "clean" not in without.calls
    assert with_it.memory.get("cleaned") == (with_it.grid.canvas_height * 128 * 12 if strength else 0)
    assert (with_it.calls["remove"], with_it.calls["remove_control"]) == (0, 0) and without.calls["remove"] > 0
    assert with_it.calls["texture"] == without.calls["texture"]
    assert (with_it.calls["encode"] > 0) == (with_it.calls["decode"] > 0) == (strength > 0)
    assert with_it.flops["clean"] > 0 and with_it.moved["clean"] > 0


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_a_small_photo_is_cleaned_once_a_large_one_twice(damaged, source, tmp_path, monkeypatch, scale) -> None:
    """For what texture begins from and for the colours; the same bytes either way."""
    made, strip = [], CleanedRows._strip
    monkeypatch.setattr(CleanedRows, "_strip", lambda rows, number: made.append(number) or strip(rows, number))
    fourfold = 560 * 128 * 12
    for name, limit, expected in (("all", fourfold, [0, 1]), ("none", fourfold - 1, [0, 0, 1, 1])):
        monkeypatch.setattr(counting_pixels, "CLEANED_KEPT", limit)
        made.clear()
        run(damaged, source, tmp_path / f"{name}.png", strength=0.3, scale=scale)
        assert sorted(made) == expected
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "none.png").read_bytes()


def test_a_dry_run_plans_a_photo_that_nobody_looked_at_as_damaged(damaged) -> None:
    for config, expected in (
        (UpscaleConfig(), (True, False)),
        (UpscaleConfig(removal=True), (False, True)),
        (UpscaleConfig(removal=False), (False, False)),
        (UpscaleConfig(looks="damaged"), (True, False)),
        (UpscaleConfig(looks="clean"), (False, False)),
    ):
        planned = for_unseen(check_settings(config, damaged))
        assert (planned.cleaner, planned.removal) == expected
    assert check_settings(UpscaleConfig(), damaged).cleaner is None


@pytest.mark.parametrize(("strength", "phase"), [(0.0, "clean"), (0.3, "encode"), (0.3, "decode")])
def test_an_interrupted_run_goes_on_to_the_same_bytes(damaged, source, tmp_path, strength, phase) -> None:
    run(damaged, source, tmp_path / "whole.png", strength=strength)
    target = tmp_path / "made.png"
    with pytest.raises(KeyboardInterrupt):
        run(damaged, source, target, Stopping(phase, 1), strength=strength)
    assert not target.exists()
    assert run(damaged, source, target, strength=strength).to_json()["cleaner"]
    assert target.read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_a_damaged_cleaner_is_refused(source, tmp_path) -> None:
    folder = tmp_path / "bundle"
    save_bundle_that_cleans(folder, DAMAGED)
    file = folder / "cleaner" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="cleaner"):
        run(open_bundle(str(folder)), source, tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()
    shutil.rmtree(folder / "cleaner")
    with pytest.raises(WeightsError, match="'cleaner' is missing"):
        run(open_bundle(str(folder)), source, tmp_path / "result.png")
