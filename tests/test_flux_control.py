"""Public FLUX ControlNets: the same features as diffusers' own walk, and refusals of what we can't feed."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.models.flux_control import FluxControl
from dreamsr_cli.models.tokens import pack, position_ids


def flux_controlnet(**changes: object) -> FluxControlNetModel:
    torch.manual_seed(11)
    settings = {
        "in_channels": 32,
        "num_layers": 2,
        "num_single_layers": 0,
        "attention_head_dim": tiny_models.HEAD_DIM,
        "num_attention_heads": tiny_models.HEADS,
        "joint_attention_dim": tiny_models.T5_WIDTH,
        "pooled_projection_dim": tiny_models.CLIP_WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": tiny_models.AXES,
    }
    model = FluxControlNetModel(**{**settings, **changes}).eval()
    for seed, layer in enumerate([*model.controlnet_blocks, model.controlnet_x_embedder]):
        assert isinstance(layer, torch.nn.Linear)
        tiny_models.fill(layer.weight, 0.2, seed)
    return model


@torch.no_grad()
def test_features_are_those_of_diffusers() -> None:
    model = flux_controlnet()
    condition, noisy = tiny_models.latent(2, seed=1), tiny_models.latent(2, seed=2)
    text, t = tiny_models.text(2), torch.tensor([0.3, 0.8])
    ours = FluxControl(model)(condition, t, text, False, 3.5, noisy)
    ids = position_ids(text.tokens_BTD.shape[1], 6, 4, condition.device)
    theirs, _ = model(
        hidden_states=pack(noisy),
        controlnet_cond=pack(condition),
        encoder_hidden_states=text.tokens_BTD,
        pooled_projections=text.pooled_BD,
        timestep=t,
        img_ids=ids[text.tokens_BTD.shape[1] :],
        txt_ids=ids[: text.tokens_BTD.shape[1]],
        guidance=torch.full((2,), 3.5),
        return_dict=False,
    )
    assert len(ours.image) == 2 and ours.text is None
    for one, other in zip(ours.image, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.abs().max() > 1e-3


@torch.no_grad()
def test_condition_and_noise_both_count() -> None:
    control = FluxControl(flux_controlnet())
    text, t = tiny_models.text(1), torch.tensor([0.5])
    one, two = tiny_models.latent(seed=1), tiny_models.latent(seed=2)

    def feature(condition: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return control(condition, t, text, False, 3.5, noisy).image[0]

    assert (feature(one, two) - feature(two, two)).abs().max() > 1e-3
    assert (feature(one, two) - feature(one, one)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"), [({"num_mode": 7}, "union"), ({"num_single_layers": 1}, "single blocks")]
)
def test_other_kinds_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FluxControl(flux_controlnet(**changes))
