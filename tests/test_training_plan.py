"""The plan of a run: FLUX's parameters by part on the meta device, bytes that autograd really keeps, steps, samples."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.training.activations import saved_bytes
from dreamsr_cli.training.memory import part_memory, step_memory
from dreamsr_cli.training.part_configs import build_meta, configs_for, of_recipe
from dreamsr_cli.training.plan import TrainingPlan, training_plan
from dreamsr_cli.training.recipe import load_recipe
from dreamsr_cli.training.stages import STAGES

GIB = 2**30
ACCELERATE = Path(str(resources.files("dreamsr_cli"))) / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def flux() -> TrainingPlan:
    torch.set_num_threads(1)
    return training_plan(load_recipe("flux"), STAGES["joint"])


def test_flux_parameters_by_part() -> None:
    networks = build_meta(configs_for(load_recipe("flux"), STAGES["joint"]), torch.bfloat16)
    parameters = networks.parameters()
    assert parameters["transformer"] == 11_901_408_320
    assert parameters["controlnet"] == 3_188_491_776
    assert parameters["context_attention"] == 339_851_520
    # rank 256 on 418 linear layers: 19 double blocks with 12, 38 single ones with 5
    assert networks.lora_modules == 418 == 19 * 12 + 38 * 5
    assert parameters["lora"] == 1_045_954_560
    double, single = 2 * (4 * 2 + 2 * 5) * 3072, (3 * 2 + 5 + 6) * 3072
    assert parameters["lora"] == 256 * (19 * double + 38 * single)
    assert parameters["vae"] == 83_819_683


@pytest.mark.slow
def test_flux_memory_plans_fit_the_cards_they_are_for(flux: TrainingPlan) -> None:
    assert set(flux.trained) == {"controlnet", "context_attention", "lora", "discriminator"}
    assert [(round(plan.card / GIB), plan.cards) for plan in flux.plans] == [(24, 1), (47, 1), (79, 1), (79, 8)]
    assert all(plan.fits for plan in flux.plans)
    assert [plan.way for plan in flux.plans] == ["offload", "offload", "offload", "sharded"]
    for plan in flux.plans:
        assert plan.backward == sum(plan.parts.values()) and plan.peak >= plan.optimizer
    texture, removal = flux.activations
    assert texture.kind == "texture" and removal.kind == "removal"
    assert texture.block < texture.kept < 4e9 and texture.decoder > 10e9
    # what doesn't fit says so
    whole = training_plan(load_recipe("flux"), STAGES["joint"], cards=[(24 * GIB, 1)], way="whole").plans[0]
    assert not whole.fits and whole.parts["transformer"] == 2 * 11_901_408_320
    table = flux.table()
    assert "11,901,408,320" in table and "6,400,000 samples" in table and table.count(": fits") == 4
    assert json.loads(json.dumps(flux.to_json()))["plans"][3]["way"] == "sharded"


def test_part_memory_by_hand() -> None:
    part = part_memory("x", 100, 40, 2, eight_bit=False, ema=True)
    assert (part.weights, part.masters, part.average, part.moments) == (200, 160, 160, 320)
    assert (part.gradients, part.wide_gradients, part.resident) == (80, 160, 840)
    frugal = part_memory("x", 100, 40, 2, eight_bit=True, ema=False)
    assert frugal.average == 0 and frugal.moments == pytest.approx(82, abs=1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["texture", "removal"])
def test_meta_counts_what_a_real_pass_keeps(kind: str, checkpointing: bool) -> None:
    """The same tiny networks, with real tensors and a flash kernel: the same bytes, but for a few percent."""
    recipe = tiny_models.RECIPE
    meta = build_meta(of_recipe(recipe), torch.float32)
    counted = step_memory(meta, kind, 64, checkpointing, pixel_terms=False).kept
    real = tiny_models.networks()
    lora = real.lora
    assert real.context_attention is not None and lora is not None
    for parameter in real.transformer.parameters():
        parameter.requires_grad_(False)
    for parameter in real.named(STAGES["joint"].learners[kind]).values():
        parameter.requires_grad_(True)
    for part in (real.controlnet, real.context_attention):
        part.requires_grad_(kind == "texture")
    real.dit.checkpoint_blocks = real.controlnet.checkpoint_blocks = checkpointing
    tokens = recipe.defaults.max_text_tokens
    text = tiny_models.TextEmbedding(
        torch.randn(1, tokens, recipe.sizes.text_width), torch.randn(1, recipe.sizes.text_width), None
    )
    z, t = torch.randn(1, recipe.latent.channels, 8, 8), torch.full((1,), 0.5)

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(kind == "texture"):
            ready = real.dit.prepare(real.controlnet(z, t, text, mask_pads=False))
        if kind == "removal":
            with lora.on():
                return real.dit(z, t, text, ready)
        return real.dit(z, t, text, ready)

    kept: dict[int, tuple[int, torch.Tensor]] = {}
    weights = {
        p.untyped_storage().data_ptr()
        for m in (real.transformer, real.controlnet, real.context_attention)
        for p in m.parameters()
    }

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    assert counted == pytest.approx(sum(n for n, _ in kept.values()), rel=0.06)


def test_saved_bytes_of_one_layer() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(8, 4)
    x = torch.empty(5, 8, device="meta")
    assert saved_bytes(lambda: layer(x), [layer]) == 5 * 8 * 4
    assert saved_bytes(lambda: layer(x).relu(), [layer]) == 5 * 8 * 4 + 5 * 4 * 4
    layer.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), [layer]) == 0


def test_checkpointing_pays_and_crops_count() -> None:
    recipe = tiny_models.RECIPE
    meta = build_meta(of_recipe(recipe), torch.float32)
    small, large = (step_memory(meta, "both", side, False).kept for side in (32, 64))
    assert small < large < 4 * small * 1.1
    assert step_memory(meta, "both", 64, True).kept < large


def test_a_bundles_own_configs_count(tiny_bundle: Path) -> None:
    recipe = dataclasses.replace(tiny_models.RECIPE, model=str(tiny_bundle))
    plan = training_plan(recipe, STAGES["joint"], dtype=torch.float32, photos=7)
    real = tiny_models.networks()
    assert real.lora is not None
    assert plan.parameters["controlnet"] == sum(p.numel() for p in real.controlnet.parameters())
    assert plan.parameters["lora"] == sum(p.numel() for p in real.lora.parameters())
    assert plan.samples == recipe.steps * 2 and "7 photos" in plan.table()
    assert len(plan.plans) == 1 and plan.plans[0].way == "whole" and "one device" in plan.table()
    mini = training_plan(load_recipe("mini"), STAGES["autoencoder"], dtype=torch.float32)
    assert set(mini.trained) == {"vae"} and configs_for(load_recipe("mini"), STAGES["joint"]).name == "mini"
    with pytest.raises(ConfigError, match="no way"):
        training_plan(recipe, STAGES["joint"], way="magic")


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_files_are_ones_that_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    wrapped = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        .get("fsdp_config", {})
        .get("fsdp_transformer_layer_cls_to_wrap", "")
    )
    known = {type(m).__name__ for m in build_meta(of_recipe(tiny_models.RECIPE), torch.float32).dit.modules()}
    assert set(filter(None, wrapped.split(","))) <= known


def test_every_planned_card_has_a_file() -> None:
    assert {p.stem for p in ACCELERATE.glob("*.yaml")} == {"24gb", "48gb", "80gb", "8x80gb"}
