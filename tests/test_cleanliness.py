"""Whether a photo is clean: the network, its stage of training, what the shipped one says, and what upscaling does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from enlargers import CLEAN, DAMAGED
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from tiny_models import CPU, RECIPE
from training_data import save_photos

from dreamsr_cli.config import LOOKS, OutputConfig, UpscaleConfig
from dreamsr_cli.degradations import pixel
from dreamsr_cli.engine import UpscaleResult, upscale
from dreamsr_cli.errors import TrainingError, WeightsError
from dreamsr_cli.looks import LEAST_CLEAN, LEAST_UNDAMAGED
from dreamsr_cli.models.bundle import PARTS, Bundle, open_bundle
from dreamsr_cli.models.cleanliness import LEAST_SIDE, WINDOW, Cleanliness, chances_of_looks, fine_detail
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import CropPlan, Recipe
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cleanliness-cache"))


def network(seed: int = 0) -> Cleanliness:
    torch.manual_seed(seed)
    return Cleanliness(width=6, hidden=8).eval()


def chances(judge: Cleanliness, photo_PQC: np.ndarray) -> dict[str, float]:
    return chances_of_looks(judge, lambda top, bottom: photo_PQC[top:bottom], *photo_PQC.shape[:2])


# ---------------------------------------------------------------- the network


@torch.no_grad()
@pytest.mark.parametrize("size", [(LEAST_SIDE, LEAST_SIDE), (24, 80), (64, 64)])
def test_logits_for_each_photo_whatever_its_brightness(size) -> None:
    judge, photos = network(), torch.rand(3, 3, *size) * 0.5
    logits = judge(photos)
    assert logits.shape == (3, len(LOOKS)) and len(set(logits.flatten().tolist())) == 9
    assert torch.allclose(judge(photos + 0.3), logits, atol=1e-4)
    assert torch.allclose(judge(photos[1:2]), logits[1:2], atol=1e-6)


def test_fine_detail_of_a_plane_is_nothing() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    plane = torch.stack([0.02 * rows, 0.01 * columns, 0.3 + 0 * rows])[None]
    assert fine_detail(plane)[..., 1:-1, 1:-1].abs().max() < 1e-5


def test_a_photo_of_any_size_is_judged_by_windows_from_all_over_it() -> None:
    judge = network()
    rng = np.random.default_rng(0)
    for size in [(1, 1), (5, 300), (WINDOW, WINDOW), (70, 130), (900, 400)]:
        photo_PQC = rng.random((*size, 3), np.float32)
        found = chances(judge, photo_PQC)
        assert tuple(found) == LOOKS and min(found.values()) >= 0 and sum(found.values()) == pytest.approx(1, abs=0.02)
    calm = np.full((640, 640, 3), 0.5, np.float32)
    noisy = (calm + rng.normal(0, 0.2, calm.shape)).astype(np.float32)
    with torch.no_grad():
        judge.exit.weight.mul_(20)
    alone = chances(judge, calm)["clean"], chances(judge, noisy)["clean"]
    assert alone[0] != alone[1]
    half = calm.copy()
    half[:, 320:] = noisy[:, 320:]
    assert chances(judge, half)["clean"] == pytest.approx(alone[1], abs=0.02)  # the busy part is what counts


# ---------------------------------------------------------------- its stage

TINY = replace(
    RECIPE,
    steps=60,
    data=replace(
        RECIPE.data,
        crops=(CropPlan(96, 8, 1.0),),
        preset="realesrgan",
        mix={"bicubic": 0.35, "jpeg": 0.3},
        full_photo=0.0,
        hold_out=2,
    ),
    optim=replace(RECIPE.optim, lr=1e-2, warmup=2, ema=0.8),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("cleanliness") / "photos", rows=120, cols=130)


def job(photos: Path, bundle: Path, out: Path, recipe: Recipe = TINY) -> TrainJob:
    return TrainJob(STAGES["cleanliness"], recipe, "tiny.toml", photos, out, model=str(bundle), device=CPU)


@pytest.fixture(scope="module")
def trained(photos, tiny_bundle, tmp_path_factory) -> Path:
    """The folder of a run."""
    out = tmp_path_factory.mktemp("cleanliness-run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cleanliness-cache"))
        train(job(photos, tiny_bundle, out), SilentProgress())
    return out


def test_it_learns_to_tell_clean_crops_from_others(trained) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    entropies = [line["judge_entropy"] for line in lines if "loss" in line]
    assert len(entropies) == 60
    assert sum(entropies[-20:]) / 20 < 0.65 < 0.9 < entropies[0]
    figures = [line["validation"] for line in lines if "validation" in line][-1]
    # Three photos teach little about two others; that the figures are those of the held-out crops is the point.
    assert set(figures) == {"judge_entropy", "clean_right", "compressed_right", "damaged_right"}
    assert figures["clean_right"] + figures["compressed_right"] + figures["damaged_right"] > 1


def test_the_run_refers_to_its_base_and_holds_the_judge_alone(trained, tiny_bundle) -> None:
    made, base = open_bundle(None, str(trained)), open_bundle(str(tiny_bundle))
    assert made.open_cleanliness() is not None and base.open_cleanliness() is None
    assert [p.name for p in (trained / "bundle").iterdir() if p.is_dir()] == ["cleanliness"]
    assert set(made.config.parts) == set(PARTS) - {"enlarger", "grain", "cleaner"}
    assert made.part_folder("transformer") == base.part_folder("transformer")


def test_the_stages_that_train_pictures_keep_the_judge(trained, photos, tmp_path) -> None:
    """Of the paper's stages the result refers to it, a warm-started backbone takes it along."""
    before = load_file(trained / "bundle" / "cleanliness" / "diffusion_pytorch_model.safetensors")
    recipe = replace(RECIPE, condition="removed", steps=1)
    judged = str(trained / "bundle")
    for stage, model, start in (("controlnet", judged, None), ("backbone", None, judged)):
        out = tmp_path / stage
        begun = TrainJob(STAGES[stage], recipe, "tiny.toml", photos, out, model, start, device=CPU)
        train(begun, SilentProgress())
        judge = open_bundle(None, str(out)).open_cleanliness()
        assert judge is not None
        assert all(torch.equal(value, before[name].float()) for name, value in judge.state_dict().items())


def test_crops_that_are_too_small_or_of_unknown_damage_are_refused(photos, tiny_bundle, tmp_path) -> None:
    small = replace(TINY, data=replace(TINY.data, crops=(CropPlan(64, 2, 1.0),)))
    with pytest.raises(TrainingError, match="too small"):
        train(job(photos, tiny_bundle, tmp_path / "small", small), SilentProgress())
    base = open_bundle(str(tiny_bundle))
    made = build_on(TINY, STAGES["cleanliness"], base, None, CPU, torch.float32)
    pairs = Crops(0, torch.rand(1, 3, 96, 96), torch.rand(1, 3, 96, 96), [""], [""])
    with pytest.raises(TrainingError, match="pairs on disk"):
        run_step("judge", made, TINY, None, None, replace(pairs, lq=torch.rand(1, 3, 24, 24), looks=(None,)))


def test_a_plan_counts_it() -> None:
    plan = training_plan(TINY, STAGES["cleanliness"], dtype=torch.float32)
    assert set(plan.trained) == {"cleanliness"} and plan.trained["cleanliness"] == plan.parameters["cleanliness"]
    assert plan.activations[0].kind == "judge" and plan.activations[0].peak > 0


# ---------------------------------------------------------------- upscaling with it


def bundle_that_says(folder: Path, base: Path, logits: tuple[float, float, float]) -> Bundle:
    """The run `base` with a judge of one opinion."""
    shutil.copytree(base / "bundle", folder)
    file = folder / "cleanliness" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["exit.weight"].zero_()
    weights["exit.bias"].copy_(torch.tensor(logits))
    save_file(weights, file, {"format": "pt"})
    return open_bundle(None, str(folder))


class Listening(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(bundle: Bundle, source: Path, target: Path, progress: SilentProgress | None = None, **more) -> UpscaleResult:
    base = UpscaleConfig(tile=64, overlap=16, steps=1, precision="fp32", scale=2.0)
    return upscale(source, target, bundle, replace(base, **more), OutputConfig(), progress or SilentProgress())


def test_a_photo_has_as_much_say_as_it_looks_clean(trained, tiny_bundle, tmp_path) -> None:
    source = next((save_photos(tmp_path / "photos", 1)).iterdir())
    progress = Listening()
    clean = bundle_that_says(tmp_path / "clean", trained, CLEAN)
    said = run(clean, source, tmp_path / "clean.png", progress)
    assert said.to_json()["consistency"] == 0.95
    assert any("looks clean (95%)" in note for note in progress.notes)
    typed = run(clean, source, tmp_path / "typed.png", consistency=0.95)
    assert (tmp_path / "typed.png").read_bytes() == (tmp_path / "clean.png").read_bytes()
    assert typed.to_json()["consistency"] == 0.95
    assert run(clean, source, tmp_path / "little.png", scale=1.9).to_json()["consistency"] == 0.0
    off = run(clean, source, tmp_path / "off.png", looks="damaged")
    damaged = run(bundle_that_says(tmp_path / "damaged", trained, DAMAGED), source, tmp_path / "damaged.png")
    without = run(open_bundle(str(tiny_bundle)), source, tmp_path / "without.png")
    assert {result.to_json()["consistency"] for result in (off, damaged, without)} == {0.0}
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("off", "damaged", "without")]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "clean.png")), pictures[0])


@pytest.mark.parametrize("wrong", ["truncated", "another shape"])
def test_a_damaged_judge_is_refused(trained, tmp_path, wrong) -> None:
    bundle = bundle_that_says(tmp_path / "bundle", trained, CLEAN)
    file = bundle.folder / "cleanliness" / "diffusion_pytorch_model.safetensors"
    if wrong == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        save_file({**load_file(file), "exit.bias": torch.zeros(1)}, file, {"format": "pt"})
    source = next((save_photos(tmp_path / "photos", 1)).iterdir())
    with pytest.raises(WeightsError, match="cleanliness"):
        run(bundle, source, tmp_path / "result.png")
    assert not (tmp_path / "result.png").exists()


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_the_shipped_judge_knows_clean_photos_from_damaged_ones(name) -> None:
    """Photos that it never trained on: shrunk to a quarter, then saved as fair JPEGs, or with noise, blur and JPEG."""
    judge = open_bundle("mini").open_cleanliness()
    assert judge is not None
    photo_PQC = getattr(data, name)()
    P, Q = (side // 4 * 4 for side in photo_PQC.shape[:2])
    hq_CPQ = torch.from_numpy(np.ascontiguousarray(photo_PQC[:P, :Q].transpose(2, 0, 1))).float() / 255

    def said(preset: str, seed: int) -> dict[str, float]:
        params = pixel.draw(preset, seed, name, 0)
        return chances(judge, pixel.degrade(hq_CPQ, params).permute(1, 2, 0).numpy())

    assert said("bicubic", 0)["clean"] > LEAST_CLEAN
    jpegs = []
    for quality in (90, 80):
        params = replace(pixel.draw("jpeg", 0, name, 0), only_jpeg=quality)
        jpegs.append(chances(judge, pixel.degrade(hq_CPQ, params).permute(1, 2, 0).numpy()))
    assert all(found["clean"] < LEAST_CLEAN and found["compressed"] > found["clean"] for found in jpegs)
    undamaged = [1 - said(preset, seed)["damaged"] for preset in ("realesrgan", "seesr-mild") for seed in range(3)]
    assert max(undamaged) < LEAST_UNDAMAGED and sum(undamaged) / len(undamaged) < 0.2
