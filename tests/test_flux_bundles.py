"""The shipped FLUX bundles from a hub to a picture: repositories of FLUX.1-dev's exact layout at tiny size, served on
the loopback interface, fetched, and used by `dreamsr upscale` in every memory mode that runs on a CPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import flux_repositories
import numpy as np
import pytest
import torch
from hub_server import COMMIT, HubState, running_hub
from PIL import Image

from dreamsr_cli.cli.app import run
from dreamsr_cli.models import bundle as bundle_module
from dreamsr_cli.models.bundle import BUILT_IN, open_bundle
from dreamsr_cli.models.text_encoder import FluxTextEncoder
from dreamsr_cli.weights_lock import load_lock

TINY = ["--tile", "64", "--overlap", "16", "--scale", "2", "--steps", "1", "--captioner", "describe"]
TINY += ["--precision", "fp32", "--device", "cpu"]
HAVE_TORCHAO = importlib.util.find_spec("torchao") is not None


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("repositories")
    return {
        "flux.1-dev": flux_repositories.save_flux_dev(base / "dev"),
        "flux-upscaler-controlnet": flux_repositories.save_upscaler(base / "upscaler"),
        "run": flux_repositories.save_run(base / "run"),
    }


@pytest.fixture
def machine(repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    """A machine with nothing fetched yet, a photo in the current folder, and a hub."""
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "DREAMSR_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.chdir(tmp_path)
    folders = {name: repositories[name] for name in flux_repositories.NAMES}
    flux_repositories.write_lock(tmp_path / "weights.lock", folders)
    monkeypatch.setenv("DREAMSR_LOCK", str(tmp_path / "weights.lock"))
    pixels = np.random.default_rng(1).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save("a.png")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        for name, repository in flux_repositories.NAMES.items():
            hub.add(repository, folders[name], commit=flux_repositories.COMMITS[name])
        yield hub


@pytest.fixture
def ready(machine: HubState, repositories: dict[str, Path], tmp_path: Path) -> HubState:
    """The same with both bundles' weights on the disk."""
    for name in flux_repositories.NAMES:
        shutil.copytree(repositories[name], tmp_path / "weights" / name)
    return machine


def picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB")).astype(int)


def upscaled(name: str, *flags: str) -> np.ndarray:
    assert run(["upscale", "a.png", "-o", name, "-q", *TINY, *flags]) == 0
    return picture(name)


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("name", BUILT_IN)
def test_shipped_bundles_point_at_what_weights_lock_lists(name: str) -> None:
    bundle, known = open_bundle(name), load_lock()
    assert bundle.config.name == name
    for part in bundle.config.parts.values():
        if part.lock is None:
            continue
        entry = known[part.lock]
        assert entry.files or entry.repository is None
        if part.subfolder:
            assert any(row.path.startswith(f"{part.subfolder}/") for row in entry.files)


# ---------------------------------------------------------------- fetch, then upscale


def test_from_the_hub_to_a_picture(
    machine: HubState, repositories: dict[str, Path], capfd: pytest.CaptureFixture
) -> None:
    assert run(["upscale", "a.png", *TINY, "--model", "flux-upscaler"]) == 1
    shown = capfd.readouterr().err
    assert len(shown.splitlines()) == 2 and "dreamsr fetch-weights flux.1-dev flux-upscaler-controlnet" in shown
    assert run(["fetch-weights", "flux", "flux-upscaler", "-q"]) == 0
    asked = len(machine.requests)
    capfd.readouterr()
    assert run(["upscale", "a.png", "-o", "up.png", "--json", *TINY, "--model", "flux-upscaler"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["model"], result["removal"], result["quantize"], result["offload"]) == (
        "flux-upscaler",
        False,
        "none",
        "none",
    )
    assert picture("up.png").shape == (72, 80, 3) and picture("up.png").std() > 5
    assert run(["upscale", "a.png", *TINY, "--model", "flux"]) == 1
    shown = capfd.readouterr().err
    assert "not published by anybody" in shown and "--weights RUN" in shown
    assert (
        run(
            [
                "upscale",
                "a.png",
                "-o",
                "f.png",
                "--json",
                *TINY,
                "--model",
                "flux",
                "--weights",
                str(repositories["run"]),
            ]
        )
        == 0
    )
    result = json.loads(capfd.readouterr().out)
    assert result["removal"] is True and result["model"] == "flux"
    assert (picture("f.png") != picture("up.png")).any()
    assert len(machine.requests) == asked, "an upscale asked the hub"


def test_a_run_names_its_base(ready: HubState, repositories: dict[str, Path], capfd: pytest.CaptureFixture) -> None:
    own = str(repositories["run"])
    with_model = upscaled("m.png", "--model", "flux", "--weights", own)
    assert np.array_equal(upscaled("w.png", "--weights", own), with_model)
    assert run(["upscale", "a.png", *TINY, "--model", "mini", "--weights", own]) == 2
    assert "another base" in capfd.readouterr().err


# ---------------------------------------------------------------- --weights ORG/NAME


def test_weights_from_the_hub_are_fetched_once(
    ready: HubState, repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    folder = repositories["run"] / "bundle"
    ready.add("me/run", folder).files["evil.bin"] = b"never fetched"
    expected = upscaled("local.png", "--weights", str(repositories["run"]))
    assert run(["upscale", "a.png", *TINY, "--dry-run", "--weights", "me/run"]) == 1
    assert "without --dry-run fetches it" in capfd.readouterr().err and not ready.requests
    assert np.array_equal(upscaled("hub.png", "--weights", "me/run"), expected)
    place = Path("weights/hub/me--run")
    assert sorted(p.name for p in place.iterdir() if not p.name.startswith(".")) == sorted(
        p.name for p in folder.iterdir()
    )
    asked = len(ready.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert np.array_equal(upscaled("again.png", "--weights", "me/run"), expected)
    assert len(ready.requests) == asked
    path = next(place.glob("lora/*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert run(["upscale", "a.png", *TINY, "--weights", "me/run"]) == 1
    assert "was altered since it was fetched" in capfd.readouterr().err


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "DREAMSR_OFFLINE"])
def test_weights_of_the_hub_without_a_network(
    ready: HubState, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    assert run(["upscale", "a.png", *TINY, "--weights", "me/run"]) == 1
    shown = capfd.readouterr().err
    assert variable in shown and "try: unset" in shown and not ready.requests


def test_a_repository_that_is_no_run_is_refused(
    ready: HubState, repositories: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    ready.add("me/other", repositories["flux-upscaler-controlnet"])
    assert run(["upscale", "a.png", *TINY, "--weights", "me/other"]) == 1
    assert "holds no bundle.json" in capfd.readouterr().err
    assert run(["upscale", "a.png", *TINY, "--weights", "me/nothing"]) == 1
    assert "knows no repository" in capfd.readouterr().err
    assert run(["upscale", "a.png", *TINY, "--weights", f"me/other@{'9' * 40}"]) == 1
    assert "has no revision" in capfd.readouterr().err
    strange = json.loads((repositories["run"] / "bundle" / "bundle.json").read_text())
    strange["parts"]["lora"] = {"path": "../../secrets"}
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "bundle.json").write_text(json.dumps(strange))
    ready.add("me/strange", folder)
    assert run(["upscale", "a.png", *TINY, "--weights", "me/strange"]) == 1
    assert "outside the repository" in capfd.readouterr().err


def test_a_run_with_another_hash_than_the_hubs_is_refused(
    ready: HubState, repositories: dict[str, Path], capfd: pytest.CaptureFixture
) -> None:
    repository = ready.add("me/run", repositories["run"] / "bundle", commit=COMMIT)
    name = next(path for path in repository.files if path.endswith(".safetensors"))
    ready.altered[name] = b"\0" * len(repository.files[name])
    assert run(["upscale", "a.png", *TINY, "--weights", "me/run"]) == 1
    assert name in capfd.readouterr().err
    ready.altered.clear()
    assert run(["fetch-weights", "me/run", "-q"]) == 0
    assert capfd.readouterr().out.strip().endswith("me--run")


# ---------------------------------------------------------------- memory modes


@pytest.fixture(scope="module")
def whole() -> dict[str, np.ndarray]:
    """Pictures without any memory mode, made once."""
    return {}


def both(repositories: dict[str, Path]) -> dict[str, list[str]]:
    """Flags of the two bundles; the run has a LoRA."""
    return {"upscaler": ["--model", "flux-upscaler"], "run": ["--weights", str(repositories["run"])]}


def difference(name: str, flags: list[str], whole: dict[str, np.ndarray], *mode: str) -> np.ndarray:
    """Levels between the picture with these flags and the one without a memory mode."""
    if name not in whole:
        whole[name] = upscaled(f"{name}.png", *flags)
    return np.abs(upscaled(f"{name}{''.join(mode)}.png", *flags, *mode) - whole[name])


@pytest.mark.parametrize("offload", ["model", "block"])
@pytest.mark.parametrize("name", ["upscaler", "run"])
def test_what_waits_in_memory_changes_no_byte(
    ready: HubState, repositories: dict[str, Path], whole: dict[str, np.ndarray], name: str, offload: str
) -> None:
    assert not difference(name, both(repositories)[name], whole, "--offload", offload).any()


@pytest.mark.skipif(not HAVE_TORCHAO, reason="torchao is not installed")
@pytest.mark.parametrize(
    "offload", ["none", pytest.param("model", marks=pytest.mark.slow), pytest.param("block", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["upscaler", "run"])
def test_fewer_bits_change_the_picture_a_little(
    ready: HubState, repositories: dict[str, Path], whole: dict[str, np.ndarray], name: str, quantize: str, offload: str
) -> None:
    found = difference(name, both(repositories)[name], whole, "--quantize", quantize, "--offload", offload).mean()
    assert 0 < found < 12, found


@pytest.mark.skipif(HAVE_TORCHAO, reason="torchao is installed")
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_missing_backend_is_named(ready: HubState, quantize: str, capfd: pytest.CaptureFixture) -> None:
    assert run(["upscale", "a.png", *TINY, "--model", "flux-upscaler", "--quantize", quantize]) == 1
    shown = capfd.readouterr().err
    assert "needs torchao" in shown and "pip install 'dreamsr[quantize]'" in shown


def test_nf4_says_why_it_does_not_run_on_a_cpu(ready: HubState, capfd: pytest.CaptureFixture) -> None:
    assert run(["upscale", "a.png", *TINY, "--model", "flux-upscaler", "--quantize", "nf4"]) == 2
    shown = capfd.readouterr().err
    assert "CUDA or XPU" in shown and "--quantize int8" in shown
    assert run(["upscale", "a.png", *TINY, "--quantize", "int3"]) == 2


@pytest.mark.skipif(not HAVE_TORCHAO, reason="torchao is not installed")
def test_the_built_in_model_takes_fewer_bits_too(ready: HubState, whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DREAMSR_LOCK")
    assert 0 < difference("mini", [], whole, "--quantize", "int8", "--offload", "block").mean() < 4


@pytest.mark.parametrize(("free", "expected"), [(None, [1]), (600 * 10**6, [0, 0])])
def test_encoders_are_freed_before_the_restorer_is_loaded_where_memory_is_short(
    ready: HubState, monkeypatch: pytest.MonkeyPatch, repositories: dict[str, Path], free: int | None, expected: list
) -> None:
    """They are loaded once for all photos, and the restorer for each; where all fit (`free`: bytes of RAM) everything
    is loaded once and stays."""
    import gc
    import weakref

    from dreamsr_cli import machine

    if free is not None:
        monkeypatch.setattr(machine, "free_memory", lambda: free)

    shutil.copy("a.png", "b.png")
    encoders: list[weakref.ref] = []
    alive: list[int] = []
    open_text, open_restorer = bundle_module.Bundle.open_text_encoder, bundle_module.Bundle.open_restorer

    def text(self, *args):  # noqa: ANN001, ANN202
        made = open_text(self, *args)
        assert isinstance(made, FluxTextEncoder)
        encoders.append(weakref.ref(made.t5))
        return made

    def restorer(self, *args):  # noqa: ANN001, ANN202
        gc.collect()
        alive.append(sum(reference() is not None for reference in encoders))
        return open_restorer(self, *args)

    monkeypatch.setattr(bundle_module.Bundle, "open_text_encoder", text)
    monkeypatch.setattr(bundle_module.Bundle, "open_restorer", restorer)
    assert run(["upscale", "a.png", "b.png", "-o", "out", "-q", *TINY, "--model", "flux-upscaler"]) == 0
    assert len(encoders) == 1 and alive == expected


# ---------------------------------------------------------------- plans before anything is fetched


@pytest.mark.parametrize("model", ["flux", "flux-upscaler"])
def test_a_dry_run_needs_no_weights(
    model: str, monkeypatch: pytest.MonkeyPatch, machine: HubState, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("DREAMSR_LOCK")
    flags = ["upscale", "a.png", "--model", model, "--dry-run", "--json", "--device", "cpu"]
    assert run(flags) == 0
    plan = json.loads(capfd.readouterr().out)
    restore = plan["phases"]["restore"]
    # 11.90 B + 9-block ControlNet, cross-attention and LoRA, or Jasper's 3,583,210,496 bytes of 16-bit weights.
    own = 3_188_700_000 + 340_000_000 + 1_047_000_000 if model == "flux" else 3_583_210_496 // 2
    assert restore["parameters"] == pytest.approx(11_901_408_320 + own, rel=1e-3)
    assert plan["phases"]["text"]["parameters"] == pytest.approx(4.885e9, rel=2e-3)
    assert any("fetch-weights flux.1-dev" in reason for reason in plan["stops_because"])
    assert any("not published" in reason for reason in plan["stops_because"]) == (model == "flux")
    assert plan["cards"]["80"]["quantize"] == plan["cards"]["80"]["offload"] == "none"
    for size in ("12", "16", "24", "48", "80"):
        assert plan["cards"][size]["device"] < int(size) * 10**9
    assert run([*flags[:-4], "--dry-run", "--device", "cpu"]) == 0
    assert "  12 GB" in capfd.readouterr().out and not machine.requests


def test_quantized_weights_are_planned_smaller(
    machine: HubState, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    if not HAVE_TORCHAO:
        pytest.skip("torchao is not installed")
    monkeypatch.delenv("DREAMSR_LOCK")
    found = {}
    for quantize in ("none", "int8"):
        flags = ["--model", "flux-upscaler", "--dry-run", "--json", "--precision", "bf16", "--quantize", quantize]
        assert run(["upscale", "a.png", "--device", "cpu", *flags]) == 0
        found[quantize] = json.loads(capfd.readouterr().out)
    whole, small = (found[name]["phases"]["restore"]["weights"] for name in ("none", "int8"))
    assert whole == pytest.approx(2 * 11.9e9 + 3.583e9, rel=1e-3) and small == pytest.approx(whole - 11.84e9, rel=1e-2)
    assert found["int8"]["memory"]["host"] < 0.65 * found["none"]["memory"]["host"]
