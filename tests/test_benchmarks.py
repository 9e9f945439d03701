"""The benchmark measures what it says: every forward pass is counted, and both samplers do the same work."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dreamsr_cli.journal import Journal
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.sampler import REMOVE, Sampler, Texts
from dreamsr_cli.tiling import make_grid

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """benchmarks/engine_overhead.py as Python finds it when it is run by its path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("engine_overhead")


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_flux_bundle"])
def test_quick_run(script, kind, request, capsys) -> None:
    model = str(request.getfixturevalue(kind))
    assert script.main(["--quick", "--model", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    overhead = found["overhead"]
    (run,) = overhead["runs"]
    inside = sum(run["networks"].values())
    assert all(seconds > 0 for seconds in run["networks"].values())
    assert run["wall"] == pytest.approx(run["loading"] + inside + run["rest"])
    assert overhead["ratio"] == pytest.approx(run["rest"] / inside) and run["rest"] > 0
    # 4 tiles in one batch: one pass of each network to remove, then 2 steps with control features made once.
    assert (overhead["steps"], run["tiles"]) == (2, 4)
    assert (run["calls"]["dit"], run["calls"]["controlnet"]) == (3, 2)


@pytest.mark.parametrize("kind", ["tiny_bundle", "tiny_flux_bundle"])
def test_every_way_of_the_race_is_timed(script, kind, request, capsys) -> None:
    race = importlib.import_module("versus_diffusers")
    # bfloat16, which a CPU that has it would choose, rounds more than the differences below.
    words = ["--quick", "--precision", "fp32", "--model", str(request.getfixturevalue(kind)), "--json"]
    assert race.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [race.PLAIN, race.PLAIN_TRIMMED, *(way.name for way in race.WAYS[:-1])]
    assert rows[race.PLAIN]["ratio"] == 1 and found["compile_skipped"]
    assert found["ratio"] == rows["+ rotary as one product"]["ratio"] > 0
    # 4 tiles in one batch, 2 steps; control features at every step, or once.
    assert rows[race.PLAIN]["calls"] == rows["ours, no saving"]["calls"] == {"dit": 2, "controlnet": 2}
    assert rows["+ control once per tile"]["calls"] == {"dit": 2, "controlnet": 1}
    assert found["text_tokens"]["plain"] >= found["text_tokens"]["ours"]
    # Where padding is masked, no saving changes more than rounding.
    differences = [row["difference"] for row in found["rows"] if row["difference"] is not None]
    assert kind != "tiny_bundle" or max(differences) < 1e-4


def test_options_are_compared_with_the_plain_path(script, tiny_bundle, capsys) -> None:
    same = importlib.import_module("same_picture")
    words = ["control", "rotary", "channels", "bucket", "batch", "upscale", "bf16", "compile"]
    assert same.main(["--quick", "--model", str(tiny_bundle), "--only", *words, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["control features kept"]["max"] == rows["rotary as one product"]["max"] == 0
    assert rows["as upscale does it"]["max"] <= 1 and rows["precision bf16"]["mean"] > 0
    assert rows["compile"]["skipped"] == "not asked for"


def test_changed_bytes_are_an_error(script) -> None:
    same = importlib.import_module("same_picture")
    plain = np.zeros((2, 2, 3), np.int16)
    other = plain.copy()
    other[0, 0, 0] = 3
    row = {"name": "x", "same_bytes": True, **same.compare(plain, other)}
    assert (row["max"], row["within_one"]) == (3, pytest.approx(11 / 12, abs=1e-5))
    assert same.broken({"rows": [row, {**row, "name": "y", "same_bytes": False}, {"name": "z", "skipped": ""}]}) == [
        "x"
    ]


def test_figures_are_printed_for_people(script, tiny_bundle, capsys) -> None:
    assert script.main(["--quick", "--repeat", "2", "--model", str(tiny_bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("upscale to 96x96" in line and "2 texture steps" in line for line in lines)
    assert "overhead, the rest / networks: " in lines[-1] and "target" in lines[-1]


def test_a_missing_model_is_two_lines(script, tmp_path, capsys) -> None:
    assert script.main(["--quick", "--model", str(tmp_path / "nothing")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("place", ["dit", "read"])
def test_time_goes_where_it_was_spent(script, tiny_bundle, monkeypatch, capsys, place) -> None:
    """A slow network is not overhead, and a slow engine is not the network's time."""

    def slow(original):
        def wrapped(*args, **kwargs):
            time.sleep(0.3)
            return original(*args, **kwargs)

        return wrapped

    if place == "dit":
        from dreamsr_cli.models.conditioned_dit import ConditionedDiT

        monkeypatch.setattr(ConditionedDiT, "forward", slow(ConditionedDiT.forward))
    else:
        from dreamsr_cli.canvas import EnlargedPhoto

        monkeypatch.setattr(EnlargedPhoto, "read_rows", slow(EnlargedPhoto.read_rows))
    assert script.main(["--quick", "--model", str(tiny_bundle), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["overhead"]["runs"]
    assert (run["networks"]["dit"] >= 0.9) == (place == "dit")
    assert place == "dit" or run["rest"] >= 0.6


@pytest.mark.slow
def test_processes_are_compared_with_threads(monkeypatch, tiny_bundle, capsys) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("processes")
    assert script.main(["--quick", "--model", str(tiny_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (pair,) = found["pairs"]
    assert found["ratio"] == pytest.approx(pair["several"] / pair["one"])
    assert pair["several_whole"] > pair["several"] > 0 and found["tiles"] == 20
    assert found["levels"]["mean"] <= 0.1


def test_the_plain_loop_is_the_same_method(script, tiny_bundle, tmp_path) -> None:
    """With control switched off on both sides, our sampler and the loop over diffusers give the same canvas."""
    loop = importlib.import_module("diffusers_loop")
    bundle = open_bundle(str(tiny_bundle))
    restorer = bundle.open_restorer(CPU, torch.float32, mask_pads=True)
    restorer.dit.context_attention = None
    assert isinstance(restorer.controlnet, MMControlNet)
    for weight in restorer.controlnet.image_projections.parameters():
        torch.nn.init.zeros_(weight)
    peer = loop.Peer.of(bundle, CPU, torch.float32)

    grid = make_grid(96, 112, 64, 16)
    encoder = bundle.open_text_encoder(CPU, torch.float32)
    words = ["the whole photo", *(f"tile {tile.index}" for tile in grid.tiles)]
    (glob, *local), _ = encoder.encode(words, 64)
    texts = Texts(glob, local)
    z_dr = np.random.default_rng(0).standard_normal((bundle.config.latent.channels, 12, 14), dtype=np.float32)
    config = bundle.config
    with Journal(tmp_path / "race.dreamsr", {}, 0) as journal:
        piece = journal.piece("z_dr", REMOVE, z_dr.shape)
        piece.append(z_dr)
        sampler = Sampler(restorer, grid, texts, config.sampling, config.control, 3, journal, SilentProgress())
        ours = sampler.texture(piece.finish(), 0.8, 3, loop.SEED, None).rows(0, z_dr.shape[1])
    theirs = loop.plain_texture(peer, grid, texts, 3, z_dr, 0.8, 3, None)
    assert np.abs(ours - theirs).max() < 1e-4
    for block in peer.controlnet.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.5)
    controlled = loop.plain_texture(peer, grid, texts, 3, z_dr, 0.8, 3, None)
    assert np.abs(ours - controlled).max() > 1e-2


@pytest.mark.slow
def test_a_folder_against_its_photos_one_by_one(script, tiny_bundle, monkeypatch, capsys) -> None:
    """Three ways in processes of their own; they give the same bytes, else there is no figure."""
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    assert importlib.import_module("folder").main(["--quick", "--model", str(tiny_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rounds"]
    assert found["photos"] == 2 and set(row) == {"folder", "in turn", "commands"}
    assert found["ratios"]["commands"] == pytest.approx(row["folder"] / row["commands"])
