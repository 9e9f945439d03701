"""Tiles: exact sizes, everything covered, the lattice, and messages that name the flag to type."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamsr_cli.errors import UsageError
from dreamsr_cli.tiling import canvas_size, check_tiling, make_grid, padded

SIDE = st.integers(1, 3000)
TILE = st.integers(2, 64).map(lambda n: 16 * n)


def legal_overlap(tile: int, share: float) -> int:
    return int(share * (tile // 2)) // 16 * 16


@given(SIDE, SIDE, TILE, st.floats(0, 1))
def test_grid_covers_the_canvas_evenly_on_the_lattice(height: int, width: int, tile: int, share: float) -> None:
    overlap = legal_overlap(tile, share)
    grid = make_grid(height, width, tile, overlap)
    assert (grid.canvas_height, grid.canvas_width) == (padded(height), padded(width))
    assert len(grid.tiles) == grid.rows * grid.columns
    assert [t.index for t in grid.tiles] == list(range(len(grid.tiles)))
    assert [(t.row, t.column) for t in grid.tiles] == [(r, c) for r in range(grid.rows) for c in range(grid.columns)]
    assert {(t.height, t.width) for t in grid.tiles} == {(grid.tile_height, grid.tile_width)}
    for side, size, starts in (
        (grid.canvas_height, grid.tile_height, [t.top for t in grid.tiles if t.column == 0]),
        (grid.canvas_width, grid.tile_width, [t.left for t in grid.tiles if t.row == 0]),
    ):
        steps = np.diff(starts)
        assert starts[0] == 0 and starts[-1] + size == side
        assert all(start % 16 == 0 for start in [*starts, size])
        assert np.all(steps > 0) and np.all(steps <= size - overlap)
        assert len(steps) == 0 or np.ptp(steps) <= 16
        if len(steps) == 0:
            assert size == side
            continue
        # one tile fewer of the size asked for couldn't cover the side, and no shorter tile could in that number
        assert len(steps) * tile - (len(steps) - 1) * overlap < side
        assert size <= tile
        assert size == 2 * overlap or (len(steps) + 1) * (size - 16) - len(steps) * overlap < side


@given(SIDE, SIDE)
def test_tile_zero_is_the_whole_canvas(height: int, width: int) -> None:
    (tile,) = make_grid(height, width, 0, 64).tiles
    assert tile.box == (0, 0, padded(width), padded(height))


def test_a_tile_larger_than_the_photo_becomes_the_canvas() -> None:
    (tile,) = make_grid(100, 300, 512, 64).tiles
    assert (tile.height, tile.width) == (112, 304)
    assert tile.latent_box() == (0, 0, 14, 38)


def test_the_papers_canvas_has_24_tiles() -> None:
    grid = make_grid(1440, 2560, 512, 64)
    assert (grid.rows, grid.columns, len(grid.tiles)) == (4, 6, 24)
    last = grid.tiles[-1]
    assert last.box == (2080, 1024, 2560, 1440)
    assert last.latent_box() == (128, 260, 52, 60)
    assert last.latent_box(16) == (64, 130, 26, 30)


def test_a_grid_that_fits_exactly_has_tiles_of_the_size_asked_for() -> None:
    grid = make_grid(960, 4096, 512, 64)
    assert (grid.tile_height, grid.tile_width, grid.rows, grid.columns) == (512, 512, 2, 9)


def test_a_canvas_barely_longer_than_a_tile_is_cut_in_halves() -> None:
    grid = make_grid(528, 512, 512, 64)
    assert (grid.tile_height, grid.tile_width, len(grid.tiles)) == (304, 512, 2)
    assert make_grid(528, 512, 512, 256).tile_height == 512


@given(SIDE, SIDE, TILE, st.floats(0, 1))
def test_the_longer_side_of_its_tile_makes_a_grid_again(height: int, width: int, tile: int, share: float) -> None:
    """Prompts files name that side, and the overlap or half of the tile."""
    grid = make_grid(height, width, tile, legal_overlap(tile, share))
    longer = max(grid.tile_height, grid.tile_width)
    again = make_grid(height, width, longer, min(grid.overlap, legal_overlap(longer, 1)))
    assert again.tiles == grid.tiles


@given(st.integers(1, 60))
def test_batches_keep_the_order(size: int) -> None:
    grid = make_grid(1440, 2560, 512, 64)
    batches = grid.batches(size)
    assert tuple(t for batch in batches for t in batch) == grid.tiles
    assert [len(b) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        make_grid(512, 512, 256, 32).batches(0)


@pytest.mark.parametrize(
    ("tile", "overlap", "flags", "hint"),
    [
        (512, 600, ("--overlap 600", "--tile 512"), "--overlap 256"),
        (48, 32, ("--overlap 32", "--tile 48"), "--overlap 16"),
        (500, 64, ("--tile 500",), "--tile 496"),
        (505, 64, ("--tile 505",), "--tile 512"),
        (3, 0, ("--tile 3",), "--tile 16"),
        (-16, 0, ("--tile -16",), "--tile 16"),
        (512, 60, ("--overlap 60",), "--overlap 64"),
        (512, 1, ("--overlap 1",), "--overlap 0"),
        (512, -16, ("--overlap -16",), "--overlap 0"),
        (0, 30, ("--overlap 30",), "--overlap 32"),
    ],
)
def test_illegal_tiling_names_the_flags_and_a_legal_value(
    tile: int, overlap: int, flags: tuple[str, ...], hint: str
) -> None:
    for check in (check_tiling, lambda t, o: make_grid(1000, 1000, t, o)):
        with pytest.raises(UsageError) as caught:
            check(tile, overlap)
        assert all(flag in caught.value.message for flag in flags)
        assert hint in caught.value.hint
        assert caught.value.exit_code == 2


@given(SIDE, SIDE, st.integers(100, 800))
def test_scale_is_exact_and_rounds_half_up(width: int, height: int, percent: int) -> None:
    expected = tuple(max(1, (2 * side * percent + 100) // 200) for side in (width, height))
    assert canvas_size(width, height, scale=percent / 100) == expected


@given(SIDE, SIDE, st.floats(1, 8))
def test_sides_are_met_exactly(width: int, height: int, factor: float) -> None:
    target = round(max(width, height) * factor)
    size = canvas_size(width, height, long_side=target)
    assert max(size) == target
    assert abs(Fraction(min(size)) - Fraction(min(width, height) * target, max(width, height))) <= Fraction(1, 2)
    target = round(min(width, height) * factor)
    assert min(canvas_size(width, height, short_side=target)) == target


def test_half_pixels_round_up() -> None:
    assert canvas_size(3, 5, scale=1.5) == (5, 8)
    assert canvas_size(1000, 10, scale=1.1) == (1100, 11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 2.0, "long_side": 900},
        {"scale": 0.5},
        {"scale": 8.01},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"long_side": 299},
        {"short_side": 1601},
    ],
)
def test_impossible_sizes_are_usage_errors(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="--(scale|long-side|short-side)"):
        canvas_size(300, 200, **options)  # ty: ignore[invalid-argument-type]
