"""Text embeddings kept on disk, so that FLUX's text encoders (9.8 GB) are opened once and not at every step.

One safetensors file per text, named by the hash of encoder, length and text: nothing stale is ever read. A damaged file
is made again. Axes: B batch, T text tokens, D width.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dreamsr_cli.models.text_encoder import TextEmbedding, TextEncoder

KEPT = 256
"""Embeddings kept in memory, those used last."""
MOST_BYTES = 50_000_000_000
"""Once the folder holds this much, further texts are encoded each time."""


class EmbeddingCache:
    """Embeddings of texts of at most `max_tokens` tokens by the encoder with the hash `encoder_sha256`.

    Processes may share the folder: files are written whole and then named.
    """

    def __init__(self, folder: Path, encoder_sha256: str, max_tokens: int, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.encoder_sha256, self.max_tokens = folder, encoder_sha256, max_tokens
        self._room = most_bytes - sum(p.stat().st_size for p in folder.glob("*/*.safetensors"))
        self._recent: OrderedDict[str, TextEmbedding] = OrderedDict()

    def path(self, text: str) -> Path:
        """Where the embedding of `text` lies, or would."""
        key = hashlib.sha256(f"{self.encoder_sha256}\0{self.max_tokens}\0{text}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts whose embedding has yet to be made, each once: opening an encoder is worth it for these only."""
        return [t for t in dict.fromkeys(texts) if t not in self._recent and not self.path(t).is_file()]

    def get(self, text: str) -> TextEmbedding | None:
        """The embedding (batch 1, CPU, as the encoder made it), or None."""
        if text in self._recent:
            self._recent.move_to_end(text)
            return self._recent[text]
        try:
            tensors = load_file(self.path(text))
            found = TextEmbedding(tensors["tokens_BTD"], tensors["pooled_BD"], tensors.get("mask_BT"))
        except (OSError, SafetensorError, KeyError):
            return None
        self._remember(text, found)
        return found

    def put(self, text: str, embedding: TextEmbedding) -> TextEmbedding:
        """Keep an embedding; it is returned on the CPU. A disk that is full costs encoding it again, nothing else."""
        mask = embedding.mask_BT
        made = TextEmbedding(
            embedding.tokens_BTD.detach().cpu().contiguous(),
            embedding.pooled_BD.detach().cpu().contiguous(),
            None if mask is None else mask.cpu().contiguous(),
        )
        tensors = {"tokens_BTD": made.tokens_BTD, "pooled_BD": made.pooled_BD}
        if made.mask_BT is not None:
            tensors["mask_BT"] = made.mask_BT
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        if size <= self._room:
            path = self.path(text)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, part)
                os.replace(part, path)
                self._room -= size
            except (OSError, SafetensorError):
                part.unlink(missing_ok=True)
                self._room = 0
        self._remember(text, made)
        return made

    def encode(self, encoder: TextEncoder | None, texts: Sequence[str]) -> list[TextEmbedding]:
        """Embeddings of `texts` in their order, batch 1 each, on the CPU; what is missing comes from `encoder`.

        Each text is encoded alone, so that what is found doesn't depend on what was asked for with it. ValueError where
        something is missing and there is no encoder.
        """
        made: dict[str, TextEmbedding] = {}
        for text in dict.fromkeys(texts):
            found = self.get(text)
            if found is None:
                if encoder is None:
                    raise ValueError(f"no embedding of {text!r}, and no encoder to make it")
                (embedding,), _ = encoder.encode([text], self.max_tokens)
                found = self.put(text, embedding)
            made[text] = found
        return [made[text] for text in texts]

    def _remember(self, text: str, embedding: TextEmbedding) -> None:
        self._recent[text] = embedding
        while len(self._recent) > KEPT:
            self._recent.popitem(last=False)


def stack(embeddings: Sequence[TextEmbedding], device: torch.device, dtype: torch.dtype) -> TextEmbedding:
    """Embeddings of batch 1 as one batch, shorter ones padded with zeros that the mask hides.

    ValueError where lengths differ and an embedding has no mask: its padding would be seen.
    """
    longest = max(e.tokens_BTD.shape[1] for e in embeddings)
    masks = [e.mask_BT for e in embeddings]
    if any(m is None for m in masks) and len({e.tokens_BTD.shape[1] for e in embeddings}) > 1:
        raise ValueError("embeddings of different lengths, without a mask")

    def padded(x: torch.Tensor) -> torch.Tensor:
        missing = longest - x.shape[1]
        return torch.cat([x, x.new_zeros(1, missing, *x.shape[2:])], 1) if missing else x

    tokens_BTD = torch.cat([padded(e.tokens_BTD) for e in embeddings]).to(device, dtype)
    pooled_BD = torch.cat([e.pooled_BD for e in embeddings]).to(device, dtype)
    found = [padded(m) for m in masks if m is not None]
    return TextEmbedding(tokens_BTD, pooled_BD, torch.cat(found).to(device) if len(found) == len(masks) else None)
