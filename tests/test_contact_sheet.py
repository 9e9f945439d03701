"""The sheet of the README's pictures: real photos through the real engine, at small size."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_a_row_of_four_panels_per_photo(monkeypatch, tmp_path, tiny_bundle) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("contact_sheet")
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 255, (66, 131, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    out = tmp_path / "sheet.png"
    words = [f"{tmp_path / 'a.png'}@8,4,64,48", str(tmp_path / "a.png")]
    assert script.main([*words, "-o", str(out), "--model", str(tiny_bundle)]) == 0
    sheet = np.asarray(Image.open(out))
    # Sides of a degraded photo are multiples of 4.
    assert sheet.shape == (48 + 64 + 2 * script.TITLE, 4 * 128 + 3 * script.GAP, 3)
    original = 3 * (64 + script.GAP)
    assert np.array_equal(sheet[script.TITLE : script.TITLE + 48, original : original + 64], photo[4:52, 8:72])
    row = [sheet[script.TITLE : script.TITLE + 48, x : x + 64] for x in range(0, original + 1, 64 + script.GAP)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(row) for b in row[:i])


def test_a_missing_photo_or_a_box_outside_is_two_lines(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("contact_sheet")
    assert script.main([str(tmp_path / "none.png"), "-o", str(tmp_path / "sheet.png")]) != 0
    assert len(capsys.readouterr().err.splitlines()) == 2
    Image.new("RGB", (64, 64)).save(tmp_path / "me@home.png")
    assert script.main([f"{tmp_path / 'me@home.png'}@60,0,8,8", "-o", str(tmp_path / "sheet.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2 and not (tmp_path / "sheet.png").exists()
