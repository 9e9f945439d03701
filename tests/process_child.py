"""What the tests of several processes run in each of them: the command itself, with a diary of what it computes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dreamsr_cli import canvas, phase_sharing
from dreamsr_cli.captioning import Captioner, Question
from dreamsr_cli.cli import app
from dreamsr_cli.sampler import Sampler

PATIENCE = 10.0
"""Seconds that process 0 waits for the others' first batch, at most."""
STRIP_PATIENCE = 120.0
"""Seconds that it waits for their first strip, where it is told to."""


def main(given: dict[str, Any]) -> None:
    """`dreamsr WORDS` as rank `rank` of `world`, in `folder`, its streams in files; `kill_after` batches it dies."""
    os.chdir(given["folder"])
    name, rank, world = given["name"], given["rank"], given["world"]
    for number, stream in ((1, "out"), (2, "err")):
        fd = os.open(f"{name}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
    os.environ["DREAMSR_CACHE"] = str(Path(given["cache"]))
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(given["port"]),
        }
    others = [f"{name}.{other}.diary" for other in range(world) if other != rank] if rank == 0 else []
    fates = given.get("kill_after"), given.get("fail_after"), given.get("meet_at_strips", False)
    keep_diary(f"{name}.{rank}.diary", others, *fates)
    sys.argv = ["dreamsr", *given["words"]]
    torch.set_num_threads(1)
    app.main()


def wait_for_others(diaries: list[str]) -> None:
    """Until every other process has begun with a batch: at this size process 0 alone would be done before."""
    until = time.monotonic() + PATIENCE
    while diaries and time.monotonic() < until:
        diaries[:] = [diary for diary in diaries if not (os.path.exists(diary) and os.path.getsize(diary))]
        time.sleep(0.05)
    diaries.clear()


def wait_for_strips(diaries: list[str]) -> None:
    """Until every other process has begun with a strip."""
    until = time.monotonic() + STRIP_PATIENCE
    while diaries and time.monotonic() < until:
        diaries[:] = [diary for diary in diaries if "strip" not in Path(diary).read_text()]
        time.sleep(0.05)
    diaries.clear()


def keep_diary(
    path: str, others: list[str], kill_after: int | None, fail_after: int | None, meet_at_strips: bool
) -> None:
    """A line for each batch ("velocity step tile"), run of the ControlNet ("control tile"), decoded strip ("strip") and
    question to a captioner ("question pictures")."""
    strangers = list(others) if meet_at_strips else []
    lines = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    velocity, control, count = Sampler._velocity, Sampler._control, [0]
    answer, strip = Captioner.answer, canvas.decode_strip

    def noted_velocity(self: Sampler, work: Any, canvases: Any, tiles: Any) -> Any:
        if count[0] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if count[0] == fail_after:
            raise torch.OutOfMemoryError("out of memory")
        count[0] += 1
        wait_for_others(others)
        os.write(lines, f"velocity {work.step} {tiles[0].index}\n".encode())
        return velocity(self, work, canvases, tiles)

    def noted_control(self: Sampler, condition: Any, tiles: Any, *rest: Any) -> Any:
        os.write(lines, f"control {tiles[0].index}\n".encode())
        return control(self, condition, tiles, *rest)

    def noted_answer(self: Captioner, question: Question) -> list[str]:
        os.write(lines, f"question {len(question.pictures)}\n".encode())
        return answer(self, question)

    def noted_strip(*given: Any) -> Any:
        os.write(lines, b"strip\n")
        wait_for_strips(strangers)
        return strip(*given)

    for owner, name, noted in (
        (Sampler, "_velocity", noted_velocity),
        (Sampler, "_control", noted_control),
        (Captioner, "answer", noted_answer),
        (canvas, "decode_strip", noted_strip),
        (phase_sharing, "decode_strip", noted_strip),
    ):
        setattr(owner, name, noted)
