"""The layout of a prompts file: its keys, what each may be, and what for. docs/prompts.md holds the same table."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dreamsr_cli.json_lines import KeyPath

MakeError = Callable[[KeyPath, str, str], Exception]
"""Makes an error from where it is, what is wrong and what to do."""


@dataclass(frozen=True)
class Key:
    """One key of a prompts file."""

    kind: str
    """What its value is, as in `KINDS`."""
    required: bool
    meaning: str


SCHEMA = {
    "format": Key("whole number", True, "1"),
    "photo": Key("table", True, "which photo the texts belong to"),
    "photo.name": Key("text", False, "its file name, without folders; compared where there is no sha256"),
    "photo.sha256": Key("text", False, "of the photo's file; another photo is refused"),
    "photo.width": Key("whole number", False, "upright pixels of the photo"),
    "photo.height": Key("whole number", False, "upright pixels of the photo"),
    "canvas": Key("[width, height]", True, "size of the result for which the boxes hold, in output pixels"),
    "tile": Key("whole number", False, "longer side of a tile in output pixels; without it boxes may lie anywhere"),
    "overlap": Key("whole number", False, "least overlap of tiles in output pixels"),
    "global": Key("table", True, "the global prompt"),
    "global.text": Key("text", True, "what the whole photo shows"),
    "global.source": Key("text", False, "who wrote it: user, or the captioner's name"),
    "tiles": Key("list of tables", True, "the local prompts, one for each tile"),
    "tiles[].box": Key("[left, top, right, bottom]", True, "where the tile lies, in output pixels"),
    "tiles[].text": Key("text", True, "what is to be seen there"),
    "tiles[].shared_with": Key("number of a tile or null", False, "the tile (from 0) whose text this one took over"),
    "captioner": Key("table", False, "what wrote the texts"),
    "captioner.name": Key("text", False, "its name"),
    "captioner.revision": Key("text", False, "version of the captioner or of its weights"),
    "captioner.instruction": Key("text", False, "what it was asked about the photo"),
    "captioner.tile_instruction": Key("text", False, "what it was asked about a tile"),
}
"""Every key that a prompts file may have; a dot steps into a table, [] into each table of a list."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(_is_number(v) for v in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "whole number": _is_number,
    "number of a tile or null": lambda value: value is None or _is_number(value),
    "[width, height]": lambda value: _are_numbers(value, 2) and min(value) > 0,
    "[left, top, right, bottom]": lambda value: _are_numbers(value, 4) and value[0] < value[2] and value[1] < value[3],
    "table": lambda value: isinstance(value, dict),
    "list of tables": lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value),
}


def check_table(table: Any, error: MakeError, prefix: str = "", path: KeyPath = ()) -> None:
    """Names and kinds of everything in a prompts file's data; in one table of it, `prefix` (as in `SCHEMA`) and `path`
    lead to it. Raises what `error` makes of the first mistake."""
    if not isinstance(table, dict):
        raise error(path, f"a prompts file is a table, not {shown(table)}", "begin it with { and end it with }")
    known = {name[len(prefix) :]: key for name, key in SCHEMA.items() if name.startswith(prefix)}
    known = {name: key for name, key in known.items() if "." not in name}
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise error((*path, name), f"unknown key {name!r}", hint)
    for name, key in known.items():
        here = (*path, name)
        if name not in table:
            if key.required:
                raise error(here, f"{prefix}{name} is missing", f"add {name!r}: {key.kind}, {key.meaning}")
            continue
        value = table[name]
        if not KINDS[key.kind](value):
            raise error(here, f"{prefix}{name} is {shown(value)}", f"write a {key.kind}: {key.meaning}")
        if key.kind == "table":
            check_table(value, error, f"{prefix}{name}.", here)
        elif key.kind == "list of tables":
            for index, entry in enumerate(value):
                check_table(entry, error, f"{prefix}{name}[].", (*here, index))


def shown(value: Any) -> str:
    """A value as JSON, cut to what a message can hold."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
