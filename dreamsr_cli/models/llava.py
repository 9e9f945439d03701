"""Captioners of the LLaVA family: LLaVA-1.5 and LLaVA-OneVision, through transformers' own classes.

A folder holds one as transformers saves it; `config.json` says which. Only safetensors are read, nothing is fetched.

Axes: P Q pixel rows and columns, C = 3 channels; B pictures, T text tokens.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from dreamsr_cli.device import choose_dtype
from dreamsr_cli.errors import DeviceError, UsageError, WeightsError
from dreamsr_cli.machine import free_memory
from dreamsr_cli.weights import refuse_pickles

FAMILIES = {"llava": "LLaVA-1.5", "llava_onevision": "LLaVA-OneVision"}
"""What `config.json` may name as its `model_type`."""
QUANTIZATIONS = ("none", "int8", "nf4")
_TOKENS_PER_WORD = 2
"""Most words of a caption are one or two tokens."""
_KEPT_WHOLE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""Parts that quantization leaves alone: they are small, and see or say the words."""


@dataclass(frozen=True, eq=False)
class Llava:
    """An open LLaVA. Make one with `open_llava`; it is freed when the last reference to it goes."""

    model: Any
    """LlavaForConditionalGeneration or LlavaOnevisionForConditionalGeneration."""
    processor: Any
    """The processor of its family; pads on the left."""
    device: torch.device
    dtype: torch.dtype

    def caption(self, pictures: Sequence[np.ndarray], instruction: str, max_words: int) -> list[str]:
        """What the model answers to `instruction` about each picture, uint8 (rows, columns, 3) of any size.

        Greedy, all pictures in one batch; raw text, of about `max_words` words at most. Raises `UsageError` if the
        instruction holds one of the model's own marks, `DeviceError` if the device's memory doesn't suffice.
        """
        prompt = self._prompt(instruction)
        images = [self._image(picture_PQC) for picture_PQC in pictures]
        inputs = self.processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        try:
            with torch.inference_mode():
                tokens_BT = self.model.generate(**inputs, max_new_tokens=_TOKENS_PER_WORD * max_words + 8)
        except torch.OutOfMemoryError as error:
            hint = "use a smaller --batch, --quantize nf4, or --captioner describe"
            raise DeviceError(f"out of memory on {self.device} while captioning", hint) from error
        answers_BT = tokens_BT[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers_BT, skip_special_tokens=True)

    def _prompt(self, instruction: str) -> str:
        for mark in self.processor.tokenizer.all_special_tokens:
            if mark in instruction:
                raise UsageError(f"the instruction holds {mark}, a mark of the model's own", "leave it out")
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _image(self, picture_PQC: np.ndarray) -> Image.Image:
        """The picture, made square with the mean colour where the processor would cut off its sides."""
        image = Image.fromarray(picture_PQC)
        shaper = self.processor.image_processor
        if not getattr(shaper, "do_center_crop", False) or image.width == image.height:
            return image
        side = max(image.size)
        red, green, blue = (round(255 * level) for level in shaper.image_mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


def open_llava(folder: Path, device: torch.device, quantize: str = "none") -> Llava:
    """Open the LLaVA in `folder` on `device`: float32 on a CPU (so that the batch size changes no word), the device's
    16-bit type elsewhere.

    Raises `WeightsError` for a folder that holds no whole LLaVA, `UsageError` and `DeviceError` as `check_quantize`,
    `DeviceError` where memory doesn't suffice.
    """
    config = read_config(folder)
    check_quantize(quantize, device)
    refuse_pickles(folder)
    dtype = caption_dtype(device)
    if device.type == "cpu" and quantize == "none":
        _check_memory(folder, config, dtype)
    import transformers

    families: dict[str, tuple[Any, Any]] = {
        "llava": (transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor),
        "llava_onevision": (transformers.LlavaOnevisionForConditionalGeneration, _images_only_processor()),
    }
    model_class, processor_class = families[config["model_type"]]
    with _quiet_loading():
        try:
            processor = _open_processor(folder, processor_class, config)
            model, report = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
                **_placement(device, quantize, dtype),
            )
        except torch.OutOfMemoryError as error:
            hint = "use --quantize nf4, --device cpu, or --captioner describe"
            raise DeviceError(f"out of memory on {device} while opening {folder}", hint) from error
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise WeightsError(f"{folder} can't be opened: {reason}", _fix(folder)) from error
    if missing := sorted(report["missing_keys"]):
        reason = f"{folder} lacks {len(missing)} weights of its network, {missing[0]} among them"
        raise WeightsError(reason, _fix(folder))
    model.generation_config = _greedy(model, processor)
    return Llava(model.eval(), processor, device, dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder that holds a LLaVA. Raises `WeightsError` for anything else."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror or error}", _fix(folder)) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON", _fix(folder)) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        reason = f"{folder} holds no captioner: the model_type in its config.json is {kind!r}"
        raise WeightsError(reason, f"use a folder with {' or '.join(FAMILIES)}, or --captioner describe")
    return config


def caption_dtype(device: torch.device) -> torch.dtype:
    """dtype of a captioner on `device`."""
    return torch.float32 if device.type == "cpu" else choose_dtype("auto", device)


def check_quantize(quantize: str, device: torch.device) -> None:
    """Raise `UsageError` unless `quantize` is known and bitsandbytes is installed, `DeviceError` where it can't run."""
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize {quantize!r} is not known", f"use one of: {', '.join(QUANTIZATIONS)}")
    if quantize == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = "pip install bitsandbytes, or leave out --quantize"
        raise UsageError(f"--quantize {quantize} needs bitsandbytes, which is not installed", hint)
    if device.type not in ("cuda", "xpu", "cpu"):
        raise DeviceError(f"--quantize {quantize}: bitsandbytes does not run on {device}", "leave out --quantize")


def _placement(device: torch.device, quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put the weights where they belong as they are read."""
    placed: dict[str, Any] = {"device_map": {"": str(device)}}
    if quantize == "none":
        return placed
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it remarks on every matrix product
    bits = (
        {"load_in_8bit": True}
        if quantize == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    )
    return {**placed, "quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=_KEPT_WHOLE, **bits)}


def _check_memory(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise `DeviceError` if the weights alone are more than the free RAM."""
    stored = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    need, free = size * dtype.itemsize // stored, free_memory()
    if free is not None and need > free:
        reason = f"{folder.name} takes {need / 2**30:.1f} GiB of RAM on a CPU, {free / 2**30:.1f} GiB are free"
        raise DeviceError(reason, "use --captioner llava-onevision-0.5b or describe, or --device cuda")


def _greedy(model: Any, processor: Any) -> Any:
    """Generation without sampling, whatever the folder says; it ends where the network or its tokenizer ends."""
    from transformers import GenerationConfig

    given, tokenizer = model.generation_config, processor.tokenizer
    ends = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    known = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    pad = next((i for i in (tokenizer.pad_token_id, given.pad_token_id, *known) if i is not None), None)
    return GenerationConfig(do_sample=False, num_beams=1, eos_token_id=known, pad_token_id=pad)


# ---------------------------------------------------------------- processors


def _open_processor(folder: Path, processor_class: Any, config: dict[str, Any]) -> Any:
    """The folder's processor, from its parts.

    Pictures are shaped by Pillow's classes: torchvision's give other pixels, and OneVision's whole processor can't be
    opened without torchvision, for the sake of videos.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    shaper = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    saved = _saved_settings(folder)
    template = saved.get("chat_template") or tokenizer.chat_template
    if not template:
        raise WeightsError(f"{folder} has no chat template", _fix(folder))
    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    vision = whole.vision_config
    if config["model_type"] == "llava":
        # early releases left these to the network's config
        defaults = {"patch_size": vision.patch_size, "num_additional_image_tokens": 1}
    else:
        patches = (vision.image_size // vision.patch_size) ** 2
        defaults = {"num_image_tokens": patches, "vision_aspect_ratio": whole.vision_aspect_ratio}
    defaults["vision_feature_select_strategy"] = whole.vision_feature_select_strategy
    chosen = {key: saved[key] if saved.get(key) is not None else default for key, default in defaults.items()}
    return processor_class(image_processor=shaper, tokenizer=tokenizer, chat_template=template, **chosen)


def _saved_settings(folder: Path) -> dict[str, Any]:
    """processor_config.json, with the chat template where that lies in a JSON file of its own."""
    settings: dict[str, Any] = {}
    for name in ("processor_config.json", "chat_template.json"):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            settings |= found if isinstance(found, dict) else {}
    return settings


def _images_only_processor() -> Any:
    """LLaVA-OneVision's processor class, which may be without the part for videos."""
    from transformers import LlavaOnevisionProcessor

    class ImagesOnly(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImagesOnly


# ---------------------------------------------------------------- small things


@contextlib.contextmanager
def _quiet_loading() -> Generator[None]:
    """No progress bar of the library's own on stderr."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def release(device: torch.device) -> None:
    """Give back what freed networks held."""
    gc.collect()
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).empty_cache()


def _fix(folder: Path) -> str:
    return f"put a whole LLaVA folder at {folder}, or use --captioner describe"
