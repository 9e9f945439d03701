"""Inside a training run: gradients, draws, validation and checkpoints on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import RECIPE, pictures

from dreamsr_cli import flow
from dreamsr_cli.config import SamplingConfig
from dreamsr_cli.errors import OutputError, TrainingError
from dreamsr_cli.training import checkpoints
from dreamsr_cli.training.both_stages import draw_texture, encode_texts, remove, texture_velocity
from dreamsr_cli.training.networks import MODULES, Networks, build
from dreamsr_cli.training.recipe import CropPlan
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_crops import blank_some, plan_of_step
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import (
    draw_renoised,
    reconstruction_step,
    restoration_step,
    run_step,
)
from dreamsr_cli.training.watch import SETTLED, LossWatch

TEXTS = (["bark of an old oak", "red bricks"], ["a forest in autumn", "a house with red walls"])


def batch(side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Good and bad crops in [0, 1]."""
    hq = (pictures(2, side, side, seed=5) + 1) / 2
    return hq, torch.nn.functional.avg_pool2d(hq, 5, 1, 2)


def crops(step: int = 0) -> Crops:
    return Crops(step, *batch(), *TEXTS)


def unfreeze(made: Networks, trains: tuple[str, ...]) -> dict[str, torch.nn.Parameter]:
    named = made.named(trains)
    for parameter in named.values():
        parameter.requires_grad_(True)
    return named


def without_gradient(named: dict[str, torch.nn.Parameter]) -> list[str]:
    return [name for name, p in named.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]


def test_gradients_reach_every_trained_parameter(tiny_networks) -> None:
    named = unfreeze(tiny_networks, STAGES["backbone"].trains)
    # Only where t <= 0.2 is a texture part decoded.
    loss, terms, *_ = restoration_step(tiny_networks, replace(RECIPE, t_range=(0.0, 0.2)), None, None, crops())
    loss.backward()
    assert without_gradient(named) == []
    assert {"removal_latent", "removal_pixel", "texture_velocity"} <= terms.keys()
    assert not tiny_networks.lora.active
    frozen = [p for n, p in tiny_networks.autoencoder.named_parameters() if not n.startswith("refiner.")]
    assert len(frozen) == 3 and all(p.grad is None for p in frozen)


def test_the_removal_loss_alone_teaches_the_lora(tiny_networks) -> None:
    """Its part is the only one that runs with the LoRA on, and the texture part sees its result without gradient."""
    named = unfreeze(tiny_networks, ("lora",))
    hq, lq_up = batch()
    z_lq = tiny_networks.autoencoder.encode(lq_up * 2 - 1)
    local, glob = (encode_texts(tiny_networks, t) for t in TEXTS)
    remove(tiny_networks, z_lq, local, glob, SamplingConfig()).square().mean().backward()
    assert named and without_gradient(named) == []
    for p in named.values():
        p.grad = None
    made = tiny_networks
    local, glob = (encode_texts(made, t) for t in TEXTS)
    made.dit(
        z_lq, torch.ones(2), glob, made.dit.prepare(made.controlnet(z_lq, torch.zeros(2), local, True))
    ).sum().backward()
    assert len(without_gradient(named)) == len(named)


def test_the_texture_part_is_conditioned_on_the_removals_result_without_its_gradient(tiny_networks) -> None:
    made, conditions, texts = tiny_networks, [], []
    unfreeze(made, STAGES["backbone"].trains)
    made.controlnet.register_forward_pre_hook(lambda _, args: conditions.append(args[0]))
    made.dit.register_forward_pre_hook(lambda _, args: texts.append(args[2]))
    restoration_step(made, RECIPE, None, None, crops())
    local, glob = (encode_texts(made, t) for t in TEXTS)
    z_lq = made.autoencoder.encode(batch()[1] * 2 - 1)
    assert torch.equal(conditions[0], z_lq) and not conditions[1].requires_grad
    assert torch.equal(conditions[1], remove(made, z_lq, local, glob, SamplingConfig()))
    assert all(torch.equal(seen.tokens_BTD, glob.tokens_BTD) for seen in texts[:2])


@pytest.mark.parametrize("t_r", [0.0, 0.5, 1.0])
def test_removal_is_one_step_of_length_t_r_from_there(tiny_networks, t_r) -> None:
    made = tiny_networks
    z_lq = made.autoencoder.encode(batch()[1] * 2 - 1)
    local, glob = (encode_texts(made, t) for t in TEXTS)
    with torch.no_grad():
        ready = made.dit.prepare(made.controlnet(z_lq, torch.zeros(2), local, mask_pads=True))
        with made.lora.on():
            v = made.dit(z_lq, torch.full((2,), t_r), glob, ready)
        z_dr = remove(made, z_lq, local, glob, SamplingConfig(t_r=t_r))
    assert torch.equal(z_dr, z_lq - t_r * v) and v.abs().max() > 1e-2


def test_a_correction_of_nothing_gives_the_condition_back(tiny_networks) -> None:
    """The built-in model's parametrisation: with an output of zero, both stages return what they were conditioned
    on."""
    made = tiny_networks
    for parameter in made.transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    z_lq = made.autoencoder.encode(batch()[1] * 2 - 1)
    local, glob = (encode_texts(made, t) for t in TEXTS)
    t, eps = draw_texture(0, 0, z_lq.shape, (0.1, 0.9))
    t_B111 = t[:, None, None, None]
    with torch.no_grad():
        assert torch.equal(remove(made, z_lq, local, glob, SamplingConfig(prediction="correction")), z_lq)
        z_t = flow.mix(z_lq, eps, t_B111)
        v = texture_velocity(made, z_t, t, z_lq, local, glob, "correction")
    assert (flow.predict_clean(z_t, v, t_B111) - z_lq).abs().max() < 1e-5
    assert (v - flow.velocity_target(z_lq, eps)).abs().max() < 1e-4


def test_renoised_samples_begin_as_at_inference_and_aim_at_the_good_picture(tiny_networks) -> None:
    made = tiny_networks
    recipe = replace(RECIPE, renoised_share=1.0, renoised_t=(0.1, 0.2))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    made.dit.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    unfreeze(made, STAGES["backbone"].trains)
    outcome = restoration_step(made, recipe, None, None, crops(step=3))
    (z_lq, _), (z_t, t_B) = seen
    local, glob = (encode_texts(made, t) for t in TEXTS)
    with torch.no_grad():
        z_dr = remove(made, z_lq, local, glob, SamplingConfig())
    _, eps = draw_texture(recipe.seed, 3, z_lq.shape, recipe.t_range)
    assert bool(((t_B >= 0.1) & (t_B < 0.2)).all())
    assert torch.allclose(z_t, flow.mix(z_dr, eps, t_B[:, None, None, None]), atol=1e-6)
    assert outcome.terms["texture_velocity"] == 0 and outcome.terms["texture_latent"] > 0
    assert outcome.terms["texture_pixel"] > 0 and outcome.fake is not None and len(outcome.fake) == 2
    outcome.loss.backward()
    assert without_gradient(made.named(("transformer", "controlnet", "refiner"))) == []


def test_who_is_renoised_depends_on_seed_step_and_index_alone() -> None:
    recipe = replace(RECIPE, renoised_share=0.75, renoised_t=(0.05, 0.25))
    many = torch.cat([draw_renoised(recipe, step, 8) for step in range(80)])
    assert torch.equal(draw_renoised(recipe, 4, 8)[3:], draw_renoised(recipe, 4, 5, first=3))
    assert abs(float((many > 0).float().mean()) - 0.75) < 0.06
    assert float(many[many > 0].min()) >= 0.05 and float(many.max()) < 0.25
    assert not draw_renoised(RECIPE, 4, 8).any()


def test_the_critic_judges_the_pictures_that_inference_ends_in(tiny_networks) -> None:
    """After stage 2 where samples are renoised, after stage 1 otherwise."""

    def critic(rgb: torch.Tensor) -> torch.Tensor:
        return rgb.mean((1, 2, 3))

    for share, term in ((0.0, "removal_gan"), (1.0, "texture_gan")):
        recipe = replace(RECIPE, renoised_share=share, renoised_t=(0.1, 0.2))
        outcome = restoration_step(tiny_networks, recipe, None, critic, crops())
        assert {"removal_gan", "texture_gan"} & outcome.terms.keys() == {term}
        assert outcome.fake is not None
        assert float(outcome.terms[term]) == pytest.approx(-float(outcome.fake.mean()), abs=1e-6)


def test_texture_parts_come_every_so_many_steps(tiny_networks) -> None:
    recipe = replace(RECIPE, texture_every=3)
    unfreeze(tiny_networks, STAGES["backbone"].trains)
    for step in range(5):
        outcome = restoration_step(tiny_networks, recipe, None, None, crops(step=step))
        assert ("texture_velocity" in outcome.terms) == (step % 3 == 0)
        none = restoration_step(tiny_networks, replace(recipe, texture_every=0), None, None, crops(step=step))
        assert "texture_velocity" not in none.terms
        if step % 3:
            assert outcome.fake is not None
            assert float(outcome.loss.detach()) == pytest.approx(
                float(outcome.terms["removal_latent"] + outcome.terms["removal_pixel"]), rel=1e-5
            )
    outcome.loss.backward()
    # Nothing waits for the next texture part: every network also takes part in removal.
    # Stage 1's results have a last convolution of their own.
    named = tiny_networks.named(("transformer", "controlnet", "text_encoder", "refiner"))
    assert without_gradient(named) == ["refiner.exit.weight", "refiner.exit.bias"]


def test_the_removal_part_has_a_weight_of_its_own(tiny_networks) -> None:
    losses = [
        restoration_step(tiny_networks, replace(RECIPE, loss=replace(RECIPE.loss, removal_part=w)), None, None, crops())
        for w in (1.0, 5.0)
    ]
    removal = losses[0].terms["removal_latent"] + losses[0].terms["removal_pixel"]
    assert float((losses[1].loss - losses[0].loss).detach()) == pytest.approx(4 * float(removal), rel=1e-4)


def test_a_weave_costs_in_both_parts(tiny_networks) -> None:
    plain, dear = (
        restoration_step(tiny_networks, replace(RECIPE, loss=replace(RECIPE.loss, lattice=w)), None, None, crops())
        for w in (0.0, 2.0)
    )
    lattices = dear.terms["removal_lattice"] + dear.terms["texture_lattice"]
    assert "removal_lattice" not in plain.terms and "texture_lattice" not in plain.terms and float(lattices) > 0
    assert float((dear.loss - plain.loss).detach()) == pytest.approx(2 * float(lattices), rel=1e-3)


def test_lpips_looks_at_another_window_in_every_step(tiny_networks) -> None:
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, perceptual_shift=8))
    hq = batch()[0] * 2 - 1
    seen: list[tuple[int, int]] = []

    def distance(x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor) -> torch.Tensor:
        assert x_BCPQ.shape == target_BCPQ.shape == (2, 3, 24, 24)
        windows = [
            (y, x) for y in range(8) for x in range(8) if torch.equal(target_BCPQ, hq[..., y:, x:][..., :24, :24])
        ]
        seen.extend(windows)
        return (x_BCPQ - target_BCPQ).square().mean((1, 2, 3))

    for step in (0, 1, 2, 3, 0):
        run_step("removal", tiny_networks, recipe, distance, None, crops(step=step))
    assert len(seen) == 5 and seen[0] == seen[4] and len(set(seen)) > 2
    with torch.no_grad():
        plain, moved = (run_step("removal", tiny_networks, r, distance_of_all, None, crops()) for r in (RECIPE, recipe))
    assert torch.equal(plain.terms["removal_pixel"], moved.terms["removal_pixel"])


def distance_of_all(x_BCPQ: torch.Tensor, target_BCPQ: torch.Tensor) -> torch.Tensor:
    return (x_BCPQ - target_BCPQ).square().mean((1, 2, 3))


def test_stage_autoencoder_trains_the_refiner(tiny_networks) -> None:
    named = unfreeze(tiny_networks, STAGES["autoencoder"].trains)
    assert named and all(name.startswith("refiner.") for name in named)
    optimizer = torch.optim.Adam(named.values(), lr=3e-3)
    psnr = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, terms = reconstruction_step(tiny_networks, batch(64)[0])
        loss.backward()
        psnr.append(float(terms["psnr"]))
        assert without_gradient(named) == []
        optimizer.step()
    assert psnr[-1] > psnr[0]


def test_parts_share_no_parameter_and_leave_none_out(tiny_networks) -> None:
    everything = tiny_networks.named((*MODULES, "lora"))
    by_id = {id(p) for p in everything.values()}
    assert len(by_id) == len(everything)
    modules = [
        tiny_networks.dit,
        tiny_networks.controlnet,
        tiny_networks.text_encoder,
        tiny_networks.autoencoder.refiner,
    ]
    assert by_id == {id(p) for module in modules for p in module.parameters()}
    assert all("lora_" in name for name in tiny_networks.named(("lora",)))


def test_a_fresh_transformer_starts_plain_and_its_controls_awake() -> None:
    made = build(RECIPE, None)
    assert not made.transformer.proj_out.weight.any()
    assert next(made.controlnet.image_projections[0].parameters()).std() > 0
    again = build(RECIPE, None)
    assert all(torch.equal(p, again.named(MODULES)[name]) for name, p in made.named(MODULES).items())
    other = build(replace(RECIPE, seed=9), None)
    assert not torch.equal(other.transformer.x_embedder.weight, made.transformer.x_embedder.weight)


def test_texture_draws_of_a_sample_do_not_depend_on_the_batch() -> None:
    t, eps = draw_texture(1, 5, torch.Size((4, 2, 3, 3)), (0.2, 0.6))
    t_two, eps_two = draw_texture(1, 5, torch.Size((2, 2, 3, 3)), (0.2, 0.6))
    assert torch.equal(t[:2], t_two) and torch.equal(eps[:2], eps_two)
    assert bool(((t >= 0.2) & (t < 0.6)).all()) and len(t.unique()) == 4
    assert not torch.equal(eps, draw_texture(1, 6, torch.Size((4, 2, 3, 3)), (0.2, 0.6))[1])
    many = torch.cat([draw_texture(1, s, torch.Size((8, 1, 1, 1)), (0.0, 1.0))[0] for s in range(60)])
    assert abs(float(many.mean()) - 0.5) < 0.05


def test_crop_sizes_and_blank_texts_come_at_the_recipes_rate() -> None:
    recipe = replace(
        RECIPE, data=replace(RECIPE.data, crops=(CropPlan(32, 2, 0.7), CropPlan(48, 1, 0.3)), no_text=0.25)
    )
    plans = [plan_of_step(recipe, step) for step in range(1000)]
    assert set(plans) == {0, 1} and abs(plans.count(0) / 1000 - 0.7) < 0.05
    blank = 0
    for step in range(250):
        local, glob = blank_some(recipe, step, ["a", "b", "c", "d"], ["A", "B", "C", "D"])
        assert [bool(x) for x in local] == [bool(x) for x in glob]
        blank += local.count("")
    assert abs(blank / 1000 - 0.25) < 0.05


def test_checkpoints_replace_each_other_and_survive_a_kill(tmp_path) -> None:
    def save(step: int, value: float) -> None:
        checkpoints.save(tmp_path, step, {"weights": {"x": torch.full((2,), value)}, "empty": {}}, {"note": "n"})

    assert checkpoints.load(tmp_path) is None
    save(1, 1.0)
    (tmp_path / ".checkpoint-2.part").mkdir()  # killed while writing
    (tmp_path / "checkpoint-2").mkdir()  # killed before `latest` was renamed
    tensors, state = checkpoints.load(tmp_path) or ({}, {})
    assert state == {"note": "n", "step": 1} and tensors["weights"]["x"].tolist() == [1, 1] and tensors["empty"] == {}
    save(2, 2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "latest"]
    written = (tmp_path / "checkpoint-2" / "weights.safetensors").stat().st_mtime_ns
    save(2, 2.0)
    assert (tmp_path / "checkpoint-2" / "weights.safetensors").stat().st_mtime_ns == written
    assert (checkpoints.load(tmp_path) or ({}, {}))[1]["step"] == 2


@pytest.mark.parametrize("wrong", ["truncated", "no state", "gone"])
def test_a_broken_checkpoint_is_an_error_not_a_fresh_start(tmp_path, wrong) -> None:
    checkpoints.save(tmp_path, 3, {"weights": {"x": torch.ones(20)}}, {})
    path = tmp_path / "checkpoint-3"
    match wrong:
        case "truncated":
            (path / "weights.safetensors").write_bytes((path / "weights.safetensors").read_bytes()[:-8])
        case "no state":
            (path / "state.json").unlink()
        case "gone":
            path.rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match="not a readable checkpoint"):
        checkpoints.load(tmp_path)


def test_a_checkpoint_that_finds_no_room_leaves_the_last_one(tmp_path, monkeypatch) -> None:
    checkpoints.save(tmp_path, 1, {"weights": {"x": torch.ones(4)}}, {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left.*last good: .*checkpoint-1 "):
        patch.setattr(checkpoints.os, "fsync", full)  # the disk says so at the latest when it is asked to keep a file
        checkpoints.save(tmp_path, 2, {"weights": {"x": torch.zeros(4)}}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "latest"]
    tensors, state = checkpoints.load(tmp_path) or ({}, {})
    assert state["step"] == 1 and tensors["weights"]["x"].tolist() == [1, 1, 1, 1]


def test_old_checkpoints_are_pruned(tmp_path) -> None:
    for step in (9, 10, 11, 12):
        checkpoints.save(tmp_path, step, {"weights": {"x": torch.ones(1)}}, {}, keep=3)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]
    (tmp_path / "latest").write_text("checkpoint-10\n")  # somebody went back
    checkpoints.save(tmp_path, 11, {"weights": {"x": torch.zeros(1)}}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11"]
    assert (checkpoints.load(tmp_path) or ({}, {}))[0]["weights"]["x"].tolist() == [0]


def test_a_loss_that_explodes_is_noticed_and_a_bad_crop_is_not() -> None:
    watch = LossWatch(20.0)
    for _ in range(SETTLED):
        assert watch.complaint("removal", 1.0, 1.0) is None
    assert watch.complaint("removal", 15.0, 1.0) is None and watch.complaint("texture", 1e6, 1.0) is None
    again = LossWatch(20.0)
    again.restore(json.loads(json.dumps(watch.state())))
    for made in (watch, again):
        assert "exploded: 50" in (made.complaint("removal", 50.0, 1.0) or "")
        assert made.complaint("removal", float("nan"), 1.0) == "the loss is not finite"
        assert made.complaint("removal", 1.0, float("inf")) == "the gradient is not finite"
    assert again.means == watch.means
    assert all(LossWatch(0).complaint("x", 10.0**step, 1.0) is None for step in range(60))
