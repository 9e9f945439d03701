"""Which of several processes this is, as torchrun or accelerate launch say in the environment; one process without
them."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass

from dreamsr_cli.errors import UsageError


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    rank: int = 0
    """0 to world - 1; process 0 owns files and messages."""
    world: int = 1
    """How many processes there are."""
    local_rank: int = 0
    """Its number among the processes of this machine: the card it takes."""


def this_place() -> Place:
    """What RANK, WORLD_SIZE and LOCAL_RANK say. Raises `UsageError` where they make no sense."""
    texts = {name: os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if texts["WORLD_SIZE"] in ("", "1"):
        return Place()
    try:
        world, rank = int(texts["WORLD_SIZE"]), int(texts["RANK"])
        local_rank = int(texts["LOCAL_RANK"] or 0)
    except ValueError as error:
        told = ", ".join(f"{name}={text!r}" for name, text in texts.items())
        raise UsageError(f"{told} in the environment make no sense", _HOW) from error
    if not 0 <= rank < world:
        raise UsageError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}", _HOW)
    return Place(rank, world, local_rank)


def again() -> str:
    """What to type to go on after a process was lost."""
    words = shlex.join(["-m", "dreamsr_cli", *sys.argv[1:]])
    if int(os.environ.get("GROUP_WORLD_SIZE", "1") or 1) > 1:
        return f"start the same torchrun command on the same machines again ({words}); it goes on where it stopped"
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    # The number of threads decides the result's bytes, and torchrun's own choice depends on the number of processes.
    threads = os.environ.get("OMP_NUM_THREADS")
    head = f"OMP_NUM_THREADS={threads} torchrun" if threads else "torchrun"
    return f"{head} --nproc-per-node {local} {words} goes on where it stopped, with any number of processes"


_HOW = "start several processes with torchrun --nproc-per-node N -m dreamsr_cli ..., or unset these"
