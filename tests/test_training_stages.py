"""The paper's stages: who learns in which step, what stays frozen, what a texture step is conditioned on, ablations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, RECIPE, pictures
from training_data import save_photos

from dreamsr_cli.errors import ConfigError, JournalError, TrainingError, UsageError
from dreamsr_cli.folder_lock import FolderLock
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.adversarial import gan_weight
from dreamsr_cli.training.both_stages import encode_texts, remove
from dreamsr_cli.training.networks import MODULES, Networks, build_on
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.provenance import losses
from dreamsr_cli.training.recipe import CropPlan, Recipe, for_ablation
from dreamsr_cli.training.stages import CONTROL, STAGES, kind_of_step
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train

PAPERS = ("controlnet", "restoration", "joint")
REMOVED = replace(RECIPE, condition="removed")
TEXTS = (["bark of an old oak", "red bricks"], ["a forest in autumn", "a house with red walls"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "stages-cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("stages") / "photos")


def crops(step: int = 0, erased: bool = True) -> Crops:
    hq = (pictures(2, 32, 32, seed=5) + 1) / 2
    lq = torch.nn.functional.avg_pool2d(hq, 5, 1, 2)
    return Crops(step, hq, lq, *TEXTS, erased=torch.nn.functional.avg_pool2d(hq, 3, 1, 1) if erased else None)


def on(bundle: Path, stage: str = "joint", recipe: Recipe = REMOVED, start: Path | None = None) -> Networks:
    begin = None if start is None else open_bundle(str(start))
    return build_on(recipe, STAGES[stage], open_bundle(str(bundle)), begin, CPU, torch.float32)


def touched(networks: Networks) -> set[str]:
    """Parts that received a gradient."""
    return {
        part
        for part in (*MODULES, "lora")
        if any(p.grad is not None and bool(p.grad.any()) for p in networks.named((part,)).values())
    }


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_flux_bundle"])
@pytest.mark.parametrize("kind", ["texture", "removal"])
def test_only_the_matching_part_receives_gradients(request, bundle, kind) -> None:
    made = on(request.getfixturevalue(bundle))
    made.train_only(STAGES["joint"].trains)
    states = []
    made.dit.register_forward_pre_hook(lambda *_: states.append(made.lora is not None and made.lora.active))
    outcome = run_step(kind, made, REMOVED, None, None, crops())
    # The condition of a texture step comes from the removal step, without gradient.
    assert states == ([True, False] if kind == "texture" else [True])
    outcome.loss.backward()
    assert touched(made) == (set(CONTROL) if kind == "texture" else {"lora"})
    assert made.lora is not None and not made.lora.active
    grown = made.named(("lora",) if kind == "removal" else CONTROL)
    assert all(p.grad is not None for p in grown.values())
    assert (outcome.fake is not None) == (kind == "removal")


@pytest.mark.parametrize("kind", ["texture", "removal"])
def test_computing_activations_again_changes_no_gradient(tiny_bundle, kind) -> None:
    """Also of the removal step, whose blocks are computed again when the LoRA has been switched off."""
    found = []
    for again in (False, True):
        made = on(tiny_bundle)
        named = made.train_only(STAGES["joint"].trains)
        if again:
            made.checkpoint_blocks()
        run_step(kind, made, REMOVED, None, None, crops()).loss.backward()
        found.append({name: p.grad for name, p in named.items() if p.grad is not None})
        assert made.lora is not None and not made.lora.active
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_fresh_parts_begin_without_effect(tiny_bundle) -> None:
    """As the paper's: injections at zero, the LoRA's output zero, ControlNet blocks copied from the transformer."""
    made = on(tiny_bundle, recipe=replace(REMOVED, fresh=True))
    assert made.lora is not None and made.context_attention is not None
    z = made.encode(crops().lq_up * 2 - 1)
    glob, local = (encode_texts(made, texts) for texts in reversed(TEXTS))
    with torch.no_grad():
        plain = made.dit(z, torch.ones(2), glob)
        z_dr = remove(made, z, local, glob, made.config.sampling)
    assert torch.allclose(z - z_dr, plain, atol=1e-6)
    name = "transformer_blocks.0.attn.to_out.0"
    copied, source = made.named(("controlnet",)), made.named(("transformer",))
    assert torch.equal(copied[f"controlnet.{name}.weight"], source[f"transformer.{name}.base_layer.weight"])
    projection = "controlnet.image_projections.0.weight"
    assert on(tiny_bundle).named(("controlnet",))[projection].any() and not copied[projection].any()


def test_joint_draws_its_kind_of_step_from_the_step_alone() -> None:
    joint = STAGES["joint"]
    kinds = [kind_of_step(joint, step, 3, 0.5) for step in range(1000)]
    assert abs(kinds.count("texture") / 1000 - 0.5) < 0.05 and set(kinds) == {"texture", "removal"}
    assert kinds[500:] == [kind_of_step(joint, step, 3, 0.5) for step in range(500, 1000)]
    assert kinds != [kind_of_step(joint, step, 4, 0.5) for step in range(1000)]
    assert {kind_of_step(joint, step, 3, 0.0) for step in range(50)} == {"removal"}
    assert [kind_of_step(STAGES[name], 7, 3, 0.5) for name in ("controlnet", "restoration")] == ["texture", "removal"]


def seen_by_the_control_net(made: Networks, recipe: Recipe, given: Crops) -> torch.Tensor:
    conditions: list[torch.Tensor] = []
    hook = made.controlnet.register_forward_pre_hook(lambda _, args: conditions.append(args[0]))
    with torch.no_grad():
        run_step("texture", made, recipe, None, None, given)
    hook.remove()
    return conditions[-1]


def test_what_a_texture_step_is_conditioned_on(tiny_bundle) -> None:
    made, given = on(tiny_bundle), crops()
    assert given.erased is not None
    z_lq, erased = made.encode(given.lq_up * 2 - 1), made.encode(given.erased * 2 - 1)
    with torch.no_grad():
        local, glob = (encode_texts(made, texts) for texts in TEXTS)
        removed = remove(made, z_lq, local, glob, made.config.sampling)
    for name, expected in (("erased", erased), ("removed", removed), ("degraded", z_lq)):
        seen = seen_by_the_control_net(made, replace(RECIPE, condition=name), given)
        assert torch.allclose(seen, expected, atol=1e-5)
    mixed, picks = replace(RECIPE, condition="mixed"), []
    for step in range(24):
        seen = seen_by_the_control_net(made, mixed, replace(given, step=step))
        for b in range(2):
            is_erased = torch.equal(seen[b], erased[b])
            assert is_erased or torch.allclose(seen[b], removed[b])
            picks.append(is_erased)
        # Another place in the global batch draws by its own index.
        alone = Crops(step, given.hq[1:], given.lq_up[1:], TEXTS[0][1:], TEXTS[1][1:], given.erased[1:], first=1)
        assert torch.allclose(seen_by_the_control_net(made, mixed, alone), seen[1:], atol=1e-4)
    assert 10 < sum(picks) < 38
    with pytest.raises(TrainingError, match="needs erased pictures.*condition=removed"):
        run_step("texture", made, RECIPE, None, None, crops(erased=False))


def test_pixel_terms_count_for_the_samples_with_small_t(tiny_bundle) -> None:
    """Eq. 6: a batch's loss is the mean over samples, of which only those with t <= 0.2 have the pixel term."""
    made = on(tiny_bundle)
    low = replace(RECIPE, condition="degraded", t_range=(0.0, 0.2))
    high = replace(low, t_range=(0.2001, 1.0))
    with torch.no_grad():
        assert run_step("texture", made, high, None, None, crops()).terms["texture_pixel"] == 0
        near = run_step("texture", made, low, None, None, crops())
        both = [run_step("texture", made, replace(low, t_range=(0, 1)), None, None, crops(step)) for step in range(12)]
    assert near.terms["texture_pixel"] > 0
    assert near.loss == pytest.approx(float(near.terms["texture_velocity"] + near.terms["texture_pixel"]))
    assert {bool(outcome.terms["texture_pixel"] > 0) for outcome in both} == {True, False}


def job(photos: Path, bundle: Path, out: Path, stage: str, recipe: Recipe = REMOVED, **more: Any) -> TrainJob:
    settings: dict[str, Any] = {"model": str(bundle), "device": CPU, **more}
    return TrainJob(STAGES[stage], recipe, "tiny.toml", photos, out, **settings)


def test_a_run_may_begin_with_less_of_the_lora(photos, tiny_bundle, tmp_path) -> None:
    def rank(bundle: Path) -> int:
        return json.loads((bundle / "lora" / "adapter_config.json").read_text())["r"]

    cut = replace(REMOVED, steps=1, sizes=replace(REMOVED.sizes, lora_cut=rank(tiny_bundle) - 1))
    result = train(job(photos, tiny_bundle, tmp_path / "run", "restoration", cut), SilentProgress())
    assert rank(result.bundle) == rank(tiny_bundle) - 1
    laid_over = open_bundle(str(tiny_bundle), str(tmp_path / "run"))
    assert laid_over.open_restorer(CPU, torch.float32, mask_pads=True).lora is not None
    trained = [training_plan(r, STAGES["restoration"], model=str(tiny_bundle)).trained["lora"] for r in (REMOVED, cut)]
    assert trained[1] * rank(tiny_bundle) == trained[0] * rank(result.bundle)


@pytest.mark.parametrize("stage", [*PAPERS, "transformer"])
def test_a_run_changes_its_parts_and_leaves_the_rest_as_it_was(photos, tiny_bundle, tmp_path, stage) -> None:
    before = on(tiny_bundle, stage)
    result = train(job(photos, tiny_bundle, tmp_path / "run", stage), SilentProgress())
    after = on(result.bundle, stage)
    changed = {
        part
        for part in (*MODULES, "lora")
        for name, p in before.named((part,)).items()
        if not torch.equal(p, after.named((part,))[name])
    }
    assert changed == set(STAGES[stage].trains)
    config = json.loads((result.bundle / "bundle.json").read_text())
    for part in {"transformer", "vae", "text_encoder"} - changed:
        assert config["parts"][part] == {"bundle": str(tiny_bundle.resolve())}
    own = {part for part in config["parts"] if "path" in config["parts"][part]}
    assert own == set(STAGES[stage].trains) == {p.name for p in result.bundle.iterdir() if p.is_dir()}
    assert "discriminator" not in str(sorted(result.bundle.rglob("*")))
    laid_over = open_bundle(str(tiny_bundle), str(tmp_path / "run"))
    assert laid_over.open_restorer(CPU, torch.float32, mask_pads=True).lora is not None


def test_the_frozen_transformer_has_the_same_hash_before_and_after(photos, tiny_bundle, tmp_path, monkeypatch) -> None:
    seen: list[str] = []
    hash_of = Networks.frozen_sha256

    def recorded(self: Networks) -> str:
        seen.append(hash_of(self))
        return seen[-1]

    monkeypatch.setattr(Networks, "frozen_sha256", recorded)
    train(job(photos, tiny_bundle, tmp_path / "run", "joint"), SilentProgress())
    assert len(seen) == 2 and seen[0] == seen[1]
    made = on(tiny_bundle)
    made.train_only(STAGES["joint"].trains)
    assert hash_of(made) == seen[0]
    with torch.no_grad():
        made.transformer.x_embedder.weight[0, 0] += 1e-4
    assert hash_of(made) != seen[0]


def test_a_frozen_weight_that_changes_stops_the_run(photos, tiny_bundle, tmp_path, monkeypatch) -> None:
    from dreamsr_cli.training import loop

    def nudge(kind: str, networks: Networks, *rest: Any) -> Any:
        with torch.no_grad():
            networks.transformer.x_embedder.weight[0, 0] += 1e-4
        return run_step(kind, networks, *rest)

    monkeypatch.setattr(loop, "run_step", nudge)
    with pytest.raises(TrainingError, match="frozen in this stage changed"):
        train(job(photos, tiny_bundle, tmp_path / "run", "restoration"), SilentProgress())


def test_joint_with_a_discriminator_resumes_to_the_same_bytes(photos, tiny_bundle, tmp_path) -> None:
    recipe = replace(REMOVED, steps=6, loss=replace(RECIPE.loss, gan_start=2, gan_lead=1), accumulate=2)
    train(job(photos, tiny_bundle, tmp_path / "whole", "joint", recipe), SilentProgress())
    parts = job(photos, tiny_bundle, tmp_path / "parts", "joint", recipe)
    train(replace(parts, max_steps=3), SilentProgress())
    train(replace(parts, resume=True), SilentProgress())
    files = sorted(p.name for p in (tmp_path / "whole" / "checkpoint-6").iterdir())
    assert {"discriminator.safetensors", "discriminator_optimizer.safetensors", "optimizer.safetensors"} <= set(files)
    for name in files:
        assert (tmp_path / "whole/checkpoint-6" / name).read_bytes() == (
            tmp_path / "parts/checkpoint-6" / name
        ).read_bytes()
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    judged = [line["step"] for line in log if "removal_gan" in line]
    assert judged and all(step > 2 for step in judged) and any("texture_velocity" in line for line in log)


def test_the_gan_term_can_be_had_in_stage_backbone(photos, tiny_bundle, tmp_path) -> None:
    recipe = replace(RECIPE, loss=replace(RECIPE.loss, gan=0.5, gan_start=2, gan_lead=0))
    start: dict[str, Any] = {"model": None, "init_from": str(tiny_bundle)}
    train(job(photos, tiny_bundle, tmp_path / "run", "backbone", recipe, **start), SilentProgress())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "removal_gan" in line] == [3, 4]
    assert [line["step"] for line in log if "discriminator" in line] == [3, 4]


def test_a_run_folder_has_one_process_at_a_time(photos, tiny_bundle, tmp_path) -> None:
    first = job(photos, tiny_bundle, tmp_path / "run", "controlnet", REMOVED)
    train(replace(first, max_steps=1), SilentProgress())
    with FolderLock(tmp_path / "run"), pytest.raises(JournalError, match="another process is working in"):
        train(replace(first, resume=True), SilentProgress())
    assert train(replace(first, resume=True), SilentProgress()).steps == REMOVED.steps


def test_two_accumulated_passes_are_one_of_both(photos, tiny_bundle, tmp_path) -> None:
    losses = []
    for accumulate in (1, 2):
        recipe = replace(REMOVED, accumulate=accumulate, data=replace(RECIPE.data, crops=(CropPlan(32, 4, 1.0),)))
        out = tmp_path / str(accumulate)
        train(job(photos, tiny_bundle, out, "controlnet", recipe), SilentProgress())
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in log if "loss" in line])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_stages_follow_one_another(photos, tiny_bundle, tmp_path) -> None:
    """A run that starts from another one's bundle carries over what it doesn't train, and counts its steps."""
    recipe = replace(REMOVED, fresh=True)
    first = train(job(photos, tiny_bundle, tmp_path / "one", "controlnet", recipe), SilentProgress())
    start = open_bundle(str(first.bundle))
    more: dict[str, Any] = {"model": None, "init_from": str(first.bundle)}
    second = train(job(photos, tiny_bundle, tmp_path / "two", "restoration", recipe, **more), SilentProgress())
    a, b = (open_bundle(str(r.bundle)).part_folder("controlnet") for r in (first, second))
    weights = "diffusion_pytorch_model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()
    record = open_bundle(str(second.bundle)).config.training
    assert record.steps == start.config.training.steps + 4


def test_no_text_branch_has_no_cross_attention_and_one_text(photos, tiny_bundle, tmp_path) -> None:
    recipe = replace(REMOVED, ablation="no-text-branch", fresh=True)
    made = on(tiny_bundle, "controlnet", for_ablation(recipe, "controlnet"))
    assert made.context_attention is None
    texts: list[torch.Tensor] = []
    made.controlnet.register_forward_pre_hook(lambda _, args: texts.append(args[2].tokens_BTD))
    made.dit.register_forward_pre_hook(lambda _, args: texts.append(args[2].tokens_BTD))
    with torch.no_grad():
        run_step("texture", made, recipe, None, None, crops())
        glob = encode_texts(made, TEXTS[1]).tokens_BTD
    assert texts and all(torch.equal(seen, glob) for seen in texts)
    result = train(job(photos, tiny_bundle, tmp_path / "run", "controlnet", recipe), SilentProgress())
    config = open_bundle(str(result.bundle)).config
    assert not config.control.text and "context_attention" not in config.parts


def test_the_other_ablations_in_the_recipes_own_keys() -> None:
    def spelled(name: str, stage: str = "controlnet") -> Recipe:
        return for_ablation(replace(RECIPE, ablation=name), stage)

    assert spelled("none") == RECIPE
    assert spelled("no-erasure").condition == "degraded"
    native = spelled("no-rfe").data
    assert native.full_photo == 1 and [c.size for c in native.crops] == [1024] and native.full_side == 1024
    assert spelled("no-lora").condition == "degraded"
    for stage in ("restoration", "joint", "backbone"):
        with pytest.raises(ConfigError, match="--stage controlnet"):
            spelled("no-lora", stage)


def test_no_lora_leaves_a_bundle_that_starts_from_pure_noise(photos, tiny_bundle, tmp_path) -> None:
    recipe = replace(RECIPE, ablation="no-lora", fresh=True)
    result = train(job(photos, tiny_bundle, tmp_path / "run", "controlnet", recipe), SilentProgress())
    config = open_bundle(str(result.bundle)).config
    assert "lora" not in config.parts and (config.sampling.t_start, config.sampling.steps) == (1.0, 20)


def test_what_makes_no_sense_is_refused_before_a_folder_is_made(photos, tiny_bundle, tmp_path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="needs erased pictures"):
        train(job(photos, tiny_bundle, out, "joint", RECIPE), SilentProgress())
    with pytest.raises(UsageError, match="--model doesn't go with --stage backbone.*--init-from"):
        train(job(photos, tiny_bundle, out, "backbone"), SilentProgress())
    with pytest.raises(UsageError, match="batch 2 can't be shared by 1 processes times 3"):
        train(job(photos, tiny_bundle, out, "joint", replace(REMOVED, accumulate=3)), SilentProgress())
    with pytest.raises(UsageError, match="float16"):
        train(job(photos, tiny_bundle, out, "joint", dtype=torch.float16), SilentProgress())
    with pytest.raises(TrainingError, match="holds no run to resume"):
        train(job(photos, tiny_bundle, out, "joint", resume=True), SilentProgress())
    with pytest.raises(ConfigError, match=r"control.map .* doesn't fit the 2 double blocks"):
        wide = replace(REMOVED, fresh=True, control=replace(RECIPE.control, map=(0, None, 1)))
        train(job(photos, tiny_bundle, out, "joint", wide), SilentProgress())
    assert not out.exists() or not (out / "bundle").exists()


def test_stage_transformer_is_for_bundles_of_our_own_and_has_no_gan(photos, tiny_flux_bundle, tmp_path) -> None:
    with pytest.raises(UsageError, match="stage transformer trains bundles of our own kind.*FLUX's parts"):
        train(job(photos, tiny_flux_bundle, tmp_path / "run", "transformer"), SilentProgress())
    stage = STAGES["transformer"]
    assert gan_weight(REMOVED, stage) == 0 and gan_weight(REMOVED, STAGES["joint"]) == 0.5
    assert "GAN" not in losses(stage, REMOVED) and "removal" in losses(stage, REMOVED)


def test_flux_parts_train_and_their_licence_is_passed_on(photos, tiny_flux_bundle, tmp_path) -> None:
    licensed = tmp_path / "flux"
    licensed.mkdir()
    config = json.loads((tiny_flux_bundle / "bundle.json").read_text())
    config["licence"] = "flux-1-dev-non-commercial-license"
    config["parts"] = {name: {"bundle": str(tiny_flux_bundle)} for name in config["parts"]}
    (licensed / "bundle.json").write_text(json.dumps(config))
    recipe = replace(
        REMOVED, steps=3, loss=replace(RECIPE.loss, gan_start=0, lattice=3.0), checkpointing=True, fresh=True
    )
    recipe = replace(recipe, optim=replace(recipe.optim, kind="muon"))
    result = train(job(photos, licensed, tmp_path / "run", "joint", recipe, dtype=torch.bfloat16), SilentProgress())
    card = (result.bundle / "README.md").read_text()
    assert "Non-Commercial" in card and "was modified" in (result.bundle / "NOTICE").read_text()
    assert "0.5 · GAN" in card and "no perceptual loss" in card
    assert card.count("3 · lattice") == 2 and "Muon" in card
    made = open_bundle(str(result.bundle))
    assert made.config.parts["transformer"].bundle == str(tiny_flux_bundle)  # passed through, not a chain
    assert made.open_restorer(CPU, torch.float32, mask_pads=False).lora is not None
    free = job(photos, tiny_flux_bundle, tmp_path / "own", "restoration", replace(recipe, steps=1))
    assert "Non-Commercial" not in (train(free, SilentProgress()).bundle / "README.md").read_text()
