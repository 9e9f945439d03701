"""The stages of training that make the cleaner of damaged photos, and what others do with it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cleaners import save_bundle_that_cleans
from enlargers import DAMAGED
from PIL import Image
from skimage import data
from tiny_models import CPU, RECIPE

from dreamsr_cli.errors import ConfigError, TrainingError
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.cleaner import PLEASING, Cleaner
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.adversarial import gan_weight
from dreamsr_cli.training.clean_steps import cleaned, cleaned_latent
from dreamsr_cli.training.networks import build_on
from dreamsr_cli.training.optimisers import HIDDEN
from dreamsr_cli.training.plan import training_plan
from dreamsr_cli.training.recipe import CropPlan, load_recipe
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.step_data import Crops
from dreamsr_cli.training.steps import run_step
from dreamsr_cli.training.trainer import TrainJob, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cleaner-cache"))


TINY = replace(
    RECIPE,
    steps=120,
    sizes=replace(RECIPE.sizes, cleaner_widths=(8, 12, 12), cleaner_blocks=(1, 1, 1)),
    data=replace(
        RECIPE.data,
        crops=(CropPlan(64, 4, 1.0),),
        preset="bicubic",
        mix={},
        full_photo=0.0,
        hold_out=1,
        words=False,
        workers=0,
    ),
    optim=replace(RECIPE.optim, kind="muon", lr=3e-3, warmup=5, ema=0.9),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos with edges."""
    folder = tmp_path_factory.mktemp("cleaner") / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()[:300, :400]).resize((200, 150)).save(folder / f"{name}.png")
    return folder


def job(stage: str, photos: Path, bundle: Path, out: Path, **more: int | bool) -> TrainJob:
    recipe = replace(TINY, **more)
    return TrainJob(STAGES[stage], recipe, "tiny.toml", photos, out, model=str(bundle), device=CPU)


@pytest.fixture(scope="module")
def trained(photos, tiny_bundle, tmp_path_factory) -> Path:
    """The folder of a run of stage cleaner."""
    out = tmp_path_factory.mktemp("cleaner-run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cleaner-cache"))
        train(job("cleaner", photos, tiny_bundle, out), SilentProgress())
    return out


def test_it_learns_to_clean_better_than_the_cubic(trained) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    figures = [line["validation"] for line in lines if "validation" in line][-1]
    assert set(figures) == {"cubic_psnr", "cleaned_psnr"}
    assert figures["cleaned_psnr"] > figures["cubic_psnr"] + 0.1
    assert [p.name for p in (trained / "bundle").iterdir() if p.is_dir()] == ["cleaner"]
    assert "Charbonnier with its knee at 0.03" in (trained / "bundle" / "README.md").read_text()


def test_the_second_manner_learns_beside_the_first(trained, photos, tmp_path) -> None:
    known = open_bundle(None, str(trained)).open_cleaner()
    train(job("cleaner-looks", photos, trained / "bundle", tmp_path / "looks", steps=3), SilentProgress())
    found = open_bundle(None, str(tmp_path / "looks")).open_cleaner()
    assert known is not None and known.pleasing is None and found is not None and found.pleasing is not None
    before, after = known.state_dict(), found.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    moved = [not torch.equal(after[n.replace("faithful", "pleasing")], v) for n, v in before.items() if "faithful" in n]
    assert moved and all(moved)


def test_both_manners_learn_at_once(trained, photos, tmp_path) -> None:
    looks = tmp_path / "looks"
    train(job("cleaner-looks", photos, trained / "bundle", looks, steps=1), SilentProgress())
    known = open_bundle(None, str(looks)).open_cleaner()
    train(job("cleaner-both", photos, looks / "bundle", tmp_path / "both", steps=3), SilentProgress())
    found = open_bundle(None, str(tmp_path / "both")).open_cleaner()
    assert known is not None and found is not None and tuple(found.config["widths"]) == (8, 12, 12)
    after = found.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in known.state_dict().items())
    line = json.loads((tmp_path / "both" / "log.jsonl").read_text().splitlines()[-1])
    assert set(line["validation"]) == {"cubic_psnr", "cleaned_psnr"}


def test_it_is_made_deeper_where_it_is_trained_on(trained, photos, tmp_path) -> None:
    looks = tmp_path / "looks"
    train(job("cleaner-looks", photos, trained / "bundle", looks, steps=1), SilentProgress())
    deeper = job("cleaner-both", photos, looks / "bundle", tmp_path / "both", steps=3)
    recipe = replace(deeper.recipe, sizes=replace(TINY.sizes, cleaner_deepen=(2, 0, 0), cleaner_views=2))
    known = open_bundle(None, str(looks)).open_cleaner()
    planned = training_plan(recipe, deeper.stage, model=deeper.model, dtype=torch.float32)
    train(replace(deeper, recipe=recipe), SilentProgress())
    found = open_bundle(None, str(tmp_path / "both")).open_cleaner()
    assert known is not None and found is not None and tuple(found.config["blocks"]) == (2, 1, 1)
    assert (known.config["views"], found.config["views"]) == (1, 2)
    assert planned.parameters["cleaner"] == sum(p.numel() for p in found.parameters())
    assert sum(p.numel() for p in known.parameters()) < planned.parameters["cleaner"]
    assert all(weights.any() for weights in found.parameters())
    with pytest.raises(ConfigError, match="cleaner_deepen is"):
        load_recipe("mini", ["sizes.cleaner_deepen=[1,-1,0]"])
    with pytest.raises(ConfigError, match="cleaner_views is 3"):
        load_recipe("mini", ["sizes.cleaner_views=3"])


def test_stages_of_other_parts_keep_it(trained, photos, tmp_path) -> None:
    known = open_bundle(None, str(trained)).open_cleaner()
    assert known is not None
    recipe = replace(RECIPE, condition="removed", steps=1)
    for stage, model, start in (("restoration", str(trained / "bundle"), None), ("backbone", None, str(trained))):
        out = tmp_path / stage
        train(TrainJob(STAGES[stage], recipe, "tiny.toml", photos, out, model, start, device=CPU), SilentProgress())
        kept = open_bundle(None, str(out)).open_cleaner()
        assert kept is not None
        assert all(torch.equal(value, known.state_dict()[name]) for name, value in kept.state_dict().items())


def test_a_run_goes_on_from_the_cleaner_that_is_there(trained, tiny_bundle) -> None:
    base, source = open_bundle(str(tiny_bundle)), open_bundle(None, str(trained))

    def begun(stage: str, start: Path | None, fresh: bool = False) -> Cleaner:
        opened = None if start is None else open_bundle(None, str(start))
        made = build_on(replace(TINY, fresh=fresh), STAGES[stage], base, opened, CPU, torch.float32).cleaner
        assert made is not None
        return made

    known = source.open_cleaner()
    assert known is not None
    assert torch.equal(begun("cleaner", trained).down.entry.weight, known.down.entry.weight)
    fresh = begun("cleaner", trained, fresh=True)
    assert not torch.equal(fresh.down.entry.weight, known.down.entry.weight)
    assert tuple(fresh.config["widths"]) == (8, 12, 12)
    # Afresh the second manner begins as the first; what that is stays.
    again = begun("cleaner-looks", trained, fresh=True)
    assert again.pleasing is not None
    assert torch.equal(again.pleasing.exit.weight, known.faithful.exit.weight)
    with pytest.raises(ConfigError, match="no cleaner"):
        begun("cleaner-looks", None)


def test_crops_that_it_cannot_clean_are_refused(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["cleaner"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    hq = torch.rand(1, 3, 64, 64)
    with pytest.raises(TrainingError, match="scale 4, these have 2"):
        run_step("clean", made, TINY, None, None, Crops(0, hq, hq, [""], [""], lq=hq[..., ::2, ::2], looks=(None,)))
    hq = torch.rand(1, 3, 40, 40)
    with pytest.raises(TrainingError, match="multiples of 4"):
        run_step("clean", made, TINY, None, None, Crops(0, hq, hq, [""], [""], lq=hq[..., ::4, ::4], looks=(None,)))


def test_muon_is_for_the_kernels_of_its_blocks() -> None:
    made = Cleaner((6, 8, 8), (1, 1, 1), pleases=True)
    hidden = {name for name, _ in made.named_parameters() if HIDDEN.fullmatch(f"cleaner.{name}")}
    kernels = {f"{n}.weight" for n, module in made.named_modules() if n.endswith((".first", ".second")) and module}
    assert hidden == kernels and len(hidden) == 14


def test_a_perceptual_distance_has_its_weight(tiny_bundle) -> None:
    made = build_on(TINY, STAGES["cleaner"], open_bundle(str(tiny_bundle)), None, CPU, torch.float32)
    assert made.cleaner is not None
    made.cleaner = copy.deepcopy(made.cleaner)
    made.cleaner.learn_to_please()
    hq = torch.rand(1, 3, 64, 64)
    crops = Crops(0, hq, hq, [""], [""], lq=hq[..., ::4, ::4], looks=(None,))
    plain = run_step("please", made, TINY, None, None, crops)
    with_it = run_step("please", made, TINY, lambda x, y: (x - y).abs().mean((1, 2, 3)) + 1, None, crops)
    woven = run_step("please", made, replace(TINY, loss=replace(TINY.loss, lattice=2.0)), None, None, crops)
    assert torch.allclose(woven.loss, plain.loss + 2 * woven.terms["clean_lattice"], atol=1e-6)
    both, faithful = (run_step(kind, made, TINY, None, None, crops) for kind in ("clean-both", "clean"))
    assert torch.allclose(both.loss, faithful.loss + plain.loss, atol=1e-6)
    assert torch.equal(both.terms["clean_faithful"], faithful.terms["clean_pixel"])
    weight = TINY.loss.cleaner_perceptual
    assert weight > 0 and torch.allclose(
        with_it.loss, plain.loss + weight * with_it.terms["clean_perceptual"], atol=1e-6
    )


def test_a_discriminator_judges_the_second_manner(trained, photos, tmp_path) -> None:
    """On top of the other terms, from its step on; stage cleaner has none whatever the recipe says."""
    recipe = replace(TINY, steps=4, loss=replace(TINY.loss, gan=0.5, gan_start=2, gan_lead=1))
    assert gan_weight(recipe, STAGES["cleaner"]) == 0 and gan_weight(TINY, STAGES["cleaner-both"]) == 0
    looks = job("cleaner-looks", photos, trained / "bundle", tmp_path / "looks")
    train(replace(looks, recipe=recipe), SilentProgress())
    log = [json.loads(line) for line in (tmp_path / "looks" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "clean_gan" in line] == [3, 4]
    assert [line["step"] for line in log if "discriminator" in line] == [2, 3, 4]
    assert "0.5 · GAN from step 2 on" in (tmp_path / "looks" / "bundle" / "README.md").read_text()

    made = build_on(
        recipe, STAGES["cleaner-both"], open_bundle(str(tmp_path / "looks/bundle")), None, CPU, torch.float32
    )
    hq = torch.rand(1, 3, 64, 64)
    crops = Crops(0, hq, hq, [""], [""], lq=hq[..., ::4, ::4], looks=(None,))
    seen: list[torch.Tensor] = []

    def critic(picture: torch.Tensor) -> torch.Tensor:
        seen.append(picture)
        return picture * 3

    plain = run_step("clean-both", made, recipe, None, None, crops)
    judged = run_step("clean-both", made, recipe, None, critic, crops)
    assert torch.allclose(judged.loss, plain.loss - 0.5 * 3 * seen[0].mean(), atol=1e-6)
    assert judged.fake is not None and judged.real is not None and not judged.fake.requires_grad
    assert torch.equal(judged.fake, seen[0]) and torch.equal(judged.real, hq * 2 - 1)
    assert torch.allclose(judged.fake, cleaned(made, crops, PLEASING).clamp(0, 1) * 2 - 1, atol=1e-6)


@torch.no_grad()
def test_texture_learns_from_what_it_begins_with_at_inference(tmp_path) -> None:
    bundle = save_bundle_that_cleans(tmp_path / "bundle", DAMAGED)
    made = build_on(replace(TINY, condition="removed"), STAGES["controlnet"], bundle, None, CPU, torch.float32)
    recipe, hq = replace(RECIPE, condition="removed"), torch.rand(2, 3, 64, 64)
    crops = Crops(0, hq, hq, ["a"] * 2, ["b"] * 2, lq=hq[..., ::4, ::4], looks=("damaged",) * 2)
    assert made.cleaner is not None and made.cleaner.pleasing is not None
    before = {kind: float(run_step(kind, made, recipe, None, None, crops).loss) for kind in ("texture", "removal")}
    assert made.cleaner.pleasing.exit.bias is not None
    made.cleaner.pleasing.exit.bias.add_(0.3)
    after = {kind: float(run_step(kind, made, recipe, None, None, crops).loss) for kind in ("texture", "removal")}
    assert after["removal"] == before["removal"] and after["texture"] != before["texture"]
    found = cleaned_latent(made, crops)
    assert found is not None and torch.equal(found, made.encode(cleaned(made, crops, PLEASING).clamp(0, 1) * 2 - 1))
    assert cleaned_latent(made, replace(crops, lq=hq[..., ::2, ::2])) is None
    assert cleaned_latent(replace(made, cleaner=None), crops) is None


@pytest.mark.parametrize(
    ("stage", "kind"), [("cleaner", "clean"), ("cleaner-looks", "please"), ("cleaner-both", "clean-both")]
)
def test_a_plan_counts_what_learns(stage, kind, trained) -> None:
    plan = training_plan(TINY, STAGES[stage], model=str(trained / "bundle"), dtype=torch.float32)
    assert set(plan.trained) == {"cleaner"} and plan.activations[0].kind == kind and plan.activations[0].peak > 0
    assert 0 < plan.trained["cleaner"] <= plan.parameters["cleaner"]
    assert (plan.trained["cleaner"] == plan.parameters["cleaner"]) == (stage != "cleaner-looks")
