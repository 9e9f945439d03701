"""How many tokens prompts are padded to: a bucket that holds the longest, instead of the most that any may have.

Buckets, because a length of its own for every set of prompts would round the numbers of all tiles differently whenever
one text is edited, and would compile networks again for every photo.
"""

from __future__ import annotations

from collections.abc import Sequence

BYTE_BUCKETS = (32, 64, 96, 128)
"""Of the built-in encoder, whose padding is masked: the length changes no more than rounding."""
T5_BUCKETS = (64, 128, 256, 512)
"""Of FLUX's T5, whose padding is seen by the transformer: another length is a slightly different picture."""


def bucket_of(tokens: int, most: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets` that holds `tokens`, at most `most`; `most` itself where none does."""
    return min(most, next((bucket for bucket in sorted(buckets) if bucket >= tokens), most))


def asked_bucket(text_bucket: int | None, most: int, buckets: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(tokens at which prompts are cut, buckets to choose from) for `--text-bucket`; None: automatic."""
    return (most, tuple(buckets)) if text_bucket is None else (text_bucket, (text_bucket,))
