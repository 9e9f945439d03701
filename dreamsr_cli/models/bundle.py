"""A bundle: a folder of weights opened phase by phase, so that encoders are freed before the restorer is loaded.

A bundle holds `bundle.json` and one sub-folder per part in the library's own format (diffusers, transformers, peft;
safetensors only).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from dreamsr_cli.config import BundleConfig, PartConfig
from dreamsr_cli.errors import ConfigError, WeightsError
from dreamsr_cli.models.attention import join_attention
from dreamsr_cli.models.autoencoder import Autoencoder, FluxAutoencoder, PatchAutoencoder, Refiner
from dreamsr_cli.models.cleaner import Cleaner
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.context_attention import ContextAttention
from dreamsr_cli.models.enlarger import Enlarger, fingerprint
from dreamsr_cli.models.flux_control import FluxControl
from dreamsr_cli.models.grain import Grain
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.models.part_loading import class_name, load_part, load_text_part
from dreamsr_cli.models.quantization import PLAIN, MemoryMode
from dreamsr_cli.models.restoration_lora import RestorationLoRA
from dreamsr_cli.models.restorer import Restorer, offload_blocks
from dreamsr_cli.models.text_encoder import ByteTextEncoder, FluxTextEncoder, TextEncoder
from dreamsr_cli.plain_data import from_dict, to_dict
from dreamsr_cli.weights import file_sha256, locate, refuse_pickles
from dreamsr_cli.weights_lock import lock_entry

CONFIG_FILE = "bundle.json"
BUILT_IN = ("mini", "flux", "flux-upscaler")
GRAIN = "grain"
CLEANER = "cleaner"
PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "controlnet",
    "context_attention",
    "lora",
    "cleanliness",
    "enlarger",
    GRAIN,
    CLEANER,
)


class Bundle:
    """A bundle's config, its hash, and its parts on request. Nothing is loaded before it is asked for."""

    def __init__(
        self, folder: Path, config: BundleConfig, opened_as: tuple[str | None, str | None] | None = None
    ) -> None:
        """`opened_as`: model and weights as given to `open_bundle`, so that another process can open the same."""
        self.folder, self.config = folder, config
        self.opened: Counter[str] = Counter()
        """How often the text encoder, the autoencoder and the restorer were loaded."""
        self.opened_as = opened_as or (str(folder), None)
        self._sha256: str | None = None
        self._located: dict[str, Path] = {}

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
                lines.extend(self._locked(name))
                if self.config.parts[name].lock is not None:
                    continue
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
            root = self._locate(name, part.lock)
            return root / part.subfolder if part.subfolder else root
        root = open_bundle(part.bundle).part_folder(name) if part.bundle else self.folder / (part.path or name)
        folder = root / part.subfolder if part.subfolder else root
        if not folder.is_dir():
            raise WeightsError(f"{folder}: part {name!r} is missing", "fetch or train the bundle again")
        refuse_pickles(folder)
        return folder

    def _locate(self, name: str, lock: str) -> Path:
        """The checked folder of an entry of weights.lock, looked up once."""
        if lock not in self._located:
            entry = lock_entry(lock)
            if entry.repository is None and not entry.bundled:
                raise WeightsError(
                    f"model {self.config.name}: its {name} is not published by anybody",
                    "train it (docs/training.md) and pass --weights RUN, or use --model flux-upscaler or mini",
                )
            self._located[lock] = locate(lock, instead="use --model mini")
        return self._located[lock]

    def _locked(self, name: str) -> list[str]:
        """(path, sha256) lines of a part that weights.lock lists; the files were compared with them when located."""
        part = self.config.parts[name]
        if part.lock is None:
            return []
        self._locate(name, part.lock)
        within = f"{part.subfolder}/" if part.subfolder else ""
        rows = [row for row in lock_entry(part.lock).files if row.path.startswith(within)]
        if not within:
            rows = [row for row in rows if name != "text_encoder" or row.path.startswith(("text_encoder", "tokenizer"))]
        return [f"{name}/{row.path.removeprefix(within)} {row.sha256}" for row in rows]

    def open_part(self, name: str, cls: Any, dtype: torch.dtype) -> Any:
        """One part as the diffusers class `cls`, on the CPU, in evaluation mode."""
        return load_part(cls, self.part_folder(name), dtype)

    def open_autoencoder(self, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        """The autoencoder in evaluation mode; the built-in one keeps its transform in float32."""
        self.opened["autoencoder"] += 1
        folder = self.part_folder("vae")
        if class_name(folder) == "PatchAutoencoder":
            autoencoder = load_part(PatchAutoencoder, folder, torch.float32).to(device)
            # Convolutions are fastest with channels last (a quarter on a CPU [measured]).
            autoencoder.refiner.to(dtype, memory_format=torch.channels_last)
            return autoencoder
        vae = load_part(AutoencoderKL, folder, dtype).to(device)
        return FluxAutoencoder(vae.to(memory_format=torch.channels_last))

    def open_cleanliness(self) -> Cleanliness | None:
        """What judges whether a photo is clean, on the CPU in float32 and evaluation mode; None where there is none."""
        if "cleanliness" not in self.config.parts:
            return None
        return load_part(Cleanliness, self.part_folder("cleanliness"), torch.float32)

    def open_grain(self) -> Grain | None:
        """What says how strong grain is to be, on the CPU in float32 and evaluation mode; None where there is none."""
        if GRAIN not in self.config.parts:
            return None
        return load_part(Grain, self.part_folder(GRAIN), torch.float32)

    def open_cleaner(self) -> Cleaner | None:
        """What cleans damaged photos before stage 1, on the CPU in float32 and evaluation mode; None where there is
        none."""
        if CLEANER not in self.config.parts:
            return None
        return load_part(Cleaner, self.part_folder(CLEANER), torch.float32)

    def open_enlarger(self) -> Enlarger | None:
        """What makes a refiner enlarge undamaged photos, on the CPU in float32 and evaluation mode; None where there is
        none."""
        if "enlarger" not in self.config.parts:
            return None
        return load_part(Enlarger, self.part_folder("enlarger"), torch.float32)

    def open_enlarging_refiner(self, looks: str) -> Refiner:
        """The refiner as the enlarger makes it for photos of these looks (`enlarger.MANNERS`), on the CPU in float32;
        for bundles that have one. Raises `WeightsError` where it was made for another refiner."""
        enlarger = self.open_enlarger()
        assert enlarger is not None, "ask whether the bundle has the part"
        refiner = load_part(PatchAutoencoder, self.part_folder("vae"), torch.float32).refiner
        if fingerprint(refiner) != enlarger.config["refiner"]:
            raise WeightsError(
                f"bundle {self.config.name}: its enlarger was made for another autoencoder",
                "train it again (dreamsr train --stage enlarger --set fresh=true), or use --removal",
            )
        return enlarger.merged(refiner, looks)

    def open_text_encoder(self, device: torch.device, dtype: torch.dtype, mode: MemoryMode = PLAIN) -> TextEncoder:
        """The text encoder in evaluation mode; `mode` concerns T5, the built-in encoder is small."""
        self.opened["text_encoder"] += 1
        folder = self.part_folder("text_encoder")
        if (folder / "config.json").is_file() and class_name(folder) == "ByteTextEncoder":
            return load_part(ByteTextEncoder, folder, torch.float32).to(device)
        from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

        clip = load_text_part(CLIPTextModel, folder / "text_encoder", dtype)
        t5 = load_text_part(T5EncoderModel, folder / "text_encoder_2", dtype, mode.quantize)
        try:
            tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
            clip_tokenizer, t5_tokenizer = (cast(PreTrainedTokenizerBase, t) for t in tokenizers)
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(f"{folder}: not a CLIP + T5 text encoder: {error}", "fetch the bundle again") from error
        if mode.offload == "block":
            offload_blocks(t5, t5.encoder.block.children(), device)
        else:
            t5.to(device)
        return FluxTextEncoder(clip_tokenizer, clip.to(device), t5_tokenizer, t5)

    def _open_controlnet(self, dtype: torch.dtype) -> MMControlNet | FluxControl:
        """The ControlNet that `control.input` names."""
        control, folder = self.config.control, self.part_folder("controlnet")
        if control.input == "condition":
            return load_part(MMControlNet, folder, dtype)
        if control.input != "noisy+condition":
            raise ConfigError(f"control.input {control.input!r} is not known", 'use "condition" or "noisy+condition"')
        if control.timestep != "sampled" or control.text:
            raise ConfigError(
                'control.input "noisy+condition" sees the noise of each step and has no text branch',
                'set control.timestep to "sampled" and control.text to false',
            )
        return FluxControl(load_part(FluxControlNetModel, folder, dtype))

    def open_restorer(
        self,
        device: torch.device,
        dtype: torch.dtype,
        mask_pads: bool,
        mode: MemoryMode = PLAIN,
        place: bool = True,
    ) -> Restorer:
        """Transformer, ControlNet, cross-attention and LoRA in evaluation mode. `mask_pads`: see
        `TextEncoder.pads_are_seen`; `mode`: what the transformer's weights are kept in, and what waits in RAM. Without
        `place` the networks stay where they were loaded until `Restorer.place` is called."""
        self.opened["restorer"] += 1
        control, parts = self.config.control, self.config.parts
        transformer = load_part(FluxTransformer2DModel, self.part_folder("transformer"), dtype, mode.quantize)
        controlnet = self._open_controlnet(dtype)
        context = (
            load_part(ContextAttention, self.part_folder("context_attention"), dtype)
            if control.text and "context_attention" in parts
            else None
        )
        lora = None
        if "lora" in parts:
            with warnings.catch_warnings():
                # peft: such an adapter can't be merged into quantized weights; it never is.
                warnings.simplefilter("ignore", UserWarning)
                lora = RestorationLoRA.load(transformer, self.part_folder("lora"))
            for parameter in lora.parameters():
                parameter.data = parameter.data.to(dtype)
        join_attention((transformer, controlnet))
        dit = ConditionedDiT(transformer, context, control.map, mask_pads)
        made = len(controlnet.transformer_blocks)
        if dit.features_needed != made:
            raise ConfigError(
                f"control.map uses {dit.features_needed} features, the ControlNet makes {made}",
                f"correct {self.folder / CONFIG_FILE}",
            )
        dit.eval().requires_grad_(False)
        controlnet.requires_grad_(False)
        restorer = Restorer(dit, controlnet, lora, device)
        if place:
            restorer.place(mode.offload)
        return restorer


def open_bundle(model: str | None, weights: str | None = None) -> Bundle:
    """The bundle `model` (a built-in name or a folder), with the trained parts of the run `weights` laid over it.

    Without `model` it is the run's own bundle, which names its base for the parts that it left alone. Raises
    `WeightsError` if there is none, `ConfigError` if bundle.json is not valid or names another base than `model`.
    """
    if weights is None:
        folder = _find(model or BUILT_IN[0])
        return Bundle(folder, read_config(folder), (model, None))
    run = Path(weights)
    run = run / "bundle" if (run / "bundle" / CONFIG_FILE).is_file() else run
    if not (run / CONFIG_FILE).is_file():
        raise WeightsError(f"{weights}: no {CONFIG_FILE} there", "give the folder of a finished `dreamsr train` run")
    over = read_config(run)
    if model is None:
        return Bundle(run, over, (None, weights))
    folder = _find(model)
    bundle = Bundle(folder, read_config(folder))
    if to_dict(over.latent) != to_dict(bundle.config.latent) or over.control.map != bundle.config.control.map:
        raise ConfigError(
            f"--weights {weights} was trained for another base than --model {model}",
            "leave out --model, or give its base",
        )
    parts = dict(bundle.config.parts)
    for name, part in over.parts.items():
        if part.path is not None:
            parts[name] = dataclasses.replace(part, path=str((run / part.path).resolve()))
    return Bundle(folder, dataclasses.replace(over, parts=parts), (model, weights))


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
    modules: Mapping[str, ModelMixin],
    lora: RestorationLoRA | None,
    *,
    elsewhere: Mapping[str, PartConfig] | None = None,
    state: Callable[[str, torch.nn.Module], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Write a bundle: `modules` by part name in bfloat16 safetensors (the built-in autoencoder's transform in float32),
    the LoRA, and in bundle.json where the parts `elsewhere` lie.

    `state(name, module)` may give other weights than the module's own (an average over steps).
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        part = folder / name
        part.mkdir(exist_ok=True)
        module.save_config(part)
        _forget_origin(part / "config.json")
        tensors = state(name, module) if state else module.state_dict()
        plain = {k.replace(".base_layer.", "."): v for k, v in tensors.items() if "lora_" not in k}
        keep = {"mean_K", "basis_CK", "gain_C"}
        save_file(
            {k: v.detach().to(torch.float32 if k in keep else torch.bfloat16).contiguous() for k, v in plain.items()},
            part / "diffusion_pytorch_model.safetensors",
            metadata={"format": "pt"},
        )
    parts = dict(elsewhere or {}) | {name: PartConfig(path=name) for name in modules}
    if lora is not None:
        lora.save(folder / "lora", torch.bfloat16, state("lora", lora.transformer) if state else None)
        parts["lora"] = PartConfig(path="lora")
    parts = {name: parts[name] for name in PARTS if name in parts}
    text = json.dumps(to_dict(dataclasses.replace(config, parts=parts)), indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _forget_origin(path: Path) -> None:
    """Take out the folder that diffusers loaded the module from: a path of whoever trained it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _find(model: str) -> Path:
    if model in BUILT_IN:
        return Path(str(resources.files("dreamsr_cli"))) / "bundles" / model
    folder = Path(model)
    for candidate in (folder, folder / "bundle"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise WeightsError(f"{model}: no such model", f"use one of {', '.join(BUILT_IN)} or a folder with a {CONFIG_FILE}")
