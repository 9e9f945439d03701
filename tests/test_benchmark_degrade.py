"""The benchmark of `degrade` makes the crops it counts."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest
import torch

from dreamsr_cli.degradations import pixel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_quick_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("degrade")
    assert script.main(["--quick", "--preset", "seesr-mild", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = (found["files"][workers]["crops_per_second"] for workers in "12")
    # which of them is faster is for the benchmark to say: on a busy machine eight small crops say nothing
    assert min(found["pixels_alone"], one, two) > 0 and found["ratio"] == pytest.approx(two / one)


def test_a_slow_pipeline_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("degrade")
    script.write_photo(tmp_path / "photo.jpg", 128)
    fast, _ = script.files(tmp_path / "photo.jpg", tmp_path / "out", "seesr-mild", 64, 3, 1)
    assert fast > 0 and len(list((tmp_path / "out" / "lq").iterdir())) == 4
    degrade = pixel.degrade

    def slow(hq_CPQ: torch.Tensor, params: pixel.PixelParams) -> torch.Tensor:
        time.sleep(1.0)
        return degrade(hq_CPQ, params)

    monkeypatch.setattr(pixel, "degrade", slow)
    # at least a second for each crop, however fast the machine is
    slowed, _ = script.files(tmp_path / "photo.jpg", tmp_path / "out", "seesr-mild", 64, 3, 1)
    assert 0 < slowed < 1
    assert 0 < script.pixels_alone("seesr-mild", 64, 2) < 1
