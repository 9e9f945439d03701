"""Cleaned captions: openings, damage, markup and loops go; bounds and fixed points hold for any text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamsr_cli.caption_texts import clean

WORDS = (
    "the image shows a photo of blurry wall, stone in focus. depicts and with green moss; quality poor! This picture "
    "is making low-resolution close-up noise there are two dogs: background **bold** # - 1. e.g. resolution of trees\n"
    "while blurred it features which in this image, soft? ASSISTANT: <image> \x00 \u202e \ufffd ß 猫"
)
sentences_st = st.lists(st.sampled_from(WORDS.split(" ")), max_size=60).map(" ".join)


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("The image shows a stone wall with moss.\nIt is blurry.", "A stone wall with moss."),
        ("In this image, there is a brown dog on a bench.", "A brown dog on a bench."),
        ("The photo depicts an old door", "An old door."),
        ("The image is a close-up of a woven cloth, slightly out of focus, with red threads.", None),
        ("A blurry image of a cat sitting on a chair.", "A cat sitting on a chair."),
        ("The image features a close-up view of a brick wall, with a blurry background of trees.", None),
        ("ASSISTANT: This picture captures a man in a suit, with his hands on the", "A man in a suit, with his hands."),
        ("Sure! Here is a photo of two ducks.", "Two ducks."),
        ("**Materials:**\n- rough stone\n- green moss", "Materials: rough stone. Green moss."),
        ("The image is blurry and out of focus, making it difficult to see the details.", ""),
        ("A dog on a bench. The background is blurred, making the dog stand out.", "A dog on a bench."),
        ("An unfocused orange flower.", "An orange flower."),
        ("a wall, a wall, a wall, a wa", "A wall."),
        ("rough stone rough stone rough stone rough stone", "Rough stone."),
        ("There are two ducks. There are two ducks. The lake is calm.", "There are two ducks. The lake is calm."),
        ("The wood grain is visible, and the image quality is poor.", "The wood grain is visible."),
        ("A museum with artifacts of bronze, glass and iron.", "A museum with artifacts of bronze, glass and iron."),
        ("`code` <image> [a link](http://x.y) to moss", "Code a link to moss."),
        ("", ""),
        ("?! ... 12", ""),
        ("\x00\x1b[31m\u202e", ""),
    ],
)
def test_what_models_say_becomes_a_prompt(said: str, prompt: str | None) -> None:
    cleaned = clean(said, 30)
    if prompt is not None:
        assert cleaned == prompt
    assert not re.search(r"image|photo|picture|close-up|blur|focus|quality", cleaned, re.IGNORECASE)


def test_long_texts_end_with_a_sentence_or_a_clause() -> None:
    said = "A stone wall with moss. A wooden door stands in it. Grass grows below."
    assert clean(said, 14) == said
    assert clean(said, 13) == "A stone wall with moss. A wooden door stands in it."
    assert clean(said, 9) == "A stone wall with moss."
    assert clean("A grey wall of large stones, with moss and grass on it", 8) == "A grey wall of large stones."
    assert clean("A grey wall of large stones with moss", 6) == "A grey wall of large stones."
    assert clean("A grey wall made of the stones", 5) == "A grey wall made."


@pytest.mark.parametrize("words", [0, -1])
def test_a_prompt_has_a_word(words: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        clean("a wall", words)


@settings(max_examples=300, deadline=None)
@given(st.one_of(sentences_st, st.text(max_size=300)), st.integers(1, 40))
def test_any_text_is_bounded_plain_and_clean(said: str, most: int) -> None:
    cleaned = clean(said, most)
    assert len(cleaned.split()) <= most
    assert all(len(word) <= 41 for word in cleaned.split())  # a longest word and the full stop
    assert cleaned.isprintable() and cleaned == " ".join(cleaned.split())
    assert not re.search(r"[*_`#<>\[\]{}|\\]", cleaned)
    assert not re.search(
        r"\b(?:blur|out of focus|in focus|resolution|low-resolution|noise|poor quality)", cleaned, re.I
    )
    assert not re.match(r"(?:the|this) (?:image|photo|picture) (?:shows|depicts|features)\b", cleaned, re.I)
    if cleaned:
        assert cleaned[0] == cleaned[0].upper() or len(cleaned[0].upper()) > 1 and cleaned[-1] in ".!?"
        assert cleaned[-1] in ".!?" and any(c.isalpha() for c in cleaned)


@settings(max_examples=300, deadline=None)
@given(st.one_of(sentences_st, st.text(max_size=200)), st.integers(1, 40))
def test_cleaning_again_changes_nothing(said: str, most: int) -> None:
    cleaned = clean(said, most)
    assert clean(cleaned, most) == cleaned


@pytest.mark.parametrize("said", ["a wall ", "the image ", "x", "very ", ", "])
def test_a_long_text_takes_no_time(said: str) -> None:
    """No pattern that explodes: ten times as long a text costs a few times as much (measured side by side)."""

    def cost(words: int) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            clean(said * words, 30)
            times.append(time.process_time() - began)
        return min(times)

    assert cost(20_000) < 30 * cost(2_000)
