"""Texts of photos whose turn is still to come: described and embedded together, so that large captioners and text
encoders are loaded once for many photos. Embeddings wait in RAM, and only so many of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dreamsr_cli.models.text_encoder import TextEmbedding, TextEncoder
from dreamsr_cli.prompts import PromptPlan

TEXT_BYTES = 2**30
"""Embeddings that wait at most, about: the texts of the photo that passes it are still taken."""


@dataclass
class TextsAhead:
    """What is known ahead of its photo's turn; empty where photos are described and embedded in their turn."""

    plans: dict[Path, PromptPlan] = field(default_factory=dict)
    """By result."""
    masks_pads: bool = False
    """Of the encoder that made the embeddings."""
    _embedded: dict[str, TextEmbedding] = field(default_factory=dict)
    _cut: set[str] = field(default_factory=set)

    def texts(self) -> list[str]:
        """Each distinct text of the plans once."""
        return list(dict.fromkeys(text for plan in self.plans.values() for text in texts_of(plan)))

    def embed(self, encoder: TextEncoder, most_tokens: int) -> None:
        """Embed all texts of the plans."""
        texts = self.texts()
        made, cut = encoder.encode(texts, most_tokens)
        self._embedded = {text: _in_ram(embedding) for text, embedding in zip(texts, made, strict=True)}
        self._cut = {texts[index] for index in cut}
        self.masks_pads = not encoder.pads_are_seen

    def find(self, texts: Sequence[str]) -> tuple[list[TextEmbedding], list[int]] | None:
        """As `TextEncoder.encode`; None unless all are here."""
        if not all(text in self._embedded for text in texts):
            return None
        cut = [index for index, text in enumerate(texts) if text in self._cut]
        return [self._embedded[text] for text in texts], cut

    def clear(self) -> None:
        """Forget everything."""
        self.plans.clear()
        self._embedded.clear()
        self._cut.clear()


def texts_of(plan: PromptPlan) -> list[str]:
    """The global text, then the tiles'."""
    return [plan.global_text, *(tile.text for tile in plan.tiles)]


def waiting_bytes(texts: Iterable[str], most_tokens: int, width: int, itemsize: int) -> int:
    """Bytes of the embeddings of distinct texts, at most."""
    return len(set(texts)) * most_tokens * width * itemsize


def _in_ram(embedding: TextEmbedding) -> TextEmbedding:
    cpu, mask_BT = torch.device("cpu"), embedding.mask_BT
    return TextEmbedding(
        embedding.tokens_BTD.to(cpu), embedding.pooled_BD.to(cpu), None if mask_BT is None else mask_BT.to(cpu)
    )
