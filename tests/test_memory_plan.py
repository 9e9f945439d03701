"""Memory modes by arithmetic: what each phase is said to need against real networks, and which mode a card gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreamsr_cli import memory_choice
from dreamsr_cli.bundle_sizes import BundleSizes, read_sizes
from dreamsr_cli.cli.app import run
from dreamsr_cli.config import UpscaleConfig, parse_memory
from dreamsr_cli.engine import check_settings
from dreamsr_cli.errors import DeviceError, UsageError
from dreamsr_cli.memory_plan import ORDER, Given, PhaseWork, choose, need, phases, typical_work
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.models.text_encoder import FluxTextEncoder

CPU = torch.device("cpu")
WORK = PhaseWork(batch=1, image_tokens=1024, text_tokens=512, prompts=10, features=0, strip_rows=384, width=4096)
GB = 10**9


@pytest.fixture
def flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BundleSizes:
    """FLUX with DreamSR's parts, none of it on this machine."""
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "none"))
    bundle = open_bundle("flux")
    return read_sizes(bundle.config, bundle.part_folder)


def weights(*modules: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def parts_of(encoder: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    assert isinstance(encoder, FluxTextEncoder)
    return encoder.clip, encoder.t5


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_flux_bundle"])
def test_the_phases_hold_what_the_networks_hold(name: str, request: pytest.FixtureRequest) -> None:
    bundle = open_bundle(str(request.getfixturevalue(name)))
    found = phases(read_sizes(bundle.config, bundle.part_folder), MemoryMode(), 4, WORK)
    restorer = bundle.open_restorer(CPU, torch.float32, mask_pads=False)
    assert found["restore"].weights == found["restore"].resident == weights(restorer.dit, restorer.controlnet)
    encoder = bundle.open_text_encoder(CPU, torch.float32)
    networks = [encoder] if isinstance(encoder, torch.nn.Module) else list(parts_of(encoder))
    # Norms and CLIP's biases are left out; at this size they are a few percent.
    assert found["text"].weights == pytest.approx(weights(*networks), rel=0.12)


def test_modes_need_what_arithmetic_says(flux: BundleSizes) -> None:
    made = {
        mode: phases(flux, MemoryMode(*mode), 2, WORK)
        for mode in [(q, o) for q in ("none", "int8", "nf4") for o in ("none", "model", "block")]
    }
    restore = {mode: phase["restore"] for mode, phase in made.items()}
    whole = restore["none", "none"]
    assert whole.parameters == pytest.approx(16.48e9, rel=2e-3) and whole.weights == 2 * whole.parameters
    # 11.84 B parameters lie in blocks.
    assert whole.weights - restore["int8", "none"].weights == pytest.approx(11.84 * GB, rel=1e-3)
    assert whole.weights - restore["nf4", "none"].weights == pytest.approx(11.84 * GB * (2 - 0.5625), rel=1e-3)
    for kind in ("none", "int8"):
        assert restore[kind, "block"].weights == restore[kind, "model"].weights == restore[kind, "none"].weights
        assert (
            restore[kind, "block"].resident
            < 2.5 * GB
            < restore[kind, "model"].resident
            < restore[kind, "none"].resident
        )
        assert restore[kind, "none"].resident - restore[kind, "model"].resident == pytest.approx(6.38 * GB, rel=1e-2)
    text = {mode: phase["text"].resident for mode, phase in made.items()}
    assert text["none", "none"] == pytest.approx(9.77 * GB, rel=2e-3)
    assert text["none", "block"] < 1.1 * GB and text["int8", "none"] < 5.5 * GB
    decode = {phase["decode"].device for phase in made.values()}
    assert len(decode) == 1 and decode.pop() < 2 * GB


def test_wide_canvases_don_t_need_more_to_decode(flux: BundleSizes) -> None:
    narrow, wide = (
        phases(flux, MemoryMode(), 2, replace(WORK, width=width))["decode"].device for width in (2048, 32768)
    )
    assert wide < 1.2 * narrow


def choice(flux: BundleSizes, gigabytes: float, given: Given | None = None, kind: str = "cuda", **more):
    work = typical_work(flux, 512, 256, 2**29)
    return choose(int(gigabytes * GB), flux, 2, work, kind, given or Given(), **more)


def test_each_card_gets_the_mode_that_changes_least(flux: BundleSizes) -> None:
    found = {size: choice(flux, size) for size in (12, 16, 24, 48, 80)}
    modes = {size: (c.mode.quantize, c.mode.offload) for size, c in found.items() if c is not None}
    assert modes == {
        12: ("none", "block"),
        16: ("none", "block"),
        24: ("int8", "none"),
        48: ("none", "none"),
        80: ("none", "none"),
    }
    for size, c in found.items():
        assert c is not None and c.device <= size * GB
        tried = ORDER[: ORDER.index(c.mode)]
        smallest = typical_work(flux, 512, 256, 2**29)(1)
        assert all(need(flux, mode, 2, smallest)[0] > size * GB for mode in tried)
    assert choice(flux, 2) is None


def test_what_a_person_typed_stays(flux: BundleSizes) -> None:
    for given in (Given(quantize="fp8"), Given(offload="block"), Given(tile_batch=1), Given("int8", "model", 2)):
        found = choice(flux, 24, given)
        assert found is not None
        assert given.quantize in (None, found.mode.quantize) and given.offload in (None, found.mode.offload)
        assert given.tile_batch in (None, found.tile_batch)
    assert choice(flux, 24, Given("none", "none")) is None


def test_backends_and_ram_that_are_not_there_are_not_chosen(flux: BundleSizes) -> None:
    no_torchao = choice(flux, 24, usable=lambda mode: mode.quantize == "none")
    assert no_torchao is not None and no_torchao.mode == MemoryMode("none", "block")
    little_ram = choice(flux, 12, host=25 * GB)
    assert little_ram is not None and little_ram.mode == MemoryMode("int8", "block")
    on_a_cpu = choice(flux, 25, kind="cpu")
    assert on_a_cpu is not None and on_a_cpu.mode == MemoryMode("int8", "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24 * GB), ("24", 24 * GB), ("1.5 gib", 3 * 2**29), ("800MB", 800 * 10**6), ("0GB", None), ("lots", None)],
)
def test_amounts_of_memory(text: str, expected: int | None) -> None:
    assert parse_memory(text) == expected


# ---------------------------------------------------------------- --memory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    return tmp_path


def test_settings_say_what_memory_chose(tiny_flux_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(str(tiny_flux_bundle))
    plain = check_settings(UpscaleConfig(), bundle)
    assert (plain.quantize, plain.offload, plain.tile_batch, plain.memory) == ("none", "none", 4, None)
    chosen = check_settings(UpscaleConfig(memory="2GB", device="cpu"), bundle)
    assert (chosen.quantize, chosen.offload, chosen.tile_batch) == ("none", "none", 8)
    assert chosen.memory is not None and chosen.memory.startswith("--memory 2GB: --quantize none --offload none")
    typed = check_settings(UpscaleConfig(memory="2GB", device="cpu", tile_batch=2, offload="model"), bundle)
    assert (typed.offload, typed.tile_batch) == ("model", 2)
    with pytest.raises(DeviceError, match="doesn't fit") as error:
        check_settings(UpscaleConfig(memory="100MB", device="cpu"), bundle)
    assert "--memory 2GB" in error.value.hint
    with pytest.raises(UsageError, match="--tile 0"):
        check_settings(UpscaleConfig(memory="2GB", tile=0), bundle)
    monkeypatch.setattr(memory_choice, "installed", lambda kind: kind == "none")
    with pytest.raises(DeviceError) as error:
        check_settings(UpscaleConfig(memory="100MB", device="cpu"), bundle)
    assert "dreamsr[quantize]" in error.value.hint


def test_memory_from_flag_environment_and_file(home: Path, tiny_bundle: Path, monkeypatch, capsys) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20), (90, 120, 60)).save("a.png")
    flags = ["upscale", "a.png", "--model", str(tiny_bundle), "--tile", "64", "--overlap", "16", "--device", "cpu"]
    assert run([*flags, "--dry-run", "--json", "--memory", "4GB"]) == 0
    shown = capsys.readouterr()
    plan = json.loads(shown.out)
    assert plan["memory_mode"].startswith("--memory 4GB: ") and plan["memory_mode"] in shown.err
    monkeypatch.setenv("DREAMSR_MEMORY", "plenty")
    assert run([*flags, "--dry-run"]) == 2
    assert "DREAMSR_MEMORY 'plenty'" in capsys.readouterr().err
    monkeypatch.delenv("DREAMSR_MEMORY")
    Path("dreamsr.toml").write_text('[upscale]\noffload = "block"\n')
    assert run([*flags, "--scale", "2", "--steps", "1", "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["offload"], result["quantize"], result["memory"]) == ("block", "none", None)
    assert run([*flags, "--dry-run", "--offload", "some"]) == 2
