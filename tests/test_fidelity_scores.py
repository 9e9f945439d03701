"""Fidelity: seams are found where they are and nowhere else, colours are compared as defined, bad tiles are named."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image
from sample_photos import ADOBE_RGB

from dreamsr_cli.draws import generator
from dreamsr_cli.errors import InputError
from dreamsr_cli.evaluation import fidelity
from dreamsr_cli.evaluation.colour_difference import ciede2000, compare
from dreamsr_cli.evaluation.fidelity import FidelityReport, fidelity_report, photo_fidelity
from dreamsr_cli.evaluation.fidelity_page import write_fidelity_page
from dreamsr_cli.evaluation.lanczos import LanczosPhoto
from dreamsr_cli.evaluation.suspicion import Measured, find_reasons
from dreamsr_cli.images import open_photo
from dreamsr_cli.tiling import make_grid

CHELSEA = Path(__file__).resolve().parents[1] / "examples" / "chelsea.jpg"
SIZE = 768, 512
GRID = make_grid(SIZE[1], SIZE[0], 256, 64)
"""Tiles of 240 x 224 begin at columns 0, 176, 352, 528 and rows 0, 144, 288."""
COLUMNS, ROWS = [176, 240, 352, 416, 528, 592], [144, 224, 288, 368]
"""Their borders."""


@functools.cache
def plain() -> np.ndarray:
    with Image.open(CHELSEA) as photo:
        return np.asarray(photo.resize(SIZE, Image.Resampling.LANCZOS)).astype(int)


@functools.cache
def noise(deviation: float, seed: int = 1) -> np.ndarray:
    return generator(seed, "test-texture").normal(0, deviation, (SIZE[1], SIZE[0], 3)).round().astype(int)


def enlarged() -> np.ndarray:
    return plain().copy()


def textured() -> np.ndarray:
    """The cat with fine noise, as a result has texture that its photo has not."""
    return plain() + noise(1)


def saved(path: Path, levels: np.ndarray) -> Path:
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def seam_of(path: Path) -> float:
    return photo_fidelity(CHELSEA, path, GRID)["seam"]


def test_the_lanczos_picture_has_no_seam_and_no_other_colours(tmp_path: Path) -> None:
    report = fidelity_report(CHELSEA, saved(tmp_path / "a.png", enlarged()), GRID, SIZE)
    assert report.seam == 1 and report.lattice == 1 and not report.suspicious
    assert report.seam_elsewhere == (1, 0)
    assert {seam.score for seam in report.borders} == {1.0}
    assert 0 < report.delta_e_mean < 0.5 and report.delta_e_mean < report.delta_e_p95 < report.delta_e_max
    assert max(abs(tile.texture) for tile in report.tiles) == 0


@pytest.mark.parametrize("axis", ["column", "row"])
def test_a_step_of_two_levels_is_a_seam_at_a_border_and_nowhere_else(tmp_path: Path, axis: str) -> None:
    without = seam_of(saved(tmp_path / "without.png", textured()))
    assert without == pytest.approx(1, abs=0.15)

    def with_steps(places: list[int]) -> Path:
        levels = textured()
        for number, place in enumerate(places):
            at = (slice(None), slice(place, None)) if axis == "column" else (slice(place, None),)
            levels[at] += 2 if number % 2 == 0 else -2
        return saved(tmp_path / "steps.png", levels)

    at_borders = COLUMNS if axis == "column" else ROWS
    away = [144, 304, 480, 640] if axis == "column" else [64, 192, 320, 432]
    report = fidelity_report(CHELSEA, with_steps(at_borders), GRID, SIZE)
    assert report.seam is not None and report.seam > without + 0.1
    # Steps at borders don't show where no border is.
    plain = fidelity_report(CHELSEA, tmp_path / "without.png", GRID, SIZE).seam_elsewhere
    assert report.seam_elsewhere is not None and report.seam_elsewhere == pytest.approx(plain, abs=1e-3)
    mean, deviation = report.seam_elsewhere
    assert 0.02 < deviation < 0.1 and abs(mean - without) < 3 * deviation
    assert report.to_json()["seam_elsewhere"] == [round(mean, 4), round(deviation, 4)]
    worst = report.borders[: len(at_borders)]
    assert {(seam.axis, seam.position) for seam in worst} == {(axis, place) for place in at_borders}
    assert min(seam.score for seam in worst) > 1.1 > max(s.score for s in report.borders[len(at_borders) :])
    assert seam_of(with_steps(away)) < without + 0.005


def test_the_seam_score_is_its_definition(tmp_path: Path) -> None:
    """Computed once more from the whole picture with loops over lines."""
    result = textured().clip(0, 255)
    weights = np.array([0.299, 0.587, 0.114])

    def ratio(levels: np.ndarray, borders: set[int], axis: int) -> float:
        luma = np.moveaxis(levels @ weights, axis, 0)
        second = {x: np.abs(luma[x - 1] - 2 * luma[x] + luma[x + 1]).mean() for x in range(1, len(luma) - 1)}
        line = {b: (second[b - 1] + second[b]) / 2 for b in range(2, len(luma) - 1)}
        far = [b for b in line if b % 16 == 0 and min(abs(b - border) for border in borders) >= 32]
        return float(np.mean([line[b] for b in borders]) / np.mean([line[b] for b in far]))

    columns, rows = set(COLUMNS), set(ROWS)
    across = ratio(result, columns, 1) - ratio(plain(), columns, 1) + 1
    down = ratio(result, rows, 0) - ratio(plain(), rows, 0) + 1
    pixels = len(columns) * SIZE[1], len(rows) * SIZE[0]
    expected = (across * pixels[0] + down * pixels[1]) / sum(pixels)
    assert seam_of(saved(tmp_path / "a.png", result)) == pytest.approx(expected, abs=1e-3)


def test_a_pattern_of_the_token_lattice_is_not_a_seam(tmp_path: Path) -> None:
    levels = textured()
    levels[:, ::16] += 3
    report = fidelity_report(CHELSEA, saved(tmp_path / "a.png", levels), GRID, SIZE)
    assert report.lattice is not None and report.lattice > 1.5
    assert report.seam == pytest.approx(seam_of(saved(tmp_path / "b.png", textured())), abs=0.05)


def test_a_picture_of_one_tile_has_no_seam_score(tmp_path: Path) -> None:
    path, grid = saved(tmp_path / "a.png", textured()), make_grid(SIZE[1], SIZE[0], 0, 64)
    report = fidelity_report(CHELSEA, path, grid, SIZE)
    assert (
        report.seam_elsewhere is None and report.seam is None and report.borders == () and report.tiles[0].seam is None
    )
    assert photo_fidelity(CHELSEA, path, grid).keys() == {"delta_e_mean", "delta_e_p95"}
    assert photo_fidelity(CHELSEA, path, None) == photo_fidelity(CHELSEA, path, grid)


def damage(levels: np.ndarray, kind: str, box: tuple[slice, slice]) -> None:
    inside = levels[box]
    if kind == "colour":
        inside[..., 0] += 24
        inside[..., 2] -= 24
    elif kind == "content":
        inside[:] = inside[::-1, ::-1].copy()
    elif kind == "smooth":
        inside[:] = plain()[box]
    else:
        inside += generator(2, "test-damage").normal(0, 14, inside.shape).round().astype(int)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("colour", "colours are shifted"),
        ("content", "differs from the photo"),
        ("smooth", "less fine detail"),
        ("noise", "more fine detail"),
    ],
)
def test_a_damaged_tile_is_named_with_its_reason(tmp_path: Path, kind: str, words: str) -> None:
    grid = make_grid(SIZE[1], SIZE[0], 128, 16)
    bad = grid.tiles[17]
    levels = textured()
    if kind in ("smooth", "noise"):
        levels += noise(3, 3)
    whole = fidelity_report(CHELSEA, saved(tmp_path / "a.png", levels), grid, SIZE)
    assert bad.index not in [tile.index for tile in whole.suspicious]
    damage(levels, kind, (slice(bad.top, bad.top + bad.height), slice(bad.left, bad.left + bad.width)))
    report = fidelity_report(CHELSEA, saved(tmp_path / "b.png", levels), grid, SIZE)
    reasons = {tile.index: tile.suspicious for tile in report.suspicious}
    assert any(words in why for why in reasons[bad.index]), reasons
    assert len(reasons) <= 5  # the tile and what it overlaps, not half of the picture


def test_outliers_need_others_and_a_step_that_can_be_seen() -> None:
    def tiles(values: list[float]) -> list[Measured]:
        return [Measured(delta_e=value, shift=0.1, texture=0.0, seam=None) for value in values]

    assert [bool(why) for why in find_reasons(tiles([1, 1, 1, 1, 1, 1, 4]))] == [False] * 6 + [True]
    assert not any(find_reasons(tiles([1, 1, 1, 1, 1, 1, 2.4])))  # hardly seen
    assert not any(find_reasons(tiles([1, 2, 4, 5, 6, 8, 9])))  # they all differ
    assert not any(find_reasons(tiles([9.5] * 24)))  # the picture is off, no tile of it
    assert [bool(why) for why in find_reasons(tiles([1, 9]))] == [False, True]  # few tiles: the fixed limit
    assert not any(find_reasons(tiles([1, 4])))


# Sharma, Wu, Dalal: The CIEDE2000 color-difference formula (2005), table 1: pairs 1, 4, 7, 9, 17, 20, 25, 31, 34
SHARMA = """50 2.6772 -79.7751 50 0 -82.7485 2.0425
50 -1.3802 -84.2814 50 0 -82.7485 1.0000
50 0 0 50 -1 2 2.3669
50 2.4900 -0.0010 50 -2.4900 0.0009 7.1792
50 2.5 0 73 25 -18 27.1492
50 2.5 0 58 24 15 19.4535
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082"""


def test_ciede2000_is_sharmas() -> None:
    rows = np.array([list(map(float, line.split())) for line in SHARMA.split("\n")])
    np.testing.assert_allclose(ciede2000(rows[:, :3], rows[:, 3:6]), rows[:, 6], atol=2e-4)
    np.testing.assert_allclose(ciede2000(rows[:, 3:6], rows[:, :3]), rows[:, 6], atol=2e-4)


def test_colours_are_compared_as_a_person_sees_them(tmp_path: Path) -> None:
    # IEC 61966-2-1 and CIELab of D65 give these for a mid colour and for white (scikit-image 0.26 computes the same)
    colours = np.array([[[0.5, 0.25, 0.75], [1, 1, 1]]], np.float32)
    _, difference = compare(colours, None, np.zeros_like(colours), None)
    np.testing.assert_allclose(difference[0], [[41.155, 51.409, -56.445], [100, 0, 0]], atol=0.02)
    # the same levels in another profile are other colours
    same, _ = compare(colours, ADOBE_RGB, colours, ADOBE_RGB)
    other, _ = compare(colours, ADOBE_RGB, colours, None)
    assert same.max() == 0 and other[0, 0] > 1


def test_delta_e_is_of_the_result_shrunk_to_the_photo(tmp_path: Path) -> None:
    """Detail that vanishes when shrunk costs nothing, another level does; the map says where."""
    flat = np.full((64, 96, 3), 120)
    photo = saved(tmp_path / "photo.png", flat)
    result = np.full((256, 384, 3), 120)
    result[::2, ::2] += 16
    result[1::2, 1::2] += 16
    result[::2, 1::2] -= 16
    result[1::2, ::2] -= 16
    figures = photo_fidelity(photo, saved(tmp_path / "fine.png", result), None)
    assert figures["delta_e_mean"] < 0.05
    result[:, 192:] += 20
    report = fidelity_report(photo, saved(tmp_path / "half.png", result), make_grid(256, 384, 128, 32), (384, 256))
    assert report.map_PQ.shape == (64, 96)
    assert report.map_PQ[:, :40].max() < 0.2 and report.map_PQ[:, 56:].min() > 5
    tiles = {tile.column: tile.delta_e for tile in report.tiles}
    assert tiles[0] < 0.2 and tiles[3] > 5
    step, _ = compare(np.full((1, 1, 3), 140 / 255), None, np.full((1, 1, 3), 120 / 255), None)
    assert report.delta_e_p95 == pytest.approx(float(step[0, 0]), abs=0.2)
    assert report.delta_e_mean == pytest.approx(float(step[0, 0]) / 2, abs=0.2)


def test_strips_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", textured())
    whole = fidelity_report(CHELSEA, path, GRID, SIZE).to_json()
    monkeypatch.setattr(fidelity, "_STRIP_PIXELS", 7 * SIZE[0])
    assert json.dumps(fidelity_report(CHELSEA, path, GRID, SIZE).to_json()) == json.dumps(whole)
    assert whole["tiles"][5]["box"] == [176, 144, 416, 368]
    with open_photo(CHELSEA) as photo:
        lanczos = LanczosPhoto(photo, *SIZE)
        pieces = [lanczos.read_rows(top, min(top + 11, SIZE[1])) for top in range(0, SIZE[1], 11)]
    np.testing.assert_array_equal(np.rint(np.concatenate(pieces) * 255), plain())


def test_a_result_of_another_size_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", enlarged()[:100])
    with pytest.raises(InputError, match="768x100"):
        fidelity_report(CHELSEA, path, GRID, SIZE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its own peak from /proc")
def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """A result of 69 megapixels (208 MB as bytes, 830 MB as floats) takes at most 400 MB more than to open it."""
    grey = (pyvips.Image.black(8192, 8448, bands=3) + 90).cast("uchar").copy(interpretation="srgb")
    grey.crop(0, 0, 2048, 2112).pngsave(str(tmp_path / "photo.png"))
    grey.pngsave(str(tmp_path / "result.png"), compression=1)
    code = f"""
import torch
from pathlib import Path
torch.set_num_threads(1)
from dreamsr_cli.evaluation.fidelity import fidelity_report, open_spilled
from dreamsr_cli.evaluation.fidelity_page import write_fidelity_page
from dreamsr_cli.evaluation.memory_peak import measure_peak
from dreamsr_cli.tiling import make_grid
folder = Path({str(tmp_path)!r})
cpu = torch.device("cpu")
with measure_peak(cpu) as before:
    open_spilled(folder / "result.png").close()
grid = make_grid(8448, 8192, 512, 64)
with measure_peak(cpu) as peak:
    report = fidelity_report(folder / "photo.png", folder / "result.png", grid, (8192, 8448))
    write_fidelity_page(report, folder / "page.html")
print(report.delta_e_max, before.bytes, peak.bytes)
"""
    # what glibc keeps of freed blocks and how libvips' threads meet make either peak up to 350 MB higher, by chance
    settled = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "VIPS_CONCURRENCY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settled)
    largest, before, peak = map(float, done.stdout.split())
    assert largest == 0 and peak - before < 400e6


def damaged_report(folder: Path, name: str = "a.png") -> FidelityReport:
    levels = textured()
    damage(levels, "colour", (slice(0, 256), slice(176, 432)))
    return fidelity_report(CHELSEA, saved(folder / name, levels), GRID, SIZE)


def test_the_page_names_suspicious_tiles_first_and_escapes(tmp_path: Path) -> None:
    report = damaged_report(tmp_path, "a<script>alert(1)<.png")
    assert report.suspicious[0].index == 1
    page = write_fidelity_page(report, tmp_path / "out" / "a.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "a&lt;script&gt;alert(1)&lt;.png" in page
    assert page.index("colours are shifted") < page.index('id="tiles"')
    rows = page[page.index('id="tiles"') :].split("<tbody>")[1]
    assert rows.startswith('<tr><td data-value="1">1</td>')  # the suspicious one, before tile 0
    assert "http://" not in page and "https://" not in page
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.html"]
