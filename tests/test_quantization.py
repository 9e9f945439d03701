"""Weights in fewer bits and weights that wait: what is quantized, what stays, and what moves when."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import latent

from dreamsr_cli.backoff import WorkPlan, next_plan, place_weights
from dreamsr_cli.errors import DeviceError, UsageError
from dreamsr_cli.models import quantization
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.quantization import MemoryMode, cannot_run, check_mode
from dreamsr_cli.models.restorer import Restorer, Turns, blocks_of
from dreamsr_cli.progress import SilentProgress

CPU, META = torch.device("cpu"), torch.device("meta")
torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(params=["tiny_bundle", "tiny_flux_bundle"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def restorer(folder: Path, mode: MemoryMode, dtype: torch.dtype = torch.float32) -> Restorer:
    return open_bundle(str(folder)).open_restorer(CPU, dtype, False, mode)


@torch.no_grad()
def velocity(made: Restorer, lora: bool = True) -> torch.Tensor:
    """Of two random tiles, through both networks."""
    dit = made.dit.transformer
    guidance = 3.5 if dit.config["guidance_embeds"] else None
    width, pooled = dit.config["joint_attention_dim"], dit.config["pooled_projection_dim"]
    generator = torch.Generator().manual_seed(3)
    words = tiny_models.TextEmbedding(
        torch.randn(2, 5, width, generator=generator), torch.randn(2, pooled, generator=generator), None
    ).to(CPU, next(made.dit.parameters()).dtype)
    features = made.controlnet(latent(2), torch.zeros(2), words, False, guidance)
    injections = made.dit.prepare(features)
    assert made.lora is not None
    if not lora:
        return made.dit(latent(2), torch.ones(2), words, injections, guidance)
    with made.lora.on():
        return made.dit(latent(2), torch.ones(2), words, injections, guidance)


@torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quantize", "allowed"), [("int8", 0.03), ("fp8", 0.1)])
def test_linear_layers_of_the_blocks_are_quantized_and_no_others(folder, quantize, allowed, dtype) -> None:
    whole, small = restorer(folder, MemoryMode(), dtype), restorer(folder, MemoryMode(quantize), dtype)
    kinds = {
        name: type(module.weight).__name__ for name, module in small.dit.named_modules() if hasattr(module, "weight")
    }
    quantized = {name for name, kind in kinds.items() if kind in ("Int8Tensor", "Float8Tensor")}
    assert any("transformer_blocks.0.attn.to_q" in name for name in quantized)
    for name in quantized:
        assert "lora_" not in name and "context_attention" not in name
        assert not any(part in name for part in quantization.NOT_QUANTIZED)
    assert not any(type(p).__name__ in ("Int8Tensor", "Float8Tensor") for p in small.controlnet.parameters())
    for lora in (True, False):
        expected, found = velocity(whole, lora), velocity(small, lora)
        error = float((found - expected).norm() / expected.norm())
        assert 0 < error < allowed, (lora, error)
    # The LoRA has as much to say as before.
    effect, before = (velocity(m, True) - velocity(m, False) for m in (small, whole))
    assert float((effect - before).norm() / before.norm()) < 0.25


@pytest.mark.parametrize("offload", ["model", "block"])
def test_moving_weights_changes_nothing(folder, offload) -> None:
    expected = velocity(restorer(folder, MemoryMode()))
    moved = restorer(folder, MemoryMode(offload=offload))
    assert torch.equal(velocity(moved), expected) and torch.equal(velocity(moved), expected)
    moved.place("block")
    assert moved.offload == "block" and torch.equal(velocity(moved), expected)


def test_every_block_waits_and_nothing_else(folder) -> None:
    made = restorer(folder, MemoryMode(offload="block"))
    for module in (made.dit, made.controlnet):
        hooked = {id(inner) for inner in module.modules() if hasattr(inner, "_diffusers_hook")}
        blocks = blocks_of(module)
        assert hooked == {id(block) for block in blocks} and len(blocks) >= 1
        inside = sum(p.numel() for block in blocks for p in block.parameters())
        assert inside > 0.5 * sum(p.numel() for p in module.parameters())


def test_networks_take_turns() -> None:
    a, b = (torch.nn.Linear(2, 2, bias=False) for _ in range(2))
    turns = Turns({a: a, b: b}, CPU)
    for module in (a, a, b, a):
        module(torch.zeros(1, 2))
        assert turns.present is module
    turns.end()
    b(torch.zeros(1, 2))
    assert turns.present is a
    # On a device of its own: the one that is called is there, the other is not.
    turns = Turns({a: a, b: b}, META)
    a(torch.zeros(1, 2, device="meta"))
    assert a.weight.device == META and b.weight.device == CPU


@torchao
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantized_weights_can_be_moved_as_the_sampler_runs(tiny_bundle, quantize) -> None:
    made = restorer(tiny_bundle, MemoryMode(quantize))
    with torch.inference_mode(), pytest.raises(RuntimeError):
        made.dit.transformer.to(META)  # why `Sampler` doesn't use this mode
    made = restorer(tiny_bundle, MemoryMode(quantize))
    with torch.no_grad():
        made.dit.transformer.to(META)
    assert all(p.device == META for p in made.dit.transformer.parameters())


def test_modes_that_cannot_run_say_why(monkeypatch) -> None:
    assert "CUDA or XPU" in cannot_run(MemoryMode("nf4"), "cpu")
    assert "block by block" in cannot_run(MemoryMode("nf4", "block"), "cuda")
    assert not cannot_run(MemoryMode("nf4", "model"), "cuda") and not cannot_run(MemoryMode("int8", "block"), "cpu")
    assert "mps" in cannot_run(MemoryMode("int8"), "mps")
    for mode, words in (
        (MemoryMode("nf4"), "--quantize int8"),
        (MemoryMode("int7"), "none, fp8"),
        (MemoryMode(offload="all"), "block"),
    ):
        with pytest.raises(UsageError) as error:
            check_mode(mode, CPU)
        assert words in error.value.hint
    with pytest.raises(UsageError) as error:
        check_mode(MemoryMode("nf4", "block"), torch.device("cuda"))
    assert "--offload model" in error.value.hint
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(DeviceError) as failure:
        check_mode(MemoryMode("int8"), CPU)
    assert "dreamsr[quantize]" in failure.value.hint


class Small(Restorer):
    """A device on which nothing but blocks fits."""

    def place(self, offload: str = "none") -> None:
        if offload != "block":
            raise torch.OutOfMemoryError("no room")
        super().place(offload)


def test_weights_that_do_not_fit_go_block_by_block(tiny_bundle) -> None:
    made = restorer(tiny_bundle, MemoryMode())
    small = Small(made.dit, made.controlnet, made.lora, CPU)
    plan = place_weights(small, WorkPlan(4, 100), True, SilentProgress())
    assert plan == WorkPlan(4, 100, "block") and small.offload == "block"
    with pytest.raises(torch.OutOfMemoryError):
        place_weights(Small(made.dit, made.controlnet, made.lora, CPU), WorkPlan(4, 100), False, SilentProgress())


def test_the_last_way_out_of_memory_is_block_by_block() -> None:
    card = torch.device("cuda")
    found = next_plan(WorkPlan(1, 0, "model"), card)
    assert found is not None and found[0].offload == "block"
    assert next_plan(WorkPlan(1, 0, "block"), card) is None and next_plan(WorkPlan(1, 0), card, movable=False) is None
    assert next_plan(WorkPlan(1, 0), CPU) is None
