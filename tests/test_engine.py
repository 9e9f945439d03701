"""From a file to a file: sizes, kinds of photos, determinism, and what each setting does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamsr_cli.backoff import WorkPlan, settle
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import UpscaleResult, upscale
from dreamsr_cli.errors import DeviceError, DreamSRError, JournalError, OutputError, UsageError
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.progress import SilentProgress


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return open_bundle(str(tiny_bundle))


def photo(path: Path, width: int = 37, height: int = 29, mode: str = "RGB") -> Path:
    """A gradient with a bright square, in any mode."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x + 90], 2).astype(np.uint8)
    rgb[height // 3 : height // 2, width // 3 : width // 2] = 240
    image = Image.fromarray(rgb)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x + y) * 255 // (width + height)).astype(np.uint8)))
    image.convert(mode).save(path)
    return path


def run(bundle: Bundle, source: Path, target: Path, **settings) -> UpscaleResult:
    base = UpscaleConfig(tile=64, overlap=16, steps=2, precision="fp32", scale=2.0)
    config = replace(base, **settings)
    return upscale(source, target, bundle, config, OutputConfig(), SilentProgress())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((37, 29), 4.0, (148, 116)),
        ((37, 29), 1.0, (37, 29)),
        ((31, 50), 2.5, (78, 125)),
        ((1, 1), 4.0, (4, 4)),
        ((90, 3), 3.3, (297, 10)),
    ],
)
def test_output_has_exactly_the_size_asked_for(bundle, tmp_path, size, scale, expected) -> None:
    result = run(bundle, photo(tmp_path / "a.png", *size), tmp_path / "b.png", scale=scale, steps=1)
    assert Image.open(tmp_path / "b.png").size == expected == (result.width, result.height)


def test_long_and_short_side(bundle, tmp_path) -> None:
    source = photo(tmp_path / "a.png", 40, 30)
    run(bundle, source, tmp_path / "l.png", scale=None, long_side=100, strength=0.0)
    run(bundle, source, tmp_path / "s.png", scale=None, short_side=100, strength=0.0)
    assert Image.open(tmp_path / "l.png").size == (100, 75)
    assert Image.open(tmp_path / "s.png").size == (133, 100)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_a_photo_comes_back_in_its_own_kind(bundle, tmp_path, mode) -> None:
    run(bundle, photo(tmp_path / "a.png", mode=mode), tmp_path / "b.png", strength=0.0)
    assert Image.open(tmp_path / "b.png").mode == mode


def test_same_command_same_bytes_and_another_seed_another_texture(bundle, tmp_path) -> None:
    source = photo(tmp_path / "a.png")
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        run(bundle, source, tmp_path / f"{name}.png", seed=seed)
    first, again, other = ((tmp_path / f"{n}.png").read_bytes() for n in "bcd")
    assert first == again
    assert first != other


def test_the_second_manner_of_decoding_is_for_strength_0_alone(tiny_bundle, tmp_path) -> None:
    """The same bundle with another last convolution for stage 1's results."""
    copied = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["refiner.restored.exit.bias"] += 0.2
    save_file(weights, file, {"format": "pt"})
    source = photo(tmp_path / "a.png")
    for name, model in (("plain", tiny_bundle), ("other", copied)):
        for strength in (0.0, 0.5):
            run(
                open_bundle(str(model)),
                source,
                tmp_path / f"{name}-{strength}.png",
                strength=strength,
                color_fix="none",
            )
    assert (pixels(tmp_path / "other-0.0.png") - pixels(tmp_path / "plain-0.0.png")).mean() > 10
    assert np.array_equal(pixels(tmp_path / "other-0.5.png"), pixels(tmp_path / "plain-0.5.png"))


def test_tile_batch_changes_rounding_only(bundle, tmp_path) -> None:
    source = photo(tmp_path / "a.png", 60, 50)
    for batch in (1, 4):
        run(bundle, source, tmp_path / f"{batch}.png", tile_batch=batch, strength=0.0)
    difference = np.abs(pixels(tmp_path / "1.png") - pixels(tmp_path / "4.png"))
    assert difference.mean() <= 0.1
    assert (difference <= 1).mean() >= 0.999


def test_every_setting_that_should_change_the_picture_does(bundle, tmp_path) -> None:
    source = photo(tmp_path / "a.png", 60, 50)
    base: dict = {"color_fix": "none"}
    variants = {
        "plain": {},
        "strength": {"strength": 0.4},
        "restored": {"strength": 0.0},
        "steps": {"steps": 3},
        "tile": {"tile": 0},
        "prompt": {"prompt": "a red brick wall"},
        "captioner": {"captioner": "none"},
        "no_removal": {"removal": False},
        "color": {"color_fix": "adain"},
        "consistency": {"consistency": 0.5},
    }
    seen = {}
    for name, settings in variants.items():
        run(bundle, source, tmp_path / f"{name}.png", **{**base, **settings})
        seen[name] = (tmp_path / f"{name}.png").read_bytes()
    assert len(set(seen.values())) == len(seen)


def test_wavelet_keeps_the_photos_colours(bundle, tmp_path) -> None:
    source = photo(tmp_path / "a.png", 64, 64)
    run(bundle, source, tmp_path / "b.png", scale=1.0)
    assert abs(pixels(tmp_path / "b.png").mean((0, 1)) - pixels(source).mean((0, 1))).max() < 1.5


def test_result_says_how_it_was_made(bundle, tmp_path) -> None:
    line = run(bundle, photo(tmp_path / "a.png"), tmp_path / "b.png", seed=7).to_json()
    assert line["input"] == str(tmp_path / "a.png")
    assert line["seed"] == 7 and line["tile"] == 64 and line["precision"] == "fp32" and line["device"] == "cpu"
    assert line["scale"] == 2.0 and line["tiles"] >= 1 and line["bundle_sha256"] == bundle.sha256
    assert "surface" in line["global_prompt"]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"overlap": 600, "tile": 512}, "--overlap"),
        ({"tile": 100}, "--tile"),
        ({"steps": 0}, "--steps"),
        ({"strength": 1.5}, "--strength"),
        ({"guidance": 3.0}, "--guidance"),
        ({"color_fix": "sepia"}, "--color-fix"),
        ({"captioner": "psychic"}, "--captioner"),
        ({"precision": "fp13"}, "--precision"),
        ({"device": "toaster"}, "--device"),
        ({"scale": 9.0}, "scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bundle, tmp_path, settings, flag) -> None:
    with pytest.raises(UsageError, match=flag):
        run(bundle, photo(tmp_path / "a.png"), tmp_path / "b.png", **settings)
    assert not (tmp_path / "b.png").exists()


class StopAt(SilentProgress):
    """An error at the beginning of one phase."""

    def __init__(self, phase: str) -> None:
        self.wanted = phase

    def phase(self, name: str, total: int) -> None:
        if name == self.wanted:
            raise DreamSRError("stop", "now")


def test_an_error_in_the_middle_leaves_a_journal_that_goes_on(bundle, tmp_path) -> None:
    source, config = photo(tmp_path / "a.png"), UpscaleConfig(tile=64, overlap=16, steps=1)
    with pytest.raises(DreamSRError, match="stop"):
        upscale(source, tmp_path / "b.png", bundle, config, OutputConfig(), StopAt("decode"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png.dreamsr"]
    upscale(source, tmp_path / "b.png", bundle, config, OutputConfig(), SilentProgress())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
    upscale(source, tmp_path / "c.png", bundle, config, OutputConfig(), SilentProgress())
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_without_resume_an_error_leaves_nothing(bundle, tmp_path) -> None:
    source, config = photo(tmp_path / "a.png"), UpscaleConfig(tile=64, overlap=16, steps=1)
    with pytest.raises(DreamSRError, match="stop"):
        upscale(source, tmp_path / "b.png", bundle, config, OutputConfig(resume=False), StopAt("decode"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_other_settings_do_not_take_over_a_journal(bundle, tmp_path) -> None:
    source, target = photo(tmp_path / "a.png"), tmp_path / "b.png"
    with pytest.raises(DreamSRError, match="stop"):
        upscale(source, target, bundle, UpscaleConfig(tile=64, overlap=16, seed=1), OutputConfig(), StopAt("texture"))
    with pytest.raises(JournalError, match="seed was 1, is 2"):
        run(bundle, source, target, seed=2, precision="auto", scale=None, steps=None)


def test_a_result_beyond_max_pixels_is_refused_before_the_work(bundle, tmp_path) -> None:
    source = photo(tmp_path / "a.png", 40, 30)
    with pytest.raises(OutputError, match="--max-pixels"):
        upscale(source, tmp_path / "b.png", bundle, UpscaleConfig(), OutputConfig(max_pixels=19_000), SilentProgress())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


class Greedy:
    """A device whose memory holds two tiles, by a hook on the real network."""

    def __init__(self, most: int) -> None:
        self.most, self.batches = most, []

    def __call__(self, module, args) -> None:
        self.batches.append(len(args[0]))
        if len(args[0]) > self.most:
            raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize(("most", "expected"), [(8, 8), (3, 2), (1, 1)])
def test_out_of_memory_halves_the_batch_until_it_fits(most, expected) -> None:
    greedy, notes = Greedy(most), SilentProgress()

    def attempt(plan: WorkPlan) -> None:
        greedy(None, (range(plan.tile_batch),))

    found = settle(WorkPlan(8, 100), attempt, torch.device("cpu"), 512, True, notes)
    assert found == WorkPlan(expected, 100)


def test_nothing_smaller_left_names_the_tile_to_type() -> None:
    def attempt(plan: WorkPlan) -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(DeviceError) as error:
        settle(WorkPlan(2, 100), attempt, torch.device("cpu"), 512, True, SilentProgress())
    assert "--tile 256" in error.value.hint
    with pytest.raises(DeviceError) as error:
        settle(WorkPlan(2, 100), attempt, torch.device("cpu"), 512, False, SilentProgress())
    assert "--no-backoff" in error.value.hint
