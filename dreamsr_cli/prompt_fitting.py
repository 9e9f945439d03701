"""Texts made to fit a run: a plan of another grid, texts typed by the user, and the modes of the paper's ablation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.prompts import PhotoId, PromptPlan, TilePrompt, text_problem
from dreamsr_cli.tiling import Tile, TileGrid

_TYPED = re.compile(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*=(.*)", re.DOTALL)


@dataclass(frozen=True)
class PointPrompt:
    """A text for the tiles that contain one output pixel."""

    x: int
    """Column, from 0 at the left."""
    y: int
    """Row, from 0 at the top."""
    text: str


# ---------------------------------------------------------------- another grid


def fit_plan(
    plan: PromptPlan, photo: PhotoId, grid: TileGrid, out_width: int, out_height: int
) -> tuple[PromptPlan, tuple[str, ...]]:
    """(the plan for `grid`, notes for the user). A plan of that very grid keeps its texts.

    Of another grid each tile takes the text whose box, scaled to this canvas, it overlaps most; of several the
    smallest box, and of these the first. One tile for the whole photo takes the global text. Raises `InputError` if a
    tile overlaps no box.
    """
    mine = tuple(tile.box for tile in grid.tiles)
    same_canvas = plan.canvas == (out_width, out_height)
    places = {tile.box: index for index, tile in enumerate(plan.tiles)}
    if same_canvas and set(places) == set(mine):
        tiles = _kept(plan, [places[box] for box in mine])
        notes: tuple[str, ...] = ()
    else:
        tiles = _remapped(plan, grid, out_width, out_height, photo.name)
        notes = (_remapping(plan, grid, out_width, out_height),)
    fitted = replace(
        plan,
        photo=photo,
        canvas=(out_width, out_height),
        tile=max(grid.tile_height, grid.tile_width),
        overlap=grid.overlap,
        tiles=tiles,
    )
    return fitted, notes


def _kept(plan: PromptPlan, order: Sequence[int]) -> tuple[TilePrompt, ...]:
    """The plan's tiles in another order; a text that a person changed is shared no more."""
    now = {old: new for new, old in enumerate(order)}
    tiles = []
    for old in order:
        tile = plan.tiles[old]
        shared = tile.shared_with
        true = shared is not None and plan.tiles[shared].text == tile.text
        tiles.append(replace(tile, shared_with=now[shared] if true and shared is not None else None))
    return tuple(tiles)


def _remapped(plan: PromptPlan, grid: TileGrid, width: int, height: int, photo: str) -> tuple[TilePrompt, ...]:
    if len(grid.tiles) == 1 and len(plan.tiles) > 1:
        return (TilePrompt(grid.tiles[0].box, plan.global_text),)
    factors = np.array([width / plan.canvas[0], height / plan.canvas[1]] * 2)
    boxes_N4 = np.array([tile.box for tile in plan.tiles], float).reshape(-1, 4) * factors
    areas_N = np.prod(boxes_N4[:, 2:] - boxes_N4[:, :2], axis=1)
    tiles = []
    for tile in grid.tiles:
        left_top, right_bottom = np.array(tile.box[:2]), np.minimum(tile.box[2:], [width, height])
        shared_N2 = np.minimum(boxes_N4[:, 2:], right_bottom) - np.maximum(boxes_N4[:, :2], left_top)
        # Whole pixels: sums of scaled edges must not decide between equal overlaps.
        overlap_N = np.rint(np.prod(shared_N2.clip(0), axis=1))
        if not overlap_N.any():
            raise InputError(
                f"{photo}: no box of the prompts file overlaps tile {tile.index}, {list(tile.box)}",
                "add a box for that part, or one for the whole photo",
            )
        best = np.lexsort((np.arange(len(areas_N)), np.rint(areas_N), -overlap_N))[0]
        tiles.append(TilePrompt(tile.box, plan.tiles[best].text))
    return tuple(tiles)


def _remapping(plan: PromptPlan, grid: TileGrid, width: int, height: int) -> str:
    across, down = plan.canvas
    what = f"{len(plan.tiles)} tiles" if len(plan.tiles) > 1 else "one tile"
    made_for = f"the prompts were made for {what} on {across} x {down} pixels"
    here = f"this run has {len(grid.tiles)} on {width} x {height}"
    if len(grid.tiles) == 1 and len(plan.tiles) > 1:
        return f"{made_for}, {here}: it takes the global text"
    return f"{made_for}, {here}: each takes the text of the box it overlaps most"


# ---------------------------------------------------------------- typed texts


def parse_tile_prompt(typed: str) -> PointPrompt:
    """What follows `--tile-prompt`: X,Y=TEXT with whole output pixels. Raises `UsageError`."""
    match = _TYPED.fullmatch(typed)
    if match is None:
        raise UsageError(
            f"--tile-prompt {typed[:60]!r} is not X,Y=TEXT",
            "give a point of the result in output pixels: --tile-prompt '640,200=a brick wall'",
        )
    if found := text_problem(match[3]):
        raise UsageError(f"--tile-prompt {match[1]},{match[2]}: {found[1]}", "write plain words")
    return PointPrompt(int(match[1]), int(match[2]), match[3].strip())


def parse_tile_prompts(typed: Sequence[str]) -> tuple[PointPrompt, ...]:
    """All of a run's `--tile-prompt`. Raises `UsageError`, also where a point is typed twice."""
    points = tuple(parse_tile_prompt(text) for text in typed)
    seen: set[tuple[int, int]] = set()
    for point in points:
        if (point.x, point.y) in seen:
            raise UsageError(f"--tile-prompt {point.x},{point.y} was typed twice", "keep one of them")
        seen.add((point.x, point.y))
    return points


def place_texts(points: Sequence[PointPrompt], grid: TileGrid, width: int, height: int, photo: Path) -> dict[int, str]:
    """Texts by index of the tile: a tile takes the text of the point inside it that is nearest to its centre.

    Where tiles overlap a point lies in several and gives its text to each. Raises `InputError` for a point outside of
    the result, and for one of which no tile is left because others lie nearer to their centres.
    """
    for point in points:
        if point.x >= width or point.y >= height:
            raise InputError(
                f"{photo}: --tile-prompt {point.x},{point.y} lies outside of the result, {width} x {height} pixels",
                f"use 0,0 to {width - 1},{height - 1}",
            )
    taken: dict[int, PointPrompt] = {}
    for tile in grid.tiles:
        inside = [p for p in points if _contains(tile, p)]
        if inside:
            taken[tile.index] = min(inside, key=lambda p, tile=tile: _distance(tile, p))
    for point in points:
        if point not in taken.values():
            raise InputError(
                f"{photo}: --tile-prompt {point.x},{point.y} changes no tile: in each the other point is nearer",
                "move the two points apart, or join their texts",
            )
    return {index: point.text for index, point in taken.items()}


def _contains(tile: Tile, point: PointPrompt) -> bool:
    left, top, right, bottom = tile.box
    return left <= point.x < right and top <= point.y < bottom


def _distance(tile: Tile, point: PointPrompt) -> int:
    """Four times the squared distance to the tile's centre; whole, so that ties are ties."""
    left, top, right, bottom = tile.box
    return (2 * point.x + 1 - left - right) ** 2 + (2 * point.y + 1 - top - bottom) ** 2


def with_texts(plan: PromptPlan, global_text: str | None, tile_texts: Mapping[int, str]) -> PromptPlan:
    """The plan with the user's texts in the place of its own; None and absent indices keep the plan's.

    With one tile that had no text of its own, its local text is the new global text.
    """
    tiles = list(plan.tiles)
    if global_text is not None:
        if len(tiles) == 1 and tiles[0].text == plan.global_text:
            tiles[0] = replace(tiles[0], text=global_text)
        plan = replace(plan, global_text=global_text, global_source="user")
    for index, text in tile_texts.items():
        tiles[index] = replace(tiles[index], text=text, shared_with=None)
    return replace(plan, tiles=tuple(tiles))


# ---------------------------------------------------------------- modes


def spread(plan: PromptPlan, grid: TileGrid) -> PromptPlan:
    """The plan in mode "global": every tile's text is the global text."""
    return replace(plan, tiles=tuple(TilePrompt(tile.box, plan.global_text) for tile in grid.tiles))
