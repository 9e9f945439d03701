"""Consistency: a result that agrees with its photo, by rows and as a whole, and what it costs nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.consistency import ConsistentRows
from dreamsr_cli.engine import UpscaleResult, upscale
from dreamsr_cli.errors import UsageError
from dreamsr_cli.images import open_photo
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.resample import resize

LEVEL = 1 / 255


def save_texture(path: Path, width: int = 40, height: int = 33) -> Path:
    """A photo with detail at every size, away from black and white."""
    rng = np.random.default_rng(3)
    levels = np.zeros((height, width, 3))
    for cell in (1, 4, 12):
        coarse = rng.uniform(-30, 30, (height // cell + 1, width // cell + 1, 3))
        levels += coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    Image.fromarray((128 + levels).clip(0, 255).astype(np.uint8)).save(path)
    return path


def shrunk(rgb_PQC: np.ndarray, rows: int, columns: int) -> np.ndarray:
    image = torch.from_numpy(np.ascontiguousarray(rgb_PQC.transpose(2, 0, 1)))[None]
    return resize(image.float(), rows, columns)[0].numpy().transpose(1, 2, 0)


class Case:
    """A photo and a result of it that lost its detail and got other detail instead."""

    def __init__(self, folder: Path, factor: float) -> None:
        photo = open_photo(save_texture(folder / "photo.png"))
        width, height = (round(side * factor) for side in (photo.info.width, photo.info.height))
        self.photo_PQC = photo.read_rows(0, photo.info.height)
        self.enlarged = EnlargedPhoto(photo, width, height)
        rng = np.random.default_rng(4)
        flat = np.float32(0.5) + 0.5 * (self.enlarged.read_rows(0, height) - 0.5)
        self.result_PQC = (flat + rng.normal(0, 0.03, flat.shape)).astype(np.float32)

    def rows(self, amount: float) -> ConsistentRows:
        return ConsistentRows(lambda top, bottom: self.result_PQC[top:bottom], self.enlarged, amount)

    def whole(self, amount: float) -> np.ndarray:
        return self.rows(amount).read_rows(0, self.enlarged.height)

    def distance(self, rgb_PQC: np.ndarray) -> float:
        """Between the photo and the shrunk picture."""
        return float(np.abs(shrunk(rgb_PQC, *self.photo_PQC.shape[:2]) - self.photo_PQC).mean())


@pytest.mark.parametrize("factor", [1.7, 2, 4, 8])
def test_the_shrunk_result_becomes_the_photo(tmp_path, factor) -> None:
    case = Case(tmp_path, factor)
    before, half, after = (case.distance(case.whole(amount)) for amount in (0, 0.5, 1))
    assert before > 10 * LEVEL
    assert after < before / 2
    assert after < half < before


def test_none_of_it_is_the_result_itself(tmp_path) -> None:
    case = Case(tmp_path, 4)
    assert np.array_equal(case.whole(0), case.result_PQC)


def test_at_its_own_size_all_of_it_is_the_photo(tmp_path) -> None:
    case = Case(tmp_path, 1)
    assert np.abs(case.whole(1) - case.photo_PQC).max() < 1e-5


def test_the_amount_is_linear(tmp_path) -> None:
    case = Case(tmp_path, 4)
    none, some, whole = (case.whole(amount) for amount in (0, 0.3, 1))
    assert np.allclose(some, none + np.float32(0.3) * (whole - none), atol=1e-6)


def test_detail_that_the_photo_cannot_hold_stays(tmp_path) -> None:
    """A checkerboard of single pixels averages to nothing: it is texture that consistency has no say in."""
    case = Case(tmp_path, 4)
    plain = case.whole(1)
    rows, columns = np.indices(case.result_PQC.shape[:2])
    board_PQ1 = (np.float32(0.1) * (-1.0) ** (rows + columns))[..., None].astype(np.float32)
    case.result_PQC = case.result_PQC + board_PQ1
    inside = (slice(16, -16), slice(16, -16))
    assert np.abs(case.whole(1) - plain - board_PQ1)[inside].max() < 0.01


@pytest.mark.parametrize("factor", [2.5, 4])
def test_rows_are_the_same_whatever_is_asked_for_with_them(tmp_path, factor) -> None:
    case = Case(tmp_path, factor)
    whole, rows = case.whole(0.8), case.rows(0.8)
    for top, bottom in [(0, 1), (0, 17), (13, 40), (70, 71), (case.enlarged.height - 3, case.enlarged.height)]:
        assert np.array_equal(rows.read_rows(top, bottom), whole[top:bottom])


def test_it_may_agree_with_another_picture_of_the_photo(tmp_path) -> None:
    """What a compressed photo would be without its JPEG."""
    case = Case(tmp_path, 4)

    class Brighter(EnlargedPhoto):
        def read_rows(self, top: int, bottom: int) -> np.ndarray:
            return super().read_rows(top, bottom) + np.float32(0.1)

    like = Brighter(case.enlarged.photo, case.enlarged.width, case.enlarged.height)
    rows = ConsistentRows(lambda top, bottom: case.result_PQC[top:bottom], case.enlarged, 1, like)
    whole = rows.read_rows(0, case.enlarged.height)
    wanted = shrunk(like.read_rows(0, like.height), *case.photo_PQC.shape[:2])
    assert np.abs(shrunk(whole, *wanted.shape[:2]) - wanted).mean() < 3 * LEVEL
    assert case.distance(whole) > 20 * LEVEL
    assert np.array_equal(rows.read_rows(13, 40), whole[13:40])


# ---------------------------------------------------------------- as a person uses it


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return open_bundle(str(tiny_bundle))


def run(bundle: Bundle, source: Path, target: Path, **settings) -> UpscaleResult:
    base = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32", strength=0.0)
    return upscale(source, target, bundle, replace(base, **settings), OutputConfig(), SilentProgress())


def photo_distance(source: Path, result: Path) -> float:
    """Between a photo and its shrunk result, in levels."""
    photo_PQC, result_PQC = (np.asarray(Image.open(path).convert("RGB"), np.float32) for path in (source, result))
    return float(np.abs(shrunk(result_PQC, *photo_PQC.shape[:2]) - photo_PQC).mean())


@pytest.mark.parametrize("settings", [{}, {"strength": 0.4}, {"color_fix": "none"}, {"color_fix": "adain"}])
def test_a_result_is_made_consistent_in_every_mode(bundle, tmp_path, settings) -> None:
    source = save_texture(tmp_path / "a.png")
    for amount in (0.0, 1.0):
        result = run(bundle, source, tmp_path / f"{amount}.png", consistency=amount, **settings)
        assert result.to_json()["consistency"] == amount
    before, after = (photo_distance(source, tmp_path / f"{amount}.png") for amount in (0.0, 1.0))
    # AdaIN comes later, and stretches contrast once more.
    assert after < 0.6 * before


def test_a_tall_result_has_no_step_between_its_strips(bundle, tmp_path) -> None:
    """Strips have 256 rows; the photo's shape must not show where they end."""
    source = save_texture(tmp_path / "a.png", 24, 150)
    run(bundle, source, tmp_path / "b.png", consistency=1.0, color_fix="none")
    run(bundle, source, tmp_path / "plain.png", color_fix="none")
    made, plain = (np.asarray(Image.open(tmp_path / name), np.float32) for name in ("b.png", "plain.png"))
    assert made.shape[0] == 600
    photo = open_photo(source)
    rows = ConsistentRows(lambda top, bottom: plain[top:bottom] / 255, EnlargedPhoto(photo, 96, 600), 1.0)
    expected = rows.read_rows(0, 600).clip(0, 1) * 255
    # The plain picture was rounded to levels before, this one is after.
    assert np.abs(made - expected).max() < 1.6


@pytest.mark.parametrize("amount", [-0.1, 1.5, float("nan")])
def test_amounts_beyond_0_and_1_are_refused(bundle, tmp_path, amount) -> None:
    with pytest.raises(UsageError, match="--consistency"):
        run(bundle, save_texture(tmp_path / "a.png"), tmp_path / "b.png", consistency=amount)
