"""The captioning job: what is shown to a LLaVA, what is shared, what is kept of an interrupted run."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llava
import torch
from PIL import Image

from dreamsr_cli import captioning
from dreamsr_cli.captioning import Captioner, crops, photo_area, plan_prompts, whole_picture
from dreamsr_cli.config import CaptionConfig
from dreamsr_cli.draws import generator
from dreamsr_cli.errors import JournalError, UsageError, WeightsError
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.prompts import PromptPlan, make_plan
from dreamsr_cli.tile_likeness import look_at, share
from dreamsr_cli.tiling import make_grid


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


CPU = torch.device("cpu")
CONFIG = CaptionConfig(max_words=5, tile_max_words=3, batch=2, tile_context=16)
NAMES = ("llava", "onevision")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("captioners")
    savers = (tiny_llava.save_llava, tiny_llava.save_onevision)
    return {name: save(base / name) for name, save in zip(NAMES, savers, strict=True)}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Photo:
    """160 x 120: blocks of colour on the left, one flat colour on the right."""
    rng = generator(2, "photo")
    blocks = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    levels_PQC = np.repeat(np.repeat(blocks, 10, 0), 10, 1)
    levels_PQC[:, 90:] = (120, 160, 210)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(levels_PQC).save(path)
    return open_photo(path)


GRID = make_grid(240, 320, 96, 16)
_PLANS: dict[Path, PromptPlan] = {}


def plan(
    photo: Photo, folder: Path, config: CaptionConfig = CONFIG, resume: Path | None = None, **names: Any
) -> PromptPlan:
    given: dict[str, Any] = {"grid": GRID, "global_prompt": None, "progress": SilentProgress()} | names
    return plan_prompts(
        photo, given["grid"], 320, 240, str(folder), config, CPU, given["global_prompt"], resume, given["progress"]
    )


def first_plan(photo: Photo, folder: Path) -> PromptPlan:
    """The plan of an uninterrupted run, made once."""
    if folder not in _PLANS:
        _PLANS[folder] = plan(photo, folder)
    return _PLANS[folder]


class Diary(SilentProgress):
    """Counts, and stops the run after so many units, as Ctrl-C does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.units, self.totals, self.notes, self.stop_after = 0, [], [], stop_after

    def phase(self, name: str, total: int) -> None:
        self.totals.append((name, total))

    def advance(self, count: int = 1) -> None:
        self.units += count
        if self.stop_after is not None and self.units >= self.stop_after:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_a_llava(folders: dict[str, Path], photo: Photo, name: str) -> None:
    diary = Diary()
    made = plan(photo, folders[name], progress=diary)
    assert [tile.box for tile in made.tiles] == [tile.box for tile in GRID.tiles]
    assert made.photo.sha256 == photo.sha256 and made.canvas == (320, 240)
    assert made.captioner.name == name == made.global_source
    assert made.captioner.instruction == CONFIG.instruction
    assert made.captioner.tile_instruction == CONFIG.tile_instruction
    assert len(made.captioner.revision) == 64
    assert made.global_text and all(tile.text for tile in made.tiles)
    assert all(len(tile.text.split()) <= 3 for tile in made.tiles) and len(made.global_text.split()) <= 5
    assert len({tile.text for tile in made.tiles}) > 5
    own = sum(tile.shared_with is None for tile in made.tiles)
    assert own < len(made.tiles)
    assert diary.totals == [("caption", own + 1)] and diary.units == own + 1
    assert PromptPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_changes_no_word(folders: dict[str, Path], photo: Photo, name: str) -> None:
    plans = [plan(photo, folders[name], replace(CONFIG, batch=batch)) for batch in (1, 8)]
    assert plans[0] == plans[1] == first_plan(photo, folders[name])


@pytest.mark.parametrize(("name", "stop_after"), [("llava", 1), ("llava", 5), ("llava", 100), ("onevision", 3)])
def test_an_interrupted_run_goes_on(
    folders: dict[str, Path], photo: Photo, tmp_path: Path, name: str, stop_after: int
) -> None:
    expected = first_plan(photo, folders[name])
    resume = tmp_path / "part.jsonl"
    try:
        plan(photo, folders[name], resume=resume, progress=Diary(stop_after))
        assert stop_after == 100
    except KeyboardInterrupt:
        pass
    kept = resume.read_bytes()
    asked = count_questions(photo, folders[name], resume)
    assert asked[1] == expected
    assert resume.read_bytes().startswith(kept)
    own = sum(tile.shared_with is None for tile in expected.tiles)
    batches = 1 + -(-own // CONFIG.batch)
    assert asked[0] == batches - (kept.count(b"\n") - 1), "finished batches must not be asked again"


def count_questions(photo: Photo, folder: Path, resume: Path) -> tuple[int, PromptPlan]:
    """Questions put to the network, and the plan."""
    count = [0]
    real = captioning.Llava.caption

    def counted(self: Any, *arguments: Any) -> list[str]:
        count[0] += 1
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioning.Llava, "caption", counted)
        made = plan(photo, folder, resume=resume)
    return count[0], made


def test_a_torn_line_is_done_again_and_nothing_is_opened_for_a_whole_file(
    folders: dict[str, Path], photo: Photo, tmp_path: Path
) -> None:
    resume = tmp_path / "part.jsonl"
    expected = plan(photo, folders["llava"], resume=resume)
    whole = resume.read_bytes()
    assert count_questions(photo, folders["llava"], resume) == (0, expected)
    lines = whole.splitlines(keepends=True)
    for torn in (b"".join(lines[:-1]) + lines[-1][:-7], b"".join(lines[:-1]) + b"\x00\xff" * 9, whole[:-1]):
        resume.write_bytes(torn)
        assert count_questions(photo, folders["llava"], resume) == (1, expected)
        assert resume.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        {"config": replace(CONFIG, tile_instruction="Which colours?")},
        {"config": replace(CONFIG, batch=3)},
        {"grid": make_grid(240, 320, 144, 16)},
        {"folder": "onevision"},
    ],
)
def test_other_settings_begin_anew(
    folders: dict[str, Path], photo: Photo, tmp_path: Path, change: dict[str, Any]
) -> None:
    resume = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        plan(photo, folders["llava"], resume=resume, progress=Diary(3))
    change = dict(change)
    folder = folders[change.pop("folder", "llava")]
    expected = plan(photo, folder, **change)
    diary = Diary()
    assert plan(photo, folder, resume=resume, progress=diary, **change) == expected
    assert not any("going on" in note for note in diary.notes)


def test_two_runs_cant_share_a_file(folders: dict[str, Path], photo: Photo, tmp_path: Path) -> None:
    resume = tmp_path / "part.jsonl"

    class Second(SilentProgress):
        def advance(self, count: int = 1) -> None:
            with pytest.raises(JournalError, match="another process"):
                plan(photo, folders["llava"], resume=resume)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(photo, folders["llava"], resume=resume, progress=Second())


def test_the_network_is_gone_before_the_plan_is_returned(
    folders: dict[str, Path], photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref] = []
    real = captioning.open_llava

    def watched(*arguments: Any) -> Any:
        opened = real(*arguments)
        seen.extend((weakref.ref(opened.model), weakref.ref(opened)))
        return opened

    monkeypatch.setattr(captioning, "open_llava", watched)
    plan(photo, folders["onevision"])
    gc.collect()
    assert len(seen) == 2 and all(reference() is None for reference in seen)
    with pytest.raises(KeyboardInterrupt):
        plan(photo, folders["onevision"], progress=Diary(2))
    gc.collect()
    assert len(seen) == 4 and all(reference() is None for reference in seen)


def test_one_tile_has_the_global_text(folders: dict[str, Path], photo: Photo) -> None:
    whole = make_grid(240, 320, 0, 0)
    made = plan(photo, folders["llava"], grid=whole)
    assert made.tiles[0].text == made.global_text != ""
    made = plan(photo, folders["llava"], grid=whole, global_prompt="A wall")
    assert (made.tiles[0].text, made.global_text, made.global_source) == ("A wall", "A wall", "user")


def test_a_typed_global_prompt_changes_no_tile(folders: dict[str, Path], photo: Photo) -> None:
    made, typed = first_plan(photo, folders["llava"]), plan(photo, folders["llava"], global_prompt="A wall")
    assert (typed.global_text, typed.global_source) == ("A wall", "user")
    assert typed.tiles == made.tiles


@pytest.mark.parametrize("name", ["describe", "none"])
def test_the_weightless_ones_are_as_before(photo: Photo, name: str, tmp_path: Path) -> None:
    resume = tmp_path / "part.jsonl"
    made = plan_prompts(photo, GRID, 320, 240, name, CONFIG, CPU, "A wall", resume, SilentProgress())
    assert made == make_plan(photo, GRID, 320, 240, name, "A wall")
    assert not resume.exists()


def test_unknown_and_missing_captioners(photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="'lava'") as caught:
        Captioner("lava", CONFIG, CPU)
    assert "llava-1.5-7b" in caught.value.hint
    with pytest.raises(WeightsError, match="not on this machine") as missing:
        Captioner("llava-onevision-0.5b", CONFIG, CPU)
    assert "dreamsr fetch-weights llava-onevision-0.5b" in missing.value.hint
    assert "--captioner describe" in missing.value.hint


def test_a_captioner_of_the_lock_is_checked_and_used(
    folders: dict[str, Path], photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamsr_cli.weights import lock_rows
    from dreamsr_cli.weights_lock import toml_row

    weights = tmp_path / "weights" / "llava-1.5-7b"
    shutil.copytree(folders["llava"], weights)
    rows = "\n".join(map(toml_row, lock_rows(weights, "MIT")))
    lock = tmp_path / "my.lock"
    lock.write_text(
        f'format = 1\n[entries."llava-1.5-7b"]\nrepository = "a/b"\nrevision = "c0ffee"\nfiles = [\n{rows}\n]\n'
    )
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("DREAMSR_LOCK", str(lock))
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    made = plan(photo, Path("llava-1.5-7b"))
    assert (made.captioner.name, made.captioner.revision) == ("llava-1.5-7b", "c0ffee")
    assert made.tiles == first_plan(photo, folders["llava"]).tiles
    (weights / "config.json").write_text((weights / "config.json").read_text() + " ")
    with pytest.raises(WeightsError, match=r"config\.json has"):
        plan(photo, Path("llava-1.5-7b"))


# ---------------------------------------------------------------- what is shown


def test_tiles_are_shown_with_a_margin_at_the_photos_resolution(photo: Photo) -> None:
    levels_PQC = np.asarray(Image.open(photo.path))
    middle = next(tile for tile in GRID.tiles if tile.left > 32 and tile.top > 32)
    left, top, right, bottom = middle.box
    assert photo_area(middle, photo, 320, 240, 0) == (left // 2, top // 2, right // 2, bottom // 2)
    area = photo_area(middle, photo, 320, 240, 16)
    assert area == (left // 2 - 8, top // 2 - 8, right // 2 + 8, bottom // 2 + 8)
    areas = [area, photo_area(GRID.tiles[0], photo, 320, 240, 16), photo_area(GRID.tiles[-1], photo, 320, 240, 16)]
    assert areas[1][:2] == (0, 0) and areas[2][2:] == (160, 120)
    for (x0, y0, x1, y1), shown_PQC in zip(areas, crops(photo, areas), strict=True):
        assert shown_PQC.dtype == np.uint8
        np.testing.assert_array_equal(shown_PQC, levels_PQC[y0:y1, x0:x1])


def test_the_whole_photo_is_shown_small_and_read_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, 1200).astype(np.uint8)
    path = tmp_path / "ramp.png"
    Image.fromarray(np.repeat(ramp[:, None], 3000, 1)).save(path)
    photo = open_photo(path)
    most = [0]
    real = Photo.read_rows

    def read(self: Photo, top: int, bottom: int) -> np.ndarray:
        most[0] = max(most[0], bottom - top)
        return real(self, top, bottom)

    monkeypatch.setattr(Photo, "read_rows", read)
    shown_PQC = whole_picture(photo)
    assert shown_PQC.shape == (307, 768, 3) and most[0] < 400
    assert np.abs(shown_PQC[:, 300, 0] - np.linspace(0, 255, 307)).max() < 2
    small = whole_picture(open_photo(_saved(tmp_path / "s.png", np.full((9, 7, 3), 50, np.uint8))))
    assert small.shape == (9, 7, 3) and (small == 50).all()


def _saved(path: Path, levels_PQC: np.ndarray) -> Path:
    Image.fromarray(levels_PQC).save(path)
    return path


# ---------------------------------------------------------------- what is shared


def shared_of(folder: Path, levels_PQC: np.ndarray, tile: int = 32) -> list[int | None]:
    """Sharing between the tiles, side by side, of a photo that is one row of them."""
    height, width = levels_PQC.shape[:2]
    photo = open_photo(_saved(folder / "row.png", levels_PQC))
    config = CaptionConfig()
    areas = [(left, 0, left + tile, height) for left in range(0, width, tile)]
    return share(look_at(photo, areas), config.flat, config.flat_colour, config.alike)


def row_of(*tiles: np.ndarray) -> np.ndarray:
    return np.concatenate(tiles, axis=1)


def flat_tile(*colour: int) -> np.ndarray:
    return np.full((32, 32, 3), colour, np.uint8)


def texture(index: int, spread: float = 40) -> np.ndarray:
    noise = generator(4, "texture", index).normal(120, spread, (32, 32, 1))
    return np.clip(np.repeat(noise, 3, 2), 0, 255).astype(np.uint8)


def test_flat_tiles_share_by_colour_alone(tmp_path: Path) -> None:
    row = row_of(flat_tile(120, 160, 210), flat_tile(200, 30, 30), flat_tile(124, 163, 212), flat_tile(205, 34, 33))
    assert shared_of(tmp_path, row) == [None, None, 0, 1]


def test_a_copy_is_shared_and_an_object_is_not_overlooked(tmp_path: Path) -> None:
    scene = texture(1)
    with_object = scene.copy()
    with_object[8:12, 8:12] = (250, 20, 20)
    dot_on_flat = flat_tile(120, 160, 210)
    dot_on_flat[20:22, 20:22] = 0
    row = row_of(scene, flat_tile(120, 160, 210), scene, with_object, dot_on_flat, texture(1, 20))
    assert shared_of(tmp_path, row) == [None, None, 0, None, None, None]


def test_sharing_points_at_tiles_with_a_text_of_their_own(folders: dict[str, Path], photo: Photo) -> None:
    made = first_plan(photo, folders["llava"])
    owners = {tile.shared_with for tile in made.tiles if tile.shared_with is not None}
    assert owners
    for index, tile in enumerate(made.tiles):
        if tile.shared_with is not None:
            assert tile.shared_with < index and made.tiles[tile.shared_with].shared_with is None
            assert tile.text == made.tiles[tile.shared_with].text
    lonely = plan(photo, folders["llava"], replace(CONFIG, share=False))
    assert all(tile.shared_with is None for tile in lonely.tiles)


@pytest.mark.parametrize("height", [40, 300])
def test_looks_dont_depend_on_strips(tmp_path: Path, height: int) -> None:
    levels_PQC = generator(5, "look").integers(0, 256, (height, 64, 3), dtype=np.uint8)
    photo = open_photo(_saved(tmp_path / "p.png", levels_PQC))
    (look,) = look_at(photo, [(3, 1, 60, height)])
    part = levels_PQC[1:height, 3:60] / 255
    np.testing.assert_allclose(look.mean_C, part.mean((0, 1)), atol=0.02)
    total = (look.detail_PQ**2).mean() + ((look.colour_PQC - look.mean_C) ** 2).mean()
    assert abs(float(np.sqrt(total)) - part.std()) < 0.02
    assert not look.is_flat(0.1) and look.is_flat(0.5)
