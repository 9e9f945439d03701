"""Pairs on disk: crops of both halves at the same place, kinds told apart, bad ones named, words from captions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from training_sets import encoded, lines, picture, plan_json, small, write_pairs

from dreamsr_cli.degradations.pixel import enlarge
from dreamsr_cli.errors import InputError, TrainingError
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.training.crops import Batch, CropSettings, batches, make_sample
from dreamsr_cli.training.open_source import open_source
from dreamsr_cli.training.pair_data import PairSource
from dreamsr_cli.training.photos import turned
from dreamsr_cli.training.sources import BadLimit, ItemTexts, SkippedPhoto

SETTINGS = CropSettings(crop=64, preset="bicubic", seed=5, p_full=0.5, full_side=64, usm=False)


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.hq_BCPQ, other.hq_BCPQ) and torch.equal(one.lq_up_BCPQ, other.lq_up_BCPQ)


def open_(folder: Path, **options: object) -> PairSource:
    source = open_source(folder, cache=folder / "cache", **{"hold_out": 1, "smallest": 64, **options})  # ty: ignore
    assert isinstance(source, PairSource)
    return source


def test_both_halves_are_cut_at_one_place_and_turned_alike(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    source = open_(tmp_path)
    seen = set()
    for step in range(12):
        sample = make_sample(source, SETTINGS, step, 0)
        hq = sample.hq_CPQ.transpose(1, 2, 0)
        # the small half is the block means of the good one, wherever it was cut and however turned
        assert np.array_equal(small(np.ascontiguousarray(hq)), sample.lq_CPQ.transpose(1, 2, 0))
        whole = picture(int(sample.origin[1:]))
        places = [
            (turn, top, left)
            for turn in range(8)
            for top in range(0, 33, 4)
            for left in range(0, 33, 4)
            if np.array_equal(turned(whole[top : top + 64, left : left + 64], turn), hq)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 6


def test_texture_pairs_bring_erased_pictures_and_are_degraded_online(tmp_path: Path) -> None:
    write_pairs(tmp_path, texture=True)
    source = open_(tmp_path)
    assert source.erased
    batch = next(iter(batches(source, SETTINGS, 3)))
    assert batch.erased_BCPQ is not None and batch.erased_BCPQ.shape == batch.hq_BCPQ.shape == (3, 3, 64, 64)
    assert torch.allclose(batch.erased_BCPQ, 1 - batch.hq_BCPQ, atol=1e-6)
    sample = make_sample(source, SETTINGS, 0, 0)
    assert sample.lq_CPQ.shape == (3, 16, 16)
    assert torch.equal(batch.lq_up_BCPQ[0], enlarge(torch.from_numpy(sample.lq_CPQ).float() / 255, 64, 64))
    with pytest.raises(TrainingError, match="dead_leaves=0"):
        make_sample(source, CropSettings(crop=64, dead_leaves=0.1, full_side=64), 0, 0)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_any_split_of_the_global_batch_sees_the_same_samples(tmp_path: Path, world: int, accumulate: int) -> None:
    write_pairs(tmp_path)
    source = open_(tmp_path)
    whole = list(islice(batches(source, SETTINGS, 4, start_step=7), 2))
    share = 4 // (world * accumulate)
    parts: dict[int, list[Batch]] = {}
    for rank in range(world):
        stream = batches(source, SETTINGS, share, 7, rank=rank, world=world, accumulate=accumulate)
        for batch in islice(stream, 2 * accumulate):
            parts.setdefault(batch.step, []).append(batch)
    for batch in whole:
        found = sorted(parts[batch.step], key=lambda b: b.first)
        assert [b.first for b in found] == list(range(0, 4, share))
        assert torch.equal(torch.cat([b.hq_BCPQ for b in found]), batch.hq_BCPQ)
        assert torch.equal(torch.cat([b.lq_up_BCPQ for b in found]), batch.lq_up_BCPQ)
        assert [t for b in found for t in b.local_texts] == batch.local_texts


def test_pairs_of_one_photo_are_held_out_together_and_records_are_checked(
    tmp_path: Path, degraded: Callable[..., Path]
) -> None:
    out = degraded(crops=3)
    source = open_(out)
    groups = {pair.group for pair in source.training}, {pair.group for pair in source.validation}
    assert not groups[0] & groups[1] and len(groups[1]) == 1 and len(source.validation) == 3
    assert all(len(pair.hq_sha256) == 64 for pair in source.training)
    assert source.data_sha256 == open_(out).data_sha256 != open_(out, hold_out=2).data_sha256
    pair = source.training[0]
    assert source.texts(pair) is not None
    pair.lq.write_bytes(encoded(small(picture(77, 64))))
    with pytest.raises(InputError, match="sha256"):
        source.read(pair)


@pytest.fixture
def degraded(tmp_path: Path) -> Callable[..., Path]:
    """A set that `dreamsr degrade` itself wrote."""

    def make(crops: int) -> Path:
        from typer.testing import CliRunner

        from dreamsr_cli.cli.app import app

        for i in range(3):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"photo{i}.png").write_bytes(encoded(picture(i, 128)))
        out = tmp_path / "pairs"
        arguments = ["degrade", str(tmp_path / "in"), "-o", str(out), "--size", "64", "--crops", str(crops)]
        arguments += ["--captioner", "describe", "--workers", "1"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return out

    return make


def test_words_come_from_captions(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    rows = [plan_json(f"p{i}.png", 96, 96, f"a whole {i}", f"a part {i}") for i in range(4)]
    (tmp_path / "captions.jsonl").write_text(lines(*rows), encoding="utf-8")
    sample = make_sample(open_(tmp_path), SETTINGS, 0, 0)
    number = sample.origin[1:]
    assert (sample.global_text, sample.local_text) == (f"a whole {number}", f"a part {number}")
    (tmp_path / "captions.jsonl").write_text('{"format": 1', encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        open_(tmp_path)
    (tmp_path / "captions.jsonl").unlink()
    plain = make_sample(open_(tmp_path), SETTINGS, 0, 0)
    assert plain.local_text == Describer().describe(plain.hq_CPQ.transpose(1, 2, 0).astype(np.float32) / 255)


def test_local_text_is_of_the_tile_that_overlaps_most() -> None:
    words = ItemTexts("all", (((0, 0, 0.5, 1), "left"), ((0.4, 0, 1, 1), "right")))
    assert words.local_text((0.1, 0, 0.5, 1)) == "left"
    assert words.local_text((0.4, 0.2, 0.9, 1)) == "right"
    assert words.local_text((0.42, 0, 0.48, 1)) == "left", "the first of equals"
    assert ItemTexts("all").local_text((0, 0, 1, 1)) is None


def test_bad_pairs_are_named_and_too_many_stop_the_run(tmp_path: Path) -> None:
    write_pairs(tmp_path, 8)
    (tmp_path / "lq" / "p1.png").unlink()
    (tmp_path / "hq" / "p2.png").write_bytes(b"no picture")
    source = open_(tmp_path, max_bad=0.3)
    assert {s.name for s in source.skipped} == {"p1", "p2"} and len(source.training) + len(source.validation) == 6
    with pytest.raises(TrainingError, match=r"2 of 8 photos.*p1") as found:
        open_(tmp_path, max_bad=0.1)
    assert "data.max_bad" in found.value.hint
    (tmp_path / "lq" / "p3.png").write_bytes(encoded(picture(3)[:50, :50]))
    pair = next(p for p in (*open_(tmp_path, max_bad=0.5).training, *source.validation) if p.name == "p3")
    with pytest.raises(InputError, match="whole fraction"):
        source.read(pair)


def test_a_pair_damaged_later_is_passed_over_told_once_and_limited(tmp_path: Path) -> None:
    write_pairs(tmp_path, 6)
    source = open_(tmp_path, max_bad=0.5)
    broken = source.training[0]
    data = broken.hq.read_bytes()
    broken.hq.write_bytes(data[: len(data) // 2])
    told: list[SkippedPhoto] = []
    made = list(islice(batches(source, SETTINGS, 4, on_bad=told.append), 6))
    assert [photo.name for photo in told] == [broken.name]
    again = list(islice(batches(source, SETTINGS, 4, workers=2), 6))
    assert all(same(one, other) for one, other in zip(made, again, strict=True))
    for pair in source.training:
        pair.hq.write_bytes(b"gone")
    with pytest.raises(TrainingError, match="in a row"):
        next(iter(batches(source, SETTINGS, 4)))
    limit = BadLimit(0.1)
    assert limit.count(45, [SkippedPhoto("a", "bad")] * 5) == [SkippedPhoto("a", "bad")]
    with pytest.raises(TrainingError, match="7 of 52 reads"):
        limit.count(0, [SkippedPhoto("b", "bad")] * 2)


def test_sets_that_cannot_be_used(tmp_path: Path) -> None:
    write_pairs(tmp_path / "mixed")
    (tmp_path / "mixed" / "lq" / "p0.png").write_bytes(encoded(picture(0)))
    with pytest.raises(TrainingError, match="kind texture"):
        open_(tmp_path / "mixed")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "params.jsonl.part").write_text("{}")
    with pytest.raises(TrainingError, match="not finished"):
        open_(tmp_path / "open")
    with pytest.raises(TrainingError, match="no such folder"):
        open_(tmp_path / "nowhere")
    write_pairs(tmp_path / "few", 1)
    with pytest.raises(TrainingError, match="held out"):
        open_(tmp_path / "few")
