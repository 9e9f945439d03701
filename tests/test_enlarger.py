"""The enlarger of clean photos: the network, its rows, and its stage of training."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from enlargers import CLEAN, cubic_of, enlarger, network, planes, refiner, rows_of, save_bundle_that_says
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from tiny_models import CPU, RECIPE

from dreamsr_cli.config import Looks
from dreamsr_cli.errors import ConfigError, TrainingError, UsageError
from dreamsr_cli.models.autoencoder import PatchAutoencoder, Refiner
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.enlarger import FACTOR, MANNERS, Enlarger, fingerprint
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.resample import resize
from dreamsr_cli.training.looks_steps import enlarged
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import CropPlan, Recipe
from dreamsr_cli.training.run_bundle import untouched
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "enlarger-cache"))


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_refitted_to_its_own_refiner_it_is_what_it_was() -> None:
    made, of, cubic = enlarger(refiner()), refiner(), torch.rand(2, 3, 36, 56)
    again = made.refitted(of, refiner())
    for looks in MANNERS:
        assert torch.allclose(again(of, cubic, looks), made(of, cubic, looks), atol=1e-5)


@torch.no_grad()
def test_refitted_to_another_refiner_it_is_closer_than_that_one() -> None:
    of, cubic = refiner(), torch.rand(2, 3, 36, 56)
    made = Enlarger.of(of, 3)
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    later = copy.deepcopy(of)
    for conv in later.convolutions:
        conv.weight.add_(torch.randn_like(conv.weight) * 0.02)
    moved, fresh = made.refitted(of, later), Enlarger.of(later, 3)
    for looks in MANNERS:
        wanted = made(of, cubic, looks)
        near, far = ((x(later, cubic, looks) - wanted).square().mean() for x in (moved, fresh))
        assert near < far / 4
    assert moved.config["refiner"] == fingerprint(later) != made.config["refiner"]
    with pytest.raises(ValueError, match="8 x 1 and 8 x 2"):
        made.refitted(of, Refiner(8, 2, True))


@torch.no_grad()
@pytest.mark.parametrize("restored", [True, False])
def test_untrained_it_does_what_the_refiner_does_to_stage_1s_results(restored) -> None:
    made, cubic = refiner(restored=restored), torch.rand(2, 3, 36, 56)
    expected = cubic + made(cubic * 2 - 1, restored=True) / 2
    for looks in MANNERS:
        assert torch.allclose(Enlarger.of(made, 3)(made, cubic, looks), expected, atol=1e-6)
    assert (expected - cubic).abs().max() > 0.01


@torch.no_grad()
def test_merged_it_is_a_refiner_of_its_own() -> None:
    made, of, cubic = enlarger(refiner()), refiner(), torch.rand(2, 3, 36, 56)
    for looks in MANNERS:
        learnt = made(of, cubic, looks)
        assert torch.allclose(cubic + made.merged(of, looks)(cubic * 2 - 1) / 2, learnt, atol=1e-6)
        assert (learnt - Enlarger.of(of, 3)(of, cubic, looks)).abs().max() > 0.01
    assert (learnt - made(of, cubic, MANNERS[0])).abs().max() > 0.01


def test_gradients_reach_its_own_weights_alone() -> None:
    made, of = enlarger(refiner()), refiner()
    made(of, torch.rand(1, 3, 16, 16), "clean").square().mean().backward()
    learning = [p for name, p in made.named_parameters() if "compressed" not in name]
    assert all(p.grad is not None and p.grad.any() for p in learning)
    assert all(p.grad is None for p in made.manner("compressed").parameters())
    assert all(p.grad is None for p in of.parameters())


def test_a_fingerprint_is_of_the_weights_as_they_ship() -> None:
    made = refiner()
    shipped = copy.deepcopy(made).to(torch.bfloat16).float()
    assert fingerprint(made) == fingerprint(shipped) == enlarger(made).config["refiner"]
    assert fingerprint(made) != fingerprint(refiner(seed=5))


# ---------------------------------------------------------------- its rows


@torch.no_grad()
def test_rows_are_those_of_the_whole_photo() -> None:
    made, photo_PQC = network(), np.random.default_rng(0).random((150, 20, 3), np.float32)
    rows = rows_of(made, photo_PQC, 600, 80)
    whole = rows.read_rows(0, 600)
    cubic = cubic_of(planes(photo_PQC))
    expected = (cubic + made(cubic * 2 - 1) / 2)[0].permute(1, 2, 0).clamp(0, 1).numpy()
    assert np.abs(whole - expected).max() < 1e-5
    for top, bottom in [(599, 600), (0, 1), (250, 262), (100, 580), (0, 600)]:
        assert np.array_equal(rows_of(made, photo_PQC, 600, 80).read_rows(top, bottom), whole[top:bottom])
        assert np.array_equal(rows.read_rows(top, bottom), whole[top:bottom])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 130), (70, 3)])
def test_photos_of_any_size(height, width) -> None:
    photo_PQC = np.random.default_rng(1).random((height, width, 3), np.float32)
    rows = rows_of(network(), photo_PQC, FACTOR * height, FACTOR * width)
    assert rows.read_rows(0, FACTOR * height).shape == (FACTOR * height, FACTOR * width, 3)


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 3.3, 8])
def test_other_factors_resize_the_fourfold_photo(factor) -> None:
    made, photo_PQC = network(), np.random.default_rng(2).random((70, 16, 3), np.float32)
    height, width = round(70 * factor), round(16 * factor)
    rows = rows_of(made, photo_PQC, height, width).read_rows(0, height)
    fourfold = planes(rows_of(made, photo_PQC, 280, 64).read_rows(0, 280))
    assert np.abs(rows - resize(fourfold, height, width)[0].permute(1, 2, 0).clamp(0, 1).numpy()).max() < 1e-4


# ---------------------------------------------------------------- its stage

TINY = replace(
    RECIPE,
    steps=150,
    sizes=replace(RECIPE.sizes, enlarger_rank=6),
    data=replace(
        RECIPE.data,
        crops=(CropPlan(64, 4, 1.0),),
        preset="bicubic",
        mix={"jpeg": 0.4},
        full_photo=0.0,
        hold_out=1,
        workers=0,
    ),
    optim=replace(RECIPE.optim, lr=1e-2, warmup=5, ema=0.9),
    loss=replace(RECIPE.loss, pixel_kind="charbonnier"),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos with edges."""
    folder = tmp_path_factory.mktemp("enlarger") / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()[:300, :400]).resize((200, 150)).save(folder / f"{name}.png")
    return folder


def job(photos: Path, bundle: Path, out: Path, recipe: Recipe = TINY) -> TrainJob:
    return TrainJob(STAGES["enlarger"], recipe, "tiny.toml", photos, out, model=str(bundle), device=CPU)


@pytest.fixture(scope="module")
def trained(photos, tiny_bundle, tmp_path_factory) -> Path:
    """The folder of a run."""
    out = tmp_path_factory.mktemp("enlarger-run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "enlarger-cache"))
        train(job(photos, tiny_bundle, out), SilentProgress())
    return out


def test_it_learns_to_enlarge_better_than_the_cubic(trained) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    figures = [line["validation"] for line in lines if "validation" in line][-1]
    assert set(figures) == {"cubic_psnr", "enlarged_psnr"}
    assert figures["enlarged_psnr"] > figures["cubic_psnr"] + 0.1
    assert "undamaged crops enlarged" in (trained / "bundle" / "README.md").read_text()


def test_stages_that_keep_its_refiner_keep_the_enlarger(trained, tiny_bundle, photos, tmp_path) -> None:
    made, base = open_bundle(None, str(trained)), open_bundle(str(tiny_bundle))
    assert base.open_enlarger() is None
    assert [p.name for p in (trained / "bundle").iterdir() if p.is_dir()] == ["enlarger"]
    assert made.part_folder("transformer") == base.part_folder("transformer")
    known = made.open_enlarger()
    assert known is not None and known.config["rank"] == 6
    recipe = replace(RECIPE, condition="removed", steps=1)
    for stage, model, start in (("controlnet", str(trained / "bundle"), None), ("backbone", None, str(trained))):
        out = tmp_path / stage
        begun = TrainJob(STAGES[stage], recipe, "tiny.toml", photos, out, model, start, device=CPU)
        train(begun, SilentProgress())
        kept = open_bundle(None, str(out)).open_enlarger()
        # Stage backbone trains the refiner that it was made for.
        assert (kept is None) == (stage == "backbone")
        if kept is not None:
            assert all(torch.equal(value, known.state_dict()[name]) for name, value in kept.state_dict().items())


def test_a_run_goes_on_from_the_enlarger_that_is_there(trained, tiny_bundle, tmp_path) -> None:
    source = open_bundle(None, str(trained))
    known = source.open_enlarger()

    def begun(recipe: Recipe, base: Bundle, start: Bundle | None = None) -> Enlarger:
        made = build_on(recipe, STAGES["enlarger"], base, start, CPU, torch.float32).enlarger
        assert made is not None
        return made

    assert known is not None
    assert torch.equal(begun(TINY, source).down[0], known.down[0])
    assert not torch.equal(begun(replace(TINY, fresh=True), source).down[0], known.down[0])
    # On another refiner it begins as near to what it was as its rank allows.
    other = save_bundle_that_says(tmp_path / "other", CLEAN, seed=9)
    theirs = other.open_autoencoder(CPU, torch.float32)
    assert isinstance(theirs, PatchAutoencoder)
    moved = begun(TINY, other, source)
    assert moved.config["refiner"] == fingerprint(theirs.refiner) and moved.config["rank"] == 6
    assert torch.equal(moved.manner("clean").bias[0], known.manner("clean").bias[0])
    assert not torch.equal(moved.down[0], begun(replace(TINY, fresh=True), other, source).down[0])
    networks = build_on(TINY, STAGES["enlarger"], other, source, CPU, torch.float32)
    assert untouched(networks, other, source, STAGES["enlarger"]) == tuple(
        p for p in other.config.parts if p != "enlarger"
    )
    for part, made in (("controlnet", networks.controlnet), ("transformer", networks.transformer)):
        theirs_own = load_file(other.part_folder(part) / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(v, theirs_own[k]) for k, v in made.state_dict().items() if k in theirs_own)
    # But not where the bundle's own refiner isn't the one that it was made for.
    config = trained / "bundle" / "enlarger" / "config.json"
    before = config.read_text()
    try:
        config.write_text(before.replace(known.config["refiner"], "0" * 16))
        with pytest.raises(ConfigError, match="another refiner"):
            begun(TINY, other, open_bundle(None, str(trained)))
    finally:
        config.write_text(before)


def test_flux_has_no_refiner_to_begin_with(tiny_flux_bundle) -> None:
    with pytest.raises(UsageError, match="no refiner"):
        build_on(TINY, STAGES["enlarger"], open_bundle(str(tiny_flux_bundle)), None, CPU, torch.float32)


def test_damaged_crops_and_other_scales_are_refused(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["enlarger"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    hq = torch.rand(1, 3, 64, 64)
    damaged = Crops(0, hq, hq, [""], [""], lq=hq[..., ::4, ::4], looks=("damaged",))
    with pytest.raises(TrainingError, match="damaged"):
        run_step("enlarge", made, TINY, None, None, damaged)
    with pytest.raises(TrainingError, match="scale 4, these have 2"):
        run_step("enlarge", made, TINY, None, None, Crops(0, hq, hq, [""], [""], lq=hq[..., ::2, ::2], looks=(None,)))


@torch.no_grad()
def test_each_crop_is_enlarged_in_the_manner_of_its_looks(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["enlarger"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    assert made.enlarger is not None
    for parameter in made.enlarger.manner("compressed").parameters():
        parameter.add_(0.1)
    hq = torch.rand(4, 3, 64, 64)
    looks: tuple[Looks | None, ...] = ("compressed", "clean", None, "compressed")
    crops = Crops(0, hq, hq, [""] * 4, [""] * 4, lq=hq[..., ::4, ::4], looks=looks)
    found = enlarged(made, crops)
    for index, manner in enumerate(("compressed", "clean", "clean", "compressed")):
        expected = made.enlarger(made.patches.refiner, hq[index : index + 1], manner)
        assert torch.allclose(found[index], expected[0], atol=1e-6)


def test_a_batch_of_one_manner_gives_every_weight_a_gradient(tiny_bundle) -> None:
    """Else processes that drew other crops would wait for it for ever."""
    made = build_on(TINY, STAGES["enlarger"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    hq = torch.rand(1, 3, 64, 64)
    crops = Crops(0, hq, hq, [""], [""], lq=hq[..., ::4, ::4], looks=("clean",))
    assert made.enlarger is not None
    made.enlarger.requires_grad_(True)
    run_step("enlarge", made, TINY, None, None, crops).loss.backward()
    gradients = {name: parameter.grad for name, parameter in made.enlarger.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    found = {name: bool(gradient.any()) for name, gradient in gradients.items() if gradient is not None}
    assert not any(learns for name, learns in found.items() if "compressed" in name)
    assert found["clean.exit.weight"]


def test_a_plan_counts_it() -> None:
    plan = training_plan(TINY, STAGES["enlarger"], dtype=torch.float32)
    assert set(plan.trained) == {"enlarger"} and plan.trained["enlarger"] == plan.parameters["enlarger"]
    assert plan.activations[0].kind == "enlarge" and plan.activations[0].peak > 0
