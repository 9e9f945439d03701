"""The figures of flux_full.py as lines for people, beside their targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TARGETS = {"bf16": 13.0, "fp8": 8.0}
"""Seconds at 2560 x 1440 on an H200 with tiles of 512."""
TARGET_SIZE, TARGET_CARD = "2560x1440", "H200"


def line(row: dict[str, Any], card: str) -> str:
    """One case for people."""
    about = f"{row['what']:<9} {row['size']:<9} {row['precision']}, tile {row['tile']}, overlap {row['overlap']}, "
    about += f"{row['tiles']} tiles, text {row['text']}, 1+{row['steps']} steps"
    if row["seconds"] is None:
        return f"{about}: {row['failed']}"
    text = f"{about}: {row['seconds']:.2f} s, {_short(row['flops'])}FLOP, {_short(row['flops_per_second'])}FLOP/s"
    if row["fraction"] is not None:
        text += f" ({row['fraction']:.0%} of the peak; floor {row['floor']:.2f} s)"
    text += f", peak memory {row['peak_memory'] / 2**30:.1f} GiB"
    target = TARGETS.get(row["precision"])
    if row["what"] == "ours" and row["size"] == TARGET_SIZE and row["tile"] == 512 and TARGET_CARD in card and target:
        text += f" (target <= {target:g} s: {'met' if row['seconds'] <= target else 'missed'})"
    return text


def _short(count: float) -> str:
    units = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))
    return next((f"{count / size:.3g} {unit}" for unit, size in units if count >= size), f"{count:.0f} ")


def text(found: dict[str, Any]) -> Iterator[str]:
    """Head and ratios; the rows were told as they came."""
    if found["reduced"]:
        yield "reduced size: networks and canvases are tiny, the figures say that it runs, not how fast"
    yield ", ".join(f"{name} {value}" for name, value in found["machine"].items()) + (
        f", {_short(found['parameters'])}parameters, {found['tile_batch']} tiles per batch, tiling "
        f"{found['tiling']}, {'compiled' if found['compile'] else 'not compiled'}"
    )
    done = [row for row in found["rows"] if row["seconds"] is not None]
    for plain in (row for row in done if row["what"] == "diffusers"):
        for ours in (row for row in done if row["what"] == "ours" and row["size"] == plain["size"]):
            ratio = ours["seconds"] / plain["seconds"]
            yield (
                f"{plain['size']}: ours ({ours['precision']}, tile {ours['tile']}) / diffusers "
                f"({plain['precision']}, tile {plain['tile']}, text {plain['text']}): {ratio:.3f}"
            )
