"""Prompts: the file's layout, and which part of the photo each tile's text speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamsr_cli.draws import generator
from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.prompts import PromptPlan, make_plan
from dreamsr_cli.tiling import TileGrid, make_grid

RED, BLUE, GREEN, WHITE = (190, 30, 30), (40, 60, 170), (30, 110, 30), (250, 250, 250)


def photo_of(folder: Path, levels_PQC: np.ndarray) -> Photo:
    path = folder / "photo.png"
    Image.fromarray(levels_PQC).save(path)
    return open_photo(path)


@pytest.fixture
def red_and_blue(tmp_path: Path) -> Photo:
    """128 x 64 pixels, left half red, right half blue."""
    levels_PQC = np.empty((64, 128, 3), np.uint8)
    levels_PQC[:, :64], levels_PQC[:, 64:] = RED, BLUE
    return photo_of(tmp_path, levels_PQC)


def grid_of_two() -> TileGrid:
    grid = make_grid(256, 512, 256, 0)
    assert len(grid.tiles) == 2
    return grid


def test_each_tile_is_described_by_what_lies_under_it(red_and_blue: Photo) -> None:
    plan = make_plan(red_and_blue, grid_of_two(), 512, 256, "describe")
    left, right = plan.tiles
    assert "mainly red," in left.text and "mainly blue," in right.text
    assert "red and blue" in plan.global_text
    assert left.box == (0, 0, 256, 256) and right.box == (256, 0, 512, 256)
    assert plan.global_source == "describe" and (plan.captioner.name, plan.captioner.revision) == ("describe", "1")
    assert (plan.photo.name, plan.photo.width, plan.photo.height) == ("photo.png", 128, 64)
    assert plan.photo.sha256 == red_and_blue.sha256
    assert (plan.canvas, plan.tile, plan.overlap) == ((512, 256), 256, 0)


def test_texts_are_those_of_the_crops_at_the_photos_resolution(tmp_path: Path) -> None:
    """An odd photo higher than one strip, at a scale that isn't whole, with overlap and a padded canvas."""
    rows, columns, out_height, out_width = 601, 333, 1503, 833
    levels_PQC = np.repeat(np.repeat(generator(3, "blocks").integers(0, 256, (9, 5, 3)), 67, 0), 67, 1)
    photo = photo_of(tmp_path, levels_PQC[:rows, :columns].astype(np.uint8))
    grid = make_grid(out_height, out_width, 320, 64)
    plan = make_plan(photo, grid, out_width, out_height, "describe")
    whole_PQC, describer = photo.read_rows(0, rows), Describer()
    assert plan.global_text == describer.describe(whole_PQC)
    assert len({tile.text for tile in plan.tiles}) > len(grid.tiles) // 2
    for tile, prompt in zip(grid.tiles, plan.tiles, strict=True):
        left, top, right, bottom = tile.box
        area_PQC = whole_PQC[
            int(top * rows / out_height) : int(np.ceil(min(bottom, out_height) * rows / out_height)),
            int(left * columns / out_width) : int(np.ceil(min(right, out_width) * columns / out_width)),
        ]
        assert prompt.box == tile.box and prompt.text == describer.describe(area_PQC)


def test_four_corners(tmp_path: Path) -> None:
    levels_PQC = np.empty((640, 640, 3), np.uint8)
    levels_PQC[:320, :320], levels_PQC[:320, 320:], levels_PQC[320:, :320], levels_PQC[320:, 320:] = (
        RED,
        BLUE,
        GREEN,
        WHITE,
    )
    plan = make_plan(photo_of(tmp_path, levels_PQC), make_grid(1280, 1280, 640, 0), 1280, 1280, "describe")
    for prompt, colour in zip(plan.tiles, ("red", "blue", "green", "white"), strict=True):
        assert f"mainly {colour}," in prompt.text


@pytest.mark.parametrize("prompt", [None, "a red wall and the sea"])
def test_with_one_tile_local_is_global(red_and_blue: Photo, prompt: str | None) -> None:
    plan = make_plan(red_and_blue, make_grid(256, 512, 0, 64), 512, 256, "describe", prompt)
    (tile,) = plan.tiles
    assert tile.text == plan.global_text and tile.box == (0, 0, 512, 256)
    assert plan.global_source == ("describe" if prompt is None else "user")


@pytest.mark.parametrize("prompt", ["a red wall and the sea", ""])
def test_the_users_prompt_replaces_the_global_text_alone(red_and_blue: Photo, prompt: str) -> None:
    described = make_plan(red_and_blue, grid_of_two(), 512, 256, "describe")
    plan = make_plan(red_and_blue, grid_of_two(), 512, 256, "describe", prompt)
    assert (plan.global_text, plan.global_source) == (prompt, "user")
    assert plan.tiles == described.tiles


def test_no_captioner_means_no_words(red_and_blue: Photo) -> None:
    plan = make_plan(red_and_blue, grid_of_two(), 512, 256, "none")
    assert {plan.global_text, *(t.text for t in plan.tiles)} == {""} and plan.global_source == "none"
    plan = make_plan(red_and_blue, grid_of_two(), 512, 256, "none", "a wall")
    assert plan.global_text == "a wall" and {t.text for t in plan.tiles} == {""}


def test_an_unknown_captioner_is_a_usage_error(red_and_blue: Photo) -> None:
    with pytest.raises(UsageError, match="--captioner"):
        make_plan(red_and_blue, grid_of_two(), 512, 256, "llava")


def test_json_round_trip_in_the_documented_layout(red_and_blue: Photo) -> None:
    plan = make_plan(red_and_blue, grid_of_two(), 512, 256, "describe", "Küste, rot")
    data = json.loads(json.dumps(plan.to_json()))
    assert data == {
        "format": 1,
        "photo": {"name": "photo.png", "sha256": red_and_blue.sha256, "width": 128, "height": 64},
        "canvas": [512, 256],
        "tile": 256,
        "overlap": 0,
        "global": {"text": "Küste, rot", "source": "user"},
        "tiles": [
            {"box": [0, 0, 256, 256], "text": plan.tiles[0].text, "shared_with": None},
            {"box": [256, 0, 512, 256], "text": plan.tiles[1].text, "shared_with": None},
        ],
        "captioner": {"name": "describe", "revision": "1", "instruction": "", "tile_instruction": ""},
    }
    assert list(data) == ["format", "photo", "canvas", "tile", "overlap", "global", "tiles", "captioner"]
    assert PromptPlan.from_json(data) == plan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "format"),
        ({"colour": 1}, "'colour'"),
        ({"tile": "512"}, "tile"),
        ({"canvas": [1, 2, 3]}, "canvas"),
        ({"global": {"txt": ""}}, "'txt'"),
        ({"global": {"text": "a"}}, "'source'"),
        ({"global_text": "a"}, "'global_text'"),
        ({"tiles": [{"box": [0, 0, 1], "text": ""}]}, "box"),
        ({"tiles": [{"box": [0, 0, 16, 16], "texts": ""}]}, "'texts'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(red_and_blue: Photo, change: dict[str, Any], named: str) -> None:
    data = make_plan(red_and_blue, grid_of_two(), 512, 256, "describe").to_json() | change
    with pytest.raises(ConfigError, match="my.json") as caught:
        PromptPlan.from_json(data, "my.json")
    assert named in caught.value.message


def test_a_missing_key_or_no_table_is_refused(red_and_blue: Photo) -> None:
    data = make_plan(red_and_blue, grid_of_two(), 512, 256, "describe").to_json()
    for key in ("format", "photo", "global", "tiles"):
        with pytest.raises(ConfigError):
            PromptPlan.from_json({k: v for k, v in data.items() if k != key})
    with pytest.raises(ConfigError, match="expected a table"):
        PromptPlan.from_json([data])
