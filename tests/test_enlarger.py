"""The enlarger of clean photos: the network, its rows, its stage of training, and the place it takes in upscaling."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from tiny_models import CPU, RECIPE, networks

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.consistency import ConsistentRows
from dreamsr_cli.engine import Engine, Order, UpscaleResult, upscale
from dreamsr_cli.errors import ConfigError, TrainingError, UsageError, WeightsError
from dreamsr_cli.images import open_photo
from dreamsr_cli.looks import LEAST_CHANCE
from dreamsr_cli.models import part_loading
from dreamsr_cli.models.autoencoder import Refiner
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.models.enlarger import FACTOR, EnlargedRows, Enlarger, fingerprint
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.resample import resize
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import CropPlan, Recipe
from dreamsr_cli.training.run_bundle import export
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.steps import Crops, run_step
from dreamsr_cli.training.trainer import TrainJob, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "enlarger-cache"))


@torch.no_grad()
def refiner(seed: int = 0, restored: bool = True) -> Refiner:
    """A small one that changes something everywhere, in each manner otherwise."""
    torch.manual_seed(seed)
    made = Refiner(8, 1, restored).eval()
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@torch.no_grad()
def enlarger(of: Refiner, seed: int = 1) -> Enlarger:
    """One that has learnt something."""
    torch.manual_seed(seed)
    made = Enlarger.of(of, 3).eval()
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def network() -> Refiner:
    """What enlarges."""
    return enlarger(refiner()).merged(refiner())


def rows_of(made: Refiner, photo_PQC: np.ndarray, height: int, width: int) -> EnlargedRows:
    P, Q = photo_PQC.shape[:2]
    return EnlargedRows(made, lambda top, bottom: photo_PQC[top:bottom], P, Q, height, width, CPU)


def planes(photo_PQC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photo_PQC.transpose(2, 0, 1)))[None]


def cubic_of(photo_BCPQ: torch.Tensor) -> torch.Tensor:
    return resize(photo_BCPQ, FACTOR * photo_BCPQ.shape[2], FACTOR * photo_BCPQ.shape[3]).clamp(0, 1)


# ---------------------------------------------------------------- the network


@torch.no_grad()
@pytest.mark.parametrize("restored", [True, False])
def test_untrained_it_does_what_the_refiner_does_to_stage_1s_results(restored) -> None:
    made, cubic = refiner(restored=restored), torch.rand(2, 3, 36, 56)
    expected = cubic + made(cubic * 2 - 1, restored=True) / 2
    assert torch.allclose(Enlarger.of(made, 3)(made, cubic), expected, atol=1e-6)
    assert (expected - cubic).abs().max() > 0.01


@torch.no_grad()
def test_merged_it_is_a_refiner_of_its_own() -> None:
    made, of, cubic = enlarger(refiner()), refiner(), torch.rand(2, 3, 36, 56)
    learnt = made(of, cubic)
    assert torch.allclose(cubic + made.merged(of)(cubic * 2 - 1) / 2, learnt, atol=1e-6)
    assert (learnt - Enlarger.of(of, 3)(of, cubic)).abs().max() > 0.01


def test_gradients_reach_its_own_weights_alone() -> None:
    made, of = enlarger(refiner()), refiner()
    made(of, torch.rand(1, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
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
        RECIPE.data, crops=(CropPlan(64, 4, 1.0),), preset="bicubic", mix={}, full_photo=0.0, hold_out=1, workers=0
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
    assert "clean crops enlarged" in (trained / "bundle" / "README.md").read_text()


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
    assert torch.equal(begun(TINY, source).exit.weight, known.exit.weight)
    assert not torch.equal(begun(replace(TINY, fresh=True), source).exit.weight, known.exit.weight)
    other = save_bundle_that_says(tmp_path / "other", 0.0, seed=9)
    with pytest.raises(ConfigError, match="another refiner"):
        begun(TINY, other, source)


def test_flux_has_no_refiner_to_begin_with(tiny_flux_bundle) -> None:
    with pytest.raises(UsageError, match="no refiner"):
        build_on(TINY, STAGES["enlarger"], open_bundle(str(tiny_flux_bundle)), None, CPU, torch.float32)


def test_damaged_crops_and_other_scales_are_refused(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["enlarger"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    hq = torch.rand(1, 3, 64, 64)
    with pytest.raises(TrainingError, match="damaged"):
        run_step("enlarge", made, TINY, None, None, Crops(0, hq, hq, [""], [""], lq=hq[..., ::4, ::4], clean=(False,)))
    with pytest.raises(TrainingError, match="scale 4, these have 2"):
        run_step("enlarge", made, TINY, None, None, Crops(0, hq, hq, [""], [""], lq=hq[..., ::2, ::2], clean=(None,)))


def test_a_plan_counts_it() -> None:
    plan = training_plan(TINY, STAGES["enlarger"], dtype=torch.float32)
    assert set(plan.trained) == {"enlarger"} and plan.trained["enlarger"] == plan.parameters["enlarger"]
    assert plan.activations[0].kind == "enlarge" and plan.activations[0].peak > 0


# ---------------------------------------------------------------- upscaling with it


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_plan_of_a_clean_photo_has_the_enlarger_in_the_place_of_stage_1(clean, source, tmp_path, strength) -> None:
    output, order = OutputConfig(), Order(source, tmp_path / "a.png")
    calls = []
    for typed in (0.95, 0.0):
        config = UpscaleConfig(tile=64, overlap=16, steps=2, precision="fp32", consistency=typed, strength=strength)
        with Engine(clean, config, output) as engine, engine.read(order, SilentProgress()) as job:
            work = job.work
            calls.append(work.calls)
            assert set(work.calls) == set(work.flops) == set(work.moved)
    with_it, without = calls
    assert (with_it["enlarge"], with_it["remove"], with_it["remove_control"]) == (3, 0, 0)
    assert "enlarge" not in without and without["remove"] > 0
    assert with_it["texture"] == without["texture"]
    assert (with_it["encode"] > 0) == (with_it["decode"] > 0) == (strength > 0)


@torch.no_grad()
def save_bundle_that_says(folder: Path, logit: float, seed: int = 0) -> Bundle:
    """A tiny bundle with an enlarger, and a judge of one opinion."""
    judge = Cleanliness(width=6, hidden=8)
    judge.exit.weight.zero_()
    judge.exit.bias.fill_(logit)
    made = networks()
    made.patches.refiner = refiner(seed)
    export(replace(made, cleanliness=judge, enlarger=enlarger(refiner(seed))), None, folder, made.config)
    return open_bundle(str(folder))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Bundle:
    """Takes every photo for clean (0.95)."""
    return save_bundle_that_says(tmp_path_factory.mktemp("bundles") / "clean", 3.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A photo of more than one strip."""
    path = tmp_path_factory.mktemp("photo") / "a.png"
    Image.fromarray(data.coffee()[100:240, 200:232]).save(path)
    return path


def run(bundle: Bundle, source: Path, target: Path, progress: SilentProgress | None = None, **more) -> UpscaleResult:
    base = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32", color_fix="none")
    return upscale(source, target, bundle, replace(base, **more), OutputConfig(), progress or SilentProgress())


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


def test_without_texture_a_clean_photo_is_the_enlargers(clean, source, tmp_path) -> None:
    said = run(clean, source, tmp_path / "made.png", strength=0.0).to_json()
    assert (said["enlarger"], said["removal"], said["consistency"]) == (True, False, 0.95)
    photo = open_photo(source)
    rows = rows_of(clean.open_clean_refiner(), photo.read_rows(0, 140), 560, 128)
    expected = ConsistentRows(rows.read_rows, EnlargedPhoto(photo, 128, 560), 0.95).read_rows(0, 560)
    assert np.abs(levels(tmp_path / "made.png") - expected.clip(0, 1) * 255).max() <= 0.51


def test_texture_starts_from_the_enlargers_photo(clean, source, tmp_path) -> None:
    """Not from the removal's: with next to no texture the results differ as the enlarged photos do."""
    said = run(clean, source, tmp_path / "made.png", strength=0.05).to_json()
    assert (said["enlarger"], said["removal"]) == (True, False)
    run(clean, source, tmp_path / "cubic.png", strength=0.05, removal=False)
    run(clean, source, tmp_path / "removed.png", strength=0.05, removal=True)
    made, cubic, removed = (levels(tmp_path / f"{name}.png") for name in ("made", "cubic", "removed"))
    assert np.abs(made - cubic).max() > 1 and np.abs(made - removed).max() > 1


def test_reading_a_photo_opens_no_network(clean, source, tmp_path, monkeypatch) -> None:
    """It happens beside the computing of another photo; diffusers' loader isn't for two threads."""
    with Engine(clean, UpscaleConfig(tile=64, overlap=16, precision="fp32"), OutputConfig()) as engine:
        monkeypatch.setattr(part_loading, "load_part", None)
        monkeypatch.setattr("dreamsr_cli.models.bundle.load_part", None)
        with engine.read(Order(source, tmp_path / "a.png"), SilentProgress()) as job:
            assert job.settings.enlarger


def test_who_asks_for_stage_1_or_for_none_gets_that(clean, source, tmp_path) -> None:
    for removal in (True, False):
        said = run(clean, source, tmp_path / f"{removal}.png", removal=removal, strength=0.0).to_json()
        assert (said["enlarger"], said["removal"], said["consistency"]) == (False, removal, 0.95)


def test_damaged_photos_and_small_factors_are_as_before(clean, source, tmp_path) -> None:
    damaged = save_bundle_that_says(tmp_path / "damaged", -3.0)
    typed = {"consistency": LEAST_CHANCE - 0.01}
    cases: list[tuple[Bundle, dict[str, Any]]] = [
        (damaged, {}),
        (clean, {"consistency": 0.0}),
        (clean, typed),
        (clean, {"scale": 1.9}),
    ]
    for bundle, more in cases:
        said = run(bundle, source, tmp_path / "made.png", strength=0.0, **more).to_json()
        assert (said["enlarger"], said["removal"]) == (False, True)
        (tmp_path / "made.png").unlink()
    said = run(damaged, source, tmp_path / "said.png", strength=0.0, consistency=0.95).to_json()
    assert said["enlarger"]
    run(clean, source, tmp_path / "made.png", strength=0.0)
    assert np.array_equal(levels(tmp_path / "said.png"), levels(tmp_path / "made.png"))


class Stopping(SilentProgress):
    """Ctrl-C after `left` pieces of work in `phase`."""

    def __init__(self, phase: str, left: int) -> None:
        self._phase, self._left, self._now = phase, left, ""

    def phase(self, name: str, total: int) -> None:
        self._now = name

    def advance(self, count: int = 1) -> None:
        self._left -= count * (self._now == self._phase)
        if self._left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("strength", "phase"), [(0.0, "enlarge"), (0.3, "encode"), (0.3, "decode")])
def test_an_interrupted_run_goes_on_to_the_same_bytes(clean, source, tmp_path, strength, phase) -> None:
    run(clean, source, tmp_path / "whole.png", strength=strength)
    target = tmp_path / "made.png"
    with pytest.raises(KeyboardInterrupt):
        run(clean, source, target, Stopping(phase, 1), strength=strength)
    assert not target.exists()
    assert run(clean, source, target, strength=strength).to_json()["enlarger"]
    assert target.read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_an_enlarger_of_another_refiner_is_refused(clean, source, tmp_path) -> None:
    folder, other = tmp_path / "bundle", tmp_path / "other"
    save_bundle_that_says(folder, 3.0)
    save_bundle_that_says(other, 3.0, seed=9)
    shutil.copytree(other / "vae", folder / "vae", dirs_exist_ok=True)
    with pytest.raises(WeightsError, match="another autoencoder"):
        run(open_bundle(str(folder)), source, tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()
    assert not run(open_bundle(str(folder)), source, tmp_path / "result.png", removal=True).to_json()["enlarger"]


def test_a_damaged_enlarger_is_refused(clean, source, tmp_path) -> None:
    folder = tmp_path / "bundle"
    save_bundle_that_says(folder, 3.0)
    file = folder / "enlarger" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="enlarger"):
        run(open_bundle(str(folder)), source, tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_the_shipped_one_is_better_than_the_cubic(name) -> None:
    """Photos that it never trained on, shrunk to a quarter."""
    made = open_bundle("mini").open_clean_refiner()
    photo_PQC = getattr(data, name)()
    P, Q = (side // 4 * 4 for side in photo_PQC.shape[:2])
    hq = planes(photo_PQC[:P, :Q]).float() / 255
    lq = (resize(hq, P // 4, Q // 4).clamp(0, 1) * 255).round() / 255
    cubic = cubic_of(lq)

    def psnr(x: torch.Tensor) -> float:
        return float(-10 * torch.log10((x.clamp(0, 1) - hq).square().mean()))

    assert psnr(cubic + made(cubic * 2 - 1) / 2) > psnr(cubic) + 0.5
