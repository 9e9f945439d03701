"""A training run in a process of its own, for tests that kill it or start it twice: `python training_child.py JSON`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import CPU, RECIPE

from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.recipe import CropPlan
from dreamsr_cli.training.stages import STAGES
from dreamsr_cli.training.trainer import TrainJob, train


class Diary(SilentProgress):
    """Writes a line per finished step into a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._training = path, False

    def phase(self, name: str, total: int) -> None:
        self._training = name.startswith("train ")

    def advance(self, count: int = 1) -> None:
        if self._training and count:
            with self._path.open("a") as file:
                file.write("step\n")


def job(given: dict) -> TrainJob:
    """The job of a test, from plain data."""
    recipe = replace(
        RECIPE,
        condition="removed",
        steps=given["steps"],
        save_every=given.get("save_every", 2),
        accumulate=given.get("accumulate", 1),
        data=replace(RECIPE.data, crops=(CropPlan(32, given.get("batch", 2), 1.0),)),
        loss=replace(RECIPE.loss, gan_start=2, gan_lead=1),
    )
    start: dict[str, Any] = (
        {"init_from": given["bundle"]} if given["stage"] == "backbone" else {"model": given["bundle"]}
    )
    return TrainJob(
        STAGES[given["stage"]],
        recipe,
        "tiny.toml",
        Path(given["data"]),
        Path(given["out"]),
        resume=given.get("resume", False),
        device=CPU,
        **start,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = json.loads(sys.argv[1])
    train(job(made), Diary(Path(made["out"] + ".steps")))
