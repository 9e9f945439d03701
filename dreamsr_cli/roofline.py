"""The least time that a device needs for counted work: each phase takes the longer of its operations at the device's
peak and of its bytes at its memory's bandwidth.

No kernel reaches a peak; the floor is what a measured time is compared with. Bytes that a cache saves, transfers
between RAM and a card (`--offload`) and the disk are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dreamsr_cli.machine import Machine


@dataclass(frozen=True)
class Peak:
    """What a device can do at most."""

    flops_per_second: float
    bytes_per_second: float
    source: str
    """"data sheet" or "measured"."""


@dataclass(frozen=True)
class Card:
    """A card by its data sheet: dense products (no sparsity), accumulated in float32."""

    names: str
    """Pattern of what the driver calls it, without "NVIDIA "."""
    bf16: float
    """TFLOP/s, of bfloat16 and float16."""
    fp8: float | None
    """TFLOP/s; None where it has no float8."""
    fp32: float
    """TFLOP/s outside of tensor cores, as torch multiplies float32 by default."""
    bandwidth: float
    """GB/s of its memory."""


CARDS = (
    # NVIDIA's data sheets of HGX B200, H200, H100, A100 and L40S, L4 (where they print figures "with sparsity": half).
    Card(r"B200([ -].*)?", 2250, 4500, 75, 7700),
    Card(r"H200 NVL", 835.5, 1671, 60, 4800),
    Card(r"H200([ -].*)?", 989.4, 1978.9, 66.9, 4800),
    Card(r"H100 NVL", 835.5, 1671, 60, 3900),
    Card(r"H100 PCIe", 756, 1513, 51.2, 2000),
    Card(r"H100([ -].*)?", 989.4, 1978.9, 66.9, 3350),
    Card(r"H20(-.*)?", 148, 296, 44, 4000),
    Card(r"A100-SXM4-80GB", 312, None, 19.5, 2039),
    Card(r"A100 80GB PCIe", 312, None, 19.5, 1935),
    Card(r"A100.*40GB.*", 312, None, 19.5, 1555),
    Card(r"L40S", 362, 733, 91.6, 864),
    Card(r"L4", 121, 242.5, 30.3, 300),
    # NVIDIA's architecture white papers of Blackwell (RTX 50), Ada (RTX 40, RTX 6000 Ada) and Ampere GA102 (RTX 30).
    Card(r"GeForce RTX 5090", 209.5, 419, 104.8, 1792),
    Card(r"RTX 6000 Ada Generation", 364.2, 728.5, 91.1, 960),
    Card(r"GeForce RTX 4090", 165.2, 330.3, 82.6, 1008),
    Card(r"GeForce RTX 4080", 97.5, 194.9, 48.7, 716.8),
    Card(r"GeForce RTX 3090", 71, None, 35.6, 936),
    Card(r"GeForce RTX 3080", 59.5, None, 29.8, 760),
)
"""Cards whose peaks are known; others are measured."""


def card_peak(name: str, precision: str) -> Peak | None:
    """The data sheet's peak of the card that its driver calls `name`, for "fp32", "bf16", "fp16" or "fp8"; None for a
    card that isn't in the table or can't do it."""
    short = name.removeprefix("NVIDIA ").strip()
    found = next((card for card in CARDS if re.fullmatch(card.names, short)), None)
    if found is None:
        return None
    tera = {"fp32": found.fp32, "bf16": found.bf16, "fp16": found.bf16, "fp8": found.fp8}[precision]
    return None if tera is None else Peak(tera * 1e12, found.bandwidth * 1e9, "data sheet")


def peak(machine: Machine) -> Peak | None:
    """Of a known card by its data sheet, of anything else as measured; None where nothing was measured."""
    known = card_peak(machine.name, machine.precision) if machine.device != "cpu" else None
    if known is not None or machine.flops_per_second is None or machine.bytes_per_second is None:
        return known
    return Peak(machine.flops_per_second, machine.bytes_per_second, "measured")


@dataclass(frozen=True)
class Floor:
    """The least time of some work on some device."""

    peak: Peak
    seconds: dict[str, float]
    """By phase."""

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; seconds to four digits after the point."""
        by_phase = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        return {"seconds": round(self.total, 4), "phases": by_phase, **asdict(self.peak)}


def floor(flops: Mapping[str, int], moved: Mapping[str, int], at: Peak) -> Floor:
    """The floor of phases with these operations and bytes, each phase by what binds it."""
    return Floor(
        at, {name: max(flops[name] / at.flops_per_second, moved[name] / at.bytes_per_second) for name in flops}
    )
