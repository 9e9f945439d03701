"""Recipes: the ones that ship can be read, and a value typed with --set is taken or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreamsr_cli.errors import ConfigError
from dreamsr_cli.training.recipe import Recipe, load_recipe, recipe_dict

RECIPES = Path(__file__).resolve().parents[1] / "dreamsr_cli" / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_that_ship_can_be_read(path) -> None:
    assert load_recipe(path.stem) == load_recipe(str(path))


def test_mini_is_the_built_in_model() -> None:
    recipe = load_recipe("mini")
    assert recipe.name == "mini" and recipe.control.map == (0, None, 1, None)
    sizes = recipe.sizes
    assert (sizes.double_blocks, sizes.single_blocks, sizes.heads * sizes.head_dim) == (4, 4, 256)
    config = recipe.bundle_config()
    assert config.control == recipe.control and config.sampling == recipe.sampling and config.parts == {}


def test_a_recipe_can_be_written_into_a_run_folder() -> None:
    written = json.loads(json.dumps(recipe_dict(load_recipe("mini"))))
    assert written["sizes"]["rope_axes"] == [8, 28, 28] and written["data"]["crops"][0]["size"] == 256


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("optim.lr=1e-4", lambda r: r.optim.lr == 1e-4),
        ("steps=7", lambda r: r.steps == 7),
        ("name=my own", lambda r: r.name == "my own"),
        ('data.preset="seesr-pairs"', lambda r: r.data.preset == "seesr-pairs"),
        ("data.preset=seesr-pairs", lambda r: r.data.preset == "seesr-pairs"),
        ("control.map=[-1, 0]", lambda r: r.control.map == (None, 0)),
        ("t_range=[0.1, 0.5]", lambda r: r.t_range == (0.1, 0.5)),
        ("loss.perceptual=none", lambda r: r.loss.perceptual == "none"),
        ("data.crops=[{size=64, batch=2, share=1.0}]", lambda r: r.data.crops[0].size == 64),
        (" optim.lr = 0.5", lambda r: r.optim.lr == 0.5),
    ],
)
def test_set_changes_one_value(text, read) -> None:
    recipe = load_recipe("mini", [text])
    assert read(recipe) and recipe != load_recipe("mini")


def test_set_is_applied_in_order() -> None:
    assert load_recipe("mini", ["steps=7", "optim.lr=1", "steps=8"]).steps == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "no '='"),
        ("optim.lrr=1", "unknown key 'lrr'.*did you mean 'lr'"),
        ("optm.lr=1", "unknown key 'optm'.*did you mean 'optim'"),
        ("steps=many", "steps: expected int, found 'many'"),
        ("steps=1.5", "steps: expected int"),
        ("steps.x=1", "'steps' is not a table"),
        ("data.crops.size=64", "'crops' is not a table"),
        ("control=5", "control: expected a table"),
        ("control.map=5", "map: expected tuple"),
        ("=5", "unknown key ''"),
        ("sizes.head_dim=32", "rope_axes sum to 64"),
        ("data.crops=[{size=100, batch=2, share=1.0}]", "crop size 100"),
        ("data.crops=[{size=64, batch=2, share=0.5}]", "don't sum to 1"),
        ("t_range=[0.5, 0.1]", "t_range"),
        ("control.map=[0, 1, 2, 3, 4]", "doesn't fit 4 double blocks"),
        ("control.map=[0, 2]", "control.map"),
        ("data.hold_out=-1", "hold_out"),
        ("data.max_bad=2", "max_bad"),
        ("condition=sharp", "condition 'sharp' is not known"),
        ("ablation=no-vae", "ablation"),
        ("loss.pixel_kind=huber", "pixel_kind"),
        ("accumulate=0", "accumulate"),
        ("texture_share=1.5", "texture_share"),
        ("texture_every=-1", "texture_every"),
        ("loss.removal_part=0.0", "removal_part"),
        ("optim.ema=1.0", "optim.ema"),
        ("optim.text=0.0", "optim.text"),
        ("optim.text=nan", "optim.text"),
        ("optim.kind=sgd", "optim.kind 'sgd' is not known"),
        ("loss.lattice=-1.0", "loss.lattice"),
        ("loss.perceptual_shift=-1", "perceptual_shift"),
        ("loss.perceptual_shift=129", "perceptual_shift is 129"),
        ("loss.gan=-1.0", "loss.gan"),
        ("loss.gan_sees=words", "gan_sees 'words' is not known"),
        ("save_every=0", "save_every"),
    ],
)
def test_set_with_anything_else_is_refused(text, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("mini", [text])


def test_no_such_recipe(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no recipe named 'maxi'.*mini"):
        load_recipe("maxi")
    with pytest.raises(ConfigError, match="none.toml"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "own.toml").write_text("steps = 3\n")
    with pytest.raises(ConfigError, match="'name' is missing"):
        load_recipe(str(tmp_path / "own.toml"))
    (tmp_path / "own.toml").write_text('name = "own"\n')
    assert load_recipe(str(tmp_path / "own.toml")) == Recipe("own")
