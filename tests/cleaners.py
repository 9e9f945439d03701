"""Small cleaners, their rows, and bundles that have one: what test_cleaner.py and test_damaged_photos.py share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from enlargers import enlarger, refiner
from tiny_models import CPU, networks

from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.cleaner import CleanedRows, Cleaner
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.training.run_bundle import export


@torch.no_grad()
def cleaner(pleases: bool = True, seed: int = 3) -> Cleaner:
    """One that changes something everywhere, in each manner otherwise."""
    torch.manual_seed(seed)
    made = Cleaner((6, 8, 8), (1, 1, 1), pleases).eval()
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def cleaned_rows(made: Cleaner, manner: str, photo_PQC: np.ndarray, height: int, width: int) -> CleanedRows:
    P, Q = photo_PQC.shape[:2]
    return CleanedRows(made, manner, lambda top, bottom: photo_PQC[top:bottom], P, Q, height, width, CPU)


@torch.no_grad()
def save_bundle_that_cleans(folder: Path, logits: tuple[float, float, float], pleases: bool = True) -> Bundle:
    """A tiny bundle with a cleaner, an enlarger, and a judge of one opinion (see `enlargers.CLEAN`)."""
    judge = Cleanliness(width=6, hidden=8)
    judge.exit.weight.zero_()
    judge.exit.bias.copy_(torch.tensor(logits))
    made = networks()
    made.patches.refiner = refiner()
    made = replace(made, cleanliness=judge, enlarger=enlarger(refiner()), cleaner=cleaner(pleases))
    export(made, None, folder, made.config)
    return open_bundle(str(folder))
