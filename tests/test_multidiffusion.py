"""Blending: what goes in constant comes out constant, and neither order nor bands change a byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamsr_cli.draws import generator
from dreamsr_cli.multidiffusion import blend, blend_rows, finished_rows, window
from dreamsr_cli.tiling import TileGrid, make_grid

GRIDS = st.builds(make_grid, st.integers(1, 700), st.integers(1, 700), st.sampled_from([64, 128, 256]), st.just(32))


def random_slots(grid: TileGrid, channels: int = 2) -> dict[int, np.ndarray]:
    shape = (channels, grid.tile_height // 8, grid.tile_width // 8)
    return {t.index: generator(7, "slots", t.index).standard_normal(shape, dtype=np.float32) for t in grid.tiles}


class RecordingSlots(Mapping[int, np.ndarray]):
    """Slots on which each read leaves a trace."""

    def __init__(self, slots: dict[int, np.ndarray]) -> None:
        self.slots = slots
        self.read: list[int] = []

    def __getitem__(self, index: int) -> np.ndarray:
        self.read.append(index)
        return self.slots[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 40))
def test_windows_are_symmetric_and_positive(height: int, width: int, overlap: int) -> None:
    weights = window(height, width, overlap)
    assert weights.shape == (height, width) and weights.dtype == np.float32
    assert weights.min() > 0 and weights.max() <= 1
    assert np.array_equal(weights, weights[::-1]) and np.array_equal(weights, weights[:, ::-1])
    assert np.array_equal(weights.T, window(width, height, overlap))


@given(st.integers(0, 32), st.integers(0, 20))
def test_neighbouring_windows_add_up_to_one(overlap: int, more: int) -> None:
    length = 2 * overlap + 1 + more
    ramp = window(length, length, overlap)[length // 2]
    total = np.zeros(2 * length - overlap)
    total[:length] += ramp
    total[length - overlap :] += ramp
    np.testing.assert_allclose(total[overlap : len(total) - overlap], 1, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.floats(-50, 50, width=32))
def test_constant_in_constant_out(grid: TileGrid, value: float) -> None:
    tile = np.full((1, grid.tile_height // 8, grid.tile_width // 8), value, np.float32)
    canvas = blend(grid, {t.index: tile for t in grid.tiles})
    assert canvas.shape == (1, grid.canvas_height // 8, grid.canvas_width // 8)
    assert np.all(canvas == np.float32(value))


@settings(max_examples=30, deadline=None)
@given(GRIDS)
def test_tiles_cut_from_a_canvas_blend_back_to_it(grid: TileGrid) -> None:
    shape = (3, grid.canvas_height // 8, grid.canvas_width // 8)
    canvas = generator(1, "canvas").standard_normal(shape, dtype=np.float32)
    slots = {}
    for tile in grid.tiles:
        top, left, height, width = tile.latent_box()
        slots[tile.index] = canvas[:, top : top + height, left : left + width]
    assert np.array_equal(blend(grid, slots), canvas)


@settings(max_examples=30, deadline=None)
@given(GRIDS, st.data())
def test_any_bands_and_any_slot_order_give_the_same_bytes(grid: TileGrid, data: st.DataObject) -> None:
    slots = random_slots(grid)
    whole = blend(grid, slots)
    rows = grid.canvas_height // 8
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, rows - 1)), max_size=5)) - {rows} | {0, rows})
    shuffled = {i: slots[i] for i in data.draw(st.permutations(sorted(slots)))}
    bands = [blend_rows(grid, shuffled, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert whole.dtype == np.float32
    assert np.concatenate(bands, 1).tobytes() == whole.tobytes()


def test_one_tile_is_the_identity() -> None:
    grid = make_grid(200, 328, 0, 64)
    slots = random_slots(grid, 4)
    assert blend(grid, slots).tobytes() == slots[0].tobytes()


def test_a_mirrored_canvas_blends_to_the_mirror_image() -> None:
    # starts 0, 80, 160, 240, 320: the grid is its own mirror image
    grid = make_grid(448, 448, 128, 32)
    slots = random_slots(grid)
    mirrored = {t.index: slots[t.row * grid.columns + grid.columns - 1 - t.column][..., ::-1] for t in grid.tiles}
    np.testing.assert_allclose(blend(grid, mirrored), blend(grid, slots)[..., ::-1], atol=1e-6)


def test_the_mean_is_weighted_by_the_window() -> None:
    grid = make_grid(64, 96, 64, 32)
    assert len(grid.tiles) == 2
    slots = {0: np.zeros((1, 8, 8), np.float32), 1: np.ones((1, 8, 8), np.float32)}
    ramp = np.sin(np.pi / 2 * (np.arange(4) + 0.5) / 4) ** 2
    np.testing.assert_allclose(blend(grid, slots)[0, 3], [0, 0, 0, 0, *ramp, 1, 1, 1, 1], atol=1e-6)


def test_a_band_reads_only_its_tiles_in_index_order() -> None:
    grid = make_grid(448, 448, 128, 32)
    slots = RecordingSlots(random_slots(grid))
    blend_rows(grid, slots, 0, 10)
    assert slots.read == [t.index for t in grid.tiles if t.row == 0]
    blend_rows(grid, slots, 10, 11)
    assert slots.read[grid.columns :] == [t.index for t in grid.tiles if t.row <= 1]


@settings(max_examples=30, deadline=None)
@given(GRIDS, st.data())
def test_finished_rows_need_no_later_tile(grid: TileGrid, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, len(grid.tiles)))
    rows = finished_rows(grid, done)
    slots = random_slots(grid)
    if rows:
        early = {i: s for i, s in slots.items() if i < done}
        assert np.array_equal(blend_rows(grid, early, 0, rows), blend(grid, slots)[:, :rows])
    if done == len(grid.tiles):
        assert rows == grid.canvas_height // 8
    else:
        with pytest.raises(KeyError):
            blend_rows(grid, {i: s for i, s in slots.items() if i < done}, rows, rows + 1)


def test_wrong_slots_and_rows_are_refused() -> None:
    grid = make_grid(128, 128, 64, 32)
    slots = random_slots(grid)
    with pytest.raises(KeyError):
        blend(grid, {i: s for i, s in slots.items() if i != 4})
    with pytest.raises(ValueError, match="slot 4"):
        blend(grid, slots | {4: slots[4][:, 1:]})
    for top, bottom in ((-1, 3), (3, 3), (5, 17)):
        with pytest.raises(ValueError, match="latent rows"):
            blend_rows(grid, slots, top, bottom)
