"""The discriminator on LPIPS' features: only heads learn, by sizes that count alike, and never from a fixed grid."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from drawn_lpips import drawn_lpips
from tiny_models import CPU, RECIPE, pictures
from training_data import save_photos

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.models.feature_discriminator import SHIFT, fresh_heads
from dreamsr_cli.models.perceptual import SMALLEST_SIDE, Lpips
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.adversarial import Adversary
from dreamsr_cli.training.distributed import Team
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import SMALLEST_FOR_FEATURES, CropPlan, load_recipe
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.trainer import TrainJob, train

SHARP = pictures(4, 80, 80, seed=1)
SOFT = torch.nn.functional.avg_pool2d(SHARP, 5, 1, 2)


@pytest.fixture(scope="module")
def squeeze() -> Lpips:
    torch.set_num_threads(1)
    return drawn_lpips()


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


@pytest.mark.parametrize("kind", ["lpips-alex", "lpips-vgg"])
def test_it_finds_the_sizes_of_every_network(kind) -> None:
    lpips = drawn_lpips(kind)
    made = fresh_heads(1, lpips)
    sides = {features.shape[2] for features in lpips.features(torch.zeros(1, 3, 128, 128))}
    assert made(torch.zeros(1, 3, 128, 128)).shape[1] == min(4, len(sides))


def test_only_its_heads_are_its_own(squeeze) -> None:
    one, two, other = fresh_heads(1, squeeze), fresh_heads(1, squeeze), fresh_heads(2, squeeze)
    assert all(name.startswith("heads.") for name in one.state_dict())
    assert sum(p.numel() for p in one.parameters()) < 150_000
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_network_that_it_looks_through_stays_as_it_is(squeeze) -> None:
    made = adversary(squeeze)
    before = {name: value.clone() for name, value in squeeze.state_dict().items()}
    fake = SOFT.clone().requires_grad_()
    for step in range(1, 4):
        made.learn(step, [SOFT], [SHARP])
        made.judge(fake, step).sum().backward()
    assert fake.grad is not None and fake.grad.abs().sum() > 0
    assert all(torch.equal(value, squeeze.state_dict()[name]) for name, value in before.items())
    assert all(p.grad is None for p in squeeze.parameters())


def test_every_step_judges_a_window_of_its_own(squeeze) -> None:
    made = adversary(squeeze)
    seen = [made._window(SHARP, step) for step in range(6)]
    assert all(x.shape[2:] == (80 - SHIFT, 80 - SHIFT) for x in seen)
    assert len({float(x.sum()) for x in seen}) > 3
    assert torch.equal(made._window(SHARP, 4), seen[4])


def test_what_leaves_it_nothing_to_see_is_refused() -> None:
    assert SMALLEST_FOR_FEATURES == SMALLEST_SIDE + SHIFT
    small = ["loss.gan_sees=features", "data.crops=[{size=32,batch=4,share=1.0}]"]
    with pytest.raises(ConfigError, match="crops of 48 px or more"):
        load_recipe("mini", small)
    with pytest.raises(ConfigError, match="needs loss.perceptual"):
        load_recipe("mini", ["loss.gan_sees=features", "loss.perceptual=none"])
    with pytest.raises(ValueError, match="without LPIPS"):
        Adversary(replace(RECIPE, loss=replace(RECIPE.loss, gan_sees="features")), 0.5, Team(CPU, torch.float32), None)
    with pytest.raises(ValueError, match="at least 32"):
        fresh_heads(1, drawn_lpips())(torch.zeros(1, 3, 16, 64))


def test_in_stage_backbone_it_judges_stage_2(tiny_bundle, tmp_path, monkeypatch) -> None:
    """LPIPS with drawn weights (a user's are a download); resumed, and what it was is on the card."""
    lpips = drawn_lpips()
    monkeypatch.setattr("dreamsr_cli.training.trainer.load_perceptual", lambda *_: lpips)
    loss = replace(RECIPE.loss, perceptual="lpips-squeeze", gan=0.5, gan_sees="features", gan_start=2, gan_lead=1)
    recipe = replace(
        RECIPE,
        steps=4,
        loss=loss,
        data=replace(RECIPE.data, crops=(CropPlan(48, 2, 1.0),)),
        renoised_share=1.0,
        renoised_t=(0.1, 0.2),
    )
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    photos, start = save_photos(tmp_path / "photos"), str(tiny_bundle)
    whole = TrainJob(STAGES["backbone"], recipe, "tiny.toml", photos, tmp_path / "run", None, start, device=CPU)
    train(replace(whole, max_steps=3), SilentProgress())
    result = train(replace(whole, resume=True), SilentProgress())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "texture_gan" in line] == [3, 4]
    assert [line["step"] for line in log if "discriminator" in line] == [2, 3, 4]
    card = (result.bundle / "README.md").read_text()
    assert "texture: velocity" in card and "heads on the features of lpips-squeeze" in card.split("texture: ")[1]
    planned = training_plan(recipe, STAGES["backbone"]).trained["discriminator"]
    assert planned == sum(p.numel() for p in fresh_heads(1, lpips).parameters())
