"""Small enlargers, their rows, and bundles that have one: what test_enlarger.py and test_clean_photos.py share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny_models import CPU, networks

from dreamsr_cli.models.autoencoder import Refiner
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.cleanliness import Cleanliness
from dreamsr_cli.models.enlarger import FACTOR, EnlargedRows, Enlarger
from dreamsr_cli.resample import resize
from dreamsr_cli.training.run_bundle import export

CLEAN, COMPRESSED, DAMAGED = (3.0, -9.0, 0.0), (-9.0, 3.0, 0.0), (0.0, -9.0, 3.0)
"""Logits of a judge that is sure of it by 95 %."""


@torch.no_grad()
def refiner(seed: int = 0, restored: bool = True) -> Refiner:
    """A small one that changes something everywhere, in each manner otherwise."""
    torch.manual_seed(seed)
    made = Refiner(8, 1, restored).eval()
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@torch.no_grad()
def enlarger(of: Refiner, seed: int = 1) -> Enlarger:
    """One that has learnt something."""
    torch.manual_seed(seed)
    made = Enlarger.of(of, 3).eval()
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def network() -> Refiner:
    """What enlarges."""
    return enlarger(refiner()).merged(refiner(), "clean")


def rows_of(made: Refiner, photo_PQC: np.ndarray, height: int, width: int) -> EnlargedRows:
    P, Q = photo_PQC.shape[:2]
    return EnlargedRows(made, lambda top, bottom: photo_PQC[top:bottom], P, Q, height, width, CPU)


def planes(photo_PQC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(photo_PQC.transpose(2, 0, 1)))[None]


def cubic_of(photo_BCPQ: torch.Tensor) -> torch.Tensor:
    return resize(photo_BCPQ, FACTOR * photo_BCPQ.shape[2], FACTOR * photo_BCPQ.shape[3]).clamp(0, 1)


@torch.no_grad()
def save_bundle_that_says(folder: Path, logits: tuple[float, float, float], seed: int = 0) -> Bundle:
    """A tiny bundle with an enlarger, and a judge of one opinion (see `CLEAN`)."""
    judge = Cleanliness(width=6, hidden=8)
    judge.exit.weight.zero_()
    judge.exit.bias.copy_(torch.tensor(logits))
    made = networks()
    made.patches.refiner = refiner(seed)
    export(replace(made, cleanliness=judge, enlarger=enlarger(refiner(seed))), None, folder, made.config)
    return open_bundle(str(folder))
