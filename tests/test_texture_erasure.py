"""Texture erasure: drawn by seed, independent of neighbours, the method's arithmetic, with both kinds of bundles."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dreamsr_cli import flow, resample
from dreamsr_cli.degradations import erasure_denoising, texture_erasure
from dreamsr_cli.degradations.texture_erasure import (
    ERASE_TEXT,
    Eraser,
    ErasureParams,
    draw_erasure,
    erasure_text,
    open_eraser,
    shrink_and_back,
)
from dreamsr_cli.draws import normal_rows
from dreamsr_cli.errors import ConfigError, DeviceError, WeightsError
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.plain_data import from_dict, to_dict
from dreamsr_cli.progress import SilentProgress

CPU = torch.device("cpu")
KINDS = ("correction", "velocity", "flux")
Open = Callable[..., Eraser]


@pytest.fixture
def erasers(tiny_bundle: Path, tiny_flux_bundle: Path) -> Open:
    """Opens an eraser of a kind of bundle, float32 on the CPU."""

    def make(kind: str, batch: int = 3, keep: bool | None = None) -> Eraser:
        bundle = open_bundle(str(tiny_flux_bundle if kind == "flux" else tiny_bundle))
        sampling = dataclasses.replace(bundle.config.sampling, prediction=kind)
        if kind != "flux":
            bundle = Bundle(bundle.folder, dataclasses.replace(bundle.config, sampling=sampling))
        return open_eraser(bundle, CPU, torch.float32, batch, keep)

    return make


def crops(count: int = 5, rows: int = 32, cols: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(4)
    return torch.from_numpy(rng.random((count, 3, rows, cols), dtype=np.float32))


def drawn(count: int = 5, steps: int | None = None) -> list[ErasureParams]:
    params = [draw_erasure(7, "a" * 64, index) for index in range(count)]
    # A short text: the tiny FLUX bundle reads 16 letters.
    return [dataclasses.replace(one, steps=steps or 1 + i % 3, erase_text="plain") for i, one in enumerate(params)]


PROMPTS = ["A field.", "", "a very long road with stones beside it and many words about trees", "sea", "x" * 900]


# ---------------------------------------------------------------- parameters


def test_draws_are_the_methods_ranges() -> None:
    params = [draw_erasure(1, "sha", index) for index in range(2000)]
    for name, low, high in (("factor", 1.0, 2.0), ("strength", 0.3, 0.5)):
        values = np.array([getattr(one, name) for one in params])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * 2000))
        counts, _ = np.histogram(values, 10, (low, high))
        assert np.abs(counts - 200).max() < 5 * math.sqrt(200)
    assert all(one.steps == math.ceil(28 * one.strength) for one in params)
    assert {one.steps for one in params} == {9, 10, 11, 12, 13, 14}
    assert len({one.noise_seed for one in params}) == 2000


def test_draws_depend_on_seed_source_and_crop_alone() -> None:
    first = draw_erasure(1, "sha", 0)
    assert draw_erasure(1, "sha", 0) == first
    assert len({first, draw_erasure(2, "sha", 0), draw_erasure(1, "other", 0), draw_erasure(1, "sha", 1)}) == 4
    other_text = draw_erasure(1, "sha", 0, "plain")
    assert other_text == dataclasses.replace(first, erase_text="plain")


def test_parameters_survive_json() -> None:
    one = draw_erasure(3, "sha", 5)
    assert from_dict(ErasureParams, json.loads(json.dumps(to_dict(one))), "params.jsonl") == one


@pytest.mark.parametrize(
    "change", [{"factor": 0.5}, {"strength": 0.0}, {"strength": 1.2}, {"steps": 0}, {"noise_seed": -1}]
)
def test_parameters_out_of_range_are_named(change: dict[str, float]) -> None:
    plain = to_dict(draw_erasure(3, "sha", 5)) | change
    with pytest.raises(ConfigError, match=next(iter(change))) as caught:
        from_dict(ErasureParams, plain, "params.jsonl")
    assert "give a number" in caught.value.hint


def test_one_text() -> None:
    assert erasure_text("A cat.", ERASE_TEXT) == f"A cat. {ERASE_TEXT}"
    assert erasure_text(" a cat ", "plain") == "a cat, plain"
    assert (erasure_text("", "plain"), erasure_text("a cat", "")) == ("plain", "a cat")


def test_shrink_and_back() -> None:
    hq = crops(2, 36, 47)
    assert torch.equal(shrink_and_back(hq, 1.0), hq)
    expected = resample.resize(resample.resize(hq, round(36 / 1.7), round(47 / 1.7)), 36, 47)
    assert torch.equal(shrink_and_back(hq, 1.7), expected)
    assert torch.allclose(shrink_and_back(torch.full((1, 3, 20, 20), 0.3), 2.0), torch.tensor(0.3), atol=1e-6)


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_does_not_depend_on_its_neighbours(erasers: Open, kind: str) -> None:
    hq, params = crops(), drawn()
    with erasers(kind) as eraser:
        made = eraser.erase(hq, params, PROMPTS)
        assert made.shape == hq.shape and made.dtype == torch.float32
        assert made.min() >= 0 and made.max() <= 1
        for order in ([4, 2, 0, 1, 3], [2], [1, 3], [0, 0, 0, 0]):
            again = eraser.erase(hq[order], [params[i] for i in order], [PROMPTS[i] for i in order])
            assert torch.equal(again, made[order])


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_counts(erasers: Open, kind: str) -> None:
    hq, (one,) = crops(1), drawn(1, steps=2)
    with erasers(kind) as eraser:

        def made(
            pixels: torch.Tensor = hq, prompt: str = "a cat", change: dict[str, Any] | None = None
        ) -> torch.Tensor:
            return eraser.erase(pixels, [dataclasses.replace(one, **(change or {}))], [prompt])

        base = made()
        assert torch.equal(made(), base)
        changes = {"factor": 1.9, "strength": 0.31, "steps": 3, "noise_seed": 5, "erase_text": "other"}
        for name, value in changes.items():
            assert not torch.equal(made(change={name: value}), base), name
        assert not torch.equal(made(prompt="a dog"), base)
        assert not torch.equal(made(pixels=1 - hq), base)


@pytest.mark.parametrize("kind", ["correction", "flux"])
def test_phase_by_phase_gives_the_same_bytes(erasers: Open, kind: str) -> None:
    hq, params = crops(2), drawn(2)
    with erasers(kind, keep=True) as eraser:
        kept = eraser.erase(hq, params, PROMPTS[:2])
        assert "vae" in eraser._open
    assert not eraser._open
    lean = erasers(kind, keep=False)
    assert torch.equal(lean.erase(hq, params, PROMPTS[:2]), kept)
    assert not lean._open


@pytest.mark.parametrize("kind", KINDS)
def test_other_batches_differ_in_the_last_bits_only(erasers: Open, kind: str) -> None:
    hq, params = crops(3), drawn(3)
    one, three = (erasers(kind, batch=batch).erase(hq, params, PROMPTS[:3]) for batch in (1, 3))
    assert (one - three).abs().max() < 1e-4


def test_odd_sides_are_padded_by_reflection(erasers: Open) -> None:
    hq, params = crops(1, 37, 50), drawn(1)
    with erasers("correction") as eraser:
        made = eraser.erase(hq, params, ["a cat"])
        assert made.shape == hq.shape
        # The network must see what a picture reflected after the downsampling would be.
        (job,) = eraser._encode(hq, params, eraser._embed(params, ["a cat"], SilentProgress())[0], SilentProgress())
        wide = torch.from_numpy(
            np.pad(shrink_and_back(hq, params[0].factor)[0].numpy(), [(0, 0), (0, 11), (0, 14)], "reflect")
        )
        expected = eraser._part("vae").encode(wide[None] * 2 - 1)[0]
        assert job.z_hq_CHW.shape == (8, 6, 8)
        assert torch.equal(job.z_hq_CHW, expected)


@pytest.mark.parametrize("kind", ["velocity", "flux"])
def test_velocities_are_followed_to_zero(erasers: Open, kind: str) -> None:
    """Against the method written out: encode, mix, Euler, decode, for one crop and nothing else."""
    hq, (one,) = crops(1), drawn(1, steps=3)
    eraser = erasers(kind, batch=1)
    made = eraser.erase(hq, [one], ["a cat"])

    bundle = eraser.bundle
    autoencoder, encoder = bundle.open_autoencoder(CPU, torch.float32), bundle.open_text_encoder(CPU, torch.float32)
    dit = bundle.open_restorer(CPU, torch.float32, not encoder.pads_are_seen).dit
    with torch.inference_mode():
        z_hq = autoencoder.encode(shrink_and_back(hq, one.factor) * 2 - 1)
        eps = torch.from_numpy(normal_rows(one.noise_seed, "erasure-noise", 0, 4, 4, 8, 0)).permute(2, 0, 1)[None]
        z_s = (1 - one.strength) * z_hq + one.strength * eps
        text = stack(encoder.encode(["a cat, plain"], bundle.config.defaults.max_text_tokens)[0])
        guidance = bundle.config.sampling.guidance

        def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
            return dit(z, torch.tensor([t]), text, None, guidance)

        z_0 = flow.euler(z_s, velocity, [one.strength * k / 3 for k in (3, 2, 1, 0)])
        expected = (autoencoder.decode(z_0) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(made, expected, atol=2e-5)


def test_corrections_are_averaged_over_draws(erasers: Open) -> None:
    """Against the rule written out: the mean of condition - correction over fresh noise, under control."""
    hq, (one,) = crops(1), drawn(1, steps=3)
    eraser = erasers("correction", batch=1)
    made = eraser.erase(hq, [one], ["a cat"])

    bundle = eraser.bundle
    autoencoder, encoder = bundle.open_autoencoder(CPU, torch.float32), bundle.open_text_encoder(CPU, torch.float32)
    restorer = bundle.open_restorer(CPU, torch.float32, True)
    with torch.inference_mode():
        z_hq, condition = (autoencoder.encode(shrink_and_back(hq, f) * 2 - 1) for f in (one.factor, 4))
        text = stack(encoder.encode(["a cat, plain"], bundle.config.defaults.max_text_tokens)[0])
        features = restorer.controlnet(condition, torch.zeros(1), text, True, None)
        injections = restorer.dit.prepare(features)
        guesses = []
        for draw in range(3):
            eps = torch.from_numpy(normal_rows(one.noise_seed, "erasure-noise", 0, 4, 4, 8, draw)).permute(2, 0, 1)
            z_s = (1 - one.strength) * z_hq + one.strength * eps
            guesses.append(condition - restorer.dit(z_s, torch.tensor([one.strength]), text, injections))
        expected = (autoencoder.decode(torch.stack(guesses).mean(0)) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(made, expected, atol=2e-5)


def test_units_are_full_and_of_one_length_of_text() -> None:
    from tiny_models import latent, text

    lengths = [5, 40, 31, 33, 32, 64, 1]
    jobs = [erasure_denoising.Job(i, drawn(7)[i], text(tokens=n), latent()[0], None) for i, n in enumerate(lengths)]
    units = list(erasure_denoising.units(jobs, 3))
    assert sorted(job.index for unit in units for job in unit) == list(range(7))
    assert sorted(len(unit) for unit in units) == [1, 3, 3]
    assert all(len({job.text_length for job in unit}) == 1 for unit in units)


def test_erase_text_survives_a_prompt_that_is_too_long(erasers: Open) -> None:
    """Only the tail of the prompt may be lost, never P_neg."""
    hq, (one,) = crops(1), drawn(1)
    long = "word " * 400
    with erasers("correction") as eraser:
        plain = eraser.erase(hq, [one], [long])
        other = eraser.erase(hq, [dataclasses.replace(one, erase_text="something else")], [long])
        tail = eraser.erase(hq, [one], [long + "and a tail"])
    assert not torch.equal(plain, other)
    assert torch.equal(plain, tail)


# ---------------------------------------------------------------- what a bundle needs, what can go wrong


def test_velocities_need_no_controlnet(tiny_flux_bundle: Path, tmp_path: Path) -> None:
    """A bundle that is yet to be trained on these pairs has none."""
    data = json.loads((tiny_flux_bundle / "bundle.json").read_text(encoding="utf-8"))
    kept = ("transformer", "vae", "text_encoder")
    data["parts"] = {name: {"path": str(tiny_flux_bundle / name)} for name in kept}
    (tmp_path / "bundle.json").write_text(json.dumps(data), encoding="utf-8")
    made = open_eraser(open_bundle(str(tmp_path)), CPU, torch.float32).erase(crops(1), drawn(1), [""])
    assert made.shape == (1, 3, 32, 32)


def test_a_missing_part_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_bundle / "bundle.json").read_text(encoding="utf-8"))
    data["parts"] = {name: {"path": str(tiny_bundle / name)} for name in data["parts"]}
    data["parts"]["transformer"] = {"path": "nowhere"}
    (tmp_path / "bundle.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(WeightsError, match="transformer"):
        open_eraser(open_bundle(str(tmp_path)), CPU, torch.float32)


@pytest.mark.parametrize(
    ("pixels", "params", "prompts", "message"),
    [
        (torch.rand(3, 32, 32), 1, 1, "expected"),
        (torch.rand(1, 4, 32, 32), 1, 1, "expected"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 1, 1, "floating point"),
        (torch.rand(0, 3, 32, 32), 0, 0, "expected"),
        (torch.rand(1, 3, 32, 15), 1, 1, "at least 16"),
        (torch.rand(2, 3, 32, 32), 1, 2, "2 crops, 1 parameters and 2 prompts"),
        (torch.rand(2, 3, 32, 32), 2, 1, "2 crops, 2 parameters and 1 prompts"),
    ],
)
def test_wrong_shapes(erasers: Open, pixels: torch.Tensor, params: int, prompts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        erasers("velocity").erase(pixels, drawn(params), ["x"] * prompts)


def test_a_batch_must_hold_something(erasers: Open) -> None:
    with pytest.raises(ValueError, match="batch"):
        erasers("velocity", batch=0)


def test_out_of_memory_says_what_to_type(erasers: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(texture_erasure, "by_euler", fails)
    with pytest.raises(DeviceError, match="32x48, 3 at a time") as caught:
        erasers("velocity").erase(crops(1, 48, 32), drawn(1), [""])
    assert "smaller crops" in caught.value.hint


def test_settings_say_what_decides_the_bytes(erasers: Open) -> None:
    settings = erasers("correction").settings
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["denoise"], erasers("flux").settings["denoise"]) == ("mean", "euler")
    assert settings["batch"] == 3 and settings["precision"] == "fp32" and len(settings["bundle_sha256"]) == 64


def test_progress_hears_where_the_work_is(erasers: Open) -> None:
    class Places(SilentProgress):
        def __init__(self) -> None:
            self.places: list[str] = []

        def at(self, place: str) -> None:
            self.places.append(place)

    for kind, word in (("correction", "draw"), ("velocity", "step")):
        heard = Places()
        erasers(kind, batch=2).erase(crops(3), drawn(3, steps=2), [""] * 3, heard)
        calls = [f"batch {unit} of 2, {word} {k} of 2" for unit in (1, 2) for k in (1, 2)]
        assert heard.places == ["reading prompts", "encoding", *calls, "decoding"]


# ---------------------------------------------------------------- benchmark


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    return importlib.import_module("texture_erasure")


def test_the_benchmarks_measures(script: ModuleType) -> None:
    """A Gaussian blur is found again by its energy, and keeps no more of edges than of texture by its own measure."""
    rng = np.random.default_rng(0)
    hq = torch.from_numpy(rng.random((2, 3, 64, 64), dtype=np.float32))
    blur = script.blurred(hq, 0.8)
    plain, sigmas = script.matched_blur(hq, script.high_energy(blur))
    assert sigmas == pytest.approx([0.8, 0.8], rel=1e-3)
    found, _ = script.figures(hq, blur)
    assert found["high_ratio"] < 0.5 and found["blur_difference_levels"] < 0.05
    assert found["edges_kept"] == pytest.approx(found["edges_kept_by_blur"], rel=1e-3)
    assert script.kept(hq, hq, script.WEAK) == pytest.approx(torch.ones(2))
    noise = hq + 0.1 * torch.from_numpy(rng.standard_normal(hq.shape, dtype=np.float32))
    assert script.kept(hq, noise, script.WEAK) == pytest.approx(torch.ones(2), abs=0.1), "noise counts for nothing"
    # Periods of 4 pixels are high, of 16 pixels are not.
    waves = [torch.sin(torch.arange(64.0) * 2 * math.pi / period).expand(1, 3, 64, 64) for period in (4, 16)]
    assert script.high_energy(waves[0]) > 1e4 * script.high_energy(waves[1])


def test_the_benchmark_runs(
    script: ModuleType, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    rng = np.random.default_rng(1)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (80, 96, 3), np.uint8)).save(tmp_path / name)
    sheet = tmp_path / "out" / "sheet.png"
    sheet.parent.mkdir()
    words = [str(tmp_path), "--model", str(tiny_bundle), "--crops", "3", "--size", "32", "--sheet", str(sheet)]
    assert script.main([*words, "--shown", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["crops"] == 3 and found["settings"]["bundle"] == "tiny"
    assert set(found["targets"].values()) <= {True, False} and len(found["targets"]) == 3
    assert Image.open(sheet).size == (64, 96)
    assert script.main(words) == 0
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("met ", "MISSED "))]
    assert len(verdicts) == 3
    assert script.main([str(sheet.parent), "--size", "4096", "--model", str(tiny_bundle)]) == 1
    assert "--size" in capsys.readouterr().err
