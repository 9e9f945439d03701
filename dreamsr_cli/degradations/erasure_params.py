"""What a texture erasure is drawn from, and the one text that it is conditioned on (docs/texture_erasure.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dreamsr_cli.draws import generator
from dreamsr_cli.errors import ConfigError

ERASE_TEXT = "smooth, plain surfaces, little fine detail, soft focus"
"""P_neg: what is added to a crop's prompt."""
FACTORS = (1.0, 2.0)
"""Range of the downsampling factor."""
STRENGTHS = (0.3, 0.5)
"""Range of the noise strength; it is sigma itself, no shift."""
FULL_STEPS = 28
"""Steps that a whole denoising from t = 1 would take; an erasure takes ceil(28 * strength)."""


@dataclass(frozen=True)
class ErasureParams:
    """Everything an erasure needs beside crop, prompt and networks; JSON-able through `config.to_dict` and
    `config.from_dict`. `ConfigError` for values that make no sense."""

    factor: float
    """Downsampling factor; drawn from `FACTORS`."""
    strength: float
    """Share of noise s in z_s = (1 - s) z_hq + s eps; drawn from `STRENGTHS`."""
    steps: int
    """Calls of the transformer: Euler steps from s to 0, or predictions to be averaged."""
    noise_seed: int
    """Key of the noise draws."""
    erase_text: str = ERASE_TEXT
    """P_neg; empty: the prompt alone."""

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("factor", 1 <= self.factor <= 8, "from 1 to 8"),
            ("strength", 0 < self.strength <= 1, "above 0, at most 1"),
            ("steps", 1 <= self.steps <= 100, "from 1 to 100"),
            ("noise_seed", self.noise_seed >= 0, "0 or more"),
        ):
            if not fits:
                raise ConfigError(f"texture erasure: {name} is {getattr(self, name)!r}", f"give a number {allowed}")


def draw_erasure(seed: int, source_sha256: str, crop_index: int, erase_text: str = ERASE_TEXT) -> ErasureParams:
    """Draw the parameters of one crop, a function of the arguments only."""
    rng = generator(seed, "texture-erasure", source_sha256, crop_index)
    factor, strength = (float(rng.uniform(low, high)) for low, high in (FACTORS, STRENGTHS))
    return ErasureParams(factor, strength, math.ceil(FULL_STEPS * strength), int(rng.integers(2**62)), erase_text)


def erasure_text(prompt: str, erase_text: str) -> str:
    """P_img + P_neg as one text; either may be empty."""
    prompt, erase_text = prompt.strip(), erase_text.strip()
    if not prompt or not erase_text:
        return prompt or erase_text
    return f"{prompt} {erase_text}" if prompt[-1] in ".!?" else f"{prompt}, {erase_text}"
