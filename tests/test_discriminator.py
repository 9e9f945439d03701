"""The discriminator: one logit per spot, bounded slope, learns to tell, costs little, and never ships. What it learns
and how it goes on holds for the one on features too (test_feature_discriminator.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn_lpips import drawn_lpips
from tiny_models import CPU, RECIPE, pictures

from dreamsr_cli.losses import hinge_discriminator
from dreamsr_cli.models.discriminator import Discriminator, fresh
from dreamsr_cli.training.adversarial import Adversary, gan_weight
from dreamsr_cli.training.distributed import Team
from dreamsr_cli.training.stages import STAGES

SHARP, SOFT = (pictures(4, 64, 64, seed=1), torch.nn.functional.avg_pool2d(pictures(4, 64, 64, seed=1), 5, 1, 2))


both = pytest.mark.parametrize("sees", ["pixels", "features"])


def adversary(sees: str = "pixels") -> Adversary:
    rate = {"pixels": 1e-3, "features": 2e-3}[sees]
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, gan_sees=sees, gan_start=3, gan_lead=2, gan_lr=rate))
    return Adversary(recipe, 0.5, Team(CPU, torch.float32), drawn_lpips() if sees == "features" else None)


def test_a_logit_for_every_spot() -> None:
    network = fresh(1).eval()
    assert network(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 16, 24)
    assert sum(p.numel() for p in network.parameters()) < 300_000
    with pytest.raises(ValueError, match="multiples of 16"):
        network(torch.zeros(1, 3, 40, 64))


def test_a_spot_sees_its_surroundings_and_no_more() -> None:
    network = fresh(1).eval()
    x = torch.zeros(1, 3, 256, 256, requires_grad=True)
    network(x)[0, 0, 32, 32].backward()
    assert x.grad is not None
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()[:, 0]
    centre = 32 * 4 + 1.5
    assert rows.min() < centre - 30 < centre + 30 < rows.max()  # both sides
    assert rows.max() - rows.min() < 110


def test_spectral_norms_bound_the_slope() -> None:
    """However large the raw weights get, every normalised convolution's matrix keeps a largest singular value of 1."""
    network: Any = fresh(1).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("original"):
                parameter.mul_(50)
        for _ in range(60):
            network(SHARP)
    for name in ("entry", "down1", "down2", "up1", "up2"):
        module: Any = getattr(network, name)
        weight = module.weight.detach().flatten(1)
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=0.05)


def test_its_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = fresh(1), fresh(1), fresh(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.exit.weight, other.exit.weight)


@both
def test_it_learns_to_tell_soft_from_sharp(sees) -> None:
    made, (learnt, unseen_too) = adversary(sees), {"pixels": (1.2, 2), "features": (1.7, 1.9)}[sees]
    for step in range(1, 61):
        terms = made.learn(step, [SOFT], [SHARP])
    assert terms["discriminator"] < learnt and terms["real_logit"] > terms["fake_logit"]
    unseen = pictures(4, 64, 64, seed=9)
    softer = torch.nn.functional.avg_pool2d(unseen, 5, 1, 2)
    with torch.no_grad():
        assert hinge_discriminator(made.judge(unseen), made.judge(softer)) < unseen_too


@both
def test_the_schedule_and_what_judging_leaves_alone(sees) -> None:
    made = adversary(sees)
    assert [made.counts(step) for step in range(5)] == [False, False, False, True, True]
    before = {k: v.clone() for k, v in made.network.state_dict().items()}
    assert made.learn(0, [SOFT], [SHARP]) == {}  # it begins gan_lead steps before it counts
    fake = SOFT.clone().requires_grad_()
    made.judge(fake).sum().backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in made.network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in made.network.state_dict().items())
    made.learn(1, [SOFT], [SHARP])
    assert any(not torch.equal(v, before[k]) for k, v in made.network.state_dict().items())


@both
def test_two_passes_learn_as_one_of_both(sees) -> None:
    one, two = adversary(sees), adversary(sees)
    a = one.learn(5, [SOFT], [SHARP])
    b = two.learn(5, [SOFT[:2], SOFT[2:]], [SHARP[:2], SHARP[2:]])
    assert {k: v.item() for k, v in a.items()} == pytest.approx({k: v.item() for k, v in b.items()}, abs=1e-6)
    norms = [{k: v for k, v in made.network.state_dict().items() if k.endswith(("_u", "_v"))} for made in (one, two)]
    assert norms[0] and all(torch.equal(v, norms[1][k]) for k, v in norms[0].items())


@both
def test_it_goes_on_as_if_never_stopped(sees) -> None:
    whole, first = adversary(sees), adversary(sees)
    for step in range(1, 5):
        whole.learn(step, [SOFT], [SHARP])
    for step in range(1, 3):
        first.learn(step, [SOFT], [SHARP])
    saved = {name: {k: v.clone() for k, v in group.items()} for name, group in first.tensors().items()}
    second = adversary(sees)
    second.restore(saved)
    for step in range(3, 5):
        second.learn(step, [SOFT], [SHARP])
    for name, group in whole.tensors().items():
        assert group.keys() == second.tensors()[name].keys()
        assert all(torch.equal(v, second.tensors()[name][k]) for k, v in group.items())


def test_lambda_2_is_the_papers_in_the_papers_stages() -> None:
    weights = {name: gan_weight(RECIPE, stage) for name, stage in STAGES.items()}
    assert {name: weight for name, weight in weights.items() if weight} == {"restoration": 0.5, "joint": 0.5}
    own = replace(RECIPE, loss=replace(RECIPE.loss, gan=0.1))
    assert gan_weight(own, STAGES["backbone"]) == 0.1 and gan_weight(own, STAGES["controlnet"]) == 0
    assert isinstance(Discriminator(), torch.nn.Module)
