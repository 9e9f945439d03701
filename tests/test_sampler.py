"""The two stages on a canvas: what each tile is shown, how velocities merge, when control features are computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamsr_cli import flow
from dreamsr_cli.models.bundle import Restorer, open_bundle
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.multidiffusion import blend
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.sampler import Sampler, Texts, renoise
from dreamsr_cli.tiling import make_grid

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    bundle = open_bundle(str(tiny_bundle))
    return (
        bundle,
        bundle.open_restorer(CPU, torch.float32, mask_pads=True),
        bundle.open_text_encoder(CPU, torch.float32),
    )


def make_sampler(opened, height=128, width=176, tile=64, overlap=16, batch=2, texts=None, **control) -> Sampler:
    bundle, restorer, encoder = opened
    grid = make_grid(height, width, tile, overlap)
    words = texts or [f"tile number {tile.index}" for tile in grid.tiles]
    (glob, *local), _ = encoder.encode(["the whole photo", *words], 128)
    settings = replace(bundle.config.control, **control)
    return Sampler(restorer, grid, Texts(glob, local), bundle.config.sampling, settings, batch, SilentProgress())


def latent(sampler: Sampler, seed: int = 0) -> np.ndarray:
    grid = sampler.grid
    channels = sampler.restorer.dit.transformer.config["in_channels"] // 4
    shape = (channels, grid.canvas_height // 8, grid.canvas_width // 8)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Calls:
    """Inputs of every forward pass of one network, by a hook on the real module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.inputs: list[tuple] = []
        self._handle = module.register_forward_pre_hook(lambda _, args: self.inputs.append(args))

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


def test_condition_of_a_tile_is_the_crop_at_the_same_place(opened) -> None:
    sampler = make_sampler(opened, batch=1)
    z_dr = latent(sampler)
    with Calls(sampler.restorer.controlnet) as control, Calls(sampler.restorer.dit) as dit:
        sampler.texture(z_dr, 0.8, 1, seed=3, guidance=None)
    z_t = renoise(z_dr, 0.8, 3)
    assert len(control.inputs) == len(dit.inputs) == len(sampler.grid.tiles) > 4
    for tile, seen, drawn in zip(sampler.grid.tiles, control.inputs, dit.inputs, strict=True):
        top, left, height, width = tile.latent_box()
        here = np.s_[:, top : top + height, left : left + width]
        assert np.array_equal(seen[0][0].numpy(), z_dr[here])
        assert np.array_equal(drawn[0][0].numpy(), z_t[here])


def test_each_tile_is_told_its_own_local_text(opened) -> None:
    sampler = make_sampler(opened, batch=1)
    with Calls(sampler.restorer.controlnet) as control:
        sampler.remove(latent(sampler))
    for tile, seen in zip(sampler.grid.tiles, control.inputs, strict=True):
        own = sampler.texts.local[tile.index].tokens_BTD
        assert torch.equal(seen[2].tokens_BTD[:, : own.shape[1]], own)


def test_one_tile_equals_no_tiles(opened) -> None:
    sampler = make_sampler(opened, tile=0, texts=["local words"])
    z_lq = latent(sampler)
    restorer: Restorer = sampler.restorer
    local, glob = stack([sampler.texts.local[0]]), stack([sampler.texts.glob])
    z = torch.from_numpy(z_lq)[None]
    with torch.no_grad():
        ready = restorer.dit.prepare(restorer.controlnet(z, torch.zeros(1), local, mask_pads=True))
        assert restorer.lora is not None
        with restorer.lora.on():
            z_dr = z - restorer.dit(z, torch.ones(1), glob, ready)
        assert np.array_equal(sampler.remove(z_lq), z_dr[0].numpy())
        ready = restorer.dit.prepare(restorer.controlnet(z_dr, torch.zeros(1), local, mask_pads=True))
        z_t = torch.from_numpy(renoise(z_dr[0].numpy(), 0.8, 5))[None]
        expected = flow.euler(z_t, lambda z, t: restorer.dit(z, torch.tensor([t]), glob, ready), flow.timesteps(0.8, 3))
    found = sampler.texture(z_dr[0].numpy(), 0.8, 3, seed=5, guidance=None)
    assert np.abs(found - expected[0].numpy()).max() < 1e-5


def test_merged_velocity_is_the_blend_of_tiles_in_any_order(opened) -> None:
    sampler = make_sampler(opened, batch=1)
    z_lq = latent(sampler)
    slots = {}
    assert sampler.restorer.lora is not None
    with torch.inference_mode(), sampler.restorer.lora.on():
        for tile in reversed(sampler.grid.tiles):
            z = sampler._crops(z_lq, (tile,))
            slots[tile.index] = (
                sampler.restorer.dit(z, torch.ones(1), sampler._glob, sampler._control(z, (tile,), 1.0, None))
            )[0].numpy()
    expected = z_lq - np.float32(sampler.sampling.t_r) * blend(sampler.grid, slots)
    assert np.array_equal(sampler.remove(z_lq), expected)


def test_clean_control_runs_once_per_tile_and_sampled_every_step(opened) -> None:
    for timestep, runs in (("clean", 1), ("sampled", 3)):
        sampler = make_sampler(opened, batch=1, timestep=timestep)
        with Calls(sampler.restorer.controlnet) as control:
            sampler.texture(latent(sampler), 0.8, 3, seed=0, guidance=None)
        assert len(control.inputs) == runs * len(sampler.grid.tiles)
        seen = {round(float(args[1][0]), 4) for args in control.inputs}
        assert seen == ({0.0} if timestep == "clean" else {0.8, 0.5333, 0.2667})


def test_features_beyond_the_budget_are_computed_again_with_the_same_bytes(opened, monkeypatch) -> None:
    sampler = make_sampler(opened)
    z_dr = latent(sampler)
    kept = sampler.texture(z_dr, 0.8, 2, seed=1, guidance=None)
    monkeypatch.setattr("dreamsr_cli.sampler.CONTROL_BYTES", 0)
    assert np.array_equal(sampler.texture(z_dr, 0.8, 2, seed=1, guidance=None), kept)


def test_lora_is_on_in_removal_only(opened) -> None:
    sampler = make_sampler(opened)
    states: dict[str, set[bool]] = {"remove": set(), "texture": set()}
    lora = sampler.restorer.lora
    assert lora is not None
    for stage in states:
        handle = sampler.restorer.dit.register_forward_pre_hook(lambda *_, s=stage: states[s].add(lora.active))
        if stage == "remove":
            sampler.remove(latent(sampler))
        else:
            sampler.texture(latent(sampler), 0.8, 1, seed=0, guidance=None)
        handle.remove()
    assert states == {"remove": {True}, "texture": {False}}


def test_batches_differ_by_rounding_only(opened) -> None:
    one, four = make_sampler(opened, batch=1), make_sampler(opened, batch=4)
    z_lq = latent(one)
    difference = np.abs(one.remove(z_lq) - four.remove(z_lq))
    assert difference.max() < 1e-4


def test_renoise_draws_each_row_alone() -> None:
    z = np.zeros((3, 6, 5), np.float32)
    whole = renoise(z, 1.0, seed=9)
    assert np.array_equal(whole[:, :2], renoise(z[:, :2], 1.0, seed=9))
    assert not np.array_equal(whole, renoise(z, 1.0, seed=10))
    assert np.array_equal(renoise(whole, 0.0, seed=1), whole)
    big = renoise(np.zeros((8, 64, 64), np.float32), 1.0, seed=0)
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.02
