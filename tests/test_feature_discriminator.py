"""The discriminator on LPIPS' features: only heads learn, by sizes that count alike, and never from a fixed grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import CPU, RECIPE, pictures

from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.losses import hinge_discriminator
from dreamsr_cli.models.feature_discriminator import SHIFT, fresh_heads
from dreamsr_cli.models.perceptual import BACKBONES, SMALLEST_SIDE, Lpips
from dreamsr_cli.training.adversarial import Adversary
from dreamsr_cli.training.distributed import Team
from dreamsr_cli.training.recipe import SMALLEST_FOR_FEATURES, load_recipe

SHARP = pictures(4, 80, 80, seed=1)
SOFT = torch.nn.functional.avg_pool2d(SHARP, 5, 1, 2)


@pytest.fixture(scope="module")
def squeeze() -> Lpips:
    """LPIPS with drawn weights; what is told apart here any features show."""
    torch.set_num_threads(1)
    torch.manual_seed(4)
    backbone = BACKBONES["lpips-squeeze"]
    widths = (64, 128, 256, 384, 384, 512, 512)
    return Lpips(backbone, backbone.build(), [torch.rand(1, c, 1, 1) for c in widths])


def adversary(squeeze: Lpips) -> Adversary:
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, gan_sees="features", gan_start=3, gan_lead=2, gan_lr=2e-3))
    return Adversary(recipe, 0.5, Team(CPU, torch.float32), squeeze)


def test_a_logit_for_every_spot_and_size(squeeze) -> None:
    made = fresh_heads(1, squeeze).eval()
    logits = made(torch.zeros(2, 3, 96, 64))
    finest = squeeze.features(torch.zeros(2, 3, 96, 64))[0].shape[2:]
    assert logits.shape == (2, 4, *finest)
    # A coarse logit is repeated over the spots that it is about.
    varied = made(pictures(1, 96, 64, seed=2))[0]
    assert len(varied[0].unique()) > 10 * len(varied[3].unique()) > 10


@pytest.mark.parametrize(
    ("kind", "widths"), [("lpips-alex", (64, 192, 384, 256, 256)), ("lpips-vgg", (64, 128, 256, 512, 512))]
)
def test_it_finds_the_sizes_of_every_network(kind, widths) -> None:
    backbone = BACKBONES[kind]
    lpips = Lpips(backbone, backbone.build(), [torch.rand(1, c, 1, 1) for c in widths])
    made = fresh_heads(1, lpips)
    sides = [squeezed.shape[2] for squeezed in lpips.features(torch.zeros(1, 3, 128, 128))]
    assert made(torch.zeros(1, 3, 128, 128)).shape[1] == min(4, len(set(sides)))


def test_only_its_heads_are_its_own(squeeze) -> None:
    one, two, other = fresh_heads(1, squeeze), fresh_heads(1, squeeze), fresh_heads(2, squeeze)
    assert all(name.startswith("heads.") for name in one.state_dict())
    assert sum(p.numel() for p in one.parameters()) < 150_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_it_learns_to_tell_soft_from_sharp(squeeze) -> None:
    made = adversary(squeeze)
    before = {name: value.clone() for name, value in squeeze.state_dict().items()}
    for step in range(1, 61):
        terms = made.learn(step, [SOFT], [SHARP])
    assert terms["discriminator"] < 1.7 and terms["real_logit"] > terms["fake_logit"]
    unseen = pictures(4, 80, 80, seed=9)
    softer = torch.nn.functional.avg_pool2d(unseen, 5, 1, 2)
    with torch.no_grad():
        assert hinge_discriminator(made.judge(unseen), made.judge(softer)) < 1.9
    assert all(torch.equal(value, squeeze.state_dict()[name]) for name, value in before.items())
    fake = softer.requires_grad_()
    made.judge(fake).sum().backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in squeeze.parameters())


def test_every_step_judges_a_window_of_its_own(squeeze) -> None:
    made = adversary(squeeze)
    seen = [made._window(SHARP, step) for step in range(6)]
    assert all(x.shape[2:] == (80 - SHIFT, 80 - SHIFT) for x in seen)
    assert len({float(x.sum()) for x in seen}) > 3
    assert torch.equal(made._window(SHARP, 4), seen[4])


def test_it_goes_on_as_if_never_stopped(squeeze) -> None:
    whole, first = adversary(squeeze), adversary(squeeze)
    for step in range(1, 5):
        whole.learn(step, [SOFT], [SHARP])
    for step in range(1, 3):
        first.learn(step, [SOFT], [SHARP])
    saved = {name: {k: v.clone() for k, v in group.items()} for name, group in first.tensors().items()}
    second = adversary(squeeze)
    second.restore(saved)
    for step in range(3, 5):
        second.learn(step, [SOFT], [SHARP])
    for name, group in whole.tensors().items():
        assert all(torch.equal(v, second.tensors()[name][k]) for k, v in group.items())


def test_without_a_perceptual_distance_it_says_what_to_type() -> None:
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, gan_sees="features"))
    with pytest.raises(UsageError, match="there is none") as caught:
        Adversary(recipe, 0.5, Team(CPU, torch.float32), None)
    assert "gan_sees=pixels" in str(caught.value.__dict__) + str(caught.value)


def test_crops_that_leave_no_window_are_refused() -> None:
    assert SMALLEST_FOR_FEATURES == SMALLEST_SIDE + SHIFT
    small = ["loss.gan_sees=features", "data.crops=[{size=32,batch=4,share=1.0}]"]
    with pytest.raises(ConfigError, match="crops of 32 px are too small.*gan_sees"):
        load_recipe("mini", small)
