"""Plain data become frozen settings or an error that names the key; and back, without loss."""

from __future__ import annotations

import ast
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dreamsr_cli import config
from dreamsr_cli.config import BundleConfig, ControlConfig, OutputConfig, PartConfig, UpscaleConfig
from dreamsr_cli.errors import ConfigError
from dreamsr_cli.plain_data import from_dict, load_toml, to_dict
from dreamsr_cli.training import loss_recipe, recipe

BUNDLE: dict[str, Any] = {"format": 1, "name": "x", "licence": "MIT", "parts": {"vae": {"path": "vae"}}}


@dataclass(frozen=True)
class Inner:
    size: int = 1
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    inners: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int | None, ...] = ()
    table: dict[str, Inner] = field(default_factory=dict)
    maybe: float | None = None
    flag: bool = False
    place: Path = Path(".")


def test_every_kind_of_value_is_read_and_written_back() -> None:
    data = {
        "name": "a",
        "inner": {"size": 3},
        "inners": [{"rate": 1}, {}],
        "pair": [4, 5],
        "many": [0, None, 2],
        "table": {"k": {"size": 9}},
        "maybe": 2,
        "flag": True,
        "place": "some/where",
    }
    read = from_dict(Outer, data, "here")
    assert read == Outer(
        "a",
        Inner(3),
        (Inner(rate=1.0), Inner()),
        (4, 5.0),
        (0, None, 2),
        {"k": Inner(9)},
        2.0,
        True,
        Path("some/where"),
    )
    assert isinstance(read.maybe, float) and isinstance(read.pair[1], float)
    assert from_dict(Outer, json.loads(json.dumps(to_dict(read))), "there") == read


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"nam": "a"}, "here: unknown key 'nam'", "did you mean 'name'?"),
        ({"name": "a", "inner": {"sise": 1}}, "here: inner: unknown key 'sise'", "did you mean 'size'?"),
        ({"name": "a", "zzz": 1}, "unknown key 'zzz'", "known keys: flag, inner"),
        ({}, "here: key 'name' is missing", "add 'name'"),
        ({"name": 3}, "here: name: expected str, found 3", "correct"),
        ({"name": "a", "inner": {"size": 1.5}}, "here: inner: size: expected int, found 1.5", "correct"),
        ({"name": "a", "inner": {"size": True}}, "inner: size: expected int, found True", "correct"),
        ({"name": "a", "inner": {"rate": True}}, "inner: rate: expected float, found True", "correct"),
        ({"name": "a", "inner": 4}, "here: inner: expected a table, found int", "docs"),
        ({"name": "a", "inners": {"size": 1}}, "here: inners: expected tuple", "correct"),
        ({"name": "a", "pair": [1]}, "here: pair: expected tuple, found [1]", "correct"),
        ({"name": "a", "many": [0, "x"]}, "here: many: expected int, found 'x'", "correct"),
        ({"name": "a", "table": {"k": {"size": "x"}}}, "here: table.k: size: expected int", "correct"),
        ({"name": "a", "maybe": "x"}, "here: maybe: expected float", "correct"),
        ({"name": "a", "flag": 1}, "here: flag: expected bool, found 1", "correct"),
        ([], "here: expected a table, found list", "docs"),
    ],
)
def test_wrong_data_name_the_key_and_the_way_out(data, message, hint) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(Outer, data, "here")
    assert message in error.value.message and hint in error.value.hint
    assert error.value.exit_code == 2


def test_bundle_defaults_are_the_designs() -> None:
    read = from_dict(BundleConfig, BUNDLE, "bundle.json")
    assert (read.scale, read.latent.channels, read.latent.stride, read.latent.pack) == (4, 32, 8, 2)
    assert (read.sampling.t_r, read.sampling.t_start, read.sampling.steps) == (1.0, 0.8, 16)
    assert (read.defaults.tile, read.defaults.overlap, read.defaults.color_fix) == (512, 64, "wavelet")
    assert read.control.input == "condition" and read.parts == {"vae": PartConfig(path="vae")}


def test_a_map_keeps_its_nulls_and_parts_leave_theirs_out() -> None:
    read = from_dict(BundleConfig, {**BUNDLE, "control": {"map": [0, None, 1, None]}}, "bundle.json")
    assert read.control == ControlConfig(map=(0, None, 1, None))
    written = to_dict(read)
    assert written["control"]["map"] == [0, None, 1, None]
    assert written["parts"] == {"vae": {"path": "vae"}} and written["sampling"]["guidance"] is None


def test_toml_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ConfigError, match="none.toml"):
        load_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = 1\nb = = 2\n")
    with pytest.raises(ConfigError, match="line 2"):
        load_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(tmp_path / "latin.toml")
    (tmp_path / "good.toml").write_text("[a]\nb = [1, 2]\n")
    assert load_toml(tmp_path / "good.toml") == {"a": {"b": [1, 2]}}


@pytest.mark.parametrize(("module", "least"), [(config, 6), (recipe, 4), (loss_recipe, 1)])
def test_every_setting_is_frozen_and_has_a_docstring(module, least) -> None:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) >= least
    for node in classes:
        made = getattr(module, node.name)
        assert dataclasses.is_dataclass(made) and made.__dataclass_params__.frozen, node.name  # type: ignore[attr-defined]
        documented = {
            a.target.id
            for a, b in zip(node.body, node.body[1:], strict=False)
            if isinstance(a, ast.AnnAssign)
            and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr)
            and isinstance(b.value, ast.Constant)
            and isinstance(b.value.value, str)
        }
        assert {f.name for f in dataclasses.fields(made)} == documented, node.name


def test_what_the_bundle_decides_has_no_default_of_its_own() -> None:
    settings = UpscaleConfig()
    for name in (
        "scale",
        "tile",
        "overlap",
        "steps",
        "strength",
        "guidance",
        "captioner",
        "color_fix",
        "removal",
        "texture",
        "grain",
    ):
        assert getattr(settings, name) is None, name
    assert (settings.seed, settings.tile_batch, settings.memory) == (42, None, None)
    output = OutputConfig()
    assert (output.format, output.quality, output.suffix) == ("auto", 95, "_x{scale}")
    assert not output.overwrite and not output.skip_existing
