"""The walk over diffusers' transformer: equal to diffusers without control, and control exactly where the map says."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from tiny_models import METHOD_MAP, control_for, flux_transformer, latent, text

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.models.conditioned_dit import ConditionedDiT, Injections
from dreamsr_cli.models.context_attention import ContextCrossAttention
from dreamsr_cli.models.mm_controlnet import ControlFeatures
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.models.tokens import pack, position_ids, unpack


def diffusers_own(transformer, z, t_B, words: TextEmbedding, guidance: float | None) -> torch.Tensor:
    """The velocity by `FluxTransformer2DModel.forward`."""
    height, width = z.shape[2:]
    length = words.tokens_BTD.shape[1]
    ids = position_ids(length, height, width, z.device)
    tokens = transformer(
        hidden_states=pack(z),
        encoder_hidden_states=words.tokens_BTD.expand(len(z), -1, -1),
        pooled_projections=words.pooled_BD.expand(len(z), -1),
        timestep=t_B.expand(len(z)),
        img_ids=ids[length:],
        txt_ids=ids[:length],
        guidance=None if guidance is None else torch.full((len(z),), guidance),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


@torch.no_grad()
def velocity(dit: ConditionedDiT, injections: Injections | None, words: TextEmbedding, batch: int = 1) -> torch.Tensor:
    return dit(latent(batch), torch.full((batch,), 0.6), words, injections, guidance=1.0)


def features(count: int, local_tokens: int = 7, batch: int = 1, seed: int = 50) -> ControlFeatures:
    """Random features of width 32 for latents of 6 x 4 (6 image tokens)."""
    generator = torch.Generator().manual_seed(seed)
    image = [torch.randn(batch, 6, 32, generator=generator) for _ in range(count)]
    return ControlFeatures(
        image, [torch.randn(batch, local_tokens, 32, generator=generator) for _ in range(count)], None
    )


@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize(("batch", "size"), [(1, (6, 4)), (3, (8, 10))])
def test_without_control_it_equals_diffusers_own_forward(guidance, batch, size) -> None:
    transformer = flux_transformer(3, 3, guidance=guidance is not None)
    dit = ConditionedDiT(transformer, None, (), mask_pads=False)
    z, t_B, words = latent(batch, *size), torch.linspace(0.1, 0.9, batch), text(batch, seed=2)
    with torch.no_grad():
        difference = dit(z, t_B, words, None, guidance) - diffusers_own(transformer, z, t_B, words, guidance)
    assert difference.abs().max() <= 1e-5


def test_one_text_and_time_for_all_tiles_equals_one_each() -> None:
    dit = ConditionedDiT(flux_transformer(), None, (), mask_pads=False)
    z, words = latent(3), text(1)
    with torch.no_grad():
        once = dit(z, torch.tensor([0.6]), words, None, 1.0)
        each = dit(z, torch.full((3,), 0.6), text(1), None, 1.0)
        full = diffusers_own(dit.transformer, z, torch.tensor([0.6]), words, 1.0)
    assert (once - full).abs().max() <= 1e-5 and (each - full).abs().max() <= 1e-5


def test_time_is_told_exactly_in_bfloat16() -> None:
    """Diffusers multiplies by 1000 in the model's dtype: 0.8 and 0.803 would be the same thousandths."""
    dit = ConditionedDiT(flux_transformer().to(torch.bfloat16), None, (), mask_pads=False)
    seen: list[torch.Tensor] = []
    dit.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        dit(latent(), torch.tensor([0.803]), text().to("cpu", torch.bfloat16), None, 3.5)
    assert seen[0].dtype == torch.float32 and float(seen[0]) == pytest.approx(803, abs=1e-3)


def test_zero_injections_equal_the_plain_transformer_exactly() -> None:
    transformer, control_map = flux_transformer(), (0, 1)
    controlnet, context = control_for(transformer, control_map, awake=False)
    dit, words = ConditionedDiT(transformer, context, control_map, mask_pads=False), text(seed=4)
    with torch.no_grad():
        made = controlnet(latent(seed=9), torch.zeros(1), text(seed=5), mask_pads=False, guidance=1.0)
    assert not any(f.any() for f in made.image)
    assert torch.equal(velocity(dit, dit.prepare(made), words), velocity(dit, None, words))


@pytest.mark.parametrize("control_map", [(0, None, 1), (None, 0, 1), (1, None, 0), (0, 0, 1), (0, 1), METHOD_MAP])
def test_every_feature_is_used_and_none_is_dropped(control_map) -> None:
    transformer = flux_transformer(max(3, len(control_map)), 1)
    _, context = control_for(transformer, control_map)
    dit = ConditionedDiT(transformer, context, control_map, mask_pads=False)
    count, words = dit.features_needed, text(seed=4)
    assert count == (9 if control_map == METHOD_MAP else 2)
    plain = features(count)
    base = velocity(dit, dit.prepare(plain), words)
    for feature in range(count):
        for stream in ("image", "text"):
            changed = features(count)
            getattr(changed, stream)[feature].mul_(-1)
            difference = (velocity(dit, dit.prepare(changed), words) - base).abs().max()
            assert difference > 1e-4, f"{stream} feature {feature} has no effect"


@pytest.mark.parametrize("control_map", [(0, None, 1), (1, None, 0), (None, 0, 0), METHOD_MAP])
def test_features_arrive_after_the_blocks_that_the_map_names(control_map) -> None:
    """What a block receives, minus what the block before it gave: the map's feature, or nothing."""
    blocks = max(3, len(control_map))
    transformer = flux_transformer(blocks, 1)
    dit = ConditionedDiT(transformer, None, control_map, mask_pads=False)
    made = features(dit.features_needed)
    gave, received = [], []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda _, a, k: received.append(k["hidden_states"]), with_kwargs=True)
        block.register_forward_hook(lambda _, a, out: gave.append(out[1]))
    transformer.single_transformer_blocks[0].register_forward_pre_hook(
        lambda _, a, k: received.append(k["hidden_states"]), with_kwargs=True
    )
    velocity(dit, dit.prepare(made), text())
    for block, feature in enumerate((*control_map, *[None] * (blocks - len(control_map)))):
        added = received[block + 1] - gave[block]
        expected = torch.zeros_like(added) if feature is None else made.image[feature]
        assert torch.allclose(added, expected, atol=1e-4), f"block {block}"


@pytest.mark.parametrize(
    ("control_map", "attentions"), [((0, None, 1, None), 2), ((0, 2), 2), ((1,), 1), ((-1, 0), 2), ((0, 1), 1)]
)
def test_maps_that_cannot_be_meant_are_refused(control_map, attentions) -> None:
    transformer = flux_transformer(3, 1)
    _, context = control_for(transformer, (0,) * attentions)
    with pytest.raises(ConfigError, match=r"control\.map|cross-attentions"):
        ConditionedDiT(transformer, context, control_map, mask_pads=False)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_features_that_the_map_leaves_out_or_lacks_are_refused(count) -> None:
    transformer = flux_transformer()
    _, context = control_for(transformer, (0, 1))
    dit = ConditionedDiT(transformer, context, (0, 1), mask_pads=False)
    with pytest.raises(ValueError, match="the map uses features"):
        dit.prepare(features(count))


def test_scale_multiplies_image_features_only() -> None:
    transformer = flux_transformer()
    _, context = control_for(transformer, (0, None))
    dit, made, words = ConditionedDiT(transformer, context, (0, None), mask_pads=False), features(1), text()
    doubled = ControlFeatures([2 * f for f in made.image], made.text, None)
    assert torch.equal(velocity(dit, dit.prepare(made, 2.0), words), velocity(dit, dit.prepare(doubled), words))
    assert torch.equal(dit.prepare(made, 2.0).image[0], 2 * made.image[0])
    size = dit.prepare(made).size
    assert size == 4 * (6 * 32 + 2 * 7 * 32)


def test_global_text_asks_and_local_text_answers() -> None:
    """Order of local tokens means nothing to attention; each global token gets its own answer."""
    transformer = flux_transformer()
    _, context = control_for(transformer, (0, None))
    attention, local = cast(ContextCrossAttention, context.blocks[0]), features(1).text
    assert local is not None
    asking = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = attention(asking, *attention.keys_values(local[0]), None) - asking
        shuffled = attention(asking, *attention.keys_values(local[0].flip(1)), None) - asking
        turned = attention(asking.flip(1), *attention.keys_values(local[0]), None) - asking.flip(1)
        other = attention(asking, *attention.keys_values(-local[0]), None) - asking
    assert answer.shape == asking.shape and answer.std(1).max() > 1e-3
    assert torch.allclose(answer, shuffled, atol=1e-5)
    assert torch.allclose(answer.flip(1), turned, atol=1e-5)
    assert (answer - other).abs().max() > 1e-2


@pytest.mark.parametrize("mask_pads", [True, False])
def test_padding_of_the_global_text_is_hidden_only_where_it_should_be(mask_pads) -> None:
    dit = ConditionedDiT(flux_transformer(), None, (), mask_pads)
    short, padded = text(tokens=4), text(tokens=4)
    noise = torch.randn(1, 3, padded.tokens_BTD.shape[2])
    mask = torch.tensor([[True] * 4 + [False] * 3])
    padded = TextEmbedding(torch.cat([padded.tokens_BTD, noise], 1), padded.pooled_BD, mask)
    difference = (velocity(dit, None, short) - velocity(dit, None, padded)).abs().max()
    assert (difference <= 1e-5) == mask_pads


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    transformer = flux_transformer()
    controlnet, context = control_for(transformer, (0, None))
    dit = ConditionedDiT(transformer, context, (0, None), mask_pads=False)
    gradients = []
    for again in (False, True):
        dit.checkpoint_blocks = again
        dit.zero_grad()
        made = controlnet(latent(seed=3), torch.zeros(1), text(seed=5), mask_pads=False, guidance=1.0)
        dit(latent(), torch.tensor([0.5]), text(), dit.prepare(made), 1.0).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in dit.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(dit.named_parameters()).keys()
    assert all(torch.allclose(g, gradients[1][n], atol=1e-6) for n, g in gradients[0].items())
