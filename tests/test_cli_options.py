"""Settings of `dreamsr upscale`: precedence, ranges, and messages that name where a value came from."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from dreamsr_cli.cli.options import RunConfig, upscale_options
from dreamsr_cli.cli.upscale import command
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.errors import ConfigError, UsageError


def options(folder, toml="", environ=None, **flags):
    if toml:
        (folder / "dreamsr.toml").write_text(toml)
    return upscale_options(flags, environ or {}, folder)


def test_every_setting_is_a_flag_and_every_flag_a_setting():
    fields = {f.name for cls in (UpscaleConfig, OutputConfig, RunConfig) for f in dataclasses.fields(cls)}
    assert set(inspect.signature(command).parameters) - {"inputs", "dry_run", "as_json", "quiet"} == fields


def test_nothing_given_is_the_defaults(tmp_path):
    asked = options(tmp_path, tile=None, overwrite=None)
    assert (asked.config, asked.output, asked.run) == (UpscaleConfig(), OutputConfig(), RunConfig())
    assert not asked.typed("tile")


def test_flag_beats_environment_beats_file(tmp_path):
    toml = "[upscale]\ntile = 256\nsteps = 3\nseed = 5\ntile-batch = 2\nmodel = 'own'\nquality = 80\n"
    environ = {"DREAMSR_TILE": "128", "DREAMSR_STEPS": "4", "DREAMSR_QUALITY": ""}
    asked = options(tmp_path, toml, environ, tile=64)
    config = asked.config
    assert (config.tile, config.steps, config.seed, config.tile_batch) == (64, 4, 5, 2)
    assert asked.run.model == "own"
    assert asked.output.quality == 80
    assert asked.typed("tile") and not asked.typed("steps")


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("Yes", True), ("off", False), ("0", False), ("true", True), ("no", False)]
)
def test_booleans_of_the_environment(tmp_path, text, value):
    assert options(tmp_path, environ={"DREAMSR_REMOVAL": text}).config.removal is value


def test_numbers_of_the_environment_have_the_settings_type(tmp_path):
    config = options(tmp_path, environ={"DREAMSR_SCALE": "2.5", "DREAMSR_STRENGTH": "0"}).config
    assert (config.scale, config.strength) == (2.5, 0.0)


def test_a_flag_replaces_its_rivals_of_lower_layers(tmp_path):
    asked = options(tmp_path, "[upscale]\nscale = 2\noverwrite = true\n", long_side=500, skip_existing=True)
    assert (asked.config.scale, asked.config.long_side) == (None, 500)
    assert (asked.output.overwrite, asked.output.skip_existing) == (False, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"scale": 2.0, "short_side": 100}, ["--scale", "--short-side"]),
        ({"overwrite": True, "skip_existing": True}, ["--overwrite", "--skip-existing"]),
    ],
)
def test_rivals_in_one_layer_are_a_mistake(tmp_path, flags, words):
    with pytest.raises(UsageError) as caught:
        options(tmp_path, **flags)
    assert all(word in caught.value.message for word in words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", 0.5),
        ("scale", float("nan")),
        ("scale", 8.1),
        ("steps", 0),
        ("steps", 101),
        ("strength", 1.01),
        ("consistency", -0.5),
        ("tile", -16),
        ("tile_batch", 0),
        ("quality", 0),
        ("seed", -1),
        ("captioner", "llava"),
        ("color_fix", "hsv"),
        ("precision", "fp8"),
        ("format", "bmp"),
        ("device", "cuda:x"),
        ("suffix", "a/b"),
        ("out", ""),
    ],
)
def test_values_out_of_range_name_the_flag(tmp_path, name, value):
    with pytest.raises(UsageError) as caught:
        options(tmp_path, **{name: value})
    assert "--" + name.replace("_", "-") in caught.value.message
    assert caught.value.hint


def test_messages_name_the_layer(tmp_path):
    with pytest.raises(UsageError, match="DREAMSR_STEPS"):
        options(tmp_path, environ={"DREAMSR_STEPS": "0"})
    with pytest.raises(UsageError, match="DREAMSR_TILE: 'big' is not a whole number"):
        options(tmp_path, environ={"DREAMSR_TILE": "big"})
    with pytest.raises(UsageError, match="DREAMSR_OVERWRITE: 'maybe'"):
        options(tmp_path, environ={"DREAMSR_OVERWRITE": "maybe"})
    with pytest.raises(UsageError, match=r"dreamsr\.toml: steps 0"):
        options(tmp_path, "[upscale]\nsteps = 0\n")


@pytest.mark.parametrize(
    ("toml", "message", "hint"),
    [
        ("[upscale]\ntiel = 1\n", "unknown key 'tiel'", "'tile'"),
        ("[upscale]\ntile = '1'\n", "expected int", "value"),
        ("[upscal]\ntile = 1\n", "'upscal' is not a table", r"\[upscale\]"),
        ("tile = 1\n", "'tile' is not a table", r"\[upscale\]"),
        ("[upscale\n", "not valid TOML", "line"),
    ],
)
def test_mistakes_in_the_file_are_usage_errors(tmp_path, toml, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        options(tmp_path, toml)
    assert caught.value.exit_code == 2
    assert re.search(hint, caught.value.hint)


def test_another_commands_table_is_left_alone(tmp_path):
    assert options(tmp_path, "[train]\nsteps = 1\n").config == UpscaleConfig()


def test_format_names_people_type_are_understood(tmp_path):
    assert options(tmp_path, format="JPEG").output.format == "jpg"
    assert options(tmp_path, format="tif").output.format == "tiff"
