"""A moving grid: parts that are the whole canvas, borders that move, texts of the place, and the promises of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dreamsr_cli.config import CONTROL_BYTES, TILINGS, OutputConfig, UpscaleConfig
from dreamsr_cli.engine import check_settings, upscale
from dreamsr_cli.errors import JournalError, UsageError
from dreamsr_cli.journal import Journal, journal_folder
from dreamsr_cli.journal_files import RowFile
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.multidiffusion import blend
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.sampler import Sampler, Texts
from dreamsr_cli.shifted_tiling import POSITIONS, Layout, overlapping, texture_layouts
from dreamsr_cli.tiling import make_grid

SIDE = st.integers(1, 3000)
TILE = st.integers(4, 40).map(lambda n: 16 * n)
CPU = torch.device("cpu")


def borders(layout: Layout, first: int, last: int) -> set[int]:
    """Where parts meet along one axis, by the places of a part's two sides in its box."""
    assert layout.owned is not None
    sides = {box[first] for box in layout.owned} | {box[last] for box in layout.owned}
    return sides - {0, max(box[last] for box in layout.owned)}


@settings(deadline=None, max_examples=60)
@given(SIDE, SIDE, TILE, st.integers(1, 20))
def test_parts_are_the_canvas_and_lie_in_what_their_tile_computes(height, width, tile, overlap) -> None:
    grid = make_grid(height, width, tile, min(16 * overlap, tile // 2 // 16 * 16))
    layouts = texture_layouts(grid, "shifted")
    if len(grid.tiles) == 1:
        assert layouts == (overlapping(grid),)
        return
    assert len(layouts) == POSITIONS and [layout.number for layout in layouts] == list(range(POSITIONS))
    assert len({(one.grid.tile_height, one.grid.tile_width, len(one.grid.tiles)) for one in layouts}) == 1
    for layout in layouts:
        assert layout.owned is not None and len(layout.grid.tiles) <= len(grid.tiles)
        assert layout.grid.tile_height <= grid.tile_height and layout.grid.tile_width <= grid.tile_width
        times_PQ = np.zeros((grid.canvas_height // 16, grid.canvas_width // 16), int)
        for one, (left, top, right, bottom) in zip(layout.grid.tiles, layout.owned, strict=True):
            assert left < right and top < bottom and not any(side % 16 for side in (left, top, right, bottom))
            assert one.left <= left and right <= one.left + one.width <= grid.canvas_width
            assert one.top <= top and bottom <= one.top + one.height <= grid.canvas_height
            times_PQ[top // 16 : bottom // 16, left // 16 : right // 16] += 1
        assert (times_PQ == 1).all()
    for first, last in ((0, 2), (1, 3)):
        before, after = (borders(layout, first, last) for layout in (layouts[0], layouts[-1]))
        assert after == {border - grid.overlap for border in before}, "every border moves by the overlap"


@settings(deadline=None, max_examples=30)
@given(st.integers(100, 900), st.integers(100, 900), st.integers(4, 20).map(lambda n: 16 * n))
def test_a_tile_takes_the_text_of_the_box_that_covers_most_of_its_part(height, width, tile) -> None:
    grid = make_grid(height, width, tile, 32)
    for layout in texture_layouts(grid, "shifted"):
        for index, text in enumerate(layout.texts):
            box = grid.tiles[index].box if layout.owned is None else layout.owned[index]
            areas = [_common(box, other.box) for other in grid.tiles]
            assert text == areas.index(max(areas))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def test_each_latent_pixel_is_its_own_tiles() -> None:
    grid = make_grid(320, 400, 160, 48)
    for layout in texture_layouts(grid, "shifted"):
        high, wide = layout.grid.tile_height // 8, layout.grid.tile_width // 8
        canvas = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)
        crops = {t.index: canvas[:, t.top // 8 :, t.left // 8 :][:, :high, :wide] for t in layout.grid.tiles}
        bands = [layout.blend_rows(crops, top, min(top + 7, 40)) for top in range(0, 40, 7)]
        assert np.array_equal(np.concatenate(bands, axis=1), canvas)
        marked = {t.index: np.full((1, high, wide), t.index, np.float32) for t in layout.grid.tiles}
        assert set(layout.blend_rows(marked, 0, 40).ravel()) == set(range(len(layout.grid.tiles)))
    plain = overlapping(grid)
    sides = grid.tile_height // 8, grid.tile_width // 8
    slots = {t.index: np.full((1, *sides), t.index, np.float32) for t in grid.tiles}
    assert np.array_equal(plain.blend_rows(slots, 0, 40), blend(grid, slots))


# ---------------------------------------------------------------- the sampler


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    bundle = open_bundle(str(tiny_bundle))
    return bundle, bundle.open_restorer(CPU, torch.float32, mask_pads=True)


class Bench:
    """Texture steps on a real journal."""

    def __init__(self, opened, folder: Path, height=144, width=208, tile=96, batch=2, tiling="shifted") -> None:
        self.bundle, self.restorer = opened
        self.grid, self.folder, self.batch, self.tiling = make_grid(height, width, tile, 32), folder, batch, tiling
        encoder = self.bundle.open_text_encoder(CPU, torch.float32)
        words = [f"tile number {tile.index}" for tile in self.grid.tiles]
        (glob, *local), _ = encoder.encode(["the whole photo", *words], 64)
        self.texts = Texts(glob, local, most_tokens=64)
        self.shape = (self.bundle.config.latent.channels, self.grid.canvas_height // 8, self.grid.canvas_width // 8)
        self.z_dr = np.random.default_rng(0).standard_normal(self.shape).astype(np.float32)

    def texture(self, name: str, steps: int = 3, control_bytes: int = CONTROL_BYTES) -> np.ndarray:
        file = RowFile(self.folder / "z", self.shape[1], self.shape[2], self.shape[0], create=True)
        file.write_rows(0, self.z_dr)
        config = self.bundle.config
        with Journal(self.folder / f"{name}.dreamsr", {}, 0) as journal:
            about = (self.batch, journal, SilentProgress(), control_bytes, 0, self.tiling)
            sampler = Sampler(self.restorer, self.grid, self.texts, config.sampling, config.control, *about)
            return sampler.texture(file, 0.8, steps, 5, None).rows(0, self.shape[1]).copy()


@pytest.fixture
def bench(opened, tmp_path):
    return lambda **settings: Bench(opened, tmp_path, **settings)


@pytest.mark.parametrize("control_bytes", [CONTROL_BYTES, 0])
def test_control_runs_once_for_each_place_of_the_grid_where_it_is_kept(bench, control_bytes) -> None:
    b = bench(batch=1)
    layouts = texture_layouts(b.grid, "shifted")
    tiles, seen = len(layouts[0].grid.tiles), []
    handle = b.restorer.controlnet.register_forward_pre_hook(lambda _, args: seen.append(args))
    made = b.texture("one", 4, control_bytes)
    handle.remove()
    assert len(seen) == (POSITIONS if control_bytes else 4) * tiles
    placed = [(layout, tile) for layout in layouts for tile in layout.grid.tiles]
    for (layout, tile), args in zip(placed, seen, strict=False):
        top, left, height, width = tile.latent_box()
        assert np.array_equal(args[0][0].numpy(), b.z_dr[:, top : top + height, left : left + width])
        own = b.texts.local[layout.texts[tile.index]].tokens_BTD
        assert torch.equal(args[2].tokens_BTD[:, : own.shape[1]], own)
    if not control_bytes:
        assert np.array_equal(made, b.texture("kept", 4))


def test_a_batch_changes_rounding_only_and_one_tile_nothing(bench) -> None:
    assert np.abs(bench(batch=1).texture("one") - bench(batch=4).texture("four")).max() < 1e-4
    whole = bench(tile=0)
    assert np.array_equal(whole.texture("shifted"), bench(tile=0, tiling="overlap").texture("overlap"))
    assert np.abs(bench().texture("a") - bench(tiling="overlap").texture("b")).max() > 1e-3


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 9])
def test_a_stopped_run_goes_on_with_the_same_bytes(bench, stop) -> None:
    b = bench()
    whole, calls = b.texture("whole"), []

    def give_up(*_) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    handle = b.restorer.dit.register_forward_pre_hook(give_up)
    with pytest.raises(KeyboardInterrupt):
        b.texture("stopped")
    handle.remove()
    calls.clear()
    handle = b.restorer.dit.register_forward_pre_hook(lambda *_: calls.append(1))
    assert np.array_equal(b.texture("stopped"), whole)
    handle.remove()
    batches = len(texture_layouts(b.grid, "shifted")[0].grid.batches(2))
    assert len(calls) == 3 * batches - (stop - 1)


# ---------------------------------------------------------------- a run

SMALL = UpscaleConfig(tile=64, overlap=16, steps=3, scale=2.0, precision="fp32", device="cpu", tiling="shifted")


def run(folder: Path, bundle, out: str, **changes) -> bytes:
    source = folder / "photo.png"
    pixels = np.random.default_rng(1).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(source)
    result = upscale(source, folder / out, bundle, replace(SMALL, **changes), OutputConfig(), SilentProgress())
    assert result.to_json()["tiling"] == changes.get("tiling", "shifted")
    return (folder / out).read_bytes()


def test_the_tiling_matters_in_texture_steps_alone(opened, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    assert run(tmp_path, opened[0], "a.png") != run(tmp_path, opened[0], "b.png", tiling="overlap")
    removed = [run(tmp_path, opened[0], f"{tiling}.png", strength=0.0, tiling=tiling) for tiling in TILINGS]
    pixels = [np.asarray(Image.open(tmp_path / f"{tiling}.png")) for tiling in TILINGS]
    assert np.array_equal(pixels[0], pixels[1]) and removed[0] != removed[1], "the record in the file says which"


def test_a_journal_of_another_tiling_is_refused(opened, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    bundle = opened[0]
    forward, calls = ConditionedDiT.forward, []

    def give_up(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(ConditionedDiT, "forward", give_up)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, bundle, "a.png")
    assert journal_folder(tmp_path / "a.png").exists()
    with pytest.raises(JournalError, match="tiling was 'shifted', is 'overlap'"):
        run(tmp_path, bundle, "a.png", tiling="overlap")
    assert run(tmp_path, bundle, "a.png") == run(tmp_path, bundle, "b.png")


def test_what_cannot_move_is_told(opened) -> None:
    with pytest.raises(UsageError, match="--overlap, which is 0"):
        check_settings(replace(SMALL, overlap=0), opened[0])
    with pytest.raises(UsageError, match="--tiling sideways is not known"):
        check_settings(replace(SMALL, tiling="sideways"), opened[0])
    assert check_settings(replace(SMALL, overlap=0, tile=0), opened[0]).tiling == "shifted"
