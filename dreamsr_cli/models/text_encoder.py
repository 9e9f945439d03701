"""Prompts -> embeddings: CLIP + T5 for FLUX, a byte-level encoder for the built-in model; each distinct prompt once.

Axes: B batch, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dreamsr_cli.text_buckets import bucket_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextEmbedding:
    """One prompt, or a batch of prompts of padded equal length."""

    tokens_BTD: Tensor
    """Token embeddings, the transformer's `encoder_hidden_states`."""
    pooled_BD: Tensor
    """Pooled vector, the transformer's `pooled_projections`."""
    mask_BT: Tensor | None
    """True where a token is text, False where it is padding; None where nothing is padded."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextEmbedding:
        """The same on another device, embeddings in `dtype`."""
        return TextEmbedding(
            self.tokens_BTD.to(device, dtype),
            self.pooled_BD.to(device, dtype),
            None if self.mask_BT is None else self.mask_BT.to(device),
        )

    def fills(self, length: int) -> bool:
        """Whether it has `length` tokens and none of them is padding; waits for its device."""
        return self.tokens_BTD.shape[1] == length and (self.mask_BT is None or bool(self.mask_BT.all()))


class TextEncoder(Protocol):
    """What the engine needs of a text encoder."""

    pads_are_seen: bool
    """True where the transformer was trained to attend to padding (FLUX); False: padding is masked everywhere."""

    def encode(
        self, texts: Sequence[str], max_tokens: int, buckets: Sequence[int] = ()
    ) -> tuple[list[TextEmbedding], list[int]]:
        """One embedding of batch 1 for each text, and the indices of texts that were cut to `max_tokens`.

        Where padding is seen, all are padded to the smallest of `buckets` that holds the longest; none: `max_tokens`.
        """
        ...


def stack(embeddings: Sequence[TextEmbedding], length: int | None = None, whole: bool | None = None) -> TextEmbedding:
    """A batch from embeddings of batch 1, zero-padded at the end to `length` tokens (default: the longest).

    The batch has no mask if no token of it is padding: `whole` says so where that is known, else the device is asked.
    """
    longest = max(e.tokens_BTD.shape[1] for e in embeddings)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"length {length} is below the longest text's {longest} tokens")

    def padded(x: Tensor) -> Tensor:
        missing = length - x.shape[1]
        return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x

    def mask(e: TextEmbedding) -> Tensor:
        tokens = e.tokens_BTD
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if e.mask_BT is None else e.mask_BT

    mask_BT = torch.cat([padded(mask(e)) for e in embeddings])
    return TextEmbedding(
        torch.cat([padded(e.tokens_BTD) for e in embeddings]),
        torch.cat([e.pooled_BD for e in embeddings]),
        None if (bool(mask_BT.all()) if whole is None else whole) else mask_BT,
    )


class ByteTextEncoder(ModelMixin, ConfigMixin):
    """The built-in model's text encoder: UTF-8 bytes in groups of `group`, a learned position, a few transformer
    layers.

    An empty prompt is one group of padding bytes, so that every prompt has at least one token. Trained with the rest
    in stage `backbone`.
    """

    pads_are_seen = False
    PAD = 256

    @register_to_config
    def __init__(
        self, width: int = 192, layers: int = 2, heads: int = 4, group: int = 4, max_tokens: int = 128
    ) -> None:
        super().__init__()
        self.group, self.max_tokens = group, max_tokens
        self.byte = nn.Embedding(257, width // group)
        self.position = nn.Embedding(max_tokens, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def tokenize(self, texts: Sequence[str], max_tokens: int, multiple: int = 1) -> tuple[Tensor, Tensor, list[int]]:
        """(bytes_BTG int64, mask_BT bool, indices of cut texts); cut at a whole character, T padded to a multiple of
        `multiple`."""
        limit = min(max_tokens, self.max_tokens) * self.group
        rows, cut = [], []
        for index, text in enumerate(texts):
            raw = text.encode("utf-8")
            if len(raw) > limit:
                raw = raw[:limit].decode("utf-8", errors="ignore").encode("utf-8")
                cut.append(index)
            rows.append(raw)
        groups = [max(1, -(-len(raw) // self.group)) for raw in rows]
        length = min(-(-max(groups) // multiple) * multiple, self.max_tokens)
        ids = torch.full((len(rows), length * self.group), self.PAD, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, (raw, n) in enumerate(zip(rows, groups, strict=True)):
            ids[i, : len(raw)] = torch.tensor(list(raw), dtype=torch.long)
            mask[i, :n] = True
        return ids.view(len(rows), -1, self.group), mask, cut

    def forward(self, bytes_BTG: Tensor, mask_BT: Tensor) -> TextEmbedding:
        """Differentiable: used by training on a whole batch at once."""
        x_BTD = self.byte(bytes_BTG).flatten(2) + self.position.weight[: bytes_BTG.shape[1]]
        x_BTD = self.norm(self.trunk(x_BTD, src_key_padding_mask=~mask_BT))
        x_BTD = x_BTD * mask_BT[..., None]
        pooled_BD = x_BTD.sum(1) / mask_BT.sum(1, keepdim=True)
        return TextEmbedding(x_BTD, pooled_BD, mask_BT)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], max_tokens: int, buckets: Sequence[int] = ()
    ) -> tuple[list[TextEmbedding], list[int]]:
        """See `TextEncoder.encode`. Each text runs alone and unpadded, so its embedding does not depend on its
        neighbours."""
        cut: list[int] = []
        done: dict[str, TextEmbedding] = {}
        for index, text in enumerate(texts):
            ids, mask, was_cut = self.tokenize([text], max_tokens)
            if was_cut:
                cut.append(index)
            if text not in done:
                done[text] = self(ids.to(self.device), mask.to(self.device))
        return [done[text] for text in texts], cut


class FluxTextEncoder:
    """CLIP's pooled vector and T5's tokens: T5 padded to a bucket (FLUX was trained with the longest), padding seen by
    the transformer.

    `clip`, `t5` are transformers' `CLIPTextModel` and `T5EncoderModel` with their tokenizers.
    """

    pads_are_seen = True

    def __init__(
        self,
        clip_tokenizer: PreTrainedTokenizerBase,
        clip: PreTrainedModel,
        t5_tokenizer: PreTrainedTokenizerBase,
        t5: PreTrainedModel,
    ) -> None:
        self.clip_tokenizer, self.clip = clip_tokenizer, clip
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], max_tokens: int, buckets: Sequence[int] = ()
    ) -> tuple[list[TextEmbedding], list[int]]:
        """See `TextEncoder.encode`. CLIP cuts at its own 77 tokens silently, as FLUX's pipeline does: T5 carries the
        text."""
        lengths = [len(self.t5_tokenizer(text).input_ids) for text in texts]
        cut = [i for i, length in enumerate(lengths) if length > max_tokens]
        padded = bucket_of(max(lengths, default=0), max_tokens, buckets)
        done: dict[str, TextEmbedding] = {}
        for text in dict.fromkeys(texts):
            done[text] = self._one(text, padded)
        return [done[text] for text in texts], cut

    def _one(self, text: str, max_tokens: int) -> TextEmbedding:
        clip_device = next(self.clip.parameters()).device
        t5_device = next(self.t5.parameters()).device
        clip_length = min(77, self.clip.config.max_position_embeddings)
        clip = self.clip_tokenizer(
            [text], padding="max_length", max_length=clip_length, truncation=True, return_tensors="pt"
        )
        pooled = self.clip(clip.input_ids.to(clip_device)).pooler_output
        t5 = self.t5_tokenizer(
            [text], padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
        )
        tokens = self.t5(t5.input_ids.to(t5_device)).last_hidden_state
        return TextEmbedding(tokens, pooled, t5.attention_mask.bool().to(t5_device))
