"""A folder of weights: opened part by part, hashed by content, refused when it isn't what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CPU, RECIPE, latent, networks, pictures

from dreamsr_cli.config import BundleConfig
from dreamsr_cli.errors import ConfigError, DreamSRError, WeightsError
from dreamsr_cli.models.autoencoder import PatchAutoencoder
from dreamsr_cli.models.bundle import PARTS, Bundle, Restorer, open_bundle, read_config, save_bundle
from dreamsr_cli.models.text_encoder import ByteTextEncoder, TextEmbedding, stack
from dreamsr_cli.plain_data import from_dict, to_dict
from dreamsr_cli.training.run_bundle import export

TENSORS = "diffusion_pytorch_model.safetensors"
PICTURES = tuple(part for part in PARTS if part not in ("cleanliness", "enlarger", "grain", "cleaner"))
"""What every bundle has; the judge of photos, what enlarges and cleans them and grain are extra (their tests)."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_bundle, tmp_path) -> Path:
    """A copy of the tiny bundle that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json as plain data."""
    path = folder / "bundle.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def open_all(folder: Path, dtype: torch.dtype = torch.float32) -> Restorer:
    bundle = open_bundle(str(folder))
    bundle.open_autoencoder(CPU, dtype)
    encoder = bundle.open_text_encoder(CPU, dtype)
    return bundle.open_restorer(CPU, dtype, mask_pads=not encoder.pads_are_seen)


@torch.no_grad()
def velocity(restorer: Restorer, words: TextEmbedding, guidance: float | None = None) -> torch.Tensor:
    """Of random latents, with control and the LoRA on: every network of the restorer has a say."""
    z, dtype = latent(2), restorer.dit.transformer.dtype
    words = words.to(CPU, dtype)
    made = restorer.controlnet(z, torch.zeros(2), words, restorer.dit.mask_pads, guidance)
    assert restorer.lora is not None
    with restorer.lora.on():
        return restorer.dit(z, torch.ones(2), words, restorer.dit.prepare(made), guidance)


def test_config_survives_the_round_trip(tiny_bundle) -> None:
    data = json.loads((tiny_bundle / "bundle.json").read_text())
    config = read_config(tiny_bundle)
    assert json.loads(json.dumps(to_dict(config))) == data
    assert from_dict(BundleConfig, to_dict(config), "here") == config
    assert config.control.map == (0, None) and set(config.parts) == set(PICTURES)
    assert config.latent.channels == 8 and config.defaults.tile == 64


def test_what_was_built_is_what_is_opened(tiny_bundle) -> None:
    made = networks()
    assert isinstance(made.text_encoder, ByteTextEncoder)
    for module in (made.dit, made.controlnet, made.text_encoder):
        module.to(torch.bfloat16).float().eval()  # bundles hold bfloat16
    bundle = open_bundle(str(tiny_bundle))
    encoder, restorer = bundle.open_text_encoder(CPU, torch.float32), open_all(tiny_bundle)
    words = stack(encoder.encode(["a wall of stone", "grass"], 128)[0])
    own = stack(made.text_encoder.encode(["a wall of stone", "grass"], 128)[0])
    assert torch.allclose(words.tokens_BTD, own.tokens_BTD, atol=1e-6)
    expected = velocity(Restorer(made.dit, made.controlnet, made.lora, torch.device("cpu")), own)
    assert torch.allclose(velocity(restorer, words), expected, atol=1e-5)
    assert not any(p.requires_grad for p in [*restorer.dit.parameters(), *restorer.controlnet.parameters()])
    assert not any(m.training for m in [*restorer.dit.modules(), *restorer.controlnet.modules()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_patch_transform_stays_in_float32(tiny_bundle, dtype) -> None:
    autoencoder = open_bundle(str(tiny_bundle)).open_autoencoder(CPU, dtype)
    assert isinstance(autoencoder, PatchAutoencoder)
    assert autoencoder.refiner.entry.weight.dtype == dtype
    for name in ("mean_K", "basis_CK", "gain_C"):
        assert torch.equal(getattr(autoencoder, name), getattr(networks().autoencoder, name))
    assert autoencoder.encode(pictures(1)).dtype == torch.float32


def test_flux_parts_are_opened_by_the_same_code(tiny_flux_bundle) -> None:
    bundle = open_bundle(str(tiny_flux_bundle))
    encoder, restorer = bundle.open_text_encoder(CPU, torch.float32), open_all(tiny_flux_bundle)
    assert not restorer.dit.mask_pads and bundle.config.sampling.guidance == 3.5
    words = stack(encoder.encode(["a wall", "grass"], 16)[0])
    one, other = velocity(restorer, words, 1.0), velocity(restorer, words, 3.5)
    assert one.shape == (2, 8, 6, 4) and one.isfinite().all()
    assert (one - other).abs().max() > 1e-4
    half = velocity(open_all(tiny_flux_bundle, torch.bfloat16), words, 1.0)
    assert half.dtype == torch.float32 and 0 < (half - one).abs().mean() < 0.1 * one.abs().mean()


def test_parts_left_out_of_control_are_not_needed(folder) -> None:
    def image_only(data: dict[str, Any]) -> None:
        data["control"]["text"] = False
        del data["parts"]["lora"], data["parts"]["context_attention"]

    edit(folder, image_only)
    restorer = open_all(folder)
    assert restorer.lora is None and restorer.dit.context_attention is None


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda d: d.update(licens="MIT"), ConfigError, r"unknown key 'licens' .* did you mean 'licence'"),
        (lambda d: d["sampling"].update(t_stat=0.5), ConfigError, r"'t_stat' .* did you mean 't_start'"),
        (lambda d: d["parts"]["vae"].update(paht="x"), ConfigError, r"parts\.vae.*'paht' .* did you mean 'path'"),
        (lambda d: d.pop("licence"), ConfigError, "'licence' is missing"),
        (lambda d: d.update(format=2), ConfigError, "format 2 is not known"),
        (lambda d: d["control"].update(map=["a"]), ConfigError, "control: map: expected int"),
        (lambda d: d["parts"].update(unet={"path": "unet"}), ConfigError, "unknown part 'unet'"),
        (lambda d: d["parts"].pop("vae"), WeightsError, "has no part 'vae'"),
        (lambda d: d["parts"].update(vae={"path": "elsewhere"}), WeightsError, "part 'vae' is missing"),
        (lambda d: d["parts"].update(vae={"lock": "flux.1-dev", "subfolder": "vae"}), WeightsError, "flux.1-dev"),
        (lambda d: d["control"].update(map=[0, 1]), DreamSRError, "context cross-attentions|control.map"),
        (lambda d: d["control"].update(map=[None, 1]), ConfigError, "control.map uses features"),
        (lambda d: d["control"].update(map=[0, None, None]), ConfigError, "3 entries for 2 double blocks"),
        (lambda d: d["control"].update(map=[]), ConfigError, "context cross-attentions"),
        (lambda d: d["control"].update(input="noisy+condition"), ConfigError, "no text branch"),
    ],
)
def test_a_bundle_json_that_cannot_be_meant_says_what_is_wrong(folder, change, kind, words) -> None:
    edit(folder, change)
    with pytest.raises(kind, match=words):
        open_all(folder)


def test_no_bundle_at_all(tmp_path) -> None:
    with pytest.raises(WeightsError, match="no such model"):
        open_bundle(str(tmp_path / "nowhere"))
    (tmp_path / "bundle.json").write_text("{not json")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_bundle(str(tmp_path))


@pytest.mark.parametrize("name", ["evil.bin", "model.PT", "deep/er/x.pkl"])
def test_a_pickle_in_a_part_is_refused(folder, name) -> None:
    path = folder / "transformer" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="pickle"):
        open_all(folder)


@pytest.mark.parametrize("part", [p for p in PICTURES if p != "lora"])
@pytest.mark.parametrize("wrong", ["missing", "extra", "truncated", "shape", "no config"])
def test_weights_that_do_not_fit_are_refused(folder, part, wrong) -> None:
    path = folder / part / TENSORS
    state = load_file(path)
    key = sorted(state)[0]
    match wrong:
        case "missing":
            save_file({k: v for k, v in state.items() if k != key}, path, metadata={"format": "pt"})
        case "extra":
            save_file({**state, "one_too_many": torch.zeros(2)}, path, metadata={"format": "pt"})
        case "shape":
            save_file({**state, key: torch.zeros(3, 5)}, path, metadata={"format": "pt"})
        case "truncated":
            path.write_bytes(path.read_bytes()[:-50])
        case "no config":
            (folder / part / "config.json").unlink()
    with pytest.raises(WeightsError, match=str(folder / part)):
        open_all(folder)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("wrong", ["missing", "truncated", "no file", "no tokenizer"])
def test_text_models_that_do_not_fit_are_refused(tiny_flux_bundle, tmp_path, part, wrong) -> None:
    """Transformers would fill a missing tensor with random numbers and go on."""
    folder = Path(shutil.copytree(tiny_flux_bundle, tmp_path / "copy"))
    path = folder / "text_encoder" / part / "model.safetensors"
    match wrong:
        case "missing":
            state = load_file(path)
            save_file({k: v for k, v in state.items() if k != sorted(state)[0]}, path, metadata={"format": "pt"})
        case "truncated":
            path.write_bytes(path.read_bytes()[:-50])
        case "no file":
            path.unlink()
        case "no tokenizer":
            shutil.rmtree(folder / "text_encoder" / part.replace("text_encoder", "tokenizer"))
    with pytest.raises(WeightsError):
        open_bundle(str(folder)).open_text_encoder(CPU, torch.float32)


def test_the_hash_belongs_to_the_content_not_to_the_place(tiny_bundle, folder, tmp_path) -> None:
    first = open_bundle(str(tiny_bundle)).sha256
    assert len(first) == 64 and open_bundle(str(folder)).sha256 == first
    (tmp_path / "run").mkdir()
    moved = folder.rename(tmp_path / "run" / "bundle")
    assert open_bundle(str(tmp_path / "run")).sha256 == first
    for part in PICTURES:
        path = next((moved / part).glob("*.safetensors"))
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        assert open_bundle(str(moved)).sha256 != first, part
        raw[-1] ^= 1
        path.write_bytes(raw)
    assert open_bundle(str(moved)).sha256 == first
    edit(moved, lambda d: d["sampling"].update(t_r=0.9))
    assert open_bundle(str(moved)).sha256 != first


def other_run(folder: Path, **settings: Any) -> Path:
    """A finished run's folder with other weights of the same sizes."""
    made = networks(replace(RECIPE, seed=RECIPE.seed + 1, name="other", **settings))
    export(made, None, folder / "bundle", made.config)
    return folder


def test_weights_of_a_run_lie_over_the_bundle(tiny_bundle, tmp_path, monkeypatch) -> None:
    run = other_run(tmp_path / "run")
    over = open_bundle(str(tiny_bundle), str(run))
    assert over.config.name == "other"
    assert over.part_folder("transformer") == run / "bundle" / "transformer"
    words = stack(over.open_text_encoder(CPU, torch.float32).encode(["a", "b"], 8)[0])
    v = velocity(over.open_restorer(CPU, torch.float32, mask_pads=True), words)
    assert torch.equal(v, velocity(open_all(run), words))
    assert not torch.equal(v, velocity(open_all(tiny_bundle), words))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(v, velocity(open_bundle(str(tiny_bundle), "run").open_restorer(CPU, torch.float32, True), words))


def test_the_hash_with_weights_laid_over_has_no_place_either(tiny_bundle, tmp_path) -> None:
    run = other_run(tmp_path / "run")
    first = open_bundle(str(tiny_bundle), str(run)).sha256
    assert first == open_bundle(str(run)).sha256 != open_bundle(str(tiny_bundle)).sha256
    moved = run.rename(tmp_path / "elsewhere")
    assert open_bundle(str(tiny_bundle), str(moved)).sha256 == first


def test_parts_a_run_did_not_train_come_from_the_bundle_it_names(tiny_bundle, folder) -> None:
    shutil.rmtree(folder / "vae")
    edit(folder, lambda d: d["parts"].update(vae={"bundle": str(tiny_bundle)}))
    bundle: Bundle = open_bundle(str(folder))
    assert bundle.part_folder("vae") == tiny_bundle / "vae"
    assert torch.equal(velocity(open_all(folder), words := _words(bundle)), velocity(open_all(tiny_bundle), words))


def _words(bundle: Bundle) -> TextEmbedding:
    return stack(bundle.open_text_encoder(CPU, torch.float32).encode(["a", "b"], 8)[0])


def test_weights_of_another_base_or_no_run_are_refused(tiny_bundle, tmp_path) -> None:
    run = other_run(tmp_path / "run", control=replace(RECIPE.control, map=(0, 1)))
    with pytest.raises(ConfigError, match="another base"):
        open_bundle(str(tiny_bundle), str(run))
    with pytest.raises(WeightsError, match="no bundle.json"):
        open_bundle(str(tiny_bundle), str(tmp_path / "run" / "nothing"))


def test_a_bundle_tells_no_path_of_whoever_trained_it(tiny_bundle, tmp_path) -> None:
    """Diffusers writes the folder that a module was loaded from into its config."""
    bundle = open_bundle(str(tiny_bundle))
    restorer = bundle.open_restorer(CPU, torch.float32, mask_pads=True)
    save_bundle(tmp_path / "again", bundle.config, {"transformer": restorer.dit.transformer}, None)
    text = (tmp_path / "again" / "transformer" / "config.json").read_text()
    assert str(tiny_bundle) not in text and "in_channels" in text
    shipped = open_bundle("mini").folder
    assert not [path for path in shipped.glob("*/*.json") if "_name_or_path" in path.read_text()]
