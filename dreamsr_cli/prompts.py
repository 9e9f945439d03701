"""One global prompt for the photo, one local prompt for each tile, and the file that holds them.

The global text goes to the transformer, a tile's local text to the MM-ControlNet. `prompts.json` (docs/decisions.md,
Prompts) is made to be read and edited by hand.
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.images import Photo, PhotoInfo
from dreamsr_cli.models.captioner import CellMeans, Describer
from dreamsr_cli.plain_data import from_dict, to_dict
from dreamsr_cli.tiling import Tile, TileGrid

FORMAT = 1
LONGEST_TEXT = 10_000
"""Characters of a prompt that a person gives; no text encoder reads as many."""
_STRIP_ROWS = 256


@dataclass(frozen=True)
class PhotoId:
    """Which photo a plan belongs to."""

    name: str = ""
    """File name without folders."""
    sha256: str = ""
    """Of the file, in hex."""
    width: int = 0
    """Upright photo pixels."""
    height: int = 0
    """Upright photo pixels."""


@dataclass(frozen=True)
class CaptionerId:
    """What wrote the texts, exactly enough to write them again."""

    name: str = ""
    """"describe" or "none"."""
    revision: str = ""
    """Version of the captioner or of its weights."""
    instruction: str = ""
    """What it was asked about the photo; empty for captioners that take no instruction."""
    tile_instruction: str = ""
    """What it was asked about a tile."""


@dataclass(frozen=True)
class TilePrompt:
    """The local prompt of one tile."""

    box: tuple[int, int, int, int]
    """(left, top, right, bottom) in output pixels of the padded canvas."""
    text: str
    """What is to be seen there."""
    shared_with: int | None = None
    """Index of the tile whose text this one took over, or null if it was described itself."""


@dataclass(frozen=True)
class PromptPlan:
    """All texts of one photo; tiles in the grid's order."""

    photo: PhotoId
    canvas: tuple[int, int]
    """(width, height) of the result in output pixels, not padded."""
    tile: int
    """Longer side of a tile in output pixels."""
    overlap: int
    """Least overlap of tiles in output pixels."""
    global_text: str
    """The global prompt."""
    global_source: str
    """"user", or the captioner's name."""
    tiles: tuple[TilePrompt, ...]
    """Local prompts, row-major."""
    captioner: CaptionerId = field(default_factory=CaptionerId)

    def to_json(self) -> dict[str, Any]:
        """Plain data in the layout of docs/decisions.md, ready for `json.dumps`."""
        plain = to_dict(self)
        text, source = plain.pop("global_text"), plain.pop("global_source")
        head = {key: plain.pop(key) for key in ("photo", "canvas", "tile", "overlap")}
        return {"format": FORMAT, **head, "global": {"text": text, "source": source}, **plain}

    @classmethod
    def from_json(cls, data: Any, where: str = "prompts.json") -> PromptPlan:
        """The plan that `to_json` wrote, or that a person edited.

        `where` names the file for messages. `ConfigError` for another format, unknown or missing keys, and wrong types.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected a table, found {type(data).__name__}", "check the file")
        flat = dict(data)
        if (found := flat.pop("format", None)) != FORMAT:
            raise ConfigError(f"{where}: format is {found!r}, this version reads {FORMAT}", "write the file anew")
        heading = from_dict(_Global, flat.pop("global", {}), f"{where}: global")
        for key in ("global_text", "global_source"):
            if key in flat:
                raise ConfigError(f"{where}: unknown key {key!r}", "use the table 'global' with text and source")
        return from_dict(cls, {**flat, "global_text": heading.text, "global_source": heading.source}, where)


@dataclass(frozen=True)
class _Global:
    """The table "global" of the file."""

    text: str
    source: str


def make_plan(
    photo: Photo, grid: TileGrid, out_width: int, out_height: int, captioner: str, global_prompt: str | None = None
) -> PromptPlan:
    """Describe the photo and what lies under each tile, at the photo's own resolution, in one pass over its strips.

    `captioner` is "describe" or "none" (empty texts); anything else raises `UsageError`. `global_prompt` replaces the
    global text alone. With one tile the local text is the global text.
    """
    if captioner == "describe":
        maker = CaptionerId(Describer.name, Describer.revision)
        global_text, tile_texts = _describe(photo, grid, out_width, out_height)
    elif captioner == "none":
        maker = CaptionerId("none")
        global_text, tile_texts = "", [""] * len(grid.tiles)
    else:
        raise UsageError(f"--captioner {captioner!r} is not known", "use --captioner describe or --captioner none")
    source = captioner
    if global_prompt is not None:
        global_text, source = global_prompt, "user"
    if len(grid.tiles) == 1:
        tile_texts = [global_text]
    return PromptPlan(
        photo=photo_id(photo.path, photo.sha256, photo.info),
        canvas=(out_width, out_height),
        tile=max(grid.tile_height, grid.tile_width),
        overlap=grid.overlap,
        global_text=global_text,
        global_source=source,
        tiles=tuple(TilePrompt(tile.box, text) for tile, text in zip(grid.tiles, tile_texts, strict=True)),
        captioner=maker,
    )


def text_problem(text: str) -> tuple[int, str] | None:
    """Why a prompt can't be used, and the offset of the reason; None for a good one.

    Refused are control characters other than white space, half characters (surrogates) and texts of more than
    `LONGEST_TEXT` characters.
    """
    for offset, character in enumerate(text[: LONGEST_TEXT + 1]):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            return offset, f"the text holds the control character U+{ord(character):04X}"
    if len(text) > LONGEST_TEXT:
        return LONGEST_TEXT, f"a text of {len(text):,} characters; {LONGEST_TEXT:,} are the most"
    return None


def photo_id(path: Path, sha256: str, info: PhotoInfo) -> PhotoId:
    """Which photo this is. Bytes of its name that are no text become signs that are."""
    return PhotoId(os.fsencode(path.name).decode("utf-8", "replace"), sha256, info.width, info.height)


def _describe(photo: Photo, grid: TileGrid, out_width: int, out_height: int) -> tuple[str, list[str]]:
    """(global text, local texts). Memory: one strip of the photo and the cells of the tiles that it touches."""
    describer = Describer()
    width, height = photo.info.width, photo.info.height
    areas = [_photo_area(tile, width, height, out_width, out_height) for tile in grid.tiles]
    whole = CellMeans(height, width)
    open_tiles: dict[int, CellMeans] = {}
    texts = [""] * len(areas)
    for top in range(0, height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, height)
        strip_PQC = photo.read_rows(top, bottom)
        whole.add(strip_PQC)
        for index, (area_left, area_top, area_right, area_bottom) in enumerate(areas):
            first, last = max(top, area_top), min(bottom, area_bottom)
            if first >= last:
                continue
            if first == area_top:
                open_tiles[index] = CellMeans(area_bottom - area_top, area_right - area_left)
            open_tiles[index].add(strip_PQC[first - top : last - top, area_left:area_right])
            if last == area_bottom:
                texts[index] = describer.look_at_cells(open_tiles.pop(index).mean_PQC).sentence()
    return describer.look_at_cells(whole.mean_PQC).sentence(), texts


def _photo_area(tile: Tile, width: int, height: int, out_width: int, out_height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in photo pixels: all that the tile touches, without the canvas' padding."""
    left, top, right, bottom = tile.box
    return (
        left * width // out_width,
        top * height // out_height,
        -(-min(right, out_width) * width // out_width),
        -(-min(bottom, out_height) * height // out_height),
    )
