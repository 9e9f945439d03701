"""What the kill tests run in another process: an upscale that kills itself at a chosen write."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import torch

from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import upscale
from dreamsr_cli.journal import journal_folder
from dreamsr_cli.models.bundle import open_bundle

SETTINGS = UpscaleConfig(tile=64, overlap=16, steps=3, scale=3.0, tile_batch=2, precision="fp32", seed=5)


class Diary:
    """A progress that remembers the phase."""

    def __init__(self) -> None:
        self.now = "start"

    def phase(self, name: str, total: int) -> None:
        self.now = name

    def at(self, place: str) -> None:
        self.now = f"texture {place}"

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def work(
    source: str, target: str, bundle: str, kill_at: int | None, torn: bool, diary_path: str, tiling: str = "overlap"
) -> None:
    """Upscale; before write number `kill_at` (pwrite or rename) die by SIGKILL, after half of its bytes if `torn`.

    The phase of every write is written to `diary_path`, one line each.
    """
    os.environ["DREAMSR_CACHE"] = f"{diary_path}.cache"
    journal = journal_folder(Path(target))
    torch.set_num_threads(1)
    diary, real_pwrite, real_replace, count = Diary(), os.pwrite, os.replace, [0]
    lines = os.open(diary_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def event(tear) -> None:
        if diary.now == "start":  # only hashes of weights are remembered there, and not in every run
            return
        os.write(lines, f"{diary.now}\n".encode())
        if count[0] == kill_at:
            if torn:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def pwrite(fd: int, data, offset: int) -> int:
        event(lambda: real_pwrite(fd, memoryview(data)[: len(data) // 2], offset))
        return real_pwrite(fd, data, offset)

    def replace(a, b, **names) -> None:
        if Path(b) == Path(target) or Path(b).parent == journal:  # not what is remembered in the user's cache
            event(lambda: None)
        real_replace(a, b, **names)

    setattr(os, "pwrite", pwrite)  # noqa: B010
    setattr(os, "replace", replace)  # noqa: B010
    settings = dataclasses.replace(SETTINGS, tiling=tiling)
    upscale(Path(source), Path(target), open_bundle(bundle), settings, OutputConfig(), diary)
