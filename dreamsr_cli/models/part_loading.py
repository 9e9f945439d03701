"""One part of a bundle from its folder: safetensors only, every tensor accounted for, quantized where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.models.quantization import NOT_QUANTIZED, library_config


def class_name(folder: Path) -> str:
    """`_class_name` of the folder's config.json, "" where it names none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}: no readable config.json: {error}", "fetch or train the bundle again") from error


def load_part(cls: Any, folder: Path, dtype: torch.dtype, quantize: str = "none") -> Any:
    """A network of diffusers' kind in evaluation mode, its linear layers quantized by diffusers' own backend.

    Raises `WeightsError` where a tensor is missing, left over or of another shape.
    """
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    extra = library_config("diffusers", quantize, dtype, NOT_QUANTIZED)
    try:
        model, info = cls.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **extra
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder}: cannot be loaded: {error}", "fetch or train the bundle again") from error
    for kind in ("missing", "unexpected"):
        if info[f"{kind}_keys"]:
            raise WeightsError(f"{folder}: {kind} tensor {info[f'{kind}_keys'][0]}", "fetch or train the bundle again")
    return model.eval()


def load_text_part(cls: Any, folder: Path, dtype: torch.dtype, quantize: str = "none") -> Any:
    """A text network of transformers' kind in evaluation mode. Raises `WeightsError` where a tensor is missing."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    extra = library_config("transformers", quantize, dtype)
    try:
        model, info = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **extra
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be loaded: {error}", "fetch the bundle again") from error
    # Left-over tensors are usual here (a checkpoint's other half); a missing one would be random.
    if info["missing_keys"]:
        raise WeightsError(f"{folder}: missing tensor {sorted(info['missing_keys'])[0]}", "fetch the bundle again")
    return model.eval()
