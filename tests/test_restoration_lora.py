"""The LoRA is on only inside its `with`, touches what the method says, and belongs to one transformer."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_models import flux_transformer, latent, text, wake_lora

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.models import restoration_lora
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.restoration_lora import CONFIG_FILE, WEIGHTS_FILE, RestorationLoRA


def awake(transformer: FluxTransformer2DModel, rank: int = 4) -> RestorationLoRA:
    lora = RestorationLoRA(transformer, rank)
    wake_lora(lora)
    return lora


@torch.no_grad()
def velocity(transformer: FluxTransformer2DModel) -> torch.Tensor:
    return ConditionedDiT(transformer, None, (), mask_pads=False)(latent(), torch.tensor([1.0]), text(), None, 1.0)


def test_off_is_exactly_the_base_and_on_is_not() -> None:
    transformer = flux_transformer()
    base = velocity(transformer)
    lora = awake(transformer)
    assert not lora.active and torch.equal(velocity(transformer), base)
    with lora.on():
        assert lora.active
        assert (velocity(transformer) - base).abs().max() > 1e-3
    assert not lora.active and torch.equal(velocity(transformer), base)


def test_a_fresh_one_changes_nothing_yet() -> None:
    transformer = flux_transformer()
    base = velocity(transformer)
    lora = RestorationLoRA(transformer, 4)
    with lora.on():
        assert torch.equal(velocity(transformer), base)


@torch.no_grad()
def test_folded_it_does_the_same_and_leaves_the_base_as_it_was() -> None:
    transformer = flux_transformer()
    base, lora = velocity(transformer), awake(transformer)
    with lora.on():
        on = velocity(transformer)
    for _ in range(2):
        with lora.folded():
            assert not lora.active  # nothing is computed beside the base weights
            assert torch.allclose(velocity(transformer), on, atol=1e-5)
        assert torch.equal(velocity(transformer), base)
    with pytest.raises(RuntimeError, match="in the middle"), lora.folded():
        raise RuntimeError("in the middle")
    assert torch.equal(velocity(transformer), base)


@torch.no_grad()
def test_folded_it_notices_other_weights() -> None:
    transformer = flux_transformer()
    lora = awake(transformer)
    with lora.folded():
        before = velocity(transformer)
    for parameter in lora.parameters():
        parameter.mul_(1.5)
    with lora.on():
        on = velocity(transformer)
    with lora.folded():
        assert torch.allclose(velocity(transformer), on, atol=1e-5)
    assert not torch.allclose(on, before, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("why", ["bfloat16", "large"])
def test_where_folding_would_lose_it_is_on_as_ever(why, monkeypatch) -> None:
    transformer = flux_transformer()
    lora = awake(transformer)
    if why == "bfloat16":
        transformer.to(torch.bfloat16)
    else:
        monkeypatch.setattr(restoration_lora, "FOLDABLE", 10)
    with lora.folded():
        assert lora.active
    assert not lora.active


def test_off_after_an_exception() -> None:
    transformer = flux_transformer()
    base, lora = velocity(transformer), awake(transformer)
    with pytest.raises(RuntimeError, match="in the middle"), lora.on():
        raise RuntimeError("in the middle")
    assert not lora.active and torch.equal(velocity(transformer), base)
    handle = transformer.single_transformer_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), lora.on():
        velocity(transformer)
    handle.remove()
    assert not lora.active and torch.equal(velocity(transformer), base)


def test_switching_does_not_stop_training_it() -> None:
    lora = awake(flux_transformer())
    with lora.on():
        pass
    assert lora.parameters() and all(p.requires_grad for p in lora.parameters())


def test_targets_at_flux_size() -> None:
    """12 linears per double block and 5 per single one: 418. method.md says 419 and 1,047 M, counting the top-level
    `proj_out` that peft's name "proj_out" would match too; eq. 7's LoRA belongs to the blocks."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        lora = RestorationLoRA(transformer, 256)
    wrapped = [name for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(wrapped) == 12 * 19 + 5 * 38 == 418
    assert "proj_out" not in wrapped
    assert not any(word in name for name in wrapped for word in ("norm", "embed"))
    assert len([n for n in wrapped if n.startswith("single_")]) == 5 * 38
    assert sum(p.numel() for p in lora.parameters()) == pytest.approx(1046e6, rel=0.001)


def test_saved_and_loaded_it_does_the_same(tmp_path) -> None:
    one = flux_transformer()
    lora = awake(one)
    lora.save(tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    two = flux_transformer()
    loaded = RestorationLoRA.load(two, tmp_path / "lora")
    assert loaded.rank == 4 and not loaded.active
    assert torch.equal(velocity(one), velocity(two))
    with lora.on(), loaded.on():
        assert torch.equal(velocity(one), velocity(two))


@pytest.mark.parametrize("cut", [0, 4, 9])
def test_one_of_that_rank_or_less_is_loaded_as_it_is(tmp_path, cut) -> None:
    one, two = flux_transformer(), flux_transformer()
    lora = awake(one)
    lora.save(tmp_path)
    loaded = RestorationLoRA.load(two, tmp_path, cut)
    assert loaded.rank == 4
    with lora.on(), loaded.on():
        assert torch.equal(velocity(one), velocity(two))


@torch.no_grad()
def test_cut_it_keeps_what_it_changes_most(tmp_path) -> None:
    lora = awake(flux_transformer())
    lora.save(tmp_path / "whole")
    loaded = RestorationLoRA.load(flux_transformer(), tmp_path / "whole", 2)
    loaded.save(tmp_path / "cut")
    assert loaded.rank == json.loads((tmp_path / "cut" / CONFIG_FILE).read_text())["r"] == 2
    whole, cut = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name in (name for name in whole if "lora_A" in name):
        up = name.replace("lora_A", "lora_B")
        change, kept = whole[up] @ whole[name], cut[up] @ cut[name]
        energies = torch.linalg.svdvals(change).square()
        assert (change - kept).square().sum() == pytest.approx(float(energies[2:].sum()), rel=1e-3)
        assert energies[2:4].sum() > 1e-3 * energies.sum()  # so that something was cut


def test_saved_in_bfloat16_it_takes_half_the_space(tmp_path) -> None:
    lora = awake(flux_transformer())
    for name, dtype in (("whole", None), ("half", torch.bfloat16)):
        lora.save(tmp_path / name, dtype)
    whole, half = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "half"))
    assert {v.dtype for v in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[k], v.to(torch.bfloat16)) for k, v in whole.items())
    assert len(whole) == 2 * (12 * 2 + 5 * 2)


def test_weights_given_are_written_instead_of_its_own(tmp_path) -> None:
    transformer = flux_transformer()
    lora = awake(transformer)
    averages = {k: torch.full_like(v, 0.25) for k, v in transformer.state_dict().items()}
    lora.save(tmp_path, weights=averages)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert len(saved) == len(lora.parameters()) and all(bool((v == 0.25).all()) for v in saved.values())


@pytest.mark.parametrize("wrong", ["shape", "missing", "extra", "truncated", "rank", "not json", "no file"])
def test_weights_of_another_transformer_or_broken_ones_are_refused(tmp_path, wrong) -> None:
    awake(flux_transformer()).save(tmp_path)
    path, state = tmp_path / WEIGHTS_FILE, load_file(tmp_path / WEIGHTS_FILE)
    key = sorted(state)[0]
    transformer = flux_transformer()
    match wrong:
        case "shape":
            transformer = flux_transformer(double=3)
        case "missing":
            save_file({k: v for k, v in state.items() if k != key}, path)
        case "extra":
            save_file({**state, key.replace("blocks.0", "blocks.9"): state[key].clone()}, path)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        case "rank":
            config = json.loads((tmp_path / CONFIG_FILE).read_text())
            (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "r": 8}))
        case "not json":
            (tmp_path / CONFIG_FILE).write_text("[4]")
        case "no file":
            path.unlink()
    with pytest.raises(WeightsError):
        RestorationLoRA.load(transformer, tmp_path)
