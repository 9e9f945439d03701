"""Texts of photos whose turn is still to come: described and embedded together, so that large captioners and text
encoders are loaded once for many photos. Embeddings wait in RAM, and only so many of them."""

from __future__ import annotations

from collections.abc import Sequence
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
    _found: dict[tuple[str, ...], tuple[list[TextEmbedding], list[int]]] = field(default_factory=dict)
    """What the encoder made of a photo's texts, all at once: where padding is seen, the longest decides for all."""

    def embed(self, encoder: TextEncoder, most_tokens: int, buckets: Sequence[int] = ()) -> None:
        """Embed the texts of every plan as they would be in its photo's turn."""
        for plan in self.plans.values():
            texts = tuple(texts_of(plan))
            if texts not in self._found:
                made, cut = encoder.encode(texts, most_tokens, buckets)
                once = {text: _in_ram(embedding) for text, embedding in zip(texts, made, strict=True)}
                self._found[texts] = [once[text] for text in texts], cut
        self.masks_pads = not encoder.pads_are_seen

    def find(self, texts: Sequence[str]) -> tuple[list[TextEmbedding], list[int]] | None:
        """As `TextEncoder.encode`; None where these are not here."""
        return self._found.get(tuple(texts))

    def waiting(self) -> int:
        """Distinct texts of the plans, counted photo by photo."""
        return sum(len(set(texts_of(plan))) for plan in self.plans.values())

    def clear(self) -> None:
        """Forget everything."""
        self.plans.clear()
        self._found.clear()


def texts_of(plan: PromptPlan) -> list[str]:
    """The global text, then the tiles'."""
    return [plan.global_text, *(tile.text for tile in plan.tiles)]


def _in_ram(embedding: TextEmbedding) -> TextEmbedding:
    cpu, mask_BT = torch.device("cpu"), embedding.mask_BT
    return TextEmbedding(
        embedding.tokens_BTD.to(cpu), embedding.pooled_BD.to(cpu), None if mask_BT is None else mask_BT.to(cpu)
    )
