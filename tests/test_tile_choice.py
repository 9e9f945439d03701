"""`--tile auto`: fewest operations within the memory, the same again, and an unfinished run's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamsr_cli import canvas
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.options import upscale_options
from dreamsr_cli.config import CONTROL_BYTES, OutputConfig, UpscaleConfig
from dreamsr_cli.engine import check_settings, upscale
from dreamsr_cli.errors import UsageError
from dreamsr_cli.images import read_info
from dreamsr_cli.machine import Machine
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.planning import plan
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.tile_choice import USABLE, TileChoice, settle_tile
from dreamsr_cli.workload import Limits

LIMITS = Limits(strip_rows=canvas.STRIP, control_bytes=CONTROL_BYTES)
MACHINE = Machine("cpu", "tester", "fp32", 1, 2**30, None, 1e9, 1e9, 8 * 2**30)
AUTO = UpscaleConfig(tile="auto", steps=2, precision="fp32", scale=4.0, device="cpu", captioner="none")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bundle(tiny_bundle) -> Bundle:
    return open_bundle(str(tiny_bundle))


def photo(width: int = 60, height: int = 44, name: str = "a.png") -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name)
    return Path(name)


def wider(bundle: Bundle, low: int = 48, high: int = 160) -> Bundle:
    return Bundle(
        bundle.folder, replace(bundle.config, defaults=replace(bundle.config.defaults, tile_auto=(low, high)))
    )


def choose(bundle: Bundle, source: Path, config=AUTO, memory=None, on=MACHINE, **output) -> TileChoice:
    settings, sizes = check_settings(config, bundle), read_sizes(bundle.config, bundle.part_folder)
    about = (source, read_info(source), Path("out.png"), OutputConfig(**output), sizes, on, LIMITS)
    settled, choice = settle_tile(settings, memory, *about)
    assert choice is not None and settled == replace(settings, tile=choice.tile)
    return choice


def test_the_fewest_operations_win(bundle):
    source, found = photo(), wider(bundle)
    choice = choose(found, source)
    assert [option.tile for option in sorted(choice.options, key=lambda o: o.tile)] == list(range(48, 161, 16))
    planned = {}
    for option in choice.options:
        settings = check_settings(replace(AUTO, tile=option.tile), found)
        sizes = read_sizes(found.config, found.part_folder)
        one = plan(source, read_info(source), Path("o.png"), settings, OutputConfig(), sizes, MACHINE, LIMITS)
        planned[option.tile] = one.total_flops
        assert (option.flops, option.memory) == (one.total_flops, one.memory["host"])
        assert option.calls == one.calls["remove"] + one.calls["texture"]
    assert planned[choice.tile] == min(planned.values())
    assert choice.budget == int(8 * 2**30 * USABLE) and all(option.fits for option in choice.options)


def test_it_stays_within_memory_and_falls_back_to_the_least():
    source, found = photo(300, 220), open_bundle("mini")
    config = replace(AUTO, removal=True)  # else decoding needs more than any of these tiles
    free = choose(found, source, config)
    needs = {option.tile: option.memory for option in free.options}
    assert needs[free.tile] > min(needs.values())
    limit = needs[free.tile] - 1
    tight = choose(found, source, config, on=replace(MACHINE, total_memory=int(limit / USABLE)))
    assert needs[tight.tile] <= limit and tight.tile != free.tile
    best = min((o for o in tight.options if o.fits), key=lambda o: o.flops)
    assert best.tile == tight.tile and any(not option.fits for option in tight.options)
    none = choose(found, source, config, on=replace(MACHINE, total_memory=1000))
    assert none.tile == min(needs, key=lambda tile: needs[tile]) and not any(o.fits for o in none.options)
    assert choose(found, source, config, memory="100GB", on=replace(MACHINE, total_memory=1000)).tile == free.tile


def test_what_is_free_just_now_does_not_matter(bundle):
    source, found = photo(), wider(bundle)
    assert choose(found, source) == choose(found, source, on=replace(MACHINE, memory=1000))
    assert choose(found, source, on=replace(MACHINE, total_memory=None)).budget is None


def test_sides_are_the_bundles(bundle):
    assert check_settings(AUTO, bundle).tile_auto == (32, 64)  # from half of its default to that
    assert check_settings(AUTO, wider(bundle)).tile_auto == (48, 160)
    assert check_settings(AUTO, open_bundle("mini")).tile_auto == (256, 512)
    assert check_settings(replace(AUTO, tile=64), bundle).tile_auto is None
    with pytest.raises(UsageError, match="more than half of every tile"):
        choose(wider(bundle, 32, 48), photo(), replace(AUTO, overlap=32))
    only_large = choose(wider(bundle), photo(), replace(AUTO, overlap=32))
    assert min(option.tile for option in only_large.options) == 64


def test_an_unfinished_run_keeps_its_tile(bundle, monkeypatch):
    source, found = photo(), wider(bundle)
    forward, calls = ConditionedDiT.forward, []

    def give_up(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    config = replace(AUTO, overlap=16)
    chosen = choose(found, source, config).tile
    other = 64 if chosen != 64 else 80
    monkeypatch.setattr(ConditionedDiT, "forward", give_up)
    with pytest.raises(KeyboardInterrupt):
        upscale(source, Path("out.png"), found, replace(config, tile=other), OutputConfig(), SilentProgress())
    assert choose(found, source, config) == TileChoice(other, None, ())
    assert choose(found, source, config, restart=True).tile == chosen
    assert choose(found, source, config, resume=False).tile == chosen
    result = upscale(source, Path("out.png"), found, config, OutputConfig(), SilentProgress())
    assert (result.to_json()["tile"], result.settings.tile_auto) == (other, (48, 160))
    upscale(source, Path("plain.png"), found, replace(config, tile=other), OutputConfig(), SilentProgress())
    first, second = (np.asarray(Image.open(name)) for name in ("out.png", "plain.png"))
    assert np.array_equal(first, second)


def test_every_way_to_say_it(tmp_path):
    def read(toml: str = "", environ: dict[str, str] | None = None):
        (tmp_path / "dreamsr.toml").write_text(f"[upscale]\n{toml}\n")
        return upscale_options({}, environ or {}, tmp_path).config.tile

    assert read('tile = "auto"') == "auto" and read("tile = 64") == 64
    assert read(environ={"DREAMSR_TILE": "Auto"}) == "auto" and read(environ={"DREAMSR_TILE": "64"}) == 64
    with pytest.raises(UsageError, match="'big' is not a whole number or auto"):
        read(environ={"DREAMSR_TILE": "big"})
    with pytest.raises(UsageError):
        read('tile = "big"')


def test_a_dry_run_shows_the_choice_and_what_else_there_was(tiny_bundle, capsys):
    photo()
    words = ["upscale", "a.png", "--dry-run", "--tile", "auto", "--model", str(tiny_bundle), "--tiling", "shifted"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "auto    tile " in text and "floor   not known" in text and "shifted ones in texture steps" in text
    assert run([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tile_choice"]["chosen"] == made["tile"][0]
    assert len(made["tile_choice"]["options"]) == 3 and made["tiling"] == "shifted"
    assert made["floor"] is None and made["bytes"]["total"] > 0 and made["tile_step"]["flops"] > 0
    assert run(["upscale", "a.png", "--dry-run", "--tile", "large", "--model", str(tiny_bundle)]) == 2
    assert "--tile: 'large' is not a whole number or auto" in capsys.readouterr().err
