"""Files of prompts: what is read, what is refused and with which line, and how texts fit another grid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.json_lines import JsonError, parse_json
from dreamsr_cli.prompt_fitting import (
    PointPrompt,
    fit_plan,
    parse_tile_prompt,
    parse_tile_prompts,
    place_texts,
    spread,
    with_texts,
)
from dreamsr_cli.prompts import LONGEST_TEXT, CaptionerId, PhotoId, PromptPlan, TilePrompt
from dreamsr_cli.prompts_file import (
    MOST_BYTES,
    PromptsError,
    check_photo,
    find_prompts,
    prompts_name,
    read_prompts,
    write_prompts,
)
from dreamsr_cli.prompts_schema import SCHEMA
from dreamsr_cli.tiling import TileGrid, make_grid

PHOTO = PhotoId("cat.jpg", "ab" * 32, 100, 72)
DOCS = (Path(__file__).resolve().parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")


def grid_of(width: int = 400, height: int = 288, tile: int = 160, overlap: int = 32) -> TileGrid:
    return make_grid(height, width, tile, overlap)


def plan_for(grid: TileGrid, width: int = 400, height: int = 288, **changes: Any) -> PromptPlan:
    plan = PromptPlan(
        photo=PHOTO,
        canvas=(width, height),
        tile=max(grid.tile_height, grid.tile_width),
        overlap=grid.overlap,
        global_text="a cat on a wall",
        global_source="describe",
        tiles=tuple(TilePrompt(tile.box, f"text {tile.index}") for tile in grid.tiles),
        captioner=CaptionerId("describe", "1"),
    )
    return replace(plan, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good prompts file of 3 x 2 tiles."""
    made = tmp_path / "cat.jpg.prompts.json"
    write_prompts(made, plan_for(grid_of()))
    return made


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- lines


def test_every_key_and_value_has_its_line() -> None:
    text = '{\n "a": [1,\n  {"b": "x, } \\" ]\\n"}],\n "c"\n:\n null, "d": {},\n "e": []}'
    data, lines = parse_json(text)
    assert data == json.loads(text)
    assert lines == {(): 1, ("a",): 2, ("a", 0): 2, ("a", 1): 3, ("a", 1, "b"): 3, ("c",): 4, ("d",): 6, ("e",): 7}


def paths_of(data: Any, path: tuple = ()) -> set[tuple]:
    found = {path}
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        found |= paths_of(value, (*path, key))
    return found


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=12,
    )
)
def test_lines_of_any_json(data: Any) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False)
    found, lines = parse_json(text)
    assert found == data and set(lines) == paths_of(data)
    rows = text.split("\n")
    for path, line in lines.items():
        if path and isinstance(path[-1], str):
            assert rows[line - 1].strip().startswith(json.dumps(path[-1], ensure_ascii=False) + ":")


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{"a": 1,\n "b" 2}', 2, 6, "delimiter"),
        ('{\n"a": "x\ny"}', 2, 8, "control character"),
        ('{"a": 1,\n\n"a": 2}', 3, None, "'a' stands twice, on line 1"),
        ("[" * 100_000, 1, None, "nested too deeply"),
        ("9" * 5000, 1, None, "digits"),
    ],
)
def test_no_json(text: str, line: int, column: int | None, words: str) -> None:
    with pytest.raises(JsonError, match=words) as caught:
        parse_json(text)
    assert (caught.value.line, caught.value.column) == (line, column)


# ---------------------------------------------------------------- good files


def test_a_written_file_comes_back(path: Path) -> None:
    plan = plan_for(grid_of(), global_text="Küste „am“ Meer\\", global_source="user")
    write_prompts(path, plan)
    assert read_prompts(path).plan == plan
    assert data_of(path) == json.loads(json.dumps(plan.to_json()))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"box"' in line for line in lines) == len(plan.tiles), "one line for each tile, to be edited"


def test_only_what_is_needed_has_to_be_there(path: Path) -> None:
    path.write_text(
        '{"format": 1, "photo": {"name": "cat.jpg"}, "canvas": [400, 288], "global": {"text": "a cat"},'
        '"tiles": [{"box": [0, 0, 400, 288], "text": "fur"}]}'
    )
    plan = read_prompts(path).plan
    assert plan is not None and plan.global_source == "user" and plan.tiles[0].text == "fur"
    check_photo(read_prompts(path), PHOTO, Path("cat.jpg"))


@pytest.mark.parametrize(
    ("name", "raw", "text"),
    [
        ("a.txt", b"a cat\r\non a wall\n", "a cat on a wall"),
        ("a.txt", b"\xef\xbb\xbfa caf\xc3\xa9", "a café"),
        ("a.json", b'{"caption": "a  cat", "score": 0.5}', "a cat"),
        ("a.JSON", b'{"caption": "a cat\\n"}', "a cat"),
        ("a.caption", b"a cat", "a cat"),
    ],
)
def test_one_text_for_the_whole_photo(tmp_path: Path, name: str, raw: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(raw)
    file = read_prompts(tmp_path / name)
    assert (file.plan, file.caption) == (None, text)
    check_photo(file, PHOTO, Path("any.jpg"))


def test_files_are_found_by_name_in_the_order_that_is_documented(tmp_path: Path) -> None:
    photo, tree = Path("photos/a/cat.jpg"), Path("a")
    names = ["cat.jpg.prompts.json", "cat.prompts.json", "cat.json", "cat.txt"]
    assert prompts_name(photo) == names[0]
    (tmp_path / "a").mkdir()
    assert find_prompts(tmp_path, photo, tree) is None
    for folder in (tmp_path, tmp_path / "a"):
        for name in reversed(names):
            (folder / name).touch()
            assert find_prompts(tmp_path, photo, tree) == folder / name
    (tmp_path / "dog.jpg.prompts.json").touch()
    assert find_prompts(tmp_path, Path("dog.png")) is None
    assert "`, `".join(names) in " ".join(DOCS.split())


# ---------------------------------------------------------------- bad files

Edit = Callable[[dict[str, Any]], Any]


def put(*keys: Any, value: Any) -> Edit:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def drop(*keys: Any) -> Edit:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


BAD: dict[str, tuple[Edit, str, str]] = {
    "format": (put("format", value=2), '"format"', "format is 2, this version reads 1"),
    "format as text": (put("format", value="1"), '"format"', 'format is "1"'),
    "no format": (drop("format"), "{", "format is missing"),
    "unknown key": (put("tile_size", value=3), '"tile_size"', "unknown key 'tile_size'"),
    "misspelt key": (put("global", value={"txt": "a"}), '"txt"', "unknown key 'txt'"),
    "unknown key of a tile": (put("tiles", 3, "weight", value=1), '"weight"', "unknown key 'weight'"),
    "global is a text": (put("global", value="a cat"), '"global"', 'global is "a cat"'),
    "no global text": (drop("global", "text"), '"global"', "global.text is missing"),
    "text is a number": (put("tiles", 2, "text", value=7), '"text": 7', "tiles[].text is 7"),
    "text is null": (put("global", "text", value=None), '"text": null', "global.text is null"),
    "no tiles": (
        put("tiles", value=[]),
        '"tiles"',
        "tile 0 with the box [0, 0, 160, 160] is missing and 5 more: 6 tiles cover",
    ),
    "tiles are texts": (put("tiles", value=["a"]), '"tiles"', 'tiles is ["a"]'),
    "missing tile": (drop("tiles", 4), '"tiles"', "tile 4 with the box [128, 128, 288, 288] is missing"),
    "tile without text": (drop("tiles", 1, "text"), '"box"', "tiles[].text is missing"),
    "box of three": (put("tiles", 1, "box", value=[1, 2, 3]), '"box"', "tiles[].box is [1, 2, 3]"),
    "box turned": (put("tiles", 1, "box", value=[9, 0, 9, 5]), '"box"', "tiles[].box is [9, 0, 9, 5]"),
    "box below zero": (put("tiles", 1, "box", value=[-9, 0, 9, 5]), '"box"', "tiles[].box is [-9, 0, 9, 5]"),
    "box of no tile": (put("tiles", 1, "box", value=[1, 0, 161, 160]), '"box"', "is no tile of 160 pixels"),
    "box twice": (put("tiles", 1, "box", value=[0, 0, 160, 160]), '"box"', "tile 1 has the box of tile 0"),
    "shared with itself": (put("tiles", 1, "shared_with", value=1), '"shared_with": 1', "shared_with is 1"),
    "shared with nobody": (put("tiles", 1, "shared_with", value=6), '"shared_with": 6', "has tiles 0 to 5"),
    "canvas of one": (put("canvas", value=[400]), '"canvas"', "canvas is [400]"),
    "empty canvas": (put("canvas", value=[0, 288]), '"canvas"', "canvas is [0, 288]"),
    "canvas of fractions": (put("canvas", value=[400.5, 288]), '"canvas"', "canvas is [400.5, 288]"),
    "endless canvas": (put("canvas", value=[2**31 - 1, 2**31 - 1]), '"tiles"', "some are missing"),
    "tile off the lattice": (put("tile", value=100), '"tile"', "100 is not a multiple of 16"),
    "overlap off the lattice": (put("overlap", value=15), '"overlap"', "15 is not a multiple of 16"),
    "control character": (put("tiles", 5, "text", value="a\x1b[2J"), '"text"', "control character U+001B"),
    "null character": (put("global", "text", value="a\0"), '"text"', "control character U+0000"),
    "half a character": (put("global", "text", value="\ud800"), '"text"', "control character U+D800"),
    "endless text": (put("tiles", 0, "text", value="wall " * 2001), '"text"', "10,000 are the most"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_line(name: str, path: Path) -> None:
    edit, found_on, words = BAD[name]
    data = data_of(path)
    edit(data)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    with pytest.raises(PromptsError) as caught:
        read_prompts(path)
    assert words in caught.value.message and len(caught.value.hint) > 12
    where = re.match(rf"{re.escape(str(path))}, line (\d+): ", caught.value.message)
    assert where, caught.value.message
    lines = path.read_text(encoding="utf-8").splitlines()
    # A missing key is told at the table that should hold it.
    shown = lines[int(where[1]) - 1]
    assert found_on in shown or ("missing" in words and shown.strip() == "{")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"a cat on a wall", "line 1, column 1: not valid JSON"),
        (b'{"format": 1,\n "photo": {},\n}', "line 3, column 1: not valid JSON"),
        (b'{"format": 1,\n "format": 1}', "line 2: not valid JSON: 'format' stands twice"),
        (b'{"caption": ["a"]}', 'line 1: caption is ["a"]'),
        (b'{"caption": "a\\u0007"}', "line 1: the text holds the control character U+0007"),
        (b"[1]", "a prompts file is a table, not [1]"),
        (b'"a cat"', "a prompts file is a table"),
        (b"null", "a prompts file is a table"),
        (b'{"a": "\xff\xfe"}', "line 1: not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "line 1: not UTF-8 text"),
        (b"x" * (MOST_BYTES + 1), "is larger than 10 MB"),
    ],
)
def test_what_is_no_prompts_file(path: Path, raw: bytes, words: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(PromptsError) as caught:
        read_prompts(path)
    assert words in caught.value.message and str(path) in caught.value.message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty"),
        (b"a cat\n\non \x07a wall", "line 3: the text holds the control character U+0007"),
        (b"a cat\n\xff", "line 2: not UTF-8 text"),
        (b"word " * 10_000, f"{LONGEST_TEXT:,} are the most"),
    ],
)
def test_what_is_no_text(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "cat.txt").write_bytes(raw)
    with pytest.raises(PromptsError, match=re.escape(words)):
        read_prompts(tmp_path / "cat.txt")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(PromptsError, match="doesn't exist"):
        read_prompts(tmp_path / "gone.json")
    with pytest.raises(PromptsError, match="is not a regular file"):
        read_prompts(Path("/dev/null"))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("photo", "sha256", value="cd" * 32), "are of another photo: sha256 cdcdcdcdcdcd..., not abab"),
        (put("photo", value={"name": "dog.jpg", "sha256": "cd" * 32}), "another photo (dog.jpg)"),
        (put("photo", value={"name": "dog.jpg"}), "are of dog.jpg, not of cat.jpg"),
        (put("photo", value={}), "a photo without name and sha256"),
        (put("photo", "width", value=101), "a photo with width 101, not 100"),
    ],
)
def test_prompts_of_another_photo_are_refused(path: Path, edit: Edit, words: str) -> None:
    data = data_of(path)
    edit(data)
    path.write_text(json.dumps(data, indent=1))
    with pytest.raises(PromptsError) as caught:
        check_photo(read_prompts(path), PHOTO, Path("in/cat.jpg"))
    assert words in caught.value.message and ", line " in caught.value.message
    assert "dreamsr caption in/cat.jpg -o cat.jpg.prompts.json" in caught.value.hint


def test_the_same_photo_under_another_name_or_without_its_hash(path: Path) -> None:
    check_photo(read_prompts(path), replace(PHOTO, name="other.png"), Path("other.png"))
    data = data_of(path)
    data["photo"]["sha256"] = ""
    path.write_text(json.dumps(data))
    check_photo(read_prompts(path), replace(PHOTO, sha256="cd" * 32), Path("cat.jpg"))


@pytest.mark.parametrize(("canvas", "fits"), [((333, 240), True), ((334, 240), True), ((400, 400), False)])
def test_the_canvas_has_the_photos_shape_but_for_rounding(tmp_path: Path, canvas: tuple[int, int], fits: bool) -> None:
    width, height = canvas
    grid = grid_of(width, height)
    write_prompts(tmp_path / "a.json", plan_for(grid, width, height))
    file = read_prompts(tmp_path / "a.json")
    if fits:
        check_photo(file, PHOTO, Path("cat.jpg"))
    else:
        with pytest.raises(PromptsError, match="line 4: a canvas of 400 x 400 pixels has not the shape of the photo"):
            check_photo(file, PHOTO, Path("cat.jpg"))


# ---------------------------------------------------------------- another grid


def test_the_very_grid_keeps_every_text_in_any_order() -> None:
    grid = grid_of()
    plan = plan_for(grid)
    tiles = list(plan.tiles)
    tiles[1], tiles[2] = replace(tiles[1], text="text 0", shared_with=0), replace(tiles[2], shared_with=0)
    turned = replace(plan, tiles=tuple(reversed([replace(t, shared_with=None) for t in tiles])))
    fitted, notes = fit_plan(replace(plan, tiles=tuple(tiles)), PHOTO, grid, 400, 288)
    assert notes == ()
    assert [t.text for t in fitted.tiles] == ["text 0", "text 0", "text 2", "text 3", "text 4", "text 5"]
    assert [t.shared_with for t in fitted.tiles][:3] == [None, 0, None], "an edited text is shared no more"
    assert fit_plan(turned, PHOTO, grid, 400, 288)[0].tiles == tuple(reversed(turned.tiles))


def test_another_grid_takes_the_text_of_the_largest_overlap_at_any_scale() -> None:
    plan = plan_for(grid_of())
    grid = make_grid(576, 800, 192, 64)
    fitted, notes = fit_plan(plan, PHOTO, grid, 800, 576)
    assert len(fitted.tiles) == len(grid.tiles) and (fitted.canvas, fitted.tile, fitted.overlap) == (
        (800, 576),
        192,
        64,
    )
    for tile, prompt in zip(grid.tiles, fitted.tiles, strict=True):
        left, top, right, bottom = tile.box
        areas = {}
        for old in plan.tiles:
            a, b, c, d = (2 * side for side in old.box)
            areas[old.text] = max(0, min(right, c, 800) - max(left, a)) * max(0, min(bottom, d, 640) - max(top, b))
        assert areas[prompt.text] == max(areas.values()) > 0 and prompt.box == tile.box
    assert len({t.text for t in fitted.tiles}) == len(plan.tiles)
    assert notes == (
        "the prompts were made for 6 tiles on 400 x 288 pixels, this run has 24 on 800 x 576: "
        "each takes the text of the box it overlaps most",
    )


def test_one_tile_takes_the_global_text_and_gives_its_own_to_many() -> None:
    plan, whole = plan_for(grid_of()), make_grid(288, 400, 0, 64)
    fitted, notes = fit_plan(plan, PHOTO, whole, 400, 288)
    assert [t.text for t in fitted.tiles] == [plan.global_text] and "takes the global text" in notes[0]
    one = replace(plan_for(whole), tiles=(TilePrompt(whole.tiles[0].box, "everything"),))
    many, notes = fit_plan(one, PHOTO, grid_of(), 400, 288)
    assert {t.text for t in many.tiles} == {"everything"} and "made for one tile" in notes[0]


def test_boxes_of_ones_own_the_smaller_one_wins_inside_it() -> None:
    everything, face = TilePrompt((0, 0, 400, 288), "a garden"), TilePrompt((110, 0, 300, 170), "a face")
    plan = plan_for(grid_of(), tile=0, tiles=(everything, face))
    fitted, _ = fit_plan(plan, PHOTO, grid_of(), 400, 288)
    assert [t.text for t in fitted.tiles] == ["a garden", "a face", "a garden", "a garden", "a garden", "a garden"]
    with pytest.raises(InputError, match=r"no box of the prompts file overlaps tile 2, \[240, 0, 400, 160\]"):
        fit_plan(replace(plan, tiles=(TilePrompt((0, 0, 240, 288), "left"),)), PHOTO, grid_of(), 400, 288)


# ---------------------------------------------------------------- typed texts


def test_points_are_output_pixels_and_texts_may_hold_anything() -> None:
    assert parse_tile_prompt("640,200=a = b, c") == PointPrompt(640, 200, "a = b, c")
    assert parse_tile_prompt(" 0 , 7 = ") == PointPrompt(0, 7, "")
    for typed in ("640=a", "640,200", "-1,2=a", "1.5,2=a", "x,y=a", "", "1,2,3=a"):
        with pytest.raises(UsageError, match="X,Y=TEXT"):
            parse_tile_prompt(typed)
    with pytest.raises(UsageError, match="U\\+0007"):
        parse_tile_prompt("1,2=a\x07")
    with pytest.raises(UsageError, match="3,4 was typed twice"):
        parse_tile_prompts(["3,4=a", "1,2=a", "3,4=a"])


def test_a_point_gives_its_text_to_every_tile_that_contains_it() -> None:
    grid, photo = grid_of(), Path("cat.jpg")
    boxes = [tile.box for tile in grid.tiles]
    assert boxes[0] == (0, 0, 160, 160) and boxes[1] == (128, 0, 288, 160)
    for x, y, tiles in ((0, 0, {0}), (127, 10, {0}), (128, 10, {0, 1}), (160, 10, {1}), (399, 287, {5})):
        assert set(place_texts([PointPrompt(x, y, "w")], grid, 400, 288, photo)) == tiles
    near, far = PointPrompt(80, 80, "near"), PointPrompt(140, 80, "far")
    for points in ([near, far], [far, near]):
        assert place_texts(points, grid, 400, 288, photo) == {0: "near", 1: "far"}
    for x, y in ((400, 0), (0, 288)):
        with pytest.raises(InputError, match=f"{x},{y} lies outside of the result, 400 x 288 pixels"):
            place_texts([PointPrompt(x, y, "w")], grid, 400, 288, photo)
    with pytest.raises(InputError, match="0,0 changes no tile"):
        place_texts([near, PointPrompt(0, 0, "corner")], grid, 400, 288, photo)


def test_typed_texts_come_before_those_of_the_plan() -> None:
    plan = plan_for(grid_of())
    shared = replace(plan, tiles=(plan.tiles[0], replace(plan.tiles[1], shared_with=0), *plan.tiles[2:]))
    changed = with_texts(shared, "typed", {1: "a wall"})
    assert (changed.global_text, changed.global_source) == ("typed", "user")
    assert [t.text for t in changed.tiles] == ["text 0", "a wall", "text 2", "text 3", "text 4", "text 5"]
    assert changed.tiles[1].shared_with is None
    assert with_texts(shared, None, {}) == shared
    whole = make_grid(288, 400, 0, 64)
    alike = replace(plan_for(whole), tiles=(TilePrompt(whole.tiles[0].box, "a cat on a wall"),))
    assert with_texts(alike, "typed", {}).tiles[0].text == "typed"
    assert with_texts(plan_for(whole), "typed", {}).tiles[0].text == "text 0", "its own text stays"
    assert {t.text for t in spread(plan, grid_of()).tiles} == {plan.global_text}


# ---------------------------------------------------------------- documentation


def test_every_key_is_documented_as_it_is() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.\[\]]+)` \| (.+?) \| (yes|no) \| (.+?) \|$", DOCS, flags=re.MULTILINE)
    found = {name: (kind, required == "yes", meaning) for name, kind, required, meaning in rows}
    assert found == {name: (key.kind, key.required, key.meaning) for name, key in SCHEMA.items()}


def test_what_is_written_has_every_key_of_the_schema(path: Path) -> None:
    def names(value: Any, prefix: str = "") -> set[str]:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return set.union(*(names(v, prefix + "[]") for v in value))
        if not isinstance(value, dict):
            return set()
        inner = {f"{prefix}.{key}".lstrip("."): v for key, v in value.items()}
        return set(inner).union(*(names(v, name) for name, v in inner.items()))

    assert names(data_of(path)) == set(SCHEMA)


def test_the_examples_of_the_documentation_are_good_files(tmp_path: Path) -> None:
    blocks = re.findall(r"^```json\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        (tmp_path / "a.json").write_text(block, encoding="utf-8")
        plan = read_prompts(tmp_path / "a.json").plan
        assert plan is not None and plan.global_text and all(tile.text for tile in plan.tiles)
