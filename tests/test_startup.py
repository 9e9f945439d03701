"""The start of an upscale with verified weights: no byte is hashed twice, and the benchmark that measures it runs."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from dreamsr_cli import weights
from dreamsr_cli.models.bundle import open_bundle

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    for name in ("DREAMSR_WEIGHTS_DIR", "DREAMSR_LOCK", "DREAMSR_CACHE"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the script sets
    return importlib.import_module("startup")


def test_the_benchmark_measures(script, capsys: pytest.CaptureFixture) -> None:
    assert script.main(["--size", "40", "--files", "4", "--repeat", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(found[f"{way}_seconds"] > 0 for way in ("unchecked", "warm", "cold"))
    assert found["warm_over_cold"] == pytest.approx(found["warm_seconds"] / found["cold_seconds"])
    assert script.main(["--size", "4", "--files", "2", "--repeat", "1"]) == 0
    assert "every byte is hashed" in capsys.readouterr().out


def test_a_second_start_hashes_nothing(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.make_weights(tmp_path, 4, 4)
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("DREAMSR_LOCK", str(tmp_path / "weights.lock"))
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    hashed: list[Path] = []
    true = weights._hash
    monkeypatch.setattr(weights, "_hash", lambda path: (hashed.append(path), true(path))[1])

    def start() -> str:
        bundle = open_bundle(str(tmp_path / "bundle"))
        for part in bundle.config.parts:
            bundle.part_folder(part)
        return bundle.sha256

    first = start()
    assert len(hashed) == 4
    assert start() == first and len(hashed) == 4
    touched = tmp_path / "weights" / "far" / "part-002.safetensors"
    os.utime(touched, (time.time() - 30, time.time() - 30))
    assert start() == first and hashed[4:] == [touched], "another mtime: that file is hashed again, and no other"
