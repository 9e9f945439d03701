"""FLUX's text encoders during a run: opened when a prompt is new, their embeddings kept on disk by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.text_encoder import TextEmbedding, TextEncoder
from dreamsr_cli.training.texts import EmbeddingCache
from dreamsr_cli.weights import cache_folder, file_sha256


class LazyTextEncoder:
    """A bundle's CLIP and T5 behind a cache. Where every prompt is known (captions), they are never opened."""

    pads_are_seen = True

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> None:
        self._bundle, self._device, self._dtype = bundle, device, dtype
        self._encoder: TextEncoder | None = None
        self._caches: dict[int, EmbeddingCache] = {}

    def encode(
        self, texts: Sequence[str], max_tokens: int, buckets: Sequence[int] = ()
    ) -> tuple[list[TextEmbedding], list[int]]:
        """See `TextEncoder.encode`; cut texts are not told, and all are padded to `max_tokens`, as FLUX was trained."""
        assert not buckets, "embeddings are kept at one length"
        if max_tokens not in self._caches:
            folder = self._bundle.part_folder("text_encoder")
            self._caches[max_tokens] = EmbeddingCache(cache_folder() / "texts", _sha256(folder), max_tokens)
        cache = self._caches[max_tokens]
        if self._encoder is None and cache.missing(texts):
            self._encoder = self._bundle.open_text_encoder(self._device, self._dtype)
        return cache.encode(self._encoder, texts), []


def _sha256(folder: Path) -> str:
    lines = [f"{p.relative_to(folder).as_posix()} {file_sha256(p)}" for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
