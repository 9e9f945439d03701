"""Figures of a run sent to trackers (TensorBoard and others) through accelerate's own classes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamsr_cli.errors import TrainingError, UsageError

INSTALL = {
    "tensorboard": ("pip install 'dreamsr[train]'", ("tensorboard", "tensorboardX")),
    "wandb": ("pip install wandb", ("wandb",)),
    "comet_ml": ("pip install comet-ml", ("comet_ml",)),
    "aim": ("pip install aim", ("aim",)),
    "mlflow": ("pip install mlflow", ("mlflow",)),
    "clearml": ("pip install clearml", ("clearml",)),
    "dvclive": ("pip install dvclive", ("dvclive",)),
    "swanlab": ("pip install swanlab", ("swanlab",)),
    "trackio": ("pip install trackio", ("trackio",)),
}
"""By name: how to install it, and modules one of which it needs."""
FOLDER = "tracking"


class Trackers:
    """Open trackers of one run; in all processes but the first there are none, so `log` may be called everywhere."""

    def __init__(self, trackers: Sequence[Any]) -> None:
        self._trackers = list(trackers)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send figures of `step`; a dotted or slashed name makes a group."""
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)

    def close(self) -> None:
        """Write what is left and end; further calls of `log` do nothing."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def check_names(names: Sequence[str]) -> None:
    """`UsageError` for a tracker that accelerate doesn't know, or that isn't installed."""
    for name in names:
        if name not in INSTALL:
            raise UsageError(f"no tracker is called {name!r}", f"use one of: {', '.join(INSTALL)}")
        command, modules = INSTALL[name]
        if not any(importlib.util.find_spec(module) for module in modules):
            raise UsageError(f"tracker {name} is not installed", command)


def open_trackers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], project: str = "dreamsr", main: bool = True
) -> Trackers:
    """Start the trackers called `names` for the run in `folder`; local ones write into `folder/tracking`.

    `config`: settings to show beside the figures (nested tables become dotted keys). `main`: False in all processes but
    the first. Raises `UsageError` as `check_names`, `TrainingError` where a tracker can't start.
    """
    check_names(names)
    if not names or not main:
        return Trackers([])
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    place = folder / FOLDER
    flat = flatten(config)
    opened: list[Any] = []
    for name in names:
        cls: Any = LOGGER_TYPE_TO_CLASS[name]
        try:
            place.mkdir(parents=True, exist_ok=True)
            tracker = cls(project, logging_dir=place) if cls.requires_logging_directory else cls(project)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(flat)
        except Exception as error:  # each tracker raises classes of its own
            Trackers(opened).close()
            hint = "leave it out of --track, or set it up as its own documentation says"
            raise TrainingError(f"tracker {name} can't start: {error}", hint) from error
        opened.append(tracker)
    return Trackers(opened)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested tables as dotted keys with plain values, as every tracker takes them."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, (str, int, float, bool)):
            flat[name] = value
        else:
            flat[name] = os.fspath(value) if isinstance(value, Path) else str(value)
    return flat
