"""MM-ControlNet: a copy of the right blocks, silent until trained, told the local text and one tile's condition."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from tiny_models import METHOD_MAP, control_for, flux_transformer, latent, text

from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention, wake_projections
from dreamsr_cli.models.mm_controlnet import ControlFeatures, MMControlNet
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.models.tokens import pack, position_ids, unpack

ZERO = torch.zeros(1)


@torch.no_grad()
def run(
    controlnet: MMControlNet, words: TextEmbedding, t: float = 0.0, mask_pads=False, seed: int = 3
) -> ControlFeatures:
    batch = len(words.pooled_BD)
    return controlnet(latent(batch, seed=seed), torch.full((batch,), t), words, mask_pads, guidance=1.0)


def padded(words: TextEmbedding, count: int) -> TextEmbedding:
    """The same text with `count` tokens of loud padding behind it."""
    noise = 3 * torch.randn(1, count, words.tokens_BTD.shape[2], generator=torch.Generator().manual_seed(8))
    length = words.tokens_BTD.shape[1]
    mask = torch.arange(length + count)[None] < length
    return TextEmbedding(torch.cat([words.tokens_BTD, noise], 1), words.pooled_BD, mask)


def test_with_the_methods_map_block_l_is_a_copy_of_double_block_2l() -> None:
    transformer = flux_transformer(19, 1)
    controlnet, context = control_for(transformer, METHOD_MAP, awake=False)
    assert len(controlnet.transformer_blocks) == len(controlnet.image_projections) == len(context.blocks) == 9
    for copy, block in enumerate(controlnet.transformer_blocks):
        for source, candidate in enumerate(transformer.transformer_blocks):
            same = all(
                torch.equal(a, b)
                for a, b in zip(block.state_dict().values(), candidate.state_dict().values(), strict=True)
            )
            assert same == (source == 2 * copy)
    for name in ("time_text_embed", "context_embedder", "x_embedder"):
        copied, original = getattr(controlnet, name).state_dict(), getattr(transformer, name).state_dict()
        assert copied and all(torch.equal(copied[key], original[key]) for key in original)
    assert next(controlnet.parameters()).data_ptr() != next(transformer.parameters()).data_ptr()


def test_flux_sizes_come_from_the_config_alone() -> None:
    with torch.device("meta"):
        controlnet = MMControlNet(guidance_embeds=True)
        context = ContextAttention(9, 24, 128)
    # dependencies.md counts 3.189 B for nine blocks with nine residual linears, of which M_img is one each.
    assert sum(p.numel() for p in controlnet.parameters()) == pytest.approx(3.19e9, rel=0.01)
    assert sum(p.numel() for p in context.parameters()) == pytest.approx(0.34e9, rel=0.01)


@pytest.mark.parametrize("mlp", [False, True])
def test_projections_start_at_zero_and_wake(mlp) -> None:
    controlnet = MMControlNet.from_transformer(flux_transformer(), (0, 1), mlp)
    made = run(controlnet, text())
    assert [f.shape for f in made.image] == [(1, 6, 32)] * 2 and not any(f.any() for f in made.image)
    context = ContextAttention(2, 2, 16, mlp)
    before = {k: v.clone() for k, v in [*controlnet.state_dict().items(), *context.state_dict().items()]}
    wake_projections(controlnet, 0.5, seed=1)
    wake_projections(context, 0.5, seed=2)
    after = {**controlnet.state_dict(), **context.state_dict()}
    changed = sorted(k for k in after if not torch.equal(after[k], before[k]))
    tail = "2.weight" if mlp else "weight"
    assert changed == sorted(
        [f"image_projections.{i}.{tail}" for i in (0, 1)] + [f"blocks.{i}.text_projection.{tail}" for i in (0, 1)]
    )
    # std / sqrt(D): a feature of unit variance becomes one of standard deviation `std`.
    assert float(after[f"image_projections.0.{tail}"].std()) == pytest.approx(0.5 / 32**0.5, rel=0.1)
    assert all(f.abs().mean() > 1e-3 for f in run(controlnet, text()).image)


def test_text_features_are_those_of_diffusers_blocks() -> None:
    """The first block's outputs equal those of the DiT it was copied from, fed with the condition."""
    transformer = flux_transformer()
    controlnet, _ = control_for(transformer, (0, 1))
    words, seen = text(seed=6), []
    transformer.transformer_blocks[0].register_forward_hook(lambda _, a, out: seen.append(out))
    made = run(controlnet, words, t=0.3)
    dit = ConditionedDiT(transformer, None, (), mask_pads=False)
    with torch.no_grad():
        dit(latent(seed=3), torch.tensor([0.3]), words, None, 1.0)
        expected = controlnet.image_projections[0](seen[0][1])
    assert made.text is not None
    assert torch.allclose(made.text[0], seen[0][0], atol=1e-5)
    assert torch.allclose(made.image[0], expected, atol=1e-5)


@pytest.mark.parametrize("changed", ["condition", "tokens", "pooled", "t"])
def test_everything_it_is_told_matters(changed) -> None:
    controlnet, _ = control_for(flux_transformer(), (0, 1))
    words = text(seed=1)
    base = run(controlnet, words)
    other = {
        "condition": lambda: run(controlnet, words, seed=4),
        "tokens": lambda: run(controlnet, TextEmbedding(-words.tokens_BTD, words.pooled_BD, None)),
        "pooled": lambda: run(controlnet, TextEmbedding(words.tokens_BTD, -words.pooled_BD, None)),
        "t": lambda: run(controlnet, words, t=0.8),
    }[changed]()
    assert base.text is not None and other.text is not None
    for one, two in zip([*base.image, *base.text], [*other.image, *other.text], strict=True):
        assert (one - two).abs().max() > 1e-4


def test_padding_of_the_local_text_changes_nothing() -> None:
    """Masked in the ControlNet and in the cross-attention, so neither features nor the velocity notice it."""
    transformer = flux_transformer()
    controlnet, context = control_for(transformer, (0, None))
    dit = ConditionedDiT(transformer, context, (0, None), mask_pads=True)
    words, glob = text(seed=1), text(seed=2)
    results = []
    for local in (words, padded(words, 4)):
        made = run(controlnet, local, mask_pads=True)
        with torch.no_grad():
            results.append((made, dit(latent(), torch.tensor([0.6]), glob, dit.prepare(made), 1.0)))
    (one, v_one), (two, v_two) = results
    assert torch.allclose(one.image[0], two.image[0], atol=1e-5)
    assert (v_one - v_two).abs().max() <= 1e-5
    seen = run(controlnet, padded(words, 4), mask_pads=False)
    assert (seen.image[0] - one.image[0]).abs().max() > 1e-4  # FLUX: padding is seen by self-attention


def test_local_text_reaches_the_picture_through_control_only() -> None:
    transformer = flux_transformer()
    controlnet, context = control_for(transformer, (0, None))
    dit = ConditionedDiT(transformer, context, (0, None), mask_pads=False)
    glob, one, two = text(seed=2), run(controlnet, text(seed=3)), run(controlnet, text(seed=4))

    def v(image: ControlFeatures, words: ControlFeatures) -> torch.Tensor:
        injections = dit.prepare(ControlFeatures(image.image, words.text, None))
        with torch.no_grad():
            return dit(latent(), torch.tensor([0.6]), glob, injections, 1.0)

    assert torch.equal(v(one, one), v(one, one))
    assert (v(one, one) - v(one, two)).abs().max() > 1e-4  # by cross-attention
    assert (v(one, one) - v(two, one)).abs().max() > 1e-4  # by the image branch
    torch.nn.init.zeros_(cast(torch.nn.Linear, context.blocks[0].text_projection).weight)
    assert torch.equal(v(one, one), v(one, two))


def test_rows_are_tiles_of_the_batch() -> None:
    controlnet, _ = control_for(flux_transformer(), (0, 1))
    made = run(controlnet, text(batch=3, words=4))
    part = made.rows(1, 3)
    assert part.text is not None and made.text is not None and part.text_mask_BT is not None
    assert all(torch.equal(p, f[1:3]) for p, f in zip(part.image + part.text, made.image + made.text, strict=True))
    assert part.text_mask_BT.shape == (2, 5)
    assert ControlFeatures(made.image, None, None).rows(0, 1).text is None


def test_packing_is_diffusers_own_and_is_undone() -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    z = latent(2, 6, 10)
    assert torch.equal(pack(z), FluxPipeline._pack_latents(z, 2, 8, 6, 10))
    assert torch.equal(unpack(pack(z), 6, 10), z)
    own = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(4, 6, 10, torch.device("cpu")), torch.cat([torch.zeros(4, 3), own]))
    with pytest.raises(ValueError, match="even"):
        pack(latent(1, 5, 4))
