"""The benchmark of the local text tells a bundle that listens from one that doesn't."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("local_text")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photos of two tiles, one dark and blue, one bright and red."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, colour in (("a", (10, 20, 90)), ("b", (240, 120, 110))):
        noise = rng.integers(-9, 9, (64, 128, 3))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def asked(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert script.main([*arguments, "--tile", "64", "--draws", "1", "--t", "0.3", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prompts_change_the_loss_of_a_bundle_that_listens(script, photos, tiny_bundle, capsys) -> None:
    found = asked(script, capsys, str(photos), "--model", str(tiny_bundle))
    assert (found["photos"], found["tiles"]) == (2, 4)
    assert len(set(found["loss"].values())) == 3 and all(x > 0 for x in found["loss"].values())
    gap = found["differences"]["right - shuffled"]
    assert gap["mean"] == pytest.approx(found["loss"]["right"] - found["loss"]["shuffled"])
    low, high = gap["over_tiles"]
    assert low <= gap["mean"] <= high and 0 <= gap["tiles_lower"] <= 4
    assert found["injections"] and all(x > 1e-6 for x in found["injections"])


def test_shuffled_within_a_photo_is_another_measurement(script, photos, tiny_bundle, capsys) -> None:
    among, within = (
        asked(script, capsys, str(photos), "--model", str(tiny_bundle), "--shuffle", whose, "--detail-words")
        for whose in ("photos", "tiles")
    )
    assert all(among["loss"][kind] == within["loss"][kind] for kind in ("right", "none"))
    assert among["loss"]["shuffled"] != within["loss"]["shuffled"]


def test_a_deaf_bundle_shows_nothing(script, photos, tiny_bundle, tmp_path, capsys) -> None:
    import shutil

    deaf = tmp_path / "deaf"
    shutil.copytree(tiny_bundle, deaf)
    (path,) = (deaf / "context_attention").glob("*.safetensors")
    weights = load_file(path)
    for name, values in weights.items():
        if "text_projection" in name:
            weights[name] = torch.zeros_like(values)
    save_file(weights, path)
    (path,) = (deaf / "controlnet").glob("*.safetensors")
    weights = load_file(path)
    for name, values in weights.items():  # the local text also reaches the image features
        if "image_projections" in name:
            weights[name] = torch.zeros_like(values)
    save_file(weights, path)
    found = asked(script, capsys, str(photos), "--model", str(deaf))
    assert found["injections"] == [0.0] * len(found["injections"])
    assert all(d["mean"] == 0 for d in found["differences"].values())


def test_one_photo_is_too_few(script, photos, tiny_bundle, capsys) -> None:
    assert script.main([str(photos), "--model", str(tiny_bundle), "--limit", "1", "--tile", "64"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2
