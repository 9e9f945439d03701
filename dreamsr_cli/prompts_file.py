"""Files of prompts that people write and edit: found, read, checked line by line, and written.

Two kinds are read. A prompts file (docs/prompts.md) holds the global prompt and one local prompt for each tile. A
plain text file, or JSON with the key `caption`, holds one text for the whole photo: the global prompt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamsr_cli.config import TOKEN_SIDE
from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.json_lines import JsonError, KeyPath, parse_json
from dreamsr_cli.prompts import CaptionerId, PhotoId, PromptPlan, TilePrompt, text_problem
from dreamsr_cli.prompts_schema import check_table, shown
from dreamsr_cli.tiling import check_tiling, make_grid

FORMAT = 1
MOST_BYTES = 10_000_000
ENDINGS = (".prompts.json", ".json", ".txt")
"""What follows a photo's name, or its name without the extension, in the name of a file of prompts."""


class PromptsError(InputError):
    """A file of prompts can't be used for this photo; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class PromptsFile:
    """What a file of prompts says: `plan`, or one text for the whole photo, `caption`."""

    path: Path
    plan: PromptPlan | None
    caption: str
    lines: dict[KeyPath, int]
    """Where the plan's keys stand."""

    def error(self, key: KeyPath, what: str, hint: str) -> PromptsError:
        """The error about `key`, or about the nearest table around it that is there."""
        while key and key not in self.lines:
            key = key[:-1]
        return PromptsError(f"{self.path}, line {self.lines.get(key, 1)}: {what}", hint)


# ---------------------------------------------------------------- names


def prompts_name(photo: Path) -> str:
    """Name of the prompts file of a photo: cat.jpg.prompts.json for cat.jpg."""
    return photo.name + ENDINGS[0]


def find_prompts(folder: Path, photo: Path, tree: Path = Path()) -> Path | None:
    """The file in `folder` with the prompts of `photo`, None if there is none.

    `folder / tree` comes before `folder`. In each, for cat.jpg: cat.jpg.prompts.json, cat.prompts.json, cat.json,
    cat.txt; the first one counts.
    """
    names = [prompts_name(photo), *(photo.stem + ending for ending in ENDINGS)]
    places = dict.fromkeys((folder / tree, folder))
    return next((place / name for place in places for name in names if os.path.lexists(place / name)), None)


# ---------------------------------------------------------------- reading


def read_prompts(path: Path) -> PromptsFile:
    """Read and check a file of prompts; its texts come back with every run of white space as one space.

    JSON is a prompts file, or an object with `caption`; a file of any other name is one text. A prompts file with the
    key `tile` has to hold each tile of the grid that it names. Raises `PromptsError`.
    """
    text = _read_text(path)
    if path.suffix.lower() != ".json":
        _refuse_bad_text(text, lambda offset: f"{path}, line {text.count(chr(10), 0, offset) + 1}")
        return PromptsFile(path, None, _cleaned(text), {})
    try:
        data, lines = parse_json(text)
    except JsonError as error:
        place = f"line {error.line}" + ("" if error.column is None else f", column {error.column}")
        hint = 'each text stands in "double quotes" on one line; commas stand between entries, not after the last'
        raise PromptsError(f"{path}, {place}: not valid JSON: {error.reason}", hint) from error
    file = PromptsFile(path, None, "", lines)
    if isinstance(data, dict) and "caption" in data and "tiles" not in data:
        return PromptsFile(path, None, _text(file, data["caption"], ("caption",)), {})
    check_table(data, file.error)
    return PromptsFile(path, _plan(file, data), "", lines)


def _read_text(path: Path) -> str:
    hint = "name a prompts file that `dreamsr caption` wrote, or a text file"
    try:
        if path.is_dir():
            raise PromptsError(f"{path} is a folder, not a file of prompts", hint)
        if not path.is_file():
            what = "is not a regular file" if os.path.lexists(path) else "doesn't exist"
            raise PromptsError(f"{path} {what}", hint)
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PromptsError(f"{path} can't be read: {error.strerror or error}", "check its permissions") from error
    if len(raw) > MOST_BYTES:
        raise PromptsError(f"{path} is larger than {MOST_BYTES // 10**6} MB, no file of prompts is", hint)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptsError(f"{path}, line {line}: not UTF-8 text", "save it as UTF-8") from error
    if not text.strip():
        raise PromptsError(f"{path} is empty", 'write a text into it, or leave it out and type --prompt ""')
    return text


def _plan(file: PromptsFile, data: dict[str, Any]) -> PromptPlan:
    """The plan that checked data says; its boxes are those of the grid that it names."""
    if data["format"] != FORMAT:
        hint = "write the file anew with `dreamsr caption`, or use the dreamsr that wrote it"
        raise file.error(("format",), f"format is {data['format']}, this version reads {FORMAT}", hint)
    tiles = []
    for index, entry in enumerate(data["tiles"]):
        text = _text(file, entry["text"], ("tiles", index, "text"))
        shared = entry.get("shared_with")
        if shared is not None and (shared >= len(data["tiles"]) or shared == index):
            what = f"shared_with is {shared}; the file has tiles 0 to {len(data['tiles']) - 1}"
            raise file.error(("tiles", index, "shared_with"), what, "name another tile, or write null")
        tiles.append(TilePrompt(tuple(entry["box"]), text, shared))
    plan = PromptPlan(
        photo=PhotoId(**data["photo"]),
        canvas=tuple(data["canvas"]),
        tile=data.get("tile", 0),
        overlap=data.get("overlap", 0),
        global_text=_text(file, data["global"]["text"], ("global", "text")),
        global_source=data["global"].get("source", "user"),
        tiles=tuple(tiles),
        captioner=CaptionerId(**data.get("captioner", {})),
    )
    _check_boxes(file, plan)
    return plan


def _check_boxes(file: PromptsFile, plan: PromptPlan) -> None:
    """Raise unless no box stands twice and, where the file names its tile, each box of that grid is there alone."""
    seen: dict[tuple[int, int, int, int], int] = {}
    for index, tile in enumerate(plan.tiles):
        if tile.box in seen:
            what = f"tile {index} has the box of tile {seen[tile.box]}, {list(tile.box)}"
            raise file.error(("tiles", index, "box"), what, "remove one of the two")
        seen[tile.box] = index
    width, height = plan.canvas
    if not plan.tile:
        return
    overlap = min(plan.overlap, plan.tile // 2 // TOKEN_SIDE * TOKEN_SIDE)
    try:
        check_tiling(plan.tile, overlap)
    except UsageError as error:
        key = ("overlap",) if error.message.startswith("--overlap") else ("tile",)
        raise file.error(key, error.message.removeprefix("--"), "put back the number that was there") from error
    # Before a grid is made: a mistyped canvas could ask for any number of tiles.
    if -(-width // plan.tile) * -(-height // plan.tile) > 1000 + 4 * len(plan.tiles):
        what = f"{len(plan.tiles)} tiles of {plan.tile} pixels can't cover {width} x {height} pixels: some are missing"
        raise file.error(("tiles",), what, "put them back, or write the file anew with `dreamsr caption`")
    grid = make_grid(height, width, plan.tile, overlap)
    wanted = {tile.box: tile.index for tile in grid.tiles}
    missing = [index for box, index in wanted.items() if box not in seen]
    for box, index in seen.items():
        if box not in wanted:
            what = f"tile {index}: {list(box)} is no tile of {plan.tile} pixels on {width} x {height} pixels"
            hint = "put back the box that was there; boxes of your own need a file without 'tile'"
            raise file.error(("tiles", index, "box"), what, hint)
    if missing:
        box = list(grid.tiles[missing[0]].box)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"tile {missing[0]} with the box {box} is missing{more}: {len(wanted)} tiles cover the photo"
        raise file.error(("tiles",), what, "put it back, or write the file anew with `dreamsr caption`")


def _text(file: PromptsFile, text: Any, key: KeyPath) -> str:
    if not isinstance(text, str):
        raise file.error(key, f"{key[-1]} is {shown(text)}", 'write a text in "double quotes"')
    _refuse_bad_text(text, lambda _: f"{file.path}, line {file.lines[key]}")
    return _cleaned(text)


def _refuse_bad_text(text: str, place: Callable[[int], str]) -> None:
    if found := text_problem(text):
        offset, what = found
        raise PromptsError(f"{place(offset)}: {what}", "remove it; write plain words")


def _cleaned(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- the photo it belongs to


def check_photo(file: PromptsFile, photo: PhotoId, photo_path: Path) -> None:
    """Raise `PromptsError` unless the file's plan is of this photo: by sha256, else by name and size; and unless its
    canvas has the photo's shape. One text for the whole photo suits every photo."""
    plan = file.plan
    if plan is None:
        return
    anew = f"dreamsr caption {photo_path} -o {prompts_name(photo_path)}"
    told, name = plan.photo, photo.name
    if told.sha256 and told.sha256.lower() != photo.sha256:
        whose = f" ({told.name})" if told.name and told.name != name else ""
        what = f"the prompts are of another photo{whose}: sha256 {told.sha256[:12]}..., not {photo.sha256[:12]}..."
        hint = f'{anew}; or, if the texts suit this photo, write "sha256": "" and its name there'
        raise file.error(("photo", "sha256"), what, hint)
    if not told.sha256 and told.name != name:
        what = f"the prompts are of {told.name or 'a photo without name and sha256'}, not of {name}"
        raise file.error(("photo", "name"), what, f'write "name": {json.dumps(name)} if they suit it, or {anew}')
    width, height = photo.width, photo.height
    for key, said, found in (("width", told.width, width), ("height", told.height, height)):
        if said and said != found:
            what = f"the prompts are of a photo with {key} {said}, not {found}"
            raise file.error(("photo", key), what, f"{anew}; or leave out width and height")
    across, down = plan.canvas
    # Both sides were rounded to whole pixels, each by half a pixel at most.
    if abs(across * height - down * width) > (width + height + 1) // 2:
        what = f"a canvas of {across} x {down} pixels has not the shape of the photo, {width} x {height}"
        raise file.error(("canvas",), what, f"put back the numbers that were there, or {anew}")


# ---------------------------------------------------------------- writing


def write_prompts(path: Path, plan: PromptPlan) -> None:
    """Write a prompts file, whole or not at all, made to be edited: one line for each tile. Raises `OSError`."""
    data = plan.to_json()
    tiles = ",\n".join("  " + json.dumps(tile, ensure_ascii=False) for tile in data.pop("tiles"))
    captioner = json.dumps(data.pop("captioner"), ensure_ascii=False)
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        text = f'{{\n{head},\n "tiles": [\n{tiles}\n ],\n "captioner": {captioner}\n}}\n'
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
