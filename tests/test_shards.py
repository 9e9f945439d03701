"""Shards: any sample by one read, words from their members, and what can't be trained on is said."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from training_sets import encoded, picture, plan_json, small, write_shard

from dreamsr_cli.errors import InputError, TrainingError
from dreamsr_cli.training import shards
from dreamsr_cli.training.crops import CropSettings, batches, make_sample
from dreamsr_cli.training.open_source import open_source
from dreamsr_cli.training.shards import ShardSource

SETTINGS = CropSettings(crop=64, preset="bicubic", seed=3, p_full=0.0, full_side=64, turns=1, usm=False)


def open_(folder: Path, **options: object) -> ShardSource:
    source = open_source(folder, cache=folder.parent / "cache", **{"hold_out": 1, "smallest": 64, **options})  # ty: ignore
    assert isinstance(source, ShardSource)
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: photos with captions, and triples with a prompts object."""
    photos = {f"{i:04d}.jpg": encoded(picture(i, 80), "JPEG") for i in range(3)}
    photos["0000.txt"] = b"a  street\nat night"
    write_shard(tmp_path / "set" / "a-000.tar", photos | {"0001.cls": b"7", "readme.md": b"no sample"})
    hq = picture(9, 96)
    triple = {
        "sub/x.hq.png": encoded(hq),
        "sub/x.lq.png": encoded(small(hq)),
        "sub/x.erased.png": encoded(hq),
        "sub/x.json": json.dumps(plan_json("x.png", 96, 96, "all of it", "a part")).encode(),
    }
    write_shard(tmp_path / "set" / "b-000.tar", triple)
    return tmp_path / "set"


def test_members_are_read_by_key(folder: Path) -> None:
    source = open_(folder, hold_out=0)
    assert [s.name for s in source.training] == [
        "a-000.tar:0000",
        "a-000.tar:0001",
        "a-000.tar:0002",
        "b-000.tar:sub/x",
    ]
    assert not source.erased and source.kind == "shards"
    first, *_, last = source.training
    assert source.read(first).hq_PQC.shape == (80, 80, 3) and source.read(first).lq_PQC is None
    made = source.read(last)
    assert np.array_equal(made.hq_PQC, picture(9, 96)) and made.scale == 4
    assert made.erased_PQC is not None and made.lq_PQC is not None and made.lq_PQC.shape == (24, 24, 3)
    words = source.texts(first), source.texts(source.training[1]), source.texts(last)
    assert words[0] is not None and words[0].global_text == "a street at night" and words[1] is None
    assert words[2] is not None and words[2].local_text((0, 0, 1, 1)) == "a part"
    assert [s.name for s in source.skipped] == [] and len(open_(folder / "b-000.tar", hold_out=0).training) == 1


def test_samples_are_the_same_from_any_process_and_shards_are_scanned_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_(folder)
    alone = list(islice(batches(source, SETTINGS, 2, 5), 3))
    together = list(islice(batches(source, SETTINGS, 2, 5, workers=2), 3))
    ranks = [list(islice(batches(source, SETTINGS, 1, 5, rank=r, world=2), 3)) for r in range(2)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch.hq_BCPQ, together[step].hq_BCPQ)
        assert torch.equal(batch.hq_BCPQ, torch.cat([ranks[r][step].hq_BCPQ for r in range(2)]))

    def refuse(path: Path) -> dict:
        raise AssertionError(f"{path} scanned again")

    monkeypatch.setattr(shards, "_scan", refuse)
    assert open_(folder).data_sha256 == source.data_sha256
    os.utime(folder / "a-000.tar", ns=(1, 1))
    with pytest.raises(AssertionError, match="a-000"):
        open_(folder)


def test_small_and_broken_samples_are_passed_over(tmp_path: Path) -> None:
    members = {f"{i}.png": encoded(picture(i, 80)) for i in range(4)}
    members |= {"4.png": encoded(picture(4, 40)), "5.png": encoded(picture(5, 80))[:500]}
    write_shard(tmp_path / "set" / "s.tar", members)
    source = open_(tmp_path / "set", hold_out=0, max_bad=0.9)
    samples = [make_sample(source, SETTINGS, step, 0) for step in range(40)]
    assert {s.origin for s in samples} == {f"s.tar:{i}" for i in range(4)}
    assert {photo.name for s in samples for photo in s.bad} == {"s.tar:5"}
    with pytest.raises(TrainingError, match=r"reads.*s\.tar:5"):
        strict = open_(tmp_path / "set", hold_out=0, max_bad=0.01)
        list(islice(batches(strict, SETTINGS, 4), 40))


def test_shards_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    source = open_(folder)
    broken = source.training[-1]
    os.utime(folder / "b-000.tar", ns=(5, 5))
    os.utime(folder / "a-000.tar", ns=(5, 5))
    with pytest.raises(TrainingError, match="changed"):
        source.read(broken)
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "s.tar.gz").write_bytes(b"")
    with pytest.raises(TrainingError, match="compressed"):
        open_(tmp_path / "zipped")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "s.tar").write_bytes(b"x" * 2000)
    with pytest.raises(TrainingError, match="damaged"):
        open_(tmp_path / "bad")
    write_shard(tmp_path / "text" / "s.tar", {"a.png": encoded(picture(1)), "a.txt": b"\xff\xfe", "b.txt": b"alone"})
    source = open_(tmp_path / "text", hold_out=0)
    assert [s.name for s in source.skipped] == ["s.tar:b"]
    with pytest.raises(InputError, match="text"):
        source.texts(source.training[0])
