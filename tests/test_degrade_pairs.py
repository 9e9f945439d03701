"""Pair sets: the same bytes for any workers, order and interruption; what params.jsonl says is what was done."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dreamsr_cli.degradations import pixel
from dreamsr_cli.degradations.pair_folder import PairFolder
from dreamsr_cli.degradations.pair_records import (
    PairRecord,
    PairSettings,
    SourceId,
    crop_box,
    pair_stems,
    read_records,
    read_source,
    refusal,
)
from dreamsr_cli.degradations.pairs import PairSet, PhotoResult, make_pair_set, plan_replay, plan_set, shared_settings
from dreamsr_cli.errors import ConfigError, DreamSRError, InputError, JournalError, OutputError
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.prompts import PromptPlan

PLAIN = PairSettings("pixel", "seesr-mild", 4, 3, 64, False, "skip", "none")


def photo(path: Path, width: int = 110, height: int = 90, seed: int = 1) -> Path:
    """Smooth blobs and edges."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return [photo(tmp_path / "in" / f"p{i}.{'jpg' if i % 2 else 'png'}", 100 + 7 * i, 90, i) for i in range(4)]


def make(
    out: Path, photos: list[Path], settings: PairSettings = PLAIN, crops: int = 2, workers: int = 1, **more: Any
) -> tuple[PairSet, list[PhotoResult]]:
    told: list[PhotoResult] = []
    plans = plan_set([read_source(path) for path in photos], settings, crops)
    overwrite, eraser = bool(more.get("overwrite")), more.get("eraser")
    shared = shared_settings(settings)
    made = make_pair_set(out, plans, shared, workers, overwrite, eraser, SilentProgress(), told.append)
    return made, told


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ---------------------------------------------------------------- sameness


def test_workers_and_order_change_no_byte(photos: list[Path], tmp_path: Path) -> None:
    settings = replace(PLAIN, captioner="describe")
    made, told = make(tmp_path / "one", photos, settings)
    assert (made.made, made.kept) == (8, 0) and len(told) == 4
    random.Random(1).shuffle(photos)
    torch.manual_seed(9)
    make(tmp_path / "two", photos, settings, workers=2)
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "two")
    assert {name for name in one if "/" not in name} == {"params.jsonl", "captions.jsonl"} and len(one) == 18


def test_a_pair_does_not_depend_on_the_other_photos(photos: list[Path], tmp_path: Path) -> None:
    make(tmp_path / "all", photos, crops=3)
    make(tmp_path / "one", photos[2:3], crops=1)
    whole, alone = content(tmp_path / "all"), content(tmp_path / "one")
    assert alone["lq/p2_0000.png"] == whole["lq/p2_0000.png"] and alone["hq/p2_0000.png"] == whole["hq/p2_0000.png"]
    assert alone["params.jsonl"] in whole["params.jsonl"]


def test_seed_changes_places_and_parameters(photos: list[Path], tmp_path: Path) -> None:
    make(tmp_path / "a", photos[:1])
    make(tmp_path / "b", photos[:1], replace(PLAIN, seed=4))
    a, b = (read_records(tmp_path / x / "params.jsonl") for x in "ab")
    assert all(x.box != y.box and x.pixel != y.pixel for x, y in zip(a, b, strict=True))
    assert a[0].box != a[1].box


def test_replay_makes_the_same_bytes(photos: list[Path], tmp_path: Path) -> None:
    make(tmp_path / "first", photos, replace(PLAIN, captioner="describe", sharpen=True))
    renamed = [Path(shutil.copy(path, tmp_path / f"renamed{i}{path.suffix}")) for i, path in enumerate(photos)]
    records = read_records(tmp_path / "first" / "params.jsonl")
    plans, missing = plan_replay(records, [read_source(path) for path in reversed(renamed)])
    assert not missing
    told: list[PhotoResult] = []
    out = tmp_path / "again"
    made = make_pair_set(out, plans, {"replay": "x"}, 1, False, None, SilentProgress(), told.append)
    assert made.made == 8 and not made.differing
    assert content(out) == content(tmp_path / "first")


def test_replay_names_what_is_missing_and_what_differs(photos: list[Path], tmp_path: Path) -> None:
    make(tmp_path / "first", photos)
    records = read_records(tmp_path / "first" / "params.jsonl")
    plans, missing = plan_replay(records, [read_source(path) for path in photos[1:]])
    assert [source.name for source in missing] == ["p0.png"] and len(plans) == 6
    wrong = replace(plans[0], recorded=replace(records[2], lq_sha256="0" * 64))
    made = make_pair_set(tmp_path / "x", [wrong], {"replay": ""}, 1, False, None, SilentProgress(), lambda _: None)
    assert made.differing == [plans[0].name]


# ---------------------------------------------------------------- the record is the truth


def test_the_files_are_what_the_record_says(photos: list[Path], tmp_path: Path) -> None:
    settings = replace(PLAIN, preset="seesr-pairs", sharpen=True)
    make(tmp_path / "out", photos[:2:2], settings, crops=4)
    source = levels(photos[0])
    for record in read_records(tmp_path / "out" / "params.jsonl"):
        left, top, right, bottom = record.box
        assert (right - left, bottom - top) == (64, 64) and record.source.name == "p0.png"
        assert record.source.sha256 == hashlib.sha256(photos[0].read_bytes()).hexdigest()
        crop = torch.from_numpy(source[top:bottom, left:right].transpose(2, 0, 1).astype(np.float32)) / 255
        hq = (pixel.sharpen(crop) * 255).round()
        assert record.pixel == pixel.draw("seesr-pairs", 3, record.source.sha256, record.crop_index)
        assert np.array_equal(levels(tmp_path / "out" / "hq" / f"{record.pair}.png"), hq.byte().permute(1, 2, 0))
        assert record.pixel is not None
        lq = (pixel.degrade(hq / 255, record.pixel) * 255).round()
        assert np.array_equal(levels(tmp_path / "out" / "lq" / f"{record.pair}.png"), lq.byte().permute(1, 2, 0))
        for side, sha256 in (("lq", record.lq_sha256), ("hq", record.hq_sha256)):
            file = tmp_path / "out" / side / f"{record.pair}.png"
            assert hashlib.sha256(file.read_bytes()).hexdigest() == sha256
        assert (record.versions.torch, record.versions.pillow) == (torch.__version__, Image.__version__)
        assert PairRecord.from_line(record.to_line(), "test") == record


def test_captions_describe_the_good_crop_and_the_photo(photos: list[Path], tmp_path: Path) -> None:
    made, _ = make(tmp_path / "out", photos, replace(PLAIN, captioner="describe"))
    assert made.captions is not None
    plans = [PromptPlan.from_json(json.loads(line)) for line in made.captions.read_text().splitlines()]
    assert [plan.photo.name for plan in plans] == [f"p{i}_000{c}.png" for i in range(4) for c in range(2)]
    for plan in plans:
        hq = levels(tmp_path / "out" / "hq" / plan.photo.name)
        (tile,) = plan.tiles
        assert tile.box == (0, 0, 64, 64) and plan.canvas == (64, 64)
        assert tile.text == Describer().describe(hq.astype(np.float32) / 255)
    whole = levels(photos[2]).astype(np.float32) / 255
    assert {plan.global_text for plan in plans[4:6]} == {Describer().describe(whole)}
    assert any(plan.global_text != plan.tiles[0].text for plan in plans)


def test_texture_pairs_with_real_networks(photos: list[Path], tmp_path: Path, tiny_bundle: Path) -> None:
    from dreamsr_cli.degradations.pair_records import ModelId
    from dreamsr_cli.degradations.texture_erasure import open_eraser
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.plain_data import from_dict

    eraser = open_eraser(open_bundle(str(tiny_bundle)), torch.device("cpu"), torch.float32, 2)
    model = from_dict(ModelId, eraser.settings, "test")
    settings = PairSettings("texture", None, 1, 3, 32, False, "skip", "describe", model)
    make(tmp_path / "one", photos[:2], settings, eraser=eraser)
    make(tmp_path / "two", photos[1::-1], settings, crops=1, eraser=eraser)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert two["lq/p1_0000.png"] == one["lq/p1_0000.png"]
    made, _ = make(tmp_path / "two", photos[:2], settings, eraser=eraser)
    assert (made.made, made.kept) == (2, 2) and content(tmp_path / "two") == one
    (record, *_) = read_records(tmp_path / "one" / "params.jsonl")
    hq = levels(tmp_path / "one" / "hq" / "p0_0000.png")
    assert record.prompt == Describer().describe(hq.astype(np.float32) / 255)
    lq = levels(tmp_path / "one" / "lq" / "p0_0000.png")
    assert lq.shape == hq.shape == (32, 32, 3) and not np.array_equal(lq, hq)
    plans, _ = plan_replay(read_records(tmp_path / "one" / "params.jsonl"), [read_source(p) for p in photos])
    again = make_pair_set(tmp_path / "re", plans, {"replay": ""}, 1, False, eraser, SilentProgress(), lambda _: None)
    assert not again.differing and content(tmp_path / "re") == one


# ---------------------------------------------------------------- geometry and names


def source(name: str, sha256: str, width: int = 100, height: int = 80) -> SourceId:
    return SourceId(name, sha256, width, height)


def test_crops_lie_anywhere_inside() -> None:
    boxes = [crop_box(source("a", "s"), PLAIN, i) for i in range(400)]
    assert all(x >= 0 and right <= 100 and right - x == 64 for x, _, right, _ in boxes)
    assert all(y >= 0 and bottom <= 80 and bottom - y == 64 for _, y, _, bottom in boxes)
    assert {x for x, *_ in boxes} == set(range(37)) and {y for _, y, *_ in boxes} == set(range(17))


def test_small_photos_are_refused_or_taken_as_they_are() -> None:
    thin = source("thin", "s", 200, 30)
    assert "below --size 64" in (refusal(thin, PLAIN) or "")
    shrink = replace(PLAIN, small="shrink")
    assert refusal(thin, shrink) is None and refusal(source("a", "s"), PLAIN) is None
    left, top, right, bottom = crop_box(thin, shrink, 0)
    assert (right - left, bottom - top) == (64, 28) and 0 <= top <= 2
    assert "below 4" in (refusal(source("dot", "s", 3, 9), shrink) or "")


def test_a_whole_photo_is_cut_to_the_scale_at_right_and_bottom() -> None:
    assert crop_box(source("a", "s", 103, 82), replace(PLAIN, size=0), 0) == (0, 0, 100, 80)


def test_names_are_the_photos_own_unless_shared() -> None:
    sources = [
        source("a/cat.png", "11" * 32),
        source("Cat.JPG", "22" * 32),
        source("dog.png", "33" * 32),
        source("x" * 200 + "1.png", "44" * 32),
        source("x" * 200 + "2.png", "55" * 32),
    ]
    stems = pair_stems(sources)
    assert stems == pair_stems(sources[::-1])
    assert [stems[d * 64] for d in "123"] == ["cat-11111111", "Cat-22222222", "dog"]
    assert stems["4" * 64] != stems["5" * 64] and len(stems["4" * 64]) < 200
    tricky = [*sources[:2], source("cat-11111111.png", "66" * 32)]
    assert len({s.casefold() for s in pair_stems(tricky).values()}) == 3


def test_whole_photos_keep_their_names(photos: list[Path], tmp_path: Path) -> None:
    settings = replace(PLAIN, preset="bicubic", size=0)
    make(tmp_path / "out", photos, settings, crops=1)
    assert sorted(os.listdir(tmp_path / "out" / "lq")) == [f"p{i}.png" for i in range(4)]
    assert Image.open(tmp_path / "out" / "hq" / "p1.png").size == (104, 88)
    assert np.array_equal(levels(tmp_path / "out" / "hq" / "p0.png"), levels(photos[0])[:88, :100])
    assert Image.open(tmp_path / "out" / "lq" / "p1.png").size == (26, 22)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preset": "x"}, "--preset"),
        ({"size": 66}, "use --size 64"),
        ({"scale": 9}, "1 to 8"),
        ({"small": "x"}, "skip"),
    ],
)
def test_settings_that_make_no_sense(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(PLAIN, **change)


# ---------------------------------------------------------------- all kinds of photos


def test_grey_alpha_deep_and_turned_photos(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (80, 80, 3), dtype=np.uint16)
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray((deep[..., 0] >> 8).astype(np.uint8)).save(folder / "grey.png")
    rgba = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGBA")
    rgba.putalpha(Image.fromarray((deep[..., 1] >> 8).astype(np.uint8)))
    rgba.save(folder / "alpha.png")
    tifffile.imwrite(folder / "deep.tif", deep)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(folder / "plain.jpg", 120, 80)
    Image.open(folder / "plain.jpg").save(folder / "turned.jpg", exif=exif, quality=95)
    make(tmp_path / "out", sorted(folder.iterdir()), replace(PLAIN, preset="bicubic", size=0), crops=1)
    hq = {p.stem: levels(p) for p in (tmp_path / "out" / "hq").iterdir()}
    assert {name: x.shape for name, x in hq.items()} == {
        **dict.fromkeys(("grey", "alpha", "deep"), (80, 80, 3)),
        "plain": (80, 120, 3),
        "turned": (120, 80, 3),
    }
    assert np.ptp(hq["grey"], axis=2).max() == 0
    assert np.array_equal(hq["deep"], np.rint(deep / 65535 * 255).astype(np.uint8))


def test_a_bad_photo_stops_no_other(photos: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "in" / "cut.png"
    cut.write_bytes(photos[0].read_bytes()[:900])
    made, told = make(tmp_path / "out", [*photos, cut], crops=20)
    assert made.made == 80
    (bad,) = [result for result in told if result.problem]
    assert bad.source.path == cut and "damaged" in str(bad.problem) and bad.pairs == ()
    assert len(read_records(tmp_path / "out" / "params.jsonl")) == 80


def test_a_photo_that_changes_meanwhile_is_told(photos: list[Path], tmp_path: Path) -> None:
    sources = [read_source(path) for path in photos[:2]]
    photo(photos[1], seed=99)
    told: list[PhotoResult] = []
    plans = plan_set(sources, PLAIN, 1)
    make_pair_set(tmp_path / "out", plans, shared_settings(PLAIN), 1, False, None, SilentProgress(), told.append)
    assert [bool(result.problem) for result in told] == [False, True] and "changed" in str(told[1].problem)


# ---------------------------------------------------------------- interruptions and what a folder holds


class Stop(SilentProgress):
    """Ctrl-C after some pairs."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_set_goes_on(photos: list[Path], tmp_path: Path, workers: int) -> None:
    make(tmp_path / "whole", photos)
    plans, shared = plan_set([read_source(path) for path in photos], PLAIN, 2), shared_settings(PLAIN)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make_pair_set(out, plans, shared, workers, False, None, Stop(4), lambda _: None)
    assert not (out / "params.jsonl").exists()
    finished = len((out / "params.jsonl.part").read_text().splitlines()) - 1
    assert finished >= 4
    with (out / "params.jsonl.part").open("a") as part:
        part.write('{"record": "{\\"for')  # a line cut short by a kill
    (out / "lq" / ".dreamsr-123").write_bytes(b"half a picture")
    (out / "hq" / "p0_0001.png").write_bytes(b"harmed")
    made, _ = make(out, photos, workers=workers)
    assert made.kept == finished - 1 and made.made == 8 - made.kept
    assert content(out) == content(tmp_path / "whole")


def test_finished_sets_are_kept_and_can_grow(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, photos[:3], crops=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    made, _ = make(out, photos, crops=2)
    assert (made.made, made.kept) == (5, 3)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    make(tmp_path / "new", photos, crops=2)
    assert content(out) == content(tmp_path / "new")


def test_a_set_is_never_mixed_with_another(photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, photos, crops=1)
    before = content(out)
    with pytest.raises(OutputError, match="other settings .seed 3, not 4"):
        make(out, photos, replace(PLAIN, seed=4), crops=1)
    with pytest.raises(OutputError, match="p3_0000"):
        make(out, photos[:3], crops=1)
    assert content(out) == before
    make(out, photos[:3], replace(PLAIN, seed=4), crops=1, overwrite=True)
    make(tmp_path / "new", photos[:3], replace(PLAIN, seed=4), crops=1)
    assert content(out) == content(tmp_path / "new")


def test_foreign_files_are_not_replaced(photos: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "out" / "hq" / "p1_0000.png"
    photo(mine)
    before = mine.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "out", photos, crops=1)
    assert mine.read_bytes() == before and not (tmp_path / "out" / "params.jsonl.part").exists()
    (tmp_path / "out" / "params.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="not written by dreamsr"):
        make(tmp_path / "out", photos, crops=1)


def test_two_processes_do_not_share_a_folder(photos: list[Path], tmp_path: Path) -> None:
    held = PairFolder(tmp_path / "out", shared_settings(PLAIN), [], False)
    with held, pytest.raises(JournalError, match="another process"):
        make(tmp_path / "out", photos)
    made, _ = make(tmp_path / "out", photos)
    assert made.made == 8


def test_nothing_is_left_of_a_set_without_pairs(photos: list[Path], tmp_path: Path) -> None:
    photos[0].write_bytes(photos[0].read_bytes()[:900])
    make(tmp_path / "out", photos[:1])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        make(tmp_path / "file", photos)
    (tmp_path / "out" / "lq" / "p1_0000.png").mkdir(parents=True)  # nothing can be moved there
    with pytest.raises(OutputError):
        make(tmp_path / "out", photos, overwrite=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no pair"),
        ("{\n", "line 1: not JSON"),
        ('{"format": 2}\n', "format is 2"),
        ('{"format": 1, "pair": "a"}\n', "missing"),
        ("[]\n", "format is 'list'"),
    ],
)
def test_a_bad_params_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "params.jsonl"
    path.write_text(text)
    with pytest.raises(DreamSRError, match=words):
        read_records(path)


def test_a_params_file_cannot_name_other_folders(photos: list[Path], tmp_path: Path) -> None:
    make(tmp_path / "out", photos[:1], crops=1)
    line = json.loads((tmp_path / "out" / "params.jsonl").read_text())
    for name in ("../evil", "a/b", ".."):
        (tmp_path / "p.jsonl").write_text(json.dumps({**line, "pair": name}))
        with pytest.raises(InputError, match="not a file name"):
            read_records(tmp_path / "p.jsonl")
    assert to_dict(PLAIN) == line["settings"]
