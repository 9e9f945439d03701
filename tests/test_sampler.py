"""The two stages on a canvas: what each tile is shown, how velocities merge, when control features are computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamsr_cli import flow
from dreamsr_cli.config import CONTROL_BYTES
from dreamsr_cli.journal import Journal
from dreamsr_cli.journal_files import RowFile
from dreamsr_cli.models.bundle import Restorer, open_bundle
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.multidiffusion import blend
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.sampler import REMOVE, Sampler, Texts, renoise
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


class Bench:
    """A sampler on real journals in a temporary folder, with canvases in and out as arrays."""

    def __init__(
        self, opened, folder: Path, height=128, width=176, tile=64, overlap=16, batch=2, texts=None, **control
    ):
        bundle, self.restorer, encoder = opened
        self.folder, self.batch = folder, batch
        self.grid = make_grid(height, width, tile, overlap)
        words = texts or [f"tile number {tile.index}" for tile in self.grid.tiles]
        (glob, *local), _ = encoder.encode(["the whole photo", *words], 128)
        self.texts, self.sampling = Texts(glob, local), bundle.config.sampling
        self.control = replace(bundle.config.control, **control)
        channels = self.restorer.dit.transformer.config["in_channels"] // 4
        self.shape = (channels, self.grid.canvas_height // 8, self.grid.canvas_width // 8)
        self.jobs = 0

    def latent(self, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(self.shape).astype(np.float32)

    def sampler(self, journal: Journal, control_bytes: int = CONTROL_BYTES) -> Sampler:
        return Sampler(
            self.restorer,
            self.grid,
            self.texts,
            self.sampling,
            self.control,
            self.batch,
            journal,
            SilentProgress(),
            control_bytes,
        )

    def on_disk(self, values: np.ndarray, name: str) -> RowFile:
        channels, rows, width = values.shape
        file = RowFile(self.folder / name, rows, width, channels, create=True)
        file.write_rows(0, values)
        return file

    def journal(self) -> Journal:
        self.jobs += 1
        return Journal(self.folder / f"job{self.jobs}.dreamsr", {}, 0)

    def remove(self, z_lq: np.ndarray) -> np.ndarray:
        with self.journal() as journal:
            return self.sampler(journal).remove(self.on_disk(z_lq, "z_lq")).rows(0, self.shape[1]).copy()

    def texture(self, z_dr: np.ndarray, t: float, steps: int, seed: int = 0, **settings) -> np.ndarray:
        with self.journal() as journal:
            sampler = self.sampler(journal, **settings)
            return sampler.texture(self.on_disk(z_dr, "z"), t, steps, seed, None).rows(0, self.shape[1]).copy()


@pytest.fixture
def bench(opened, tmp_path):
    return lambda **settings: Bench(opened, tmp_path, **settings)


class Calls:
    """Inputs of every forward pass of one network, by a hook on the real module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.inputs: list[tuple] = []
        self._handle = module.register_forward_pre_hook(lambda _, args: self.inputs.append(args))

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


def test_condition_of_a_tile_is_the_crop_at_the_same_place(bench) -> None:
    b = bench(batch=1)
    z_dr = b.latent()
    with Calls(b.restorer.controlnet) as control, Calls(b.restorer.dit) as dit:
        b.texture(z_dr, 0.8, 1, seed=3)
    z_t = renoise(z_dr, 0.8, 3)
    assert len(control.inputs) == len(dit.inputs) == len(b.grid.tiles) > 4
    for tile, seen, drawn in zip(b.grid.tiles, control.inputs, dit.inputs, strict=True):
        top, left, height, width = tile.latent_box()
        here = np.s_[:, top : top + height, left : left + width]
        assert np.array_equal(seen[0][0].numpy(), z_dr[here])
        assert np.array_equal(drawn[0][0].numpy(), z_t[here])


def test_each_tile_is_told_its_own_local_text(bench) -> None:
    b = bench(batch=1)
    with Calls(b.restorer.controlnet) as control:
        b.remove(b.latent())
    for tile, seen in zip(b.grid.tiles, control.inputs, strict=True):
        own = b.texts.local[tile.index].tokens_BTD
        assert torch.equal(seen[2].tokens_BTD[:, : own.shape[1]], own)


def test_local_texts_may_go_to_both_networks(bench) -> None:
    b = bench(batch=4)
    b.texts = replace(b.texts, local_to_both=True)
    z_lq = b.latent()
    with Calls(b.restorer.dit) as dit:
        whole = b.remove(z_lq)
    for tiles, seen in zip(b.grid.batches(4), dit.inputs, strict=True):
        padded = tiles + (tiles[-1],) * (4 - len(tiles))
        expected = stack([b.texts.local[tile.index] for tile in padded], b.texts.length)
        assert torch.equal(seen[2].tokens_BTD, expected.tokens_BTD)
        assert torch.equal(seen[2].pooled_BD, expected.pooled_BD)
    one = bench(batch=1)
    one.texts = replace(one.texts, local_to_both=True)
    assert np.abs(one.remove(z_lq) - whole).max() < 1e-4


@pytest.mark.parametrize("local_to_both", [False, True])
def test_a_longer_text_in_one_tile_changes_no_other_tile_by_a_bit(bench, local_to_both) -> None:
    made = []
    for words in ("grass", "long grass and wild flowers in front of an old wall of grey stone, with moss on it"):
        b = bench(batch=4, texts=[words if index == 5 else f"tile number {index}" for index in range(12)])
        b.texts = replace(b.texts, local_to_both=local_to_both, most_tokens=128)
        made.append(b.remove(b.latent()))
    top, left, height, width = b.grid.tiles[5].latent_box()
    same_HW = (made[0] == made[1]).all(axis=0)
    assert not same_HW[top : top + height, left : left + width].all()
    same_HW[top : top + height, left : left + width] = True
    assert same_HW.all()


def test_one_tile_equals_no_tiles(bench) -> None:
    b = bench(tile=0, texts=["local words"])
    z_lq = b.latent()
    restorer: Restorer = b.restorer
    local, glob = stack([b.texts.local[0]]), stack([b.texts.glob])
    z = torch.from_numpy(z_lq)[None]
    with torch.no_grad():
        ready = restorer.dit.prepare(restorer.controlnet(z, torch.zeros(1), local, mask_pads=True))
        assert restorer.lora is not None
        with restorer.lora.on():
            z_dr = z - restorer.dit(z, torch.ones(1), glob, ready)
        # The sampler adds the LoRA's change to the weights, which is the same up to rounding.
        assert np.abs(b.remove(z_lq) - z_dr[0].numpy()).max() < 1e-5
        ready = restorer.dit.prepare(restorer.controlnet(z_dr, torch.zeros(1), local, mask_pads=True))
        z_t = torch.from_numpy(renoise(z_dr[0].numpy(), 0.8, 5))[None]
        expected = flow.euler(z_t, lambda z, t: restorer.dit(z, torch.tensor([t]), glob, ready), flow.timesteps(0.8, 3))
    found = b.texture(z_dr[0].numpy(), 0.8, 3, seed=5)
    assert np.abs(found - expected[0].numpy()).max() < 1e-5


def test_corrections_become_the_velocity_that_points_at_condition_minus_correction(bench) -> None:
    b = bench(tile=0, texts=["local words"])
    z_dr, sampling = b.latent(), b.sampling
    b.sampling = replace(sampling, prediction="correction")
    restorer: Restorer = b.restorer
    local, glob = stack([b.texts.local[0]]), stack([b.texts.glob])
    condition, z_t = torch.from_numpy(z_dr)[None], torch.from_numpy(renoise(z_dr, 0.5, 5))[None]
    with torch.no_grad():
        ready = restorer.dit.prepare(restorer.controlnet(condition, torch.zeros(1), local, mask_pads=True))
        correction = restorer.dit(z_t, torch.tensor([0.5]), glob, ready)
    # One step from t = 0.5 to 0 lands on the predicted clean latent.
    assert np.abs(b.texture(z_dr, 0.5, 1, seed=5) - (condition - correction)[0].numpy()).max() < 1e-5
    removed = b.remove(z_dr)
    b.sampling = sampling
    assert np.array_equal(removed, b.remove(z_dr)), "with t_r = 1 a correction is the velocity"


def test_merged_velocity_is_the_blend_of_tiles_in_any_order(bench) -> None:
    b = bench(batch=1)
    z_lq, slots = b.latent(), {}
    with b.journal() as journal:
        sampler, file = b.sampler(journal), b.on_disk(z_lq, "z_lq")
        with torch.inference_mode():
            for tile in reversed(b.grid.tiles):
                v_BCHW = sampler._removal_velocity(sampler._crops(file, (tile,)), (tile,), None)
                slots[tile.index] = v_BCHW[0].numpy()
    expected = z_lq - np.float32(b.sampling.t_r) * blend(b.grid, slots)
    assert np.array_equal(b.remove(z_lq), expected)


def test_clean_control_runs_once_per_tile_and_sampled_every_step(bench) -> None:
    for timestep, runs in (("clean", 1), ("sampled", 3)):
        b = bench(batch=1, timestep=timestep)
        with Calls(b.restorer.controlnet) as control:
            b.texture(b.latent(), 0.8, 3)
        assert len(control.inputs) == runs * len(b.grid.tiles)
        seen = {round(float(args[1][0]), 4) for args in control.inputs}
        assert seen == ({0.0} if timestep == "clean" else {0.8, 0.5333, 0.2667})


def test_features_beyond_the_budget_are_computed_again_with_the_same_bytes(bench) -> None:
    b = bench()
    z_dr = b.latent()
    with Calls(b.restorer.controlnet) as kept_calls:
        kept = b.texture(z_dr, 0.8, 2)
    with Calls(b.restorer.controlnet) as again_calls:
        again = b.texture(z_dr, 0.8, 2, control_bytes=0)
    assert np.array_equal(kept, again)
    assert len(again_calls.inputs) == 2 * len(kept_calls.inputs)


def test_lora_is_on_in_removal_only(bench) -> None:
    """On, or added to the weights (`RestorationLoRA.folded`)."""
    b = bench()
    base = b.restorer.dit.transformer.transformer_blocks[0].attn.to_q.get_base_layer()
    own = base.weight.detach().clone()
    states: dict[str, set[bool]] = {"remove": set(), "texture": set()}
    for stage, work in (("remove", b.remove), ("texture", lambda z: b.texture(z, 0.8, 1))):

        def look(*_: object, note: set[bool] = states[stage]) -> None:
            note.add(b.restorer.lora.active or not torch.equal(base.weight, own))

        handle = b.restorer.dit.register_forward_pre_hook(look)
        work(b.latent())
        handle.remove()
    assert states == {"remove": {True}, "texture": {False}}
    assert torch.equal(base.weight, own)


def test_batches_differ_by_rounding_only(bench) -> None:
    one, four = bench(batch=1), bench(batch=4)
    z_lq = one.latent()
    assert np.abs(one.remove(z_lq) - four.remove(z_lq)).max() < 1e-4


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_stopped_step_goes_on_at_the_tile_with_the_same_bytes(bench, stop) -> None:
    b = bench(batch=2, overlap=32)
    z_lq = b.latent()
    whole = b.remove(z_lq)
    calls = []

    def give_up(*_) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    folder = b.folder / "stopped.dreamsr"
    handle = b.restorer.dit.register_forward_pre_hook(give_up)
    with pytest.raises(KeyboardInterrupt), Journal(folder, {}, 0) as journal:
        b.sampler(journal).remove(b.on_disk(z_lq, "z"))
    handle.remove()
    with Journal(folder, {}, 0) as journal, Calls(b.restorer.dit) as rest:
        again = b.sampler(journal).remove(b.on_disk(z_lq, "z")).rows(0, b.shape[1]).copy()
    assert np.array_equal(again, whole)
    assert len(rest.inputs) == len(b.grid.batches(2)) - (stop - 1)


def test_a_damaged_slot_is_computed_again(bench) -> None:
    b = bench(batch=1)
    z_lq = b.latent()
    whole = b.remove(z_lq)
    folder = b.folder / "damaged.dreamsr"
    seen = []

    def give_up(*_) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    handle = b.restorer.dit.register_forward_pre_hook(give_up)
    with pytest.raises(KeyboardInterrupt), Journal(folder, {}, 0) as journal:
        b.sampler(journal).remove(b.on_disk(z_lq, "z"))
    handle.remove()
    with (folder / "slots.f32").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff\xff\xff")
    with Journal(folder, {}, 0) as journal:
        sampler = b.sampler(journal)
        slots = sampler._open_slots(sampler.layout)
        slots.begin(REMOVE)
        assert [slots.holds(i) for i in range(3)] == [False, True, False]
        assert np.array_equal(sampler.remove(b.on_disk(z_lq, "z")).rows(0, b.shape[1]), whole)


def test_renoise_draws_each_row_alone() -> None:
    z = np.zeros((3, 6, 5), np.float32)
    whole = renoise(z, 1.0, seed=9)
    assert np.array_equal(whole[:, 2:4], renoise(z[:, 2:4], 1.0, seed=9, first_row=2))
    assert not np.array_equal(whole, renoise(z, 1.0, seed=10))
    assert np.array_equal(renoise(whole, 0.0, seed=1), whole)
    big = renoise(np.zeros((8, 64, 64), np.float32), 1.0, seed=0)
    assert abs(big.mean()) < 0.02 and abs(big.std() - 1) < 0.02
