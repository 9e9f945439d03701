"""A bundle: a folder of weights opened phase by phase, so that encoders are freed before the restorer is loaded.

A bundle holds `bundle.json` and one sub-folder per part in the library's own format (diffusers, transformers, peft;
safetensors only).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors import SafetensorError

from dreamsr_cli.config import BundleConfig, PartConfig, from_dict, to_dict
from dreamsr_cli.errors import ConfigError, WeightsError
from dreamsr_cli.models.autoencoder import Autoencoder, FluxAutoencoder, PatchAutoencoder
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.text_encoder import ByteTextEncoder, FluxTextEncoder, TextEncoder
from dreamsr_cli.weights import file_sha256, refuse_pickles

CONFIG_FILE = "bundle.json"
BUILT_IN = ("mini",)
PARTS = ("transformer", "vae", "text_encoder", "controlnet", "context_attention", "lora")


@dataclass
class Restorer:
    """The networks of both stages, on one device: what the sampler calls."""

    dit: ConditionedDiT
    controlnet: MMControlNet
    lora: RestorationLoRA | None
    device: torch.device
    """Where batches of tiles go."""
    offloaded: bool = False

    def offload(self) -> None:
        """From now on keep the weights in RAM and send them to the device layer by layer, as they are needed."""
        from diffusers.hooks import apply_group_offloading

        if self.offloaded:
            return
        for module in (self.dit, self.controlnet):
            module.to("cpu")
            apply_group_offloading(module, onload_device=self.device, offload_type="leaf_level")
        self.offloaded = True


class Bundle:
    """A bundle's config, its hash, and its parts on request. Nothing is loaded before it is asked for."""

    def __init__(self, folder: Path, config: BundleConfig) -> None:
        self.folder, self.config = folder, config
        self._sha256: str | None = None

    @property
    def sha256(self) -> str:
        """sha256 of bundle.json and of the sorted (path, sha256) list of all files of all parts."""
        if self._sha256 is None:
            # A part laid over from elsewhere has an absolute path; its files count, not where they lie.
            parts = {
                name: dataclasses.replace(part, path=name) if part.path and Path(part.path).is_absolute() else part
                for name, part in self.config.parts.items()
            }
            lines = [json.dumps(to_dict(dataclasses.replace(self.config, parts=parts)), sort_keys=True)]
            for name in sorted(self.config.parts):
                root = self.part_folder(name)
                for path in sorted(root.rglob("*")):
                    if path.is_file():
                        lines.append(f"{name}/{path.relative_to(root).as_posix()} {file_sha256(path)}")
            self._sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return self._sha256

    def part_folder(self, name: str) -> Path:
        """Where part `name` lies. Raises `WeightsError` if it is not there, or holds a pickle."""
        part = self.config.parts.get(name)
        if part is None:
            raise WeightsError(f"bundle {self.config.name} has no part {name!r}", f"add it to {CONFIG_FILE}")
        if part.lock is not None:
            raise WeightsError(
                f"part {name!r} of bundle {self.config.name} is entry {part.lock!r} of weights.lock, not on this disk",
                "use a bundle whose parts have a path, such as --model mini",
            )
        root = open_bundle(part.bundle).part_folder(name) if part.bundle else self.folder / (part.path or name)
        folder = root / part.subfolder if part.subfolder else root
        if not folder.is_dir():
            raise WeightsError(f"{folder}: part {name!r} is missing", "fetch or train the bundle again")
        refuse_pickles(folder)
        return folder

    def open_autoencoder(self, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        """The autoencoder in evaluation mode; the built-in one keeps its transform in float32."""
        folder = self.part_folder("vae")
        if _class_name(folder) == "PatchAutoencoder":
            autoencoder = _load(PatchAutoencoder, folder, torch.float32).to(device)
            autoencoder.refiner.to(dtype)
            return autoencoder
        return FluxAutoencoder(_load(AutoencoderKL, folder, dtype).to(device))

    def open_text_encoder(self, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """The text encoder in evaluation mode."""
        folder = self.part_folder("text_encoder")
        if (folder / "config.json").is_file() and _class_name(folder) == "ByteTextEncoder":
            return _load(ByteTextEncoder, folder, torch.float32).to(device)
        from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

        clip = _load_text(CLIPTextModel, folder / "text_encoder", dtype)
        t5 = _load_text(T5EncoderModel, folder / "text_encoder_2", dtype)
        try:
            tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
            clip_tokenizer, t5_tokenizer = (cast(PreTrainedTokenizerBase, t) for t in tokenizers)
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(f"{folder}: not a CLIP + T5 text encoder: {error}", "fetch the bundle again") from error
        return FluxTextEncoder(clip_tokenizer, clip.to(device), t5_tokenizer, t5.to(device))

    def open_restorer(self, device: torch.device, dtype: torch.dtype, mask_pads: bool) -> Restorer:
        """Transformer, ControlNet, cross-attention and LoRA in evaluation mode. `mask_pads`: see
        `TextEncoder.pads_are_seen`."""
        control, parts = self.config.control, self.config.parts
        if control.input != "condition":
            raise ConfigError(f"control.input {control.input!r} is not supported yet", 'use "condition"')
        transformer = _load(FluxTransformer2DModel, self.part_folder("transformer"), dtype)
        controlnet = _load(MMControlNet, self.part_folder("controlnet"), dtype)
        context = (
            _load(ContextAttention, self.part_folder("context_attention"), dtype)
            if control.text and "context_attention" in parts
            else None
        )
        lora = RestorationLoRA.load(transformer, self.part_folder("lora")) if "lora" in parts else None
        dit = ConditionedDiT(transformer, context, control.map, mask_pads)
        made = len(controlnet.transformer_blocks)
        if dit.features_needed != made:
            raise ConfigError(
                f"control.map uses {dit.features_needed} features, the ControlNet makes {made}",
                f"correct {self.folder / CONFIG_FILE}",
            )
        dit.to(device, dtype).eval().requires_grad_(False)
        controlnet.to(device).requires_grad_(False)
        return Restorer(dit, controlnet, lora, device)


def open_bundle(model: str, weights: str | None = None) -> Bundle:
    """The bundle `model` (a built-in name or a folder), with the trained parts of the run `weights` laid over it.

    Raises `WeightsError` if there is none, `ConfigError` if bundle.json is not valid or names another base than
    `model`.
    """
    folder = _find(model)
    bundle = Bundle(folder, read_config(folder))
    if weights is None:
        return bundle
    run = Path(weights)
    run = run / "bundle" if (run / "bundle" / CONFIG_FILE).is_file() else run
    if not (run / CONFIG_FILE).is_file():
        raise WeightsError(f"{weights}: no {CONFIG_FILE} there", "give the folder of a finished `dreamsr train` run")
    over = read_config(run)
    if to_dict(over.latent) != to_dict(bundle.config.latent) or over.control.map != bundle.config.control.map:
        raise ConfigError(
            f"--weights {weights} was trained for another base than --model {model}",
            "leave out --model, or give its base",
        )
    parts = dict(bundle.config.parts)
    for name, part in over.parts.items():
        if part.path is not None:
            parts[name] = dataclasses.replace(part, path=str((run / part.path).resolve()))
    return Bundle(folder, dataclasses.replace(over, parts=parts))


def read_config(folder: Path) -> BundleConfig:
    """Parse and check bundle.json of `folder`."""
    path = folder / CONFIG_FILE
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}", "check --model") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}", "correct it, or fetch the bundle again") from error
    config = from_dict(BundleConfig, data, str(path))
    if config.format != 1:
        raise ConfigError(f"{path}: format {config.format} is not known", "update dreamsr")
    unknown = set(config.parts) - set(PARTS)
    if unknown:
        raise ConfigError(f"{path}: unknown part {sorted(unknown)[0]!r}", f"known parts: {', '.join(PARTS)}")
    return config


def save_bundle(
    folder: Path,
    config: BundleConfig,
    *,
    transformer: FluxTransformer2DModel,
    autoencoder: PatchAutoencoder,
    text_encoder: ByteTextEncoder,
    controlnet: MMControlNet,
    context_attention: ContextAttention,
    lora: RestorationLoRA,
    state: Callable[[str, torch.nn.Module], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Write a bundle of our own kind: bfloat16 safetensors, the autoencoder's transform in float32.

    `state(name, module)` may give other weights than the module's own (an average over steps).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    modules: dict[str, ModelMixin] = {
        "transformer": transformer,
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "controlnet": controlnet,
        "context_attention": context_attention,
    }
    for name, module in modules.items():
        part = folder / name
        part.mkdir(exist_ok=True)
        module.save_config(part)
        tensors = state(name, module) if state else module.state_dict()
        plain = {k.replace(".base_layer.", "."): v for k, v in tensors.items() if "lora_" not in k}
        keep = {"mean_K", "basis_CK", "gain_C"}
        save_file(
            {k: v.detach().to(torch.float32 if k in keep else torch.bfloat16).contiguous() for k, v in plain.items()},
            part / "diffusion_pytorch_model.safetensors",
            metadata={"format": "pt"},
        )
    lora.save(folder / "lora", torch.bfloat16, state("lora", transformer) if state else None)
    parts = {name: PartConfig(path=name) for name in PARTS}
    text = json.dumps(to_dict(dataclasses.replace(config, parts=parts)), indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _find(model: str) -> Path:
    if model in BUILT_IN:
        return Path(str(resources.files("dreamsr_cli"))) / "bundles" / model
    folder = Path(model)
    for candidate in (folder, folder / "bundle"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise WeightsError(f"{model}: no such model", f"use one of {', '.join(BUILT_IN)} or a folder with a {CONFIG_FILE}")


def _class_name(folder: Path) -> str:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}: no readable config.json: {error}", "fetch or train the bundle again") from error


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    from diffusers.utils import logging

    logging.set_verbosity_error()
    try:
        model, info = cls.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder}: cannot be loaded: {error}", "fetch or train the bundle again") from error
    for kind in ("missing", "unexpected"):
        if info[f"{kind}_keys"]:
            raise WeightsError(f"{folder}: {kind} tensor {info[f'{kind}_keys'][0]}", "fetch or train the bundle again")
    return model.eval()


def _load_text(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be loaded: {error}", "fetch the bundle again") from error
    # Left-over tensors are usual here (a checkpoint's other half); a missing one would be random.
    if info["missing_keys"]:
        raise WeightsError(f"{folder}: missing tensor {sorted(info['missing_keys'])[0]}", "fetch the bundle again")
    return model.eval()
