"""`dreamsr doctor`: which models are ready, what is missing and what to type for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamsr_cli.bundle_state import entry_lack, lacking, refuse_lacking
from dreamsr_cli.cli.app import run
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.weights_lock import load_lock


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was fetched."""
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights"


def sparse(base: Path, entry: str, *, but: str = "") -> None:
    """Files of the right names and sizes, with nothing in them."""
    for row in load_lock()[entry].files:
        path = base / entry / row.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate((row.size or 1) - (1 if row.path == but else 0))


def test_missing_models_are_told_and_no_fault(capsys: pytest.CaptureFixture) -> None:
    assert run(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] and not answer["problems"]
    bundles, captioners = answer["bundles"], answer["captioners"]
    assert bundles["mini"] == {"ready": True, "missing": [], "command": ""}
    assert bundles["flux-upscaler"]["command"] == "dreamsr fetch-weights flux-upscaler"
    assert "33.7" in bundles["flux-upscaler"]["missing"][0]
    flux = bundles["flux"]["command"]
    assert flux.startswith("dreamsr fetch-weights flux, then") and "--weights RUN" in flux
    assert captioners["describe"]["ready"]
    assert captioners["llava-onevision-0.5b"]["command"] == "dreamsr fetch-weights llava-onevision-0.5b"
    assert set(answer["extras"]) == {"torchao", "bitsandbytes", "pyiqa", "tensorboard"}
    assert "free" in answer["memory"]["ram"] and len(answer["write"]) == 2
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bundles") and "-> dreamsr fetch-weights flux-upscaler" in line for line in lines)


def test_what_was_fetched_is_ready(bare: Path, capsys: pytest.CaptureFixture) -> None:
    for entry in ("flux.1-dev", "flux-upscaler-controlnet"):
        sparse(bare, entry)
    assert run(["doctor", "--json"]) == 0
    bundles = json.loads(capsys.readouterr().out)["bundles"]
    assert bundles["flux-upscaler"]["ready"] and not bundles["flux"]["ready"]
    assert not bundles["flux"]["command"].startswith("dreamsr fetch-weights")


def test_a_file_of_another_size_and_a_cut_download_count_as_missing(bare: Path) -> None:
    name = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
    sparse(bare, "flux.1-dev", but=name)
    lack = entry_lack("flux.1-dev")
    assert lack is not None and (lack.files, lack.bytes) == (1, 9_949_328_904)
    path = bare / "flux.1-dev" / name
    path.rename(path.with_name(path.name + ".part"))
    lack = entry_lack("flux.1-dev")
    assert lack is not None and (lack.files, lack.bytes) == (1, 1)


def test_everything_that_is_missing_is_one_error() -> None:
    assert not lacking(open_bundle("mini").config)
    refuse_lacking(open_bundle("mini").config)
    with pytest.raises(WeightsError) as error:
        refuse_lacking(open_bundle("flux-upscaler").config)
    assert "dreamsr fetch-weights flux.1-dev flux-upscaler-controlnet" in error.value.hint
    with pytest.raises(WeightsError, match="not published by anybody") as error:
        refuse_lacking(open_bundle("flux").config)
    assert "pass --weights RUN" in error.value.hint and "dreamsr fetch-weights flux.1-dev" in error.value.hint
