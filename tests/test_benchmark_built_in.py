"""The table of docs/mini.md: real photos degraded, enlarged and scored by the real commands, at small size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("built_in")


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight commands, each of which imports torch
def test_every_set_and_setting_has_its_paired_differences(script, tmp_path, tiny_bundle, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    good = tmp_path / "good"
    good.mkdir()
    for index in range(2):
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 255, (16, 24, 3)).astype(np.uint8)
        Image.fromarray(picture).resize((96, 64), Image.Resampling.BICUBIC).save(good / f"{index}.png")
    words = ["--good", str(good), "--seeds", "2", "--model", str(tiny_bundle), "--metrics", "psnr"]
    presets = ("realesrgan", "bicubic")
    words += ["--presets", *presets]
    assert script.main([*words, "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert [(r["set"], r["setting"], r["metric"]) for r in rows] == [
        (preset, setting, "psnr-y") for preset in presets for setting in ("default", "strength-0")
    ]
    assert len({round(r["value"], 6) for r in rows}) == len(rows)
    for row in rows:
        assert set(row["against"]) == {"lanczos", "bicubic"}
        for difference in row["against"].values():
            assert difference["mean"] == pytest.approx(row["value"] - difference["baseline"], abs=1e-6)
            assert difference["low"] <= difference["mean"] <= difference["high"]
            assert difference["count"] == (2 if row["set"] == "bicubic" else 4)
    lines = list(script.text(found))
    assert len(lines) == 2 + len(rows) and " dB |" in lines[2]


def test_no_photos_is_two_lines(script, tmp_path, capsys) -> None:
    assert script.main(["-o", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
