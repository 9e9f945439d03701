"""How many tiles go into one network call where nobody says so."""

from __future__ import annotations

FEW_THREADS = 4
"""Up to so many CPU threads one tile at a time is fastest: what lies between matrix products then stays in the
caches (0.22 s against 0.25 s per tile of the built-in model in batches of 4 [measured, one thread])."""
MANY_TOKENS = 512
"""From so many image tokens on a tile alone keeps a CPU's matrix products busy."""


def fitting_batch(tiles: int, most: int) -> int:
    """The largest batch up to `most` that leaves the fewest padded tiles in the last one."""
    return max(range(1, min(most, tiles) + 1), key=lambda batch: (-(-tiles % batch), batch))


def automatic_batch(tiles: int, most: int, image_tokens: int, device: str, threads: int) -> int:
    """The batch for a canvas of `tiles` of `image_tokens` each, at most `most`, on a device of that name with so many
    CPU threads."""
    if device.startswith("cpu") and threads <= FEW_THREADS and image_tokens >= MANY_TOKENS:
        return 1
    return fitting_batch(tiles, most)
