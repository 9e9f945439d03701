"""Training steps of the parts that go by what photos look like: the judge, and the enlarger of undamaged ones.

Axes: B batch, K looks, P Q pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamsr_cli.config import LOOKS
from dreamsr_cli.errors import TrainingError
from dreamsr_cli.losses import pixel_distance
from dreamsr_cli.models.cleanliness import LEAST_SIDE
from dreamsr_cli.models.enlarger import FACTOR, MANNERS
from dreamsr_cli.training.networks import Networks
from dreamsr_cli.training.recipe import Recipe
from dreamsr_cli.training.step_data import Crops, Outcome


def judge_step(networks: Networks, crops: Crops) -> Outcome:
    """A step of stage `cleanliness`: cross-entropy of what bad crops look like. Raises as `judged` does."""
    logits_BK, looks_B = judged(networks, crops)
    loss = F.cross_entropy(logits_BK, looks_B)
    right = (logits_BK.argmax(1) == looks_B).float().mean()
    return Outcome(loss, {"judge_entropy": loss.detach(), "judge_right": right.detach()})


def judged(networks: Networks, crops: Crops) -> tuple[Tensor, Tensor]:
    """(logits_BK, looks_B): what the judge says of each bad crop, float32, and the truth, indices into `LOOKS`. Raises
    `TrainingError` for crops whose degradation isn't known, or that are too small."""
    if networks.cleanliness is None or crops.lq is None:
        raise ValueError("a judge step needs the judge and bad crops at their own size")
    if None in crops.looks:
        raise TrainingError(
            "pairs on disk don't say how they were degraded, so nothing can be learnt about that from them",
            "give --data a folder of good photos",
        )
    if min(crops.lq.shape[2:]) < LEAST_SIDE:
        raise TrainingError(
            f"bad crops of {crops.lq.shape[3]} pixels are too small to be judged",
            "--set 'data.crops=[{size=256,batch=16,share=1.0}]'",
        )
    looks_B = torch.tensor([LOOKS.index(looks) for looks in crops.looks if looks], device=crops.lq.device)
    return networks.cleanliness(crops.lq).float(), looks_B


def enlarge_step(networks: Networks, recipe: Recipe, crops: Crops) -> Outcome:
    """A step of stage `enlarger`: the pixel distance of enlarged and good crops. Raises as `enlarged` does."""
    loss = pixel_distance(enlarged(networks, crops) * 2 - 1, crops.hq * 2 - 1, recipe.loss.pixel_kind)
    assert networks.enlarger is not None
    # Every weight gets a gradient, also in a batch of one manner alone: processes exchange them.
    none = sum(parameter.sum() for parameter in networks.enlarger.parameters()) * 0
    return Outcome(loss + none, {"enlarge_pixel": loss.detach()})


def enlarged(networks: Networks, crops: Crops) -> Tensor:
    """The bad crops enlarged, (B, 3, P, Q), float32, about [0, 1]. Raises `TrainingError` for crops that were shrunk by
    another factor than the enlarger's, and for damaged ones."""
    if networks.enlarger is None or crops.lq is None:
        raise ValueError("an enlarge step needs the enlarger and bad crops at their own size")
    if "damaged" in crops.looks:
        raise TrainingError(
            "the enlarger is for photos that only lack pixels, and this recipe's crops are damaged",
            "--set data.preset=bicubic --set 'data.mix={jpeg=0.5}'",
        )
    if crops.hq.shape[2] != FACTOR * crops.lq.shape[2]:
        raise TrainingError(
            f"the enlarger knows pairs of scale {FACTOR}, these have {crops.hq.shape[2] // crops.lq.shape[2]}",
            f"make them with dreamsr degrade --preset bicubic --scale {FACTOR}",
        )
    refiner, made_B3PQ = networks.patches.refiner, torch.empty_like(crops.hq)
    for manner in MANNERS:
        # Pairs on disk don't say; what is made for an enlarger is clean.
        those = [index for index, looks in enumerate(crops.looks) if (looks or MANNERS[0]) == manner]
        if those:
            made_B3PQ[those] = networks.enlarger(refiner, crops.lq_up[those], manner)
    return made_B3PQ
