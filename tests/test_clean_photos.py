"""Upscaling photos that look clean: the enlarger in the place of stage 1."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enlargers import CLEAN, COMPRESSED, DAMAGED, cubic_of, planes, rows_of, save_bundle_that_says
from PIL import Image
from skimage import data
from tiny_models import CPU
from tiny_upscales import Stopping, levels, run_tiny, save_photo_of_strips

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.consistency import ConsistentRows
from dreamsr_cli.degradations import pixel
from dreamsr_cli.engine import Engine, Order
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.images import open_photo
from dreamsr_cli.looks import LEAST_CLEAN
from dreamsr_cli.models import part_loading
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.open_parts import OpenParts
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.resample import resize


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "enlarger-cache"))


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_plan_of_a_clean_photo_has_the_enlarger_in_the_place_of_stage_1(clean, source, tmp_path, strength) -> None:
    output, order = OutputConfig(), Order(source, tmp_path / "a.png")
    calls = []
    for typed in ("clean", "damaged", "compressed"):
        config = UpscaleConfig(tile=64, overlap=16, steps=2, precision="fp32", looks=typed, strength=strength)
        with Engine(clean, config, output) as engine, engine.read(order, SilentProgress()) as job:
            work = job.work
            calls.append(work.calls)
            assert set(work.calls) == set(work.flops) == set(work.moved)
    with_it, without, compressed = calls
    assert compressed == with_it | {"enlarge": 6 if strength else 3}  # once more for what the result keeps to
    assert (with_it["enlarge"], with_it["remove"], with_it["remove_control"]) == (3, 0, 0)
    assert "enlarge" not in without and without["remove"] > 0
    assert with_it["texture"] == without["texture"]
    assert (with_it["encode"] > 0) == (with_it["decode"] > 0) == (strength > 0)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Bundle:
    """Takes every photo for clean (0.95)."""
    return save_bundle_that_says(tmp_path_factory.mktemp("bundles") / "clean", CLEAN)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_photo_of_strips(tmp_path_factory.mktemp("photo") / "a.png")


run = partial(run_tiny, color_fix="none")


def test_without_texture_a_clean_photo_is_the_enlargers(clean, source, tmp_path) -> None:
    said = run(clean, source, tmp_path / "made.png", strength=0.0).to_json()
    assert (said["enlarger"], said["removal"], said["consistency"]) == (True, False, 0.95)
    photo = open_photo(source)
    rows = rows_of(clean.open_enlarging_refiner("clean"), photo.read_rows(0, 140), 560, 128)
    expected = ConsistentRows(rows.read_rows, EnlargedPhoto(photo, 128, 560), 0.95).read_rows(0, 560)
    assert np.abs(levels(tmp_path / "made.png") - expected.clip(0, 1) * 255).max() <= 0.51


def test_a_compressed_photo_is_enlarged_in_a_manner_of_its_own(clean, source, tmp_path) -> None:
    said = run(clean, source, tmp_path / "made.png", strength=0.0, looks="compressed").to_json()
    assert (said["looks"], said["enlarger"], said["removal"], said["consistency"]) == ("compressed", True, False, 0.0)
    rows = rows_of(clean.open_enlarging_refiner("compressed"), open_photo(source).read_rows(0, 140), 560, 128)
    assert np.abs(levels(tmp_path / "made.png") - rows.read_rows(0, 560) * 255).max() <= 0.51
    other = rows_of(clean.open_enlarging_refiner("clean"), open_photo(source).read_rows(0, 140), 560, 128)
    assert np.abs(rows.read_rows(0, 560) - other.read_rows(0, 560)).max() > 0.01


def test_a_compressed_result_keeps_to_what_the_enlarger_made(clean, source, tmp_path) -> None:
    """Shrunk again it agrees with the enlarger's photo, not with the photo, whose JPEG it would show."""

    def small(name: str, **more: Any) -> np.ndarray:
        run(clean, source, tmp_path / f"{name}.png", **more)
        planes_BCPQ = planes(levels(tmp_path / f"{name}.png"))
        return resize(planes_BCPQ, 140, 32)[0].permute(1, 2, 0).numpy()

    made = small("made", looks="compressed", strength=0.0)
    kept = small("kept", looks="compressed", strength=0.4)
    free = small("free", looks="compressed", strength=0.4, consistency=0.0)
    photo = np.asarray(Image.open(source), np.float32)
    assert np.abs(made - photo).mean() > 1
    assert np.abs(kept - made).mean() < 0.5 * np.abs(free - made).mean()
    assert np.abs(kept - made).mean() < 0.5 * np.abs(kept - photo).mean()


@pytest.mark.parametrize("keep", [(), ("enlarger",)])
def test_both_manners_stay_open_for_a_folder_or_neither(clean, keep) -> None:
    parts = OpenParts(clean, CPU, torch.float32, keep=keep)
    first, other = (parts.enlarging_refiner(looks) for looks in ("clean", "compressed"))
    assert first is parts.enlarging_refiner("clean") is not other
    parts.release()
    again = [parts.enlarging_refiner(looks) for looks in ("clean", "compressed")]
    assert (again[0] is first, again[1] is other) == (bool(keep), bool(keep))


def test_texture_starts_from_the_enlargers_photo(clean, source, tmp_path) -> None:
    """Not from the removal's: with next to no texture the results differ as the enlarged photos do."""
    said = run(clean, source, tmp_path / "made.png", strength=0.05).to_json()
    assert (said["enlarger"], said["removal"]) == (True, False)
    run(clean, source, tmp_path / "cubic.png", strength=0.05, removal=False)
    run(clean, source, tmp_path / "removed.png", strength=0.05, removal=True)
    made, cubic, removed = (levels(tmp_path / f"{name}.png") for name in ("made", "cubic", "removed"))
    assert np.abs(made - cubic).max() > 1 and np.abs(made - removed).max() > 1


def test_reading_a_photo_opens_no_network(clean, source, tmp_path, monkeypatch) -> None:
    """It happens beside the computing of another photo; diffusers' loader isn't for two threads."""
    with Engine(clean, UpscaleConfig(tile=64, overlap=16, precision="fp32"), OutputConfig()) as engine:
        monkeypatch.setattr(part_loading, "load_part", None)
        monkeypatch.setattr("dreamsr_cli.models.bundle.load_part", None)
        with engine.read(Order(source, tmp_path / "a.png"), SilentProgress()) as job:
            assert job.settings.enlarger


def test_who_asks_for_stage_1_or_for_none_gets_that(clean, source, tmp_path) -> None:
    for removal in (True, False):
        said = run(clean, source, tmp_path / f"{removal}.png", removal=removal, strength=0.0).to_json()
        assert (said["enlarger"], said["removal"], said["consistency"]) == (False, removal, 0.95)


LEAST = math.log(LEAST_CLEAN / (1 - LEAST_CLEAN))


@pytest.mark.parametrize(
    ("opinion", "more", "expected"),
    [
        (CLEAN, {}, ("clean", 0.95, True)),
        (CLEAN, {"consistency": 0.0}, ("clean", 0.0, True)),
        (CLEAN, {"looks": "damaged"}, ("damaged", 0.0, False)),
        (CLEAN, {"looks": "damaged", "consistency": 0.3}, ("damaged", 0.3, False)),
        (CLEAN, {"scale": 1.9}, ("damaged", 0.0, False)),
        (COMPRESSED, {}, ("compressed", 1.0, True)),
        (COMPRESSED, {"strength": 0.0}, ("compressed", 0.0, True)),
        (COMPRESSED, {"looks": "clean"}, ("clean", 1.0, True)),
        (COMPRESSED, {"looks": "clean", "scale": 1.9}, ("clean", 0.0, True)),
        (COMPRESSED, {"removal": True}, ("compressed", 0.0, False)),
        (DAMAGED, {}, ("damaged", 0.0, False)),
        (DAMAGED, {"consistency": 0.9}, ("damaged", 0.9, False)),
        (DAMAGED, {"looks": "compressed", "consistency": 0.4}, ("compressed", 0.4, True)),
        (DAMAGED, {"looks": "compressed", "scale": 1.9}, ("compressed", 0.0, True)),
        # Clean or compressed is no question of the enlarger's: what counts is that it is one of them.
        ((3.0, 3.0, 0.0), {}, ("compressed", 1.0, True)),
        ((-9.0, 1.5, 0.0), {}, ("damaged", 0.0, False)),  # a JPEG, but not surely enough
        ((LEAST + 0.05, -9.0, 0.0), {}, ("clean", 0.51, True)),
        ((LEAST - 0.05, -9.0, 0.0), {}, ("damaged", 0.0, False)),
    ],
)
def test_what_looks_and_typed_settings_decide(opinion, more, expected, source, tmp_path) -> None:
    config = replace(UpscaleConfig(tile=64, overlap=16, precision="fp32"), **more)
    bundle = save_bundle_that_says(tmp_path / "bundle", opinion)
    order = Order(source, tmp_path / "a.png")
    with Engine(bundle, config, OutputConfig()) as engine, engine.read(order, SilentProgress()) as job:
        said = job.settings
    assert (said.looks, said.consistency, said.enlarger) == expected
    assert said.removal == (not said.enlarger)


def test_people_hear_what_a_photo_was_taken_for(source, tmp_path) -> None:
    def notes(opinion: tuple[float, float, float], **more: Any) -> list[str]:
        bundle, progress = save_bundle_that_says(tmp_path / str(len(list(tmp_path.iterdir()))), opinion), Listening()
        config = replace(UpscaleConfig(tile=64, overlap=16, precision="fp32"), **more)
        order = Order(source, tmp_path / "a.png")
        with Engine(bundle, config, OutputConfig()) as engine, engine.read(order, progress):
            return progress.notes

    (clean,) = notes(CLEAN)
    assert clean == "a.png: looks clean (95%), so stage 1 is left out and the result keeps to it"
    (compressed,) = notes(COMPRESSED)
    assert compressed == "a.png: looks clean but for its JPEG (95%), so stage 1 is left out and the result keeps to it"
    assert notes(COMPRESSED, removal=True) == ["a.png: looks clean but for its JPEG (95%)"]
    assert notes(DAMAGED) == notes(CLEAN, looks="clean") == []


def test_what_is_typed_makes_the_same_picture_as_what_is_judged(clean, source, tmp_path) -> None:
    damaged = save_bundle_that_says(tmp_path / "damaged", DAMAGED)
    run(damaged, source, tmp_path / "said.png", strength=0.0, looks="clean", consistency=0.95)
    run(clean, source, tmp_path / "made.png", strength=0.0)
    assert np.array_equal(levels(tmp_path / "said.png"), levels(tmp_path / "made.png"))


class Listening(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("strength", "phase"), [(0.0, "enlarge"), (0.3, "encode"), (0.3, "decode")])
def test_an_interrupted_run_goes_on_to_the_same_bytes(clean, source, tmp_path, strength, phase) -> None:
    run(clean, source, tmp_path / "whole.png", strength=strength)
    target = tmp_path / "made.png"
    with pytest.raises(KeyboardInterrupt):
        run(clean, source, target, Stopping(phase, 1), strength=strength)
    assert not target.exists()
    assert run(clean, source, target, strength=strength).to_json()["enlarger"]
    assert target.read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_an_enlarger_of_another_refiner_is_refused(clean, source, tmp_path) -> None:
    folder, other = tmp_path / "bundle", tmp_path / "other"
    save_bundle_that_says(folder, CLEAN)
    save_bundle_that_says(other, CLEAN, seed=9)
    shutil.copytree(other / "vae", folder / "vae", dirs_exist_ok=True)
    with pytest.raises(WeightsError, match="another autoencoder"):
        run(open_bundle(str(folder)), source, tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()
    assert not run(open_bundle(str(folder)), source, tmp_path / "result.png", removal=True).to_json()["enlarger"]


def test_a_damaged_enlarger_is_refused(clean, source, tmp_path) -> None:
    folder = tmp_path / "bundle"
    save_bundle_that_says(folder, CLEAN)
    file = folder / "enlarger" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="enlarger"):
        run(open_bundle(str(folder)), source, tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize(("quality", "gain"), [(None, 0.5), (95, 0.1), (80, 0.1)])
def test_the_shipped_one_is_better_than_the_cubic(name, quality, gain) -> None:
    """Photos that it never trained on, shrunk to a quarter, and as JPEGs; good ones count as clean."""
    made = open_bundle("mini").open_enlarging_refiner("compressed" if quality == 80 else "clean")
    photo_PQC = getattr(data, name)()
    P, Q = (side // 4 * 4 for side in photo_PQC.shape[:2])
    hq = planes(photo_PQC[:P, :Q]).float() / 255
    params = replace(pixel.draw("jpeg", 0, name, 0), only_jpeg=quality)
    cubic = cubic_of(pixel.degrade(hq[0], params)[None])

    def psnr(x: torch.Tensor) -> float:
        return float(-10 * torch.log10((x.clamp(0, 1) - hq).square().mean()))

    assert psnr(cubic + made(cubic * 2 - 1) / 2) > psnr(cubic) + gain
