"""Polish: the network, its rows, what people can ask for, its stage of training, and what it is counted as."""

from __future__ import annotations

import json
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
from dreamsr_cli.config import Looks, OutputConfig, UpscaleConfig
from dreamsr_cli.counting_pixels import PolishSizes
from dreamsr_cli.engine import upscale
from dreamsr_cli.errors import UsageError, WeightsError
from dreamsr_cli.images import open_photo
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.polish import FOLD, Polish
from dreamsr_cli.polished import PolishedRows
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.settings import check_settings
from dreamsr_cli.training import polish_steps
from dreamsr_cli.training.finished_crops import finished, polished
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.optimisers import HIDDEN
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import CropPlan, Recipe
from dreamsr_cli.training.run_bundle import export, untouched
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train

LEVEL = 1 / 255
WIDTHS, BLOCKS = (8, 8, 8), (1, 1, 1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "polish-cache"))


@torch.no_grad()
def polish(seed: int = 0) -> Polish:
    """A small one that adds something to every place."""
    torch.manual_seed(seed)
    made = Polish(WIDTHS, BLOCKS).eval()
    made.exit.weight.normal_(std=0.02)
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d) and module is not made.exit:
            module.weight.mul_(2)
    return made


# ---------------------------------------------------------------- the network


@torch.no_grad()
def test_a_fresh_one_adds_nothing() -> None:
    made, picture = Polish(WIDTHS, BLOCKS), pictures(1, 64, 96)
    added = made(picture, picture)
    assert added.shape == picture.shape and added.dtype == torch.float32 and not added.any()


@torch.no_grad()
def test_what_it_adds_depends_on_the_surroundings_alone() -> None:
    made = polish()
    assert made.side_step == FOLD * 4 and made.reach % made.side_step == 0
    side = 2 * made.reach + 96
    picture = pictures(1, side, side)
    before, changed = made(picture, picture), picture.clone()
    middle = side // 2
    changed[..., middle, middle] += 0.5
    seen = (made(changed, changed) != before).any(1)[0].nonzero()
    assert len(seen) and (seen - middle).abs().max() <= made.reach


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 widths and 3"):
        Polish((8, 8), (1, 1, 1))


# ---------------------------------------------------------------- its rows


class Case:
    """A photo, and a result of it."""

    def __init__(self, folder: Path, width: int = 90, height: int = 333) -> None:
        levels = np.random.default_rng(3).integers(60, 190, (37, 21, 3), np.uint8)
        Image.fromarray(levels).save(folder / "photo.png")
        self.enlarged = EnlargedPhoto(open_photo(folder / "photo.png"), width, height)
        self.result_PQC = np.random.default_rng(4).uniform(0.2, 0.8, (height, width, 3)).astype(np.float32)
        self.asked: list[tuple[int, int]] = []

    def rows(self, made: Polish | None, amount: float = 1.0) -> PolishedRows:
        def read(top: int, bottom: int) -> np.ndarray:
            assert 0 <= top < bottom <= len(self.result_PQC)
            self.asked.append((top, bottom))
            return self.result_PQC[top:bottom]

        return PolishedRows(read, self.enlarged, made, amount, CPU)

    def whole(self, made: Polish | None, amount: float = 1.0) -> np.ndarray:
        return self.rows(made, amount).read_rows(0, len(self.result_PQC))


@pytest.fixture
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolishedRows, "STRIP", 96)


def test_rows_are_the_same_whatever_is_asked_for_with_them(tmp_path, short_strips) -> None:
    case = Case(tmp_path)
    whole, rows = case.whole(polish()), case.rows(polish())
    for top, bottom in [(330, 333), (0, 1), (90, 140), (40, 290), (0, 333)]:
        assert np.array_equal(rows.read_rows(top, bottom), whole[top:bottom])
        assert np.array_equal(case.rows(polish()).read_rows(top, bottom), whole[top:bottom])


def test_strips_show_nowhere(tmp_path, monkeypatch) -> None:
    case, made = Case(tmp_path), polish()
    monkeypatch.setattr(PolishedRows, "STRIP", 384)
    at_once = case.whole(made)
    monkeypatch.setattr(PolishedRows, "STRIP", 96)
    assert np.abs(case.whole(made) - at_once).max() < 1e-5
    assert np.abs(at_once - case.result_PQC).mean() > LEVEL


def test_rows_around_a_strip_are_read_once(tmp_path, monkeypatch) -> None:
    """They may have to be decoded for it."""
    monkeypatch.setattr(PolishedRows, "STRIP", 192)
    case, made = Case(tmp_path, height=1000), polish()
    assert made.reach <= PolishedRows.STRIP // 2
    case.whole(made)
    assert sum(bottom - top for top, bottom in case.asked) == 1000


def test_the_amount_is_linear_and_none_is_the_result_itself(tmp_path) -> None:
    case = Case(tmp_path)
    half, all_of_it = (case.whole(polish(), amount) - case.result_PQC for amount in (0.5, 1.0))
    assert np.allclose(all_of_it, 2 * half, atol=1e-6)
    assert np.array_equal(case.whole(polish(), 0), case.result_PQC)
    assert np.array_equal(case.whole(None), case.result_PQC)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 130), (131, 3)])
def test_results_of_any_size(tmp_path, width, height) -> None:
    assert Case(tmp_path, width, height).whole(polish()).shape == (height, width, 3)


# ---------------------------------------------------------------- as a person uses it


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """A tiny bundle with polish."""
    folder, made = tmp_path_factory.mktemp("polish") / "bundle", networks()
    export(replace(made, polish=polish()), None, folder, made.config)
    return open_bundle(str(folder))


def photo(folder: Path) -> Path:
    Image.fromarray(data.chelsea()[80:120, 120:168]).save(folder / "photo.png")
    return folder / "photo.png"


def made_by(bundle: Bundle, source: Path, **settings) -> np.ndarray:
    target = source.with_name("result.png")
    base = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32")
    upscale(source, target, bundle, replace(base, **settings), OutputConfig(overwrite=True), SilentProgress())
    return np.asarray(Image.open(target).convert("RGB"), np.float32)


def test_texture_is_polished_and_the_most_faithful_result_is_not(bundle, tmp_path) -> None:
    source = photo(tmp_path)
    default, none, half = (made_by(bundle, source, **asked) for asked in ({}, {"polish": 0.0}, {"polish": 0.5}))
    assert 0.5 < np.abs(half - none).mean() < np.abs(default - none).mean()
    faithful = made_by(bundle, source, strength=0.0)
    assert np.array_equal(faithful, made_by(bundle, source, strength=0.0, polish=0.0))
    assert not np.array_equal(faithful, made_by(bundle, source, strength=0.0, polish=1.0))
    assert np.array_equal(default, made_by(bundle, source))


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


def test_an_interrupted_run_goes_on_to_the_same_bytes(bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(PolishedRows, "STRIP", 192)
    tall = tmp_path / "tall.png"
    Image.fromarray(data.chelsea()[:240, 120:152]).save(tall)
    settings = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32")

    def run(name: str, progress: SilentProgress) -> Path:
        upscale(tall, tmp_path / name, bundle, settings, OutputConfig(), progress)
        return tmp_path / name

    whole = run("whole.png", SilentProgress())
    with pytest.raises(KeyboardInterrupt):
        run("made.png", StopDecoding(3))
    assert not (tmp_path / "made.png").exists()
    assert run("made.png", SilentProgress()).read_bytes() == whole.read_bytes()


@torch.no_grad()
def test_a_damaged_one_is_refused(tmp_path) -> None:
    folder, made = tmp_path / "bundle", networks()
    export(replace(made, polish=polish()), None, folder, made.config)
    file = folder / "polish" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(WeightsError, match="polish"):
        made_by(open_bundle(str(folder)), photo(tmp_path))
    assert not (tmp_path / "result.png").exists()


def test_what_can_be_asked_for(bundle, tiny_bundle) -> None:
    plain = open_bundle(str(tiny_bundle))
    assert check_settings(UpscaleConfig(), bundle).polish == 1
    assert check_settings(UpscaleConfig(strength=0.0), bundle).polish == 0
    own = replace(bundle.config, defaults=replace(bundle.config.defaults, polish=0.5))
    assert check_settings(UpscaleConfig(), Bundle(bundle.folder, own)).polish == 0.5
    assert check_settings(UpscaleConfig(), plain).polish == check_settings(UpscaleConfig(polish=0.0), plain).polish == 0
    with pytest.raises(UsageError, match="no network"):
        check_settings(UpscaleConfig(polish=1.0), plain)
    with pytest.raises(UsageError, match="--polish 2"):
        check_settings(UpscaleConfig(polish=2.0), bundle)


# ---------------------------------------------------------------- its stage


TINY = replace(
    RECIPE,
    steps=40,
    sizes=replace(RECIPE.sizes, polish_widths=(8, 8, 8), polish_blocks=(1, 1, 1)),
    data=replace(RECIPE.data, crops=(CropPlan(64, 2, 1.0),), mix={"bicubic": 0.3}, full_photo=0.0),
    loss=replace(RECIPE.loss, polish_pixel=1.0),
    optim=replace(RECIPE.optim, lr=5e-3, warmup=5, ema=0.9),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("polish-photos") / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()[:300, :400]).resize((200, 150)).save(folder / f"{name}.png")
    return folder


def job_for(photos: Path, out: Path, model: Path, recipe: Recipe = TINY, **more) -> TrainJob:
    return TrainJob(STAGES["polish"], recipe, "tiny.toml", photos, out, model=str(model), device=CPU, **more)


@pytest.fixture
def blind_bundle(tmp_path) -> Path:
    """Networks that make every photo too dark."""
    made = networks()
    with torch.no_grad():
        for parameters in (made.transformer.proj_out, made.patches.refiner.exit):
            for parameter in parameters.parameters():
                parameter.zero_()
        made.patches.refiner.exit.bias.fill_(-0.3)
    export(made, None, tmp_path / "dark", made.config)
    return tmp_path / "dark"


def test_it_learns_what_results_lack(photos, blind_bundle, tmp_path) -> None:
    train(job_for(photos, tmp_path / "run", blind_bundle), SilentProgress())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    figures = [line["validation"] for line in lines if "validation" in line][-1]
    assert set(figures) == {"textured_psnr", "polished_psnr"}
    assert figures["polished_psnr"] > figures["textured_psnr"] + 3
    made, base = open_bundle(None, str(tmp_path / "run")), open_bundle(str(blind_bundle))
    assert base.open_polish() is None and made.open_polish() is not None
    assert [p.name for p in (tmp_path / "run" / "bundle").iterdir() if p.is_dir()] == ["polish"]
    assert made.part_folder("transformer") == base.part_folder("transformer")
    assert "pixel mse" in (tmp_path / "run" / "bundle" / "README.md").read_text()


def weights_of(run: Path) -> torch.Tensor:
    made = open_bundle(None, str(run)).open_polish()
    assert made is not None
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def test_crops_that_come_again_are_remembered_and_an_interruption_changes_nothing(
    photos, blind_bundle, tmp_path, monkeypatch
) -> None:
    """Rounds of 4 steps: finished once each, turned otherwise each time; also after a stop within a round."""
    again = replace(TINY, steps=10, data=replace(TINY.data, again_after=4))
    calls = []
    true = polish_steps.finished
    monkeypatch.setattr(polish_steps, "finished", lambda n, r, c: (calls.append(c.place), true(n, r, c))[1])
    train(job_for(photos, tmp_path / "whole", blind_bundle, again), SilentProgress())
    assert [place for place in calls if place is not None] == [0, 1, 2, 3]
    train(job_for(photos, tmp_path / "parts", blind_bundle, again, max_steps=6), SilentProgress())
    train(job_for(photos, tmp_path / "parts", blind_bundle, again, resume=True), SilentProgress())
    assert torch.equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    fresh = replace(again, data=replace(again.data, again_after=0))
    train(job_for(photos, tmp_path / "fresh", blind_bundle, fresh), SilentProgress())
    assert not torch.equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "fresh"))


def test_perception_and_pixels_both_have_their_say(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["polish"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    assert made.polish is not None
    made.train_only(STAGES["polish"].trains)
    hq = pictures(2) / 2 + 0.5
    crops = Crops(3, hq, hq, ["a", "b"], ["", ""], lq=hq[..., ::4, ::4], looks=("damaged", "damaged"))
    weight = made.polish.exit.weight

    def pull(**weights: float) -> torch.Tensor:
        weight.grad = None
        recipe = replace(TINY, loss=replace(TINY.loss, **weights))
        run_step("polish", made, recipe, drawn_lpips(), None, crops).loss.backward()
        assert weight.grad is not None
        return weight.grad.clone()

    both, pixels, perception = pull(), pull(polish_perceptual=0.0), pull(polish_pixel=0.0)
    assert perception.any() and pixels.any()
    assert torch.allclose(both, perception + pixels, atol=1e-6)
    others = [p for part in (made.transformer, made.controlnet, made.patches) for p in part.parameters()]
    assert not any(parameter.grad is not None for parameter in others)


@torch.no_grad()
def test_grain_learns_on_polished_crops_and_undamaged_ones_are_enlarged_first(bundle, tmp_path) -> None:
    made = build_on(TINY, STAGES["grain"], bundle, None, CPU, torch.float32)
    hq = pictures(2) / 2 + 0.5

    def crops(looks: tuple[Looks | None, ...]) -> Crops:
        return Crops(3, hq, hq, ["a", "b"], ["", ""], lq=hq[..., ::4, ::4], looks=looks)

    plain = finished(made, TINY, crops(("damaged", "damaged")))
    assert (polished(made, crops(("damaged", "damaged")), plain) - plain).abs().mean() > LEVEL
    clean = save_bundle_that_says(tmp_path / "bundle", CLEAN)
    other = build_on(TINY, STAGES["polish"], clean, None, CPU, torch.float32)
    damaged, mixed = (finished(other, TINY, crops(("damaged", looks))) for looks in ("damaged", "clean"))
    assert torch.allclose(damaged[0], mixed[0], atol=1e-5) and (damaged[1] - mixed[1]).abs().max() > LEVEL
    assert untouched(other, clean, None, STAGES["polish"]) == tuple(clean.config.parts)


def test_a_run_goes_on_from_the_polish_that_is_there(bundle) -> None:
    sizes = replace(TINY, sizes=replace(TINY.sizes, polish_widths=(16, 8)), fresh=True)
    sizes = replace(sizes, sizes=replace(sizes.sizes, polish_blocks=(1, 1)))
    known = build_on(TINY, STAGES["polish"], bundle, None, CPU, torch.float32).polish
    fresh = build_on(sizes, STAGES["polish"], bundle, None, CPU, torch.float32).polish
    there = bundle.open_polish()
    assert known is not None and fresh is not None and there is not None
    assert torch.equal(known.entry.weight, there.entry.weight)
    assert fresh.entry.weight.shape != there.entry.weight.shape


# ---------------------------------------------------------------- what it is counted as


def test_a_plan_counts_it() -> None:
    plan = training_plan(TINY, STAGES["polish"], dtype=torch.float32)
    assert set(plan.trained) == {"polish"} and plan.trained["polish"] == plan.parameters["polish"]
    assert plan.activations[0].kind == "polish" and plan.activations[0].peak > 0


def test_its_work_is_what_torch_counts(tmp_path, monkeypatch) -> None:
    case, made = Case(tmp_path, width=88, height=700), polish()
    sizes = PolishSizes({"widths": WIDTHS, "blocks": BLOCKS})
    assert sizes.reach == made.reach and PolishSizes.STRIP == PolishedRows.STRIP
    with FlopCounterMode(display=False) as counter:
        case.whole(made)
    assert sizes.flops(700, 88) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert sizes.moved_values(700, 88) > 2 * 3 * 700 * 88
    assert sizes.device_bytes(700, 88, 4) > 0 and sizes.host_bytes(700, 88) > 700 * 88 * 12


def test_muon_takes_what_lies_between_its_layers() -> None:
    kernels = {name for name, p in polish().named_parameters() if p.ndim == 4}
    taken = {name for name in kernels if HIDDEN.fullmatch(f"polish.{name}")}
    assert kernels - taken == {name for name in kernels if name.split(".")[0] in ("entry", "exit", "shrink", "grow")}
    assert len(taken) == 2 * 5
