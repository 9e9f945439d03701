"""The cleaner's second manner trained on what users get: with what stage 2 and grain change in its crops."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cleaners import save_bundle_that_cleans
from enlargers import DAMAGED
from PIL import Image
from skimage import data
from tiny_models import CPU, RECIPE

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.grain import Grain
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.clean_steps import cleaned
from dreamsr_cli.training.finishing import added_by_default, grain_on
from dreamsr_cli.training.grain_steps import finished
from dreamsr_cli.training.networks import Networks, build_on
from dreamsr_cli.training.recipe import CropPlan, Recipe, load_recipe
from dreamsr_cli.training.run_bundle import export
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "finishing-cache"))


def seen(what: str) -> Recipe:
    """A tiny recipe in which LPIPS sees that."""
    crops = (CropPlan(64, 2, 1.0),)
    data_recipe = replace(
        RECIPE.data, crops=crops, preset="bicubic", mix={}, full_photo=0.0, hold_out=1, words=False, workers=0
    )
    return replace(RECIPE, steps=2, data=data_recipe, loss=replace(RECIPE.loss, cleaner_seen=what))


@pytest.fixture(scope="module")
def grainy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny bundle that cleans, keeps part of what stage 2 changes, and adds a lot of grain."""
    folder = tmp_path_factory.mktemp("finishing")
    plain = save_bundle_that_cleans(folder / "plain", DAMAGED)
    made = build_on(RECIPE, STAGES["grain"], plain, None, CPU, torch.float32)
    torch.manual_seed(5)
    made.grain = Grain(8, 1)
    assert made.grain.exit.bias is not None
    torch.nn.init.constant_(made.grain.exit.bias, -2.0)
    defaults = replace(made.config.defaults, grain=1.5, texture=0.7)
    export(made, None, folder / "grainy", replace(made.config, defaults=defaults))
    return open_bundle(str(folder / "grainy"))


def opened(bundle: Bundle, recipe: Recipe, stage: str = "cleaner-looks") -> Networks:
    return build_on(recipe, STAGES[stage], bundle, None, CPU, torch.float32)


def some_crops() -> Crops:
    hq = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return Crops(3, hq, hq, ["a"] * 2, ["b"] * 2, lq=hq[..., ::4, ::4], looks=("damaged",) * 2)


@torch.no_grad()
def test_it_is_what_grain_learns_on_and_as_much_grain_as_users_get(grainy) -> None:
    recipe, crops = seen("finished"), some_crops()
    made = opened(grainy, recipe, "grain")
    picture = cleaned(made, crops, "pleasing").clamp(0, 1) * 2 - 1
    plain = finished(made, recipe, crops)
    grain = grain_on(made, recipe, crops, plain)
    added = added_by_default(made, recipe, crops, picture)
    assert grain.std() > 0.01 and (plain - picture).std() > 0.001
    assert torch.allclose(picture + added, plain + 1.5 * grain, atol=1e-5)
    without = replace(made, grain=None)
    assert torch.allclose(picture + added_by_default(without, recipe, crops, picture), plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["please", "clean-both"])
def test_the_perceptual_distance_sees_it_and_only_the_cleaner_learns(kind, grainy) -> None:
    stage = {"please": "cleaner-looks", "clean-both": "cleaner-both"}[kind]
    crops, looked_at = some_crops(), []

    def perceptual(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        looked_at.append(picture)
        return (picture * target).mean((1, 2, 3))

    gradients = []
    for what in ("cleaned", "finished"):
        recipe = seen(what)
        made = opened(grainy, recipe, stage)
        learns = made.train_only(STAGES[stage].trains)
        run_step(kind, made, recipe, perceptual, None, crops).loss.backward()
        gradients.append([parameter.grad for parameter in learns.values()])
        assert made.cleaner is not None and (made.grain is None) == (what == "cleaned")
        for other in (made.transformer, made.controlnet, made.grain):
            assert other is None or all(p.grad is None and not p.requires_grad for p in other.parameters())
    plain, whole = (picture.detach() for picture in looked_at)
    assert torch.allclose(whole - plain, added_by_default(made, recipe, crops, plain), atol=1e-6)
    # This distance's gradient is the target, whatever picture it sees; what was added has none.
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients, strict=True))


def test_a_run_says_how_good_the_finished_crops_are(grainy, tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()[:300, :400]).resize((200, 150)).save(photos / f"{name}.png")
    out = tmp_path / "run"
    job = TrainJob(
        STAGES["cleaner-looks"], seen("finished"), "tiny.toml", photos, out, model=str(grainy.folder), device=CPU
    )
    train(job, SilentProgress())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = [line["validation"] for line in lines if "validation" in line][-1]
    assert set(figures) == {"cubic_psnr", "cleaned_psnr", "finished_psnr"}
    assert figures["finished_psnr"] < figures["cleaned_psnr"]
    assert [p.name for p in (out / "bundle").iterdir() if p.is_dir()] == ["cleaner"]
    kept = open_bundle(None, str(out)).open_grain()
    assert kept is not None and kept.exit.bias is not None and bool((kept.exit.bias == -2).all())


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="use one of cleaned, finished"):
        load_recipe("mini", ["loss.cleaner_seen=both"])
