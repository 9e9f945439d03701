"""Grain: the network, its rows, what people can ask for, its stage of training, and what it is counted as."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_lpips import drawn_lpips
from enlargers import CLEAN, save_bundle_that_says
from PIL import Image
from skimage import data
from tiny_models import CPU, RECIPE, networks, pictures
from torch.utils.flop_counter import FlopCounterMode

from dreamsr_cli.canvas import EnlargedPhoto
from dreamsr_cli.config import Looks, OutputConfig, SamplingConfig, UpscaleConfig
from dreamsr_cli.counting_pixels import GrainSizes
from dreamsr_cli.engine import upscale
from dreamsr_cli.errors import UsageError, WeightsError
from dreamsr_cli.grained import GrainedRows
from dreamsr_cli.images import open_photo
from dreamsr_cli.losses import contrast_distance
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.grain import BANDS, MARGIN, Grain
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.settings import check_settings
from dreamsr_cli.training.grain_steps import finished
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import CropPlan, Recipe
from dreamsr_cli.training.run_bundle import export, untouched
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train

LEVEL = 1 / 255


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "grain-cache"))


@torch.no_grad()
def grain(seed: int = 0, width: int = 8, blocks: int = 1) -> Grain:
    """A small one that says something else of every place."""
    torch.manual_seed(seed)
    made = Grain(width, blocks).eval()
    made.exit.weight.add_(torch.randn_like(made.exit.weight) * 0.1)
    torch.nn.init.constant_(bias_of(made), -3.0)
    return made


def bias_of(made: Grain | None) -> torch.Tensor:
    assert made is not None and made.exit.bias is not None
    return made.exit.bias


def noise_for(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    shape = 1, 1, rows + 2 * MARGIN, columns + 2 * MARGIN
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_black_and_white_stay_pure() -> None:
    made, picture = grain(), torch.zeros(1, 3, 32, 48)
    picture[..., :16], picture[..., 32:] = -1, 1
    found = made(picture, picture, noise_for(32, 48))
    assert found.shape == picture.shape and found.dtype == torch.float32
    assert not found[..., :16].any() and not found[..., 32:].any()
    assert found[..., 16:32].std() > LEVEL


@torch.no_grad()
def test_what_is_said_of_a_pixel_depends_on_its_surroundings_alone() -> None:
    made, picture = grain(), pictures(1, 96, 96)
    before = made.strengths(picture, picture)
    changed = picture.clone()
    changed[..., 48, 48] += 0.5
    seen = (made.strengths(changed, changed) != before).any(1)[0].nonzero()
    assert len(seen) and (seen - 48).abs().max() < made.reach + Grain.FOLD
    assert (before >= 0).all() and before.mean() > LEVEL


@torch.no_grad()
def test_a_fresh_one_says_about_a_level_everywhere() -> None:
    made, picture = Grain(), torch.zeros(1, 3, 64, 64)
    found = made(picture, picture, noise_for(64, 64))
    # Levels are half as large on [-1, 1].
    assert 0.7 * LEVEL < found.std() / 2 < 2 * LEVEL


# ---------------------------------------------------------------- its rows


class Case:
    """A photo, and a result of it."""

    def __init__(self, folder: Path, width: int = 90, height: int = 301) -> None:
        levels = np.random.default_rng(3).integers(60, 190, (37, 21, 3), np.uint8)
        Image.fromarray(levels).save(folder / "photo.png")
        self.enlarged = EnlargedPhoto(open_photo(folder / "photo.png"), width, height)
        self.result_PQC = np.random.default_rng(4).uniform(0.2, 0.8, (height, width, 3)).astype(np.float32)

    def rows(self, made: Grain | None, amount: float = 1.0, seed: int = 42) -> GrainedRows:
        def read(top: int, bottom: int) -> np.ndarray:
            assert 0 <= top < bottom <= len(self.result_PQC)
            return self.result_PQC[top:bottom]

        return GrainedRows(read, self.enlarged, made, amount, seed, CPU)

    def whole(self, made: Grain | None, amount: float = 1.0, seed: int = 42) -> np.ndarray:
        return self.rows(made, amount, seed).read_rows(0, len(self.result_PQC))


def test_rows_are_the_same_whatever_is_asked_for_with_them(tmp_path) -> None:
    case = Case(tmp_path)
    whole, rows = case.whole(grain()), case.rows(grain())
    for top, bottom in [(300, 301), (0, 1), (120, 140), (40, 290), (0, 301)]:
        assert np.array_equal(rows.read_rows(top, bottom), whole[top:bottom])
        assert np.array_equal(case.rows(grain()).read_rows(top, bottom), whole[top:bottom])


@torch.no_grad()
def test_strips_show_nowhere(tmp_path, monkeypatch) -> None:
    """The grain of the whole picture at once, by the same noise."""
    case, made = Case(tmp_path, width=88, height=300), grain()
    in_strips = case.whole(made)
    monkeypatch.setattr(GrainedRows, "STRIP", 300)
    assert np.abs(case.whole(made) - in_strips).max() < 1e-6


def test_the_amount_is_linear_and_none_is_the_result_itself(tmp_path) -> None:
    case = Case(tmp_path)
    once, twice = (case.whole(grain(), amount) - case.result_PQC for amount in (1, 2))
    assert np.abs(once).mean() > LEVEL
    assert np.allclose(twice, 2 * once, atol=1e-6)
    assert np.array_equal(case.whole(grain(), 0), case.result_PQC)
    assert np.array_equal(case.whole(None), case.result_PQC)


def test_it_comes_from_the_seed_and_repeats_nowhere(tmp_path) -> None:
    case = Case(tmp_path)
    first, again, other = (case.whole(grain(), seed=seed) - case.result_PQC for seed in (1, 1, 2))
    assert np.array_equal(first, again)

    def alike(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))

    assert alike(first, other) < 0.05
    assert alike(first[:128], first[128:256]) < 0.05


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 130), (131, 3)])
def test_results_of_any_size(tmp_path, width, height) -> None:
    case = Case(tmp_path, width, height)
    assert case.whole(grain()).shape == (height, width, 3)


# ---------------------------------------------------------------- as a person uses it


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """A tiny bundle with grain."""
    folder, made = tmp_path_factory.mktemp("grain") / "bundle", networks()
    export(replace(made, grain=grain()), None, folder, made.config)
    return open_bundle(str(folder))


def photo(folder: Path) -> Path:
    Image.fromarray(data.chelsea()[80:120, 120:168]).save(folder / "photo.png")
    return folder / "photo.png"


def made_by(bundle: Bundle, source: Path, **settings) -> np.ndarray:
    target = source.with_name("result.png")
    base = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32")
    upscale(source, target, bundle, replace(base, **settings), OutputConfig(overwrite=True), SilentProgress())
    return np.asarray(Image.open(target).convert("RGB"), np.float32)


def test_texture_gets_grain_and_the_most_faithful_result_none(bundle, tmp_path) -> None:
    source = photo(tmp_path)
    default, none, twice = (made_by(bundle, source, **asked) for asked in ({}, {"grain": 0.0}, {"grain": 2.0}))
    assert 0.5 < np.abs(default - none).mean() < np.abs(twice - none).mean()
    # It averages to nothing: colours stay.
    assert abs((default - none).mean()) < 0.3
    faithful = made_by(bundle, source, strength=0.0)
    assert np.array_equal(faithful, made_by(bundle, source, strength=0.0, grain=0.0))
    assert not np.array_equal(faithful, made_by(bundle, source, strength=0.0, grain=1.0))
    assert np.array_equal(default, made_by(bundle, source))
    assert not np.array_equal(default, made_by(bundle, source, seed=7))


class StopDecoding(SilentProgress):
    """Ctrl-C once `left` strips are decoded."""

    def __init__(self, left: int) -> None:
        self._left, self._now = left, ""

    def phase(self, name: str, total: int) -> None:
        self._now = name

    def advance(self, count: int = 1) -> None:
        self._left -= count * (self._now == "decode")
        if self._left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_bytes(bundle, tmp_path) -> None:
    tall = tmp_path / "tall.png"
    Image.fromarray(data.chelsea()[:240, 120:152]).save(tall)
    settings = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32")

    def run(name: str, progress: SilentProgress) -> Path:
        upscale(tall, tmp_path / name, bundle, settings, OutputConfig(), progress)
        return tmp_path / name

    whole = run("whole.png", SilentProgress())
    with pytest.raises(KeyboardInterrupt):
        run("made.png", StopDecoding(2))
    assert not (tmp_path / "made.png").exists()
    assert run("made.png", SilentProgress()).read_bytes() == whole.read_bytes()
    levels = [np.asarray(Image.open(made).convert("RGB"), np.float32) for made in (whole, tall)]
    assert levels[0].shape[0] == 4 * levels[1].shape[0] > 3 * GrainedRows.STRIP


@torch.no_grad()
def test_a_damaged_one_is_refused(tmp_path) -> None:
    folder, made = tmp_path / "bundle", networks()
    export(replace(made, grain=grain()), None, folder, made.config)
    file = folder / "grain" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="grain"):
        made_by(open_bundle(str(folder)), photo(tmp_path))
    assert not (tmp_path / "result.png").exists()


def test_what_can_be_asked_for(bundle, tiny_bundle) -> None:
    plain = open_bundle(str(tiny_bundle))
    assert check_settings(UpscaleConfig(), bundle).grain == 1
    assert check_settings(UpscaleConfig(strength=0.0), bundle).grain == 0
    own = replace(bundle.config, defaults=replace(bundle.config.defaults, grain=1.5))
    assert check_settings(UpscaleConfig(), Bundle(bundle.folder, own)).grain == 1.5
    assert check_settings(UpscaleConfig(), plain).grain == check_settings(UpscaleConfig(grain=0.0), plain).grain == 0
    with pytest.raises(UsageError, match="no network"):
        check_settings(UpscaleConfig(grain=1.0), plain)
    with pytest.raises(UsageError, match="--grain 3"):
        check_settings(UpscaleConfig(grain=3.0), bundle)


# ---------------------------------------------------------------- its loss and its stage


def test_local_contrast_is_a_matter_of_strength_not_of_place() -> None:
    torch.manual_seed(0)
    grey = torch.zeros(2, 3, 96, 96)
    one, other = (grey + 0.1 * torch.randn(2, 1, 96, 96) for _ in range(2))
    weak = grey + 0.05 * torch.randn(2, 1, 96, 96)
    assert contrast_distance(one, one) == 0
    assert contrast_distance(one, other) < 0.1
    assert contrast_distance(weak, other) == pytest.approx(math.log(2), abs=0.1)
    assert contrast_distance(grey, other) > contrast_distance(weak, other)
    assert contrast_distance(grey + 0.3, grey) < 1e-3


TINY = replace(
    RECIPE,
    steps=90,
    data=replace(RECIPE.data, crops=(CropPlan(64, 2, 1.0),), mix={"bicubic": 0.3}, full_photo=0.0),
    loss=replace(RECIPE.loss, grain_contrast=1.0),
    optim=replace(RECIPE.optim, lr=5e-3, warmup=5, ema=0.9),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos with noise of their own."""
    folder, rng = tmp_path_factory.mktemp("grain-photos") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        levels = np.asarray(Image.fromarray(getattr(data, name)()[:300, :400]).resize((200, 150)), np.float32)
        levels = levels + rng.normal(0, 30, (*levels.shape[:2], 1))
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


@torch.no_grad()
def save_smooth_bundle(folder: Path) -> Path:
    """Networks that leave a photo as smooth as it was enlarged."""
    made = networks()
    for parameters in (made.transformer.proj_out, made.patches.refiner.exit):
        for parameter in parameters.parameters():
            parameter.zero_()
    export(made, None, folder, replace(made.config, sampling=SamplingConfig(steps=1, t_start=0.01)))
    return folder


def test_it_learns_how_strong_the_texture_of_good_photos_is(photos, tmp_path) -> None:
    base_folder = save_smooth_bundle(tmp_path / "smooth")
    job = TrainJob(STAGES["grain"], TINY, "tiny.toml", photos, tmp_path / "run", model=str(base_folder), device=CPU)
    train(job, SilentProgress())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    figures = [line["validation"] for line in lines if "validation" in line][-1]
    assert set(figures) == {"grain_levels", "textured_contrast", "grained_contrast"}
    assert figures["grained_contrast"] < 0.8 * figures["textured_contrast"]
    assert figures["grain_levels"] > 2
    made, base = open_bundle(None, str(tmp_path / "run")), open_bundle(str(base_folder))
    assert base.open_grain() is None and made.open_grain() is not None
    assert [p.name for p in (tmp_path / "run" / "bundle").iterdir() if p.is_dir()] == ["grain"]
    assert made.part_folder("transformer") == base.part_folder("transformer")
    assert "local contrast" in (tmp_path / "run" / "bundle" / "README.md").read_text()


def test_perception_and_contrast_both_have_their_say(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["grain"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    assert made.grain is not None
    made.train_only(STAGES["grain"].trains)
    hq = pictures(2) / 2 + 0.5
    crops = Crops(3, hq, hq, ["a", "b"], ["", ""], lq=hq[..., ::4, ::4], looks=("damaged", "damaged"))

    def pull(recipe: Recipe) -> torch.Tensor:
        bias = bias_of(made.grain)
        bias.grad = None
        run_step("grain", made, recipe, drawn_lpips(), None, crops).loss.backward()
        assert bias.grad is not None
        return bias.grad.clone()

    both, contrast = pull(TINY), pull(replace(TINY, loss=replace(TINY.loss, grain_perceptual=0.0)))
    perception = pull(replace(TINY, loss=replace(TINY.loss, grain_contrast=0.0)))
    assert perception.any() and contrast.any()
    assert torch.allclose(both, perception + contrast, atol=1e-6)
    others = [p for part in (made.transformer, made.controlnet, made.patches) for p in part.parameters()]
    assert not any(parameter.grad is not None for parameter in others)


@torch.no_grad()
def test_undamaged_crops_are_enlarged_first_as_photos_are(tmp_path) -> None:
    bundle = save_bundle_that_says(tmp_path / "bundle", CLEAN)
    made = build_on(TINY, STAGES["grain"], bundle, None, CPU, torch.float32)
    assert made.enlarger is not None
    hq = pictures(2) / 2 + 0.5

    def found(looks: tuple[Looks | None, ...]) -> torch.Tensor:
        return finished(made, TINY, Crops(3, hq, hq, ["a", "b"], ["", ""], lq=hq[..., ::4, ::4], looks=looks))

    damaged, mixed = found(("damaged", "damaged")), found(("damaged", "clean"))
    assert torch.allclose(damaged[0], mixed[0], atol=1e-5)
    assert (damaged[1] - mixed[1]).abs().max() > LEVEL
    assert untouched(made, bundle, None, STAGES["grain"]) == tuple(bundle.config.parts)


def test_a_run_goes_on_from_the_grain_that_is_there(bundle) -> None:
    known = build_on(TINY, STAGES["grain"], bundle, None, CPU, torch.float32).grain
    fresh = build_on(replace(TINY, fresh=True), STAGES["grain"], bundle, None, CPU, torch.float32).grain
    there = bundle.open_grain()
    assert known is not None and fresh is not None and there is not None
    assert torch.equal(known.entry.weight, there.entry.weight)
    assert fresh.entry.weight.shape != there.entry.weight.shape


# ---------------------------------------------------------------- what it is counted as


def test_a_plan_counts_it() -> None:
    plan = training_plan(TINY, STAGES["grain"], dtype=torch.float32)
    assert set(plan.trained) == {"grain"} and plan.trained["grain"] == plan.parameters["grain"]
    assert plan.activations[0].kind == "grain" and plan.activations[0].peak > 0


def test_its_work_is_what_torch_counts(tmp_path) -> None:
    case, made = Case(tmp_path, width=88, height=300), grain()
    with FlopCounterMode(display=False) as counter:
        case.whole(made)
    sizes = GrainSizes({"width": 8, "blocks": 1})
    assert (len(BANDS), (2 * MARGIN + 1) ** 2) == (GrainSizes.BANDS, GrainSizes.KERNEL)
    assert GrainSizes.STRIP == GrainedRows.STRIP
    assert sizes.flops(300, 88) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert sizes.moved_values(300, 88) > 3 * 300 * 88
