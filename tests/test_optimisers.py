"""What turns gradients into better weights: float32 masters, their average, the learning rates, and their state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import RECIPE, networks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from dreamsr_cli.errors import UsageError
from dreamsr_cli.models.cleaner import FAITHFUL, Cleaner
from dreamsr_cli.training.optimisers import HIDDEN, Learner, Masters, learning_rate


def test_masters_keep_what_bfloat16_would_lose() -> None:
    live = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = Masters({"x": live}, decay=0.5)
    optimizer = torch.optim.SGD(masters.master, lr=1.0)
    for step in range(100):
        live.grad = torch.full_like(live, 1e-4)
        assert masters.take_gradients(1e9) == pytest.approx(3**0.5 * 1e-4, rel=0.01)
        optimizer.step()
        masters.publish(step)
    assert torch.allclose(masters.master[0], torch.full((3,), 0.99), atol=1e-4)
    assert live.dtype == torch.bfloat16 and torch.allclose(live.float(), torch.full((3,), 0.99), atol=3e-3)
    assert live.grad is None
    masters.average[0].fill_(2.0)
    masters.show_average()
    assert bool((live == 2).all())
    masters.restore()
    assert not bool((live == 2).any())


def test_gradients_are_clipped_by_their_common_norm() -> None:
    live = {name: torch.nn.Parameter(torch.zeros(4)) for name in ("a", "b", "unused")}
    masters = Masters(live, decay=0.9)
    live["a"].grad, live["b"].grad = torch.full((4,), 3.0), torch.full((4,), 4.0)
    assert masters.take_gradients(1.0) == pytest.approx(10.0)
    a, b, unused = (m.grad for m in masters.master)
    assert unused is None and a is not None and b is not None
    assert float((a.square().sum() + b.square().sum()).sqrt()) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(a / b, torch.full((4,), 0.75))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_kernels_learn_the_same_in_either_memory_format(kind) -> None:
    """Masters are contiguous, channels-last networks' gradients aren't: a fused AdamW takes what lies in one place."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        made: Any = Cleaner((4, 6, 6), (1, 1, 1))
        made = made.to(memory_format=layout)
        learner = Learner(
            {f"cleaner.{name}": p for name, p in made.named_parameters()}, replace(RECIPE.optim, kind=kind)
        )
        photo, wanted = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 64, 64)
        losses = []
        for step in range(12):
            loss = (made(photo.contiguous(memory_format=layout), FAITHFUL) - wanted).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
            learner.masters.take_gradients(1.0)
            learner.update(3e-3, step)
        assert losses[-1] < losses[0]
        found.append((losses, made.faithful.exit.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert torch.allclose(found[0][1], found[1][1], atol=2e-4)


def test_learning_rate_warms_up_and_decays_to_its_share() -> None:
    recipe = replace(RECIPE, steps=100, optim=replace(RECIPE.optim, lr=1.0, warmup=10, final=0.05))
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.525) and rates[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_learners_state_survives_a_file(tmp_path, kind) -> None:
    named = networks().named(("refiner",))

    def learner() -> Learner:
        optim = replace(RECIPE.optim, kind=kind)
        return Learner({n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}, optim)

    def learn(learner: Learner, step: int) -> None:
        for index, master in enumerate(learner.masters.master[:-1]):
            master.grad = torch.randn(master.shape, generator=torch.Generator().manual_seed(10 * step + index))
        learner.update(0.1, step)

    one, two = learner(), learner()
    learn(one, 0)
    for name, group in one.tensors().items():
        save_file(group, tmp_path / f"{name}.safetensors")
    two.restore({p.stem: load_file(p) for p in tmp_path.iterdir()})
    assert two.state(two.masters.master[-1]) == {}
    kinds = {frozenset(two.state(master)) for master in two.masters.master[:-1]}
    adamw = frozenset({"step", "exp_avg", "exp_avg_sq"})
    assert kinds == ({adamw} if kind == "adamw" else {adamw, frozenset({"momentum_buffer"})})
    for a, b in zip(one.masters.master[:-1], two.masters.master[:-1], strict=True):
        assert torch.equal(a, b) and all(torch.equal(one.state(a)[k], two.state(b)[k]) for k in one.state(a))
    for both in (one, two):
        learn(both, 1)
    assert all(torch.equal(a, b) for a, b in zip(one.masters.master, two.masters.master, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.masters.average, two.masters.average, strict=True))


def test_muon_takes_what_lies_between_hidden_layers() -> None:
    named = networks().named(("transformer", "controlnet", "context_attention", "text_encoder", "refiner", "lora"))
    hidden = {n for n, p in named.items() if p.ndim > 1 and HIDDEN.fullmatch(n)}
    for name in (
        "transformer.transformer_blocks.0.attn.to_q.base_layer.weight",
        "transformer.single_transformer_blocks.1.proj_out.base_layer.weight",
        "controlnet.transformer_blocks.0.ff.net.2.weight",
        "refiner.blocks.0.1.weight",
    ):
        assert name in hidden
    for word in ("lora_", ".norm", "embed", "text_encoder", "context_attention", "entry", "exit", "projections"):
        assert any(word in n for n in named) and not any(word in n for n in hidden), word


def test_only_matrices_decay() -> None:
    named = networks().named(("refiner",))
    optim = replace(RECIPE.optim, lr=1e-2, weight_decay=0.5, ema=0.0)
    learner = Learner(named, optim)
    before = {n: m.detach().clone() for n, m in zip(learner.masters.names, learner.masters.master, strict=True)}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    learner.masters.take_gradients(1.0)
    learner.update(1e-2, 1)
    after = dict(zip(learner.masters.names, learner.masters.master, strict=True))
    stayed = {n for n in before if torch.equal(before[n], after[n])}
    plain = {n for n in before if n.endswith((".bias", "gain_LC", "shift_LC"))}
    assert stayed == plain and {"refiner.restored.gain_LC", "refiner.entry.bias"} <= plain


def test_muon_refuses_sharded_weights() -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        whole = torch.nn.Parameter(torch.zeros(8, 4))
        sharded = torch.nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,))))
        with pytest.raises(UsageError, match="sharded"):
            Learner({"controlnet.transformer_blocks.0.ff.weight": sharded}, replace(RECIPE.optim, kind="muon"))
    finally:
        torch.distributed.destroy_process_group()


def test_muons_step_is_as_long_as_adamws_in_every_direction() -> None:
    names = ("controlnet.transformer_blocks.0.ff.weight", "refiner.blocks.0.0.weight", "controlnet.x_embedder.weight")
    live = {n: torch.nn.Parameter(torch.zeros(8, 4, 3, 3) if "refiner" in n else torch.zeros(8, 36)) for n in names}
    learner = Learner(live, replace(RECIPE.optim, kind="muon", ema=0.0, weight_decay=0.0))
    for master in learner.masters.master:
        master.grad = torch.randn(master.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    learner.update(0.1, 0)
    for name, parameter in live.items():
        step = parameter.detach().flatten(1)
        spread = torch.linalg.svdvals(step)
        if "embedder" in name:
            assert torch.allclose(step.abs(), torch.tensor(0.1), rtol=1e-2)
        else:
            assert float(spread.max() / spread.min()) < 3
            assert 0.01 < float(step.square().mean().sqrt()) < 0.1


def test_the_text_path_learns_at_its_own_rate() -> None:
    names = ("text_encoder.w", "context_attention.b", "controlnet.w", "controlnet.b")
    live = {n: torch.nn.Parameter(torch.ones((2, 2) if n.endswith("w") else (2,))) for n in names}
    learner = Learner(live, replace(RECIPE.optim, ema=0.0, weight_decay=0.0, text=3.0))
    for master in learner.masters.master:
        master.grad = torch.ones_like(master)
    learner.update(0.1, 0)
    # AdamW's first step has the length of the learning rate.
    moved = {n: round(float(1 - live[n].flatten()[0]), 4) for n in names}
    assert moved == {"text_encoder.w": 0.3, "context_attention.b": 0.3, "controlnet.w": 0.1, "controlnet.b": 0.1}


def test_without_an_average_the_last_weights_ship() -> None:
    live = {"x": torch.nn.Parameter(torch.ones(3))}
    learner = Learner(live, replace(RECIPE.optim, ema=0.0))
    learner.masters.master[0].grad = torch.ones(3)
    learner.update(0.1, 0)
    assert "x" not in learner.tensors()["average"] and learner.masters.average == []
    assert torch.equal(learner.masters.shipped()[0], live["x"]) and not torch.equal(live["x"], torch.ones(3))
