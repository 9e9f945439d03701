"""Caches of embeddings and latents: what comes back is what was made, and stale or damaged files never do."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from dreamsr_cli.training.latent_cache import LatentCache
from dreamsr_cli.training.texts import EmbeddingCache, stack


class Counting:
    """A real encoder that tells how often it was asked."""

    pads_are_seen = False

    def __init__(self) -> None:
        self.encoder = tiny_models.networks().text_encoder
        self.asked: list[str] = []

    def encode(self, texts, max_tokens, buckets=()):  # noqa: ANN001, ANN201
        self.asked += texts
        return self.encoder.encode(texts, max_tokens)


def test_embeddings_are_made_once_and_come_back_exactly(tmp_path: Path) -> None:
    encoder = Counting()
    made = EmbeddingCache(tmp_path, "a" * 64, 16).encode(encoder, ["one", "two words", "one"])
    assert encoder.asked == ["one", "two words"]
    again = EmbeddingCache(tmp_path, "a" * 64, 16)
    assert again.missing(["one", "three", "two words", "three"]) == ["three"]
    for one, other in zip(made, again.encode(None, ["one", "two words", "one"]), strict=True):
        assert torch.equal(one.tokens_BTD, other.tokens_BTD) and torch.equal(one.pooled_BD, other.pooled_BD)
        assert one.mask_BT is not None and other.mask_BT is not None and torch.equal(one.mask_BT, other.mask_BT)
    with pytest.raises(ValueError, match="three"):
        again.encode(None, ["three"])
    for other in (EmbeddingCache(tmp_path, "b" * 64, 16), EmbeddingCache(tmp_path, "a" * 64, 8)):
        assert other.missing(["one"]) == ["one"]


def test_damaged_embeddings_are_made_again_and_a_full_cache_still_works(tmp_path: Path) -> None:
    encoder = Counting()
    cache = EmbeddingCache(tmp_path, "a" * 64, 16)
    (first,) = cache.encode(encoder, ["one"])
    cache.path("one").write_bytes(b"half")
    (second,) = EmbeddingCache(tmp_path, "a" * 64, 16).encode(encoder, ["one"])
    assert encoder.asked == ["one", "one"] and torch.equal(first.tokens_BTD, second.tokens_BTD)
    small = EmbeddingCache(tmp_path / "small", "a" * 64, 16, most_bytes=10)
    small.encode(encoder, ["one"])
    assert not list((tmp_path / "small").rglob("*")) and small.get("one") is not None


def test_stacked_embeddings_are_padded_behind_a_mask(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "a" * 64, 32)
    made = cache.encode(Counting(), ["short", "a text of more tokens than that"])
    batch = stack(made, torch.device("cpu"), torch.float32)
    assert batch.tokens_BTD.shape[0] == 2 and batch.mask_BT is not None
    length = made[0].tokens_BTD.shape[1]
    assert batch.tokens_BTD.shape[1] > length and not batch.mask_BT[0, length:].any()
    assert torch.equal(batch.tokens_BTD[0, :length], made[0].tokens_BTD[0])
    with pytest.raises(ValueError, match="mask"):
        stack([tiny_models.text(tokens=3), tiny_models.text(tokens=4)], torch.device("cpu"), torch.float32)


def test_latents_come_back_by_content(tmp_path: Path) -> None:
    autoencoder = tiny_models.networks().autoencoder
    x = tiny_models.pictures(3)
    cache = LatentCache(tmp_path, "v" * 64)
    made = cache.encode(autoencoder, x)
    assert (cache.hits, cache.misses) == (0, 3) and torch.allclose(made, autoencoder.encode(x), atol=1e-5)
    again = LatentCache(tmp_path, "v" * 64)
    assert torch.equal(again.encode(autoencoder, x.flip(0)), made.flip(0)) and (again.hits, again.misses) == (3, 0)
    LatentCache(tmp_path, "w" * 64).path(x[0])
    assert LatentCache(tmp_path, "w" * 64).path(x[0]) != cache.path(x[0]) != cache.path(x[1])
    cache.path(x[0]).write_bytes(b"half")
    assert torch.equal(again.encode(autoencoder, x[:1]), made[:1]) and again.misses == 1
