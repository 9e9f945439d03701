"""Prompts become embeddings: byte groups of our own encoder, CLIP and T5 for FLUX, batches with padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CPU

from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.text_encoder import ByteTextEncoder, FluxTextEncoder, TextEmbedding, stack

WORDS = ["a red brick wall", "", "grass", "a red brick wall", "sky " * 40]


@pytest.fixture(scope="module")
def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(width=24, layers=2, heads=4, group=4, max_tokens=16).eval()


@pytest.fixture(scope="module")
def flux(tiny_flux_bundle) -> FluxTextEncoder:
    opened = open_bundle(str(tiny_flux_bundle)).open_text_encoder(CPU, torch.float32)
    assert isinstance(opened, FluxTextEncoder)
    return opened


class Calls:
    """How often a real module ran."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        self._handle = module.register_forward_pre_hook(lambda *_: self._seen())

    def _seen(self) -> None:
        self.count += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def test_distinct_prompts_are_encoded_once_and_cut_ones_are_named(encoder) -> None:
    with Calls(encoder) as calls:
        embeddings, cut = encoder.encode(WORDS, 128)
    assert calls.count == 4 and cut == [4]
    assert torch.equal(embeddings[0].tokens_BTD, embeddings[3].tokens_BTD)
    assert [e.tokens_BTD.shape for e in embeddings] == [(1, n, 24) for n in (4, 1, 2, 4, 16)]
    assert all(e.pooled_BD.shape == (1, 24) for e in embeddings)


def test_different_words_and_orders_differ(encoder) -> None:
    (one, two, three), _ = encoder.encode(["dogs and cats...", "cats and dogs...", "cats and dogs!!!"], 128)
    for other in (two, three):
        assert (one.tokens_BTD - other.tokens_BTD).abs().max() > 1e-3
        assert (one.pooled_BD - other.pooled_BD).abs().max() > 1e-3


@pytest.mark.parametrize(("words", "multiple", "length"), [(WORDS, 1, 16), (WORDS[:4], 1, 4), (WORDS[:4], 8, 8)])
def test_training_batches_give_what_single_prompts_give(encoder, words, multiple, length) -> None:
    """Padding is masked inside: the batch's longest prompt doesn't change the others."""
    single, _ = encoder.encode(words, 16)
    ids, mask, _ = encoder.tokenize(words, 16, multiple)
    assert mask.shape[1] == length
    batch = encoder(ids, mask)
    assert batch.tokens_BTD.requires_grad
    for row, alone in enumerate(single):
        length = alone.tokens_BTD.shape[1]
        assert torch.allclose(batch.tokens_BTD[row, :length], alone.tokens_BTD[0], atol=1e-5)
        assert torch.allclose(batch.pooled_BD[row], alone.pooled_BD[0], atol=1e-5)
        assert not batch.tokens_BTD[row, length:].any()


@given(text=st.text(max_size=60), limit=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_tokens_are_the_utf8_bytes_cut_at_a_whole_character(text, limit) -> None:
    encoder = ByteTextEncoder(width=8, layers=1, heads=1, group=4, max_tokens=16)
    ids, mask, cut = encoder.tokenize([text], limit)
    kept = bytes(i for i in ids.flatten().tolist() if i != ByteTextEncoder.PAD).decode("utf-8")
    raw, room = text.encode("utf-8"), 4 * min(limit, 16)
    assert text.startswith(kept) and len(kept.encode()) <= room
    assert bool(cut) == (len(raw) > room)
    assert kept == text or len((kept + text[len(kept)]).encode()) > room
    assert ids.shape == (1, max(1, -(-len(kept.encode()) // 4)), 4) and bool(mask.all())


def test_stack_pads_with_zeros_and_marks_them(encoder) -> None:
    embeddings, _ = encoder.encode(["grass", "a red brick wall"], 16)
    batch = stack(embeddings)
    assert batch.tokens_BTD.shape == (2, 4, 24)
    assert batch.mask_BT is not None
    assert batch.mask_BT.tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(batch.tokens_BTD[0, :2], embeddings[0].tokens_BTD[0]) and not batch.tokens_BTD[0, 2:].any()
    assert torch.equal(batch.pooled_BD, torch.cat([e.pooled_BD for e in embeddings]))


def test_stack_without_padding_has_no_mask(encoder) -> None:
    embeddings, _ = encoder.encode(["grass", "trees"], 16)
    assert stack(embeddings).mask_BT is None
    longer = stack(embeddings, length=5)
    assert longer.tokens_BTD.shape[1] == 5 and longer.mask_BT is not None
    with pytest.raises(ValueError, match="below the longest"):
        stack(embeddings, length=1)


def test_moving_changes_embeddings_not_masks(encoder) -> None:
    embeddings, _ = encoder.encode(["grass", "a red brick wall"], 16)
    moved = stack(embeddings).to("cpu", torch.bfloat16)
    assert moved.tokens_BTD.dtype == moved.pooled_BD.dtype == torch.bfloat16
    assert moved.mask_BT is not None and moved.mask_BT.dtype == torch.bool
    assert TextEmbedding(moved.tokens_BTD, moved.pooled_BD, None).to("cpu", torch.float32).mask_BT is None


def test_flux_gives_t5_tokens_padded_and_clips_pooled_vector(flux) -> None:
    assert flux.pads_are_seen
    with Calls(flux.t5) as t5, Calls(flux.clip) as clip:
        embeddings, cut = flux.encode(["a cat", "a dog", "a cat", "words " * 9], 16)
    assert (t5.count, clip.count, cut) == (3, 3, [3])
    first = embeddings[0]
    assert first.tokens_BTD.shape == (1, 16, 24) and first.pooled_BD.shape == (1, 20)
    assert first.mask_BT is not None and int(first.mask_BT.sum()) == len(flux.t5_tokenizer("a cat").input_ids)
    assert first.tokens_BTD[~first.mask_BT].abs().max() > 0  # FLUX was trained to see T5's padding
    assert torch.equal(first.tokens_BTD, embeddings[2].tokens_BTD)
    assert (first.pooled_BD - embeddings[1].pooled_BD).abs().max() > 1e-4


def test_flux_equals_diffusers_own_pipeline(flux) -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    pipeline_class: Any = FluxPipeline  # its annotations don't say that parts may be None
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=flux.clip,
        tokenizer=flux.clip_tokenizer,
        text_encoder_2=flux.t5,
        tokenizer_2=flux.t5_tokenizer,
        transformer=None,
    )
    pipeline.tokenizer_max_length = 20
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt("a cat on a wall", None, max_sequence_length=16)
    (mine,), _ = flux.encode(["a cat on a wall"], 16)
    assert torch.equal(mine.tokens_BTD, tokens)
    assert torch.equal(mine.pooled_BD, pooled)
