"""flux_full.py at reduced size runs the code that a GPU would; scaling.py measures what it says."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dreamsr_cli.counting import transformer_parameters

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """A script of benchmarks/ as Python finds it when it is run by its path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


@pytest.fixture
def flux(load) -> ModuleType:
    return load("flux_full")


def test_the_reduced_run_has_every_case(flux, capsys):
    assert flux.main(["--reduced", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reduced"] is True
    cases = [(row["what"], row["precision"] == "fp8", row["tile"], row["text"]) for row in found["rows"]]
    plain = [("diffusers", False, 64, 8), ("diffusers", False, 64, 16)]
    assert cases == [*plain, *(("ours", eight, tile, 8) for eight in (False, True) for tile in (64, 96))]
    for row in found["rows"]:
        assert row["seconds"] > 0 and row["peak_memory"] > 0
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["fraction"] is None, "the speed wasn't measured here"


def test_people_are_told_that_it_is_reduced(flux, capsys):
    words = ["--precision", "bf16", "--tiles", "64", "--plain-text", "8", "--tiling", "shifted", "--sizes", "96x64"]
    assert flux.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and "1+2 steps" in lines[0] and lines[0].startswith("diffusers")
    assert lines[2].startswith("reduced size")
    # The last row's precision is the CPU's own choice.
    assert re.search(r"ours \((fp32|bf16), tile 64\) / diffusers", lines[4])


@pytest.mark.parametrize("tiling", ["overlap", "shifted"])
def test_counted_operations_are_those_of_a_run(flux, load, tiling):
    made = load("random_flux")
    size, steps = made.REDUCED, 2
    words = ["--tile-batch", "1", "--steps", str(steps), "--tiling", tiling, "--overlap", "32", "--text", "8"]
    options = flux.arguments(words)
    transformer = made.make_transformer(size, CPU, torch.float32)
    peer_control = made.make_peer_control(size, CPU, torch.float32)
    peer = load("diffusers_loop").Peer(transformer, peer_control, size.control_map)
    grid, counts = flux._grid(112, 144, 96, 32), flux.Counts(size)
    assert transformer_parameters(counts.transformer) == sum(p.numel() for p in transformer.parameters())

    def counted(case) -> int:
        work, count = case
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work(count)
        return counter.get_total_flops()

    plain = counted(flux._plain(peer, grid, size, 8, options, CPU, torch.float32))
    assert counts.plain(grid, 8, steps) == pytest.approx(plain, rel=0.03)
    restorer = made.make_restorer(transformer, size, CPU, torch.float32)
    assert sum(p.numel() for p in restorer.controlnet.parameters()) == transformer_parameters(counts.controlnet)
    ours = counted(flux._ours(restorer, grid, size, options, CPU, torch.float32))
    assert counts.ours(grid, tiling, 8, steps) == pytest.approx(ours, rel=0.03)


def test_full_size_is_flux_dev(load):
    made = load("random_flux")
    with torch.device("meta"):
        transformer = made.FluxTransformer2DModel(**made.FULL.transformer)
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320
    assert made.FULL.features == 9


def test_large_linears_multiply_in_eight_bits(load):
    made = load("random_flux")
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96)
    x = torch.randn(2, 5, 128) * torch.logspace(-3, 3, 5)[:, None]
    eight, exact = made.Float8Linear(linear)(x) - linear.bias, linear(x) - linear.bias
    error = (eight - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert eight.shape == exact.shape and 1e-4 < error.max() < 0.06, "every token has a scale of its own"

    size = made.REDUCED
    restorer = made.make_restorer(made.make_transformer(size, CPU, torch.float32), size, CPU, torch.float32)
    z, text = torch.randn(1, 16, 8, 8), made_text(size)
    assert restorer.lora is not None
    with torch.no_grad(), restorer.lora.on():
        before = restorer.dit(z, torch.ones(1), text, None, 3.5)
        # 8 of attention and 4 of feed-forward in a double block, 5 linears in a single one.
        assert made.to_float8(restorer.dit.transformer) == 4 * 12 + 4 * 5
        after = restorer.dit(z, torch.ones(1), text, None, 3.5)
    assert 0 < (after - before).norm() / before.norm() < 0.2
    assert made.to_float8(restorer.controlnet) == 2 * 12


def made_text(size):
    from dreamsr_cli.models.text_encoder import TextEmbedding

    return TextEmbedding(torch.randn(1, 6, size.text_width), torch.randn(1, size.pooled_width), None)


@pytest.mark.parametrize("words", [["--sizes", "wide"], ["--sizes", "0x4"], ["--precision", "int3"]])
def test_wrong_words_are_usage_errors(flux, words, capsys):
    with pytest.raises(SystemExit) as caught:
        flux.main(words)
    assert caught.value.code == 2 and capsys.readouterr().err


def test_a_device_that_is_not_there_is_two_lines(flux, capsys):
    assert flux.main(["--device", "cuda:7"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_scaling_counts_seconds_per_tile(load, tiny_bundle, capsys):
    scaling = load("scaling")
    assert scaling.main(["--quick", "--model", str(tiny_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["side"] for row in found["rows"]] == [128, 192] and found["ratio"] is None
    for row in found["rows"]:
        assert row["seconds_per_tile"] == pytest.approx(row["seconds"] / row["tiles"]) and row["flops"] > 0
    assert found["rows"][1]["tiles"] > found["rows"][0]["tiles"]
    assert scaling.main(["--quick", "--model", str(tiny_bundle), "--tiling", "shifted"]) == 0
    told = capsys.readouterr().out
    assert "s per tile" in told and "tiling shifted" in told
