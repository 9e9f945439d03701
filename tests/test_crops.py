"""Training samples: the same in any process, honest about photos that can't be used, with the right texts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamsr_cli import draws
from dreamsr_cli.config import Looks
from dreamsr_cli.degradations import pixel
from dreamsr_cli.errors import ConfigError, TrainingError
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.models.detail_words import detail_words
from dreamsr_cli.plain_data import from_dict
from dreamsr_cli.training.crops import DEAD_LEAVES, Batch, CropSettings, Sample, batches, make_sample
from dreamsr_cli.training.cutting import slanted
from dreamsr_cli.training.dead_leaves import dead_leaves
from dreamsr_cli.training.photos import PhotoSource, turned

SMALL = CropSettings(crop=64, preset="seesr-mild", seed=5, p_full=0.3, full_side=80, dead_leaves=0.2)


def write_photos(folder: Path, count: int = 5) -> None:
    """Leaves of different sizes as PNG and JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rgb = dead_leaves(192, draws.generator(i, "photo")).permute(1, 2, 0).numpy()[: 128 + 8 * i]
        picture = Image.fromarray((rgb * 255).astype(np.uint8))
        picture.save(folder / (f"photo{i}.png" if i % 2 else f"photo{i}.jpg"), quality=92)


@pytest.fixture(scope="module")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PhotoSource]:
    base = tmp_path_factory.mktemp("photos")
    write_photos(base / "in")

    def make(hold_out: int = 1) -> PhotoSource:
        return PhotoSource(base / "in", base / "cache", hold_out, smallest=64)

    return make


def content(sample: Sample) -> tuple[bytes, bytes, str, str, str]:
    return sample.hq_CPQ.tobytes(), sample.lq_CPQ.tobytes(), sample.local_text, sample.global_text, sample.origin


def same(one: Batch, other: Batch) -> bool:
    return (
        one.step == other.step
        and torch.equal(one.hq_BCPQ, other.hq_BCPQ)
        and torch.equal(one.lq_up_BCPQ, other.lq_up_BCPQ)
        and one.local_texts == other.local_texts
        and one.global_texts == other.global_texts
    )


def test_sample_is_a_function_of_seed_step_and_index(make_source: Callable[..., PhotoSource]) -> None:
    sites = [(step, index) for step in range(3) for index in range(3)]
    forward = [content(make_sample(make_source(), SMALL, *site)) for site in sites]
    torch.manual_seed(1)
    warm = make_source()
    assert [content(make_sample(warm, SMALL, *site)) for site in reversed(sites)] == forward[::-1]
    assert len({hq for hq, *_ in forward}) == len(sites)
    other = content(make_sample(warm, dataclasses.replace(SMALL, seed=6), 0, 0))
    assert other[0] != forward[0][0]


def test_two_workers_give_the_batches_of_none(make_source: Callable[..., PhotoSource]) -> None:
    alone = list(islice(batches(make_source(), SMALL, 2, start_step=3, workers=0), 5))
    stream = batches(make_source(), SMALL, 2, start_step=3, workers=2)
    together = list(islice(stream, 5))
    stream.close()
    assert [b.step for b in together] == [3, 4, 5, 6, 7]
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_batch_is_its_samples_enlarged(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()
    batch = next(iter(batches(source, SMALL, 3, start_step=8)))
    assert batch.hq_BCPQ.shape == batch.lq_up_BCPQ.shape == (3, 3, 64, 64)
    assert batch.hq_BCPQ.dtype == batch.lq_up_BCPQ.dtype == torch.float32
    for index in range(3):
        sample = make_sample(source, SMALL, 8, index)
        assert sample.hq_CPQ.dtype == sample.lq_CPQ.dtype == np.uint8 and sample.lq_CPQ.shape == (3, 16, 16)
        assert np.array_equal((batch.hq_BCPQ[index] * 255).round().numpy(), sample.hq_CPQ)
        up = pixel.enlarge(torch.from_numpy(sample.lq_CPQ).float() / 255, 64, 64)
        assert torch.equal(batch.lq_up_BCPQ[index], up)
        assert batch.local_texts[index] == sample.local_text and batch.global_texts[index] == sample.global_text


def test_truncated_photo_is_skipped_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_photos(folder, 3)
    whole = (folder / "photo0.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a photo")
    shutil.copy(folder / "photo0.jpg", folder / "zcopy.jpg")
    Image.new("RGB", (300, 20)).save(folder / "thin.png")
    source = PhotoSource(folder, tmp_path / "cache", 0, smallest=64)
    assert {photo.name for photo in source.training} == {"photo0.jpg", "photo1.png", "photo2.jpg"}
    assert {s.name for s in source.skipped} == {"broken.jpg", "empty.png", "zcopy.jpg", "thin.png"}
    reasons = {s.name: s.reason for s in source.skipped}
    assert "photo0.jpg" in reasons["zcopy.jpg"] and "below 64" in reasons["thin.png"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_decoded_photo_is_the_file_and_is_decoded_once(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 2)
    source = PhotoSource(tmp_path / "in", tmp_path / "cache", 0, smallest=64)
    lossless = next(photo for photo in source.training if photo.name.endswith(".png"))
    expected = np.asarray(Image.open(tmp_path / "in" / lossless.name))
    assert np.array_equal(lossless.read(), expected)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = PhotoSource(tmp_path / "in", tmp_path / "cache", 0, smallest=64)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before
    assert again.training == source.training and again.data_sha256 == source.data_sha256


def test_held_out_photos_are_the_last_by_hash_and_never_trained_on(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source(hold_out=2)
    hashes = [photo.sha256 for photo in (*source.training, *source.validation)]
    assert hashes == sorted(hashes) and len(source.validation) == 2
    plain = dataclasses.replace(SMALL, dead_leaves=0.0)
    held = dataclasses.replace(plain, held_out=True)
    trained = {make_sample(source, plain, step, 0).origin for step in range(12)}
    checked = {make_sample(source, held, step, 0).origin for step in range(12)}
    assert trained == {photo.name for photo in source.training}
    assert checked == {photo.name for photo in source.validation}


def test_local_text_is_of_the_crop_and_global_text_of_the_photo(make_source: Callable[..., PhotoSource]) -> None:
    source, describer = make_source(), Describer()
    native = dataclasses.replace(SMALL, p_full=0.0, dead_leaves=0.0)
    photos = {photo.name: photo for photo in source.training}
    differ = 0
    for step in range(8):
        sample = make_sample(source, native, step, 0)
        assert sample.local_text == describer.describe(sample.hq_CPQ.transpose(1, 2, 0).astype(np.float32) / 255)
        photo = photos[sample.origin]
        assert sample.global_text in {source.global_text(photo, turn, describer) for turn in range(8)}
        differ += sample.local_text != sample.global_text
    assert differ > 0


def test_crops_of_a_part_of_a_shrunk_photo_have_words_of_their_own(make_source: Callable[..., PhotoSource]) -> None:
    source, describer = make_source(), Describer()
    part = dataclasses.replace(SMALL, p_full=1.0, full_side=128, dead_leaves=0.0)
    for step in range(4):
        sample = make_sample(source, part, step, 0)
        assert sample.local_text == describer.describe(sample.hq_CPQ.transpose(1, 2, 0).astype(np.float32) / 255)


def test_a_share_of_local_texts_says_how_much_detail_there_is(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()
    plain = dataclasses.replace(SMALL, p_full=0.0, dead_leaves=0.0)
    half = dataclasses.replace(plain, detail_words=0.5)
    told = 0
    for step in range(24):
        before, after = make_sample(source, plain, step, 0), make_sample(source, half, step, 0)
        # Nothing else is drawn differently.
        assert before.hq_CPQ.tobytes() == after.hq_CPQ.tobytes() and before.lq_CPQ.tobytes() == after.lq_CPQ.tobytes()
        words = detail_words(after.hq_CPQ.transpose(1, 2, 0).astype(np.float32) / 255)
        assert after.local_text in (before.local_text, f"{words} {before.local_text}")
        assert after.global_text == before.global_text
        told += after.local_text != before.local_text
    assert 5 <= told <= 19


def test_shrunk_steps_share_one_text_and_dead_leaves_have_no_photo(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()
    full = dataclasses.replace(SMALL, p_full=1.0, dead_leaves=0.0)
    assert all(s.local_text == s.global_text != "" for s in (make_sample(source, full, i, 0) for i in range(6)))
    leaves = make_sample(source, dataclasses.replace(SMALL, dead_leaves=1.0), 0, 0)
    assert leaves.origin == DEAD_LEAVES and leaves.local_text == leaves.global_text
    shrunk = source.shrunk(source.training[0], 80)
    assert min(shrunk.shape[:2]) == 80 and shrunk.dtype == np.uint8
    assert np.abs(shrunk.mean((0, 1)) - source.training[0].read().mean((0, 1))).max() < 2


def test_shrunk_photos_come_in_several_sizes(make_source: Callable[..., PhotoSource]) -> None:
    """Photos of several short sides give crops whose texture is finer or coarser; one side is drawn per sample."""
    source = make_source()
    one = dataclasses.replace(SMALL, p_full=1.0, full_side=64, dead_leaves=0.0, turns=1)
    several = dataclasses.replace(one, full_sides=(96, 120))
    seen = set()
    for step in range(12):
        sample = make_sample(source, several, step, 0)
        photo = next(p for p in source.training if p.name == sample.origin)
        whole = {side: source.shrunk(photo, side) for side in (64, 96, 120)}
        hq_PQC = sample.hq_CPQ.transpose(1, 2, 0)
        windows = {s: np.lib.stride_tricks.sliding_window_view(x, (64, 64, 3)) for s, x in whole.items()}
        seen |= {s for s, w in windows.items() if (w == hq_PQC).all((-3, -2, -1)).any()}
        assert make_sample(source, several, step, 0).hq_CPQ.tobytes() == sample.hq_CPQ.tobytes()
    assert seen == {64, 96, 120}
    with pytest.raises(ConfigError, match="full_side 48 is below crop 64"):
        dataclasses.replace(one, full_sides=(96, 48))


def test_slanted_crops_show_the_photo_turned_and_shrunk_and_nothing_else() -> None:
    rows, columns = np.mgrid[:200, :300].astype(np.float64)
    slope = np.stack([rows, columns, np.full_like(rows, 90)], -1).round().astype(np.uint8)
    found = [slanted(slope[:, :250], 64, 2, np.random.default_rng(seed)) for seed in range(40)]
    zooms, angles = [], []
    for made in found:
        assert made is not None
        crop_PQC, (top, left), around = made
        assert crop_PQC.shape == (64, 64, 3) and crop_PQC.dtype == np.uint8
        assert 0 <= top <= 200 - around and 0 <= left <= 250 - around
        # Every pixel is one of the square's: the third colour, the same everywhere, would show others.
        assert (abs(crop_PQC[..., 2].astype(int) - 90) <= 1).all()
        assert crop_PQC[..., 0].min() >= top - 1 and crop_PQC[..., 0].max() <= top + around
        assert crop_PQC[..., 1].min() >= left - 1 and crop_PQC[..., 1].max() <= left + around
        across = (crop_PQC[:, 60].astype(float) - crop_PQC[:, 4]).mean(0) / 56
        zooms.append(np.hypot(*across[:2]))
        angles.append(np.degrees(np.arctan2(across[0], across[1])))
    assert 1.2 < min(zooms) < 1.4 and 1.6 < max(zooms) < 1.8
    assert min(angles) < -30 and max(angles) > 30 and max(map(abs, angles)) < 46
    assert slanted(slope[:70], 64, 2, np.random.default_rng(0)) is None
    # Where only small angles have room, those are taken.
    tight = slanted(slope[:114], 64, 2, np.random.default_rng(3))
    assert tight is not None and (abs(tight[0][..., 2].astype(int) - 90) <= 1).all()
    # And where not a pixel is to spare, rounding must not make the angles end before they begin; at no size.
    exact = [slanted(np.zeros((side, side, 3), np.uint8), 64, 2, np.random.default_rng(3)) for side in range(80, 124)]
    fits = [made is not None for made in exact]
    assert fits == sorted(fits) and any(fits) and not all(fits)


def test_a_share_of_the_crops_of_shrunk_photos_is_slanted(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()
    upright = dataclasses.replace(SMALL, crop=32, p_full=1.0, full_side=64, dead_leaves=0.0)
    half = dataclasses.replace(upright, slanted=0.5)
    pairs = [(make_sample(source, upright, step, 0), make_sample(source, half, step, 0)) for step in range(20)]
    same = [plain.hq_CPQ.tobytes() == sample.hq_CPQ.tobytes() for plain, sample in pairs]
    assert 4 <= sum(same) <= 16
    assert all(plain.origin == sample.origin and sample.local_text for plain, sample in pairs)
    assert all(sample.hq_CPQ.shape == (3, 32, 32) for _, sample in pairs)
    native = dataclasses.replace(half, p_full=0.0, slanted=1.0)
    assert make_sample(source, native, 0, 0).hq_CPQ.tobytes() == (
        make_sample(source, dataclasses.replace(native, slanted=0.0), 0, 0).hq_CPQ.tobytes()
    )
    with pytest.raises(ConfigError, match="slanted = 2 is not a share"):
        dataclasses.replace(half, slanted=2)


def test_full_steps_have_larger_crops_of_shrunk_photos_large_enough(tmp_path: Path) -> None:
    """Sizes 128 to 160 by 192: with a short side of 144 and crops as large, the smaller photos are never enlarged."""
    write_photos(tmp_path / "in")
    source = PhotoSource(tmp_path / "in", tmp_path / "cache", 0, smallest=64)
    settings = CropSettings(crop=64, preset="bicubic", seed=1, p_full=0.5, full_side=144, full_crop=144, usm=False)
    sides = {}
    for step in range(10):
        batch = next(iter(batches(source, settings, 2, step)))
        sides[step] = batch.hq_BCPQ.shape[-1]
        assert batch.lq_up_BCPQ.shape == batch.hq_BCPQ.shape
        assert (batch.local_texts == batch.global_texts) == (sides[step] == 144)
        origins = {make_sample(source, settings, step, i).origin for i in range(2)}
        if sides[step] == 144:
            assert origins <= {p.name for p in source.training if min(p.height, p.width) >= 144}
    assert set(sides.values()) == {64, 144}
    none = dataclasses.replace(settings, p_full=1.0, full_side=256, full_crop=256)
    assert make_sample(source, none, 0, 0).hq_CPQ.shape == (3, 64, 64), "no photo is large enough"
    with pytest.raises(ConfigError, match="full_crop"):
        dataclasses.replace(settings, full_crop=160)


def test_words_of_a_prompts_file_beside_the_photo(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", 1)
    box = [[0, 0, 96, 128], [96, 0, 192, 128]]
    tiles = [{"box": b, "text": t, "shared_with": None} for b, t in zip(box, ("left", "right"), strict=True)]
    plan = {
        "format": 1,
        "photo": {"name": "photo0.jpg"},
        "canvas": [192, 128],
        "global": {"text": "all"},
        "tiles": tiles,
    }
    path = tmp_path / "in" / "photo0.jpg.prompts.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    source = PhotoSource(tmp_path / "in", tmp_path / "cache", 0, smallest=64)
    settings = CropSettings(crop=64, preset="bicubic", seed=1, p_full=0, full_side=128, turns=1, usm=False)
    photo = source.training[0].read()
    seen = set()
    for step in range(16):
        sample = make_sample(source, settings, step, 0)
        crop = sample.hq_CPQ.transpose(1, 2, 0)
        (left,) = {x for y in range(65) for x in range(129) if np.array_equal(photo[y : y + 64, x : x + 64], crop)}
        assert sample.global_text == "all" and sample.local_text == ("left" if left + 32 <= 96 else "right")
        seen.add(sample.local_text)
    assert seen == {"left", "right"}
    path.write_text(json.dumps({**plan, "photo": {"name": "other.jpg"}}), encoding="utf-8")
    with pytest.raises(TrainingError, match="held out"):
        PhotoSource(tmp_path / "in", tmp_path / "cache", 0, smallest=64)


def test_native_crop_lies_in_its_photo_under_one_of_the_turns(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()
    native = dataclasses.replace(SMALL, p_full=0.0, dead_leaves=0.0, usm=False)
    sample = make_sample(source, native, 4, 1)
    photo = next(p for p in source.training if p.name == sample.origin).read()
    crop = sample.hq_CPQ.transpose(1, 2, 0)

    def places(turned_photo: np.ndarray) -> int:
        windows = np.lib.stride_tricks.sliding_window_view(turned_photo, (64, 64), axis=(0, 1))
        starts = np.argwhere((windows[..., 0, 0] == crop[0, 0]).all(-1))
        return sum(np.array_equal(turned_photo[y : y + 64, x : x + 64], crop) for y, x in starts)

    assert sum(places(turned(photo, turn)) for turn in range(8)) == 1


def test_busy_crops_are_favoured(tmp_path: Path) -> None:
    """Left half flat, right half noise: with three candidates the right side is taken much more often."""
    rgb = np.full((96, 400, 3), 128, np.uint8)
    rgb[:, 200:] = np.random.default_rng(0).integers(0, 256, (96, 200, 3))
    (tmp_path / "in").mkdir()
    Image.fromarray(rgb).save(tmp_path / "in" / "half.png")
    source = PhotoSource(tmp_path / "in", tmp_path / "cache", 0, smallest=64)

    def busy(candidates: int) -> float:
        settings = CropSettings(crop=64, preset="bicubic", p_full=0, full_side=96, candidates=candidates)
        return float(np.mean([make_sample(source, settings, s, 0).hq_CPQ.std() > 20 for s in range(60)]))

    assert busy(1) < 0.75 < 0.85 < busy(3)


def test_a_sample_says_what_its_bad_crop_looks_like(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()

    def looks(preset: str) -> list[Looks | None]:
        settings = dataclasses.replace(SMALL, dead_leaves=0.0, preset=preset)
        return [make_sample(source, settings, step, 0).looks for step in range(40)]

    assert set(looks("bicubic")) == {"clean"} and set(looks("camera")) == {"damaged"}
    # of the qualities 70 to 98 those from 92 on count as clean
    assert 2 <= looks("jpeg").count("clean") <= 20 and set(looks("jpeg")) == {"clean", "compressed"}


def test_mixed_presets_keep_their_shares(make_source: Callable[..., PhotoSource]) -> None:
    source = make_source()
    plain = dataclasses.replace(SMALL, dead_leaves=0.0)
    mixed = dataclasses.replace(plain, mix=(("bicubic", 0.5),))
    cubic = dataclasses.replace(plain, preset="bicubic")

    def bad(settings: CropSettings) -> list[bytes]:
        return [make_sample(source, settings, step, 0).lq_CPQ.tobytes() for step in range(60)]

    chosen = [m == c for m, c in zip(bad(mixed), bad(cubic), strict=True)]
    untouched = [m == p for m, p in zip(bad(mixed), bad(plain), strict=True)]
    assert 18 <= sum(chosen) <= 42
    assert sum(chosen) + sum(untouched) == 60
    with pytest.raises(ConfigError, match="exceed"):
        dataclasses.replace(plain, mix=(("bicubic", 0.7), ("realesrgan", 0.7)))


def test_settings_and_folders_that_make_no_sense(make_source: Callable[..., PhotoSource], tmp_path: Path) -> None:
    for key, value in {
        "crop": 100,
        "preset": "mystery",
        "p_full": 1.5,
        "detail_words": -0.1,
        "full_side": 48,
        "candidates": 0,
    }.items():
        with pytest.raises(ConfigError, match=key):
            from_dict(CropSettings, {"crop": 64, key: value}, "test")
    with pytest.raises(TrainingError, match="no such folder"):
        PhotoSource(tmp_path / "nowhere", tmp_path / "cache", 0)
    with pytest.raises(TrainingError, match="held out"):
        make_source(hold_out=5)
    with pytest.raises(TrainingError, match="smallest"):
        make_sample(make_source(), dataclasses.replace(SMALL, crop=128, full_side=128), 0, 0)
    with pytest.raises(TrainingError, match="validate"):
        make_sample(make_source(hold_out=0), dataclasses.replace(SMALL, held_out=True), 0, 0)


def test_dead_leaves_are_a_function_of_the_generator() -> None:
    one = dead_leaves(96, draws.generator(1, "leaves"))
    assert one.shape == (3, 96, 96) and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1
    assert one.std() > 0.05
    assert torch.equal(one, dead_leaves(96, draws.generator(1, "leaves")))
    assert not torch.equal(one, dead_leaves(96, draws.generator(2, "leaves")))


def test_dead_leaves_take_the_palette_given() -> None:
    red = np.tile(np.array([[200, 20, 10]], np.uint8), (7, 1))
    leaves = dead_leaves(96, draws.generator(1, "leaves"), red)
    plain = (leaves * 255 - torch.tensor([200.0, 20.0, 10.0]).reshape(3, 1, 1)).abs().amax(0) < 1
    assert plain.float().mean() > 0.3
    assert (leaves[0] > leaves[1]).float().mean() > 0.9
