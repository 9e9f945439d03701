"""Training runs at tiny size: an interruption changes no bit, settings belong to a run, stages build on each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import CPU, RECIPE

from dreamsr_cli import draws
from dreamsr_cli.cli.app import run as dreamsr
from dreamsr_cli.errors import ConfigError, TrainingError
from dreamsr_cli.models.bundle import PARTS, open_bundle
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.optimisers import Masters
from dreamsr_cli.training.recipe import CropPlan, Recipe, load_recipe
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.trainer import TrainJob, TrainResult, train

TWO_SIZES = replace(RECIPE, data=replace(RECIPE.data, crops=(CropPlan(32, 2, 0.5), CropPlan(48, 1, 0.5))))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos of waves and noise, 64 x 56."""
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[0:56, 0:64]
    for i in range(5):
        rng = draws.generator(i, "test photo")
        waves = np.stack([np.sin(x * rng.uniform(0.05, 0.4) + y * rng.uniform(0.05, 0.4)) for _ in range(3)], 2)
        rgb = 128 + 90 * waves + rng.normal(0, 8, waves.shape)
        Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "training-cache"))


@pytest.fixture
def job(photos, tiny_bundle, tmp_path):
    """Makes the job of a stage; all but stage autoencoder start from the tiny bundle."""

    def make(stage: str = "backbone", out: str = "run", recipe: Recipe = RECIPE, **settings: Any) -> TrainJob:
        start = None if stage == "autoencoder" else str(tiny_bundle)
        return replace(
            TrainJob(STAGES[stage], recipe, "tiny.toml", photos, tmp_path / out, init_from=start, device=CPU),
            **settings,
        )

    return make


def go(job: TrainJob) -> TrainResult:
    return train(job, SilentProgress())


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def log(job: TrainJob) -> list[dict[str, Any]]:
    """log.jsonl without what may differ: seconds, and validations that only the end of a part has."""
    lines = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if "validation" not in line]


@pytest.mark.parametrize(
    ("stage", "dtype"), [("autoencoder", torch.float32), ("backbone", torch.float32), ("backbone", torch.bfloat16)]
)
def test_two_steps_and_two_after_a_resume_are_four_steps(job, stage, dtype) -> None:
    whole, parts = (job(stage, out, TWO_SIZES, dtype=dtype) for out in ("whole", "parts"))
    result = go(whole)
    assert go(replace(parts, max_steps=2)).steps == 2
    again = go(replace(parts, resume=True))
    assert (again.steps, again.validation) == (result.steps, result.validation) == (4, result.validation)
    assert content(whole.out / "bundle") == content(parts.out / "bundle")
    assert content(whole.out / "checkpoint-4") == content(parts.out / "checkpoint-4")
    assert log(whole) == log(parts) and len(log(whole)) >= 4


@pytest.mark.parametrize("moment", ["between optimizer and average", "after both"])
def test_ctrl_c_in_the_middle_of_a_step_changes_nothing(job, monkeypatch, moment) -> None:
    recipe = replace(RECIPE, save_every=2)
    whole, parts = job(out="whole", recipe=recipe), job(out="parts", recipe=recipe)
    go(whole)
    publish = Masters.publish

    def interrupted(self: Masters, step: int) -> None:
        if step == 3 and moment.startswith("between"):
            raise KeyboardInterrupt
        publish(self, step)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Masters, "publish", interrupted)
        go(parts)
    assert (parts.out / "latest").read_text() == "checkpoint-2\n" and not (parts.out / "bundle").exists()
    go(replace(parts, resume=True))
    assert content(whole.out / "bundle") == content(parts.out / "bundle")


def test_ctrl_c_between_steps_keeps_every_step(job) -> None:
    class Stop(SilentProgress):
        steps = 0

        def phase(self, name: str, total: int) -> None:
            self.steps = 0 if name.startswith("train ") else -100

        def advance(self, count: int = 1) -> None:
            self.steps += count
            if self.steps == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job(), Stop())
    assert (job().out / "latest").read_text() == "checkpoint-3\n"


def test_a_resume_after_the_end_writes_the_same_bundle_again(job) -> None:
    go(job())
    before = content(job().out / "bundle")
    shutil.rmtree(job().out / "bundle")
    assert go(job(resume=True)).steps == 4
    assert content(job().out / "bundle") == before


def test_a_run_folder_belongs_to_its_settings(job, tmp_path, photos) -> None:
    go(job(max_steps=0))
    with pytest.raises(TrainingError, match="holds a run already.*--resume"):
        go(job())
    other = replace(RECIPE, optim=replace(RECIPE.optim, lr=5e-4))
    with pytest.raises(TrainingError, match=r"other settings \(recipe\)"):
        go(job(recipe=other, resume=True))
    with pytest.raises(TrainingError, match=r"other settings \(stage, start\)"):
        go(job("autoencoder", resume=True))
    shutil.copytree(photos, tmp_path / "photos")
    with pytest.raises(TrainingError, match=r"other settings \(data\)"):
        go(job(resume=True, data=tmp_path / "photos"))
    assert go(job(resume=True, max_steps=1)).steps == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(job) -> None:
    recipe = replace(RECIPE, save_every=1, optim=replace(RECIPE.optim, lr=1e25, warmup=0))
    with pytest.raises(
        TrainingError, match="not finite at step 1; last good checkpoint: .*checkpoint-1 .*--max-steps 0"
    ):
        go(job(recipe=recipe))
    assert (job().out / "latest").read_text() == "checkpoint-1\n"
    saved = load_file(job().out / "checkpoint-1" / "weights.safetensors")
    assert all(bool(v.isfinite().all()) for v in saved.values())
    assert go(job(recipe=recipe, resume=True, max_steps=0)).steps == 1  # what the hint says works


def test_what_a_bad_step_leaves_behind_is_not_saved(job) -> None:
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, lr=1e25, warmup=0))
    with pytest.raises(TrainingError, match="last good checkpoint: none yet"):
        go(job(recipe=recipe))
    assert not (job().out / "latest").exists()


def test_too_few_photos(job, tmp_path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(TrainingError, match="0 usable photos"):
        go(job(data=tmp_path / "none"))


def test_a_stage_changes_what_it_trains_and_nothing_else(job, tiny_bundle) -> None:
    """From one bundle: the autoencoder stage leaves the networks alone, the backbone stage changes every part."""
    pictures = [part for part in PARTS if part not in ("cleanliness", "enlarger", "grain", "cleaner")]
    for stage, changed in (("autoencoder", {"vae"}), ("backbone", set(pictures))):
        result = go(job(stage, stage, init_from=str(tiny_bundle)))
        found = set()
        for part in pictures:
            (file,) = (tiny_bundle / part).glob("*.safetensors")
            before, after = load_file(file), load_file(result.bundle / part / file.name)
            assert before.keys() == after.keys()
            if any(not torch.equal(before[k], after[k]) for k in before):
                found.add(part)
            transform = {"mean_K", "basis_CK", "gain_C"} & before.keys() if stage == "backbone" else set()
            assert all(torch.equal(before[k], after[k]) for k in transform)
        assert found == changed


def test_a_run_may_begin_with_fewer_single_blocks(job, tiny_bundle) -> None:
    cut = replace(RECIPE, sizes=replace(RECIPE.sizes, single_cut=1))
    result = go(job(recipe=cut, max_steps=0))
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / file) for folder in (tiny_bundle, result.bundle))
    assert after.keys() == {name for name in before if not name.startswith("single_transformer_blocks.1.")}
    assert all(torch.equal(after[name], before[name]) for name in after)
    opened = open_bundle(str(result.bundle)).open_restorer(CPU, torch.float32, mask_pads=True)
    assert opened.lora is not None and len(opened.dit.transformer.single_transformer_blocks) == 1
    trained = load_file(go(job(recipe=cut, out="trained", max_steps=2)).bundle / file)
    assert trained.keys() == after.keys()
    assert any(not torch.equal(trained[name], after[name]) for name in after if name.startswith("single_"))
    with pytest.raises(ConfigError, match="single_cut is -1"):
        load_recipe("mini", ["sizes.single_cut=-1"])


def test_what_ships_are_the_averaged_weights(job) -> None:
    result = go(job())
    averages = load_file(job().out / "checkpoint-4" / "average.safetensors")
    live = load_file(job().out / "checkpoint-4" / "weights.safetensors")
    shipped = load_file(result.bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    lora = load_file(result.bundle / "lora" / "adapter_model.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    average = averages[f"transformer.{name}.base_layer.weight"]
    assert torch.equal(shipped[f"{name}.weight"], average.to(torch.bfloat16))
    assert not torch.equal(average, live[f"transformer.{name}.base_layer.weight"])
    (key,) = [k for k in averages if k.startswith(f"transformer.{name}.lora_B")]
    assert torch.equal(lora[f"{name}.lora_B.weight"], averages[key].to(torch.bfloat16))


RECIPE_TOML = """
name = "from-toml"
steps = 2
log_every = 1
[sizes]
double_blocks = 2
single_blocks = 1
heads = 2
head_dim = 16
rope_axes = [4, 6, 6]
text_width = 24
text_layers = 1
refiner_width = 8
refiner_blocks = 1
lora_rank = 2
[latent]
channels = 12
[control]
map = [0, -1]
[data]
crops = [{ size = 32, batch = 2, share = 1.0 }]
hold_out = 1
workers = 0
[loss]
perceptual = "none"
"""


def test_the_command_trains_both_stages_and_leaves_a_bundle_that_opens(photos, tmp_path, capsys) -> None:
    recipe, first, second = tmp_path / "own.toml", tmp_path / "ae", tmp_path / "bb"
    recipe.write_text(RECIPE_TOML)
    common = ["--config", str(recipe), "--data", str(photos), "--device", "cpu", "--precision", "fp32", "-q"]
    assert dreamsr(["train", "--stage", "autoencoder", "-o", str(first), *common]) == 0
    assert capsys.readouterr().out == f"{first / 'bundle'}\n"
    start = ["--init-from", str(first / "bundle"), "--set", "steps=3", "--json"]
    assert dreamsr(["train", "--stage", "backbone", "-o", str(second), *common, *start]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["bundle"] == str(second / "bundle") and line["steps"] == 3
    assert {"round_trip_psnr", "cubic_psnr", "removed_psnr", "clean_0.2", "clean_0.8", "textured_psnr"} == set(
        line["validation"]
    )

    bundle = open_bundle(str(second))
    restorer = bundle.open_restorer(CPU, torch.float32, mask_pads=True)
    assert bundle.open_autoencoder(CPU, torch.float32).channels == 12
    assert bundle.open_text_encoder(CPU, torch.float32).encode(["a wall"], 8)[0][0].tokens_BTD.shape == (1, 2, 24)
    assert restorer.lora is not None and restorer.dit.control_map == (0, None)
    record = bundle.config.training
    assert (bundle.config.name, record.recipe, record.steps) == ("from-toml", "own.toml", 5)
    assert len(record.data_sha256) == 64 and record.dreamsr

    arguments = ["train", "--stage", "backbone", "-o", str(second), *common, *start]
    assert dreamsr(arguments) == 1
    assert "--resume" in capsys.readouterr().err
    assert dreamsr([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--stage", "jiont"], 2, "--stage jiont: no such stage"),
        (["--config", "maxi"], 2, "no recipe named 'maxi'"),
        (["--set", "optim.lrr=1"], 2, "did you mean 'lr'?"),
        (["--set", "steps"], 2, "no '='"),
        (["--data", "nowhere"], 2, "--data nowhere: not a folder"),
        (["--device", "toaster"], 2, "--device toaster"),
        (["--precision", "fp16"], 2, "--precision fp16"),
        (["--init-from", "nowhere"], 1, "nowhere: no such model"),
        (["--set", "loss.perceptual=lpips-squeeze"], 2, "--perceptual-weights"),
    ],
)
def test_the_command_says_what_is_wrong_in_two_lines(photos, tmp_path, capsys, change, code, words) -> None:
    (tmp_path / "own.toml").write_text(RECIPE_TOML)
    arguments = ["train", "--stage", "backbone", "--config", str(tmp_path / "own.toml"), "--data", str(photos)]
    arguments += ["-o", str(tmp_path / "run"), "--device", "cpu", "-q", *change]
    assert dreamsr(arguments) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and words in " ".join(told) and not (tmp_path / "run").exists()
