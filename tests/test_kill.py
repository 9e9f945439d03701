"""SIGKILL at any instant: the same command goes on, and the bytes are those of a run that was never killed."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import kill_child
import numpy as np
import pytest
from PIL import Image

from dreamsr_cli.journal import journal_folder


class Killer:
    """Runs upscales in children of a process that has the imports."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder, self.runs, self.tiling = bundle, folder, 0, "overlap"
        self.source = folder / "photo.png"
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (45, 60, 3), dtype=np.uint8)).save(self.source)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["dreamsr_cli.engine"])

    def start(self, target: Path, kill_at: int | None = None, torn: bool = False):
        self.runs += 1
        diary = self.folder / f"diary{self.runs}"
        child = self.context.Process(
            target=kill_child.work,
            args=(str(self.source), str(target), str(self.bundle), kill_at, torn, str(diary), self.tiling),
        )
        child.start()
        return child, diary

    def run(self, target: Path, kill_at: int | None = None, torn: bool = False) -> tuple[int | None, list[str]]:
        child, diary = self.start(target, kill_at, torn)
        child.join()
        return child.exitcode, diary.read_text().splitlines() if diary.exists() else []


@pytest.fixture(scope="module")
def killer(tiny_bundle, tmp_path_factory) -> Killer:
    return Killer(tiny_bundle, tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def reference(killer) -> tuple[bytes, list[str]]:
    """Bytes of an uninterrupted run, and the phase of each of its writes."""
    target = killer.folder / "whole.png"
    code, phases = killer.run(target)
    assert code == 0 and not journal_folder(target).exists()
    return target.read_bytes(), phases


def check(killer: Killer, reference: tuple[bytes, list[str]], name: str, kill_at: int, torn: bool) -> str:
    """Kill at one write, resume, compare; returns the phase it died in."""
    whole, phases = reference
    target = killer.folder / f"{name}.png"
    code, seen = killer.run(target, kill_at, torn)
    assert code == -signal.SIGKILL and seen == phases[: kill_at + 1]
    assert not target.exists() or target.read_bytes() == whole
    code, again = killer.run(target)
    assert code == 0 and target.read_bytes() == whole
    assert not journal_folder(target).exists()
    assert [p.name for p in killer.folder.iterdir() if p.name.startswith(f".{name}")] == []
    if kill_at > len(phases) // 2:
        assert len(again) < len(phases), "the second run did everything again"
    return seen[-1]


def test_killed_in_every_phase(killer, reference) -> None:
    _, phases = reference
    draw = random.Random(1)
    died = set()
    names = list(dict.fromkeys(phases))
    assert {"describe", "encode", "remove degradation", "texture", "texture step 2 of 3", "decode"} <= set(names)
    for number, phase in enumerate(names):
        writes = [i for i, p in enumerate(phases) if p == phase]
        died.add(check(killer, reference, f"phase{number}", draw.choice(writes), torn=number % 2 == 1))
    last = len(phases) - 1
    died.add(check(killer, reference, "last", last, torn=False))
    assert died == set(names)


def test_killed_again_and_again_until_done(killer, reference) -> None:
    target, draw, kills = killer.folder / "chain.png", random.Random(2), 0
    while not target.exists():
        code, _ = killer.run(target, kill_at=draw.randrange(6, 14), torn=draw.random() < 0.5)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 3
    if journal_folder(target).exists():
        killer.run(target)
    assert target.read_bytes() == reference[0] and not journal_folder(target).exists()


def test_killed_with_a_moving_grid(killer) -> None:
    killer.tiling = "shifted"
    try:
        target = killer.folder / "shifted.png"
        assert killer.run(target)[0] == 0
        whole, phases = target.read_bytes(), killer.run(killer.folder / "again.png")[1]
        writes = [i for i, phase in enumerate(phases) if phase.startswith("texture step")]
        for number, kill_at in enumerate(random.Random(4).sample(writes, 3)):
            check(killer, (whole, phases), f"shifted{number}", kill_at, torn=number % 2 == 1)
    finally:
        killer.tiling = "overlap"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_kills_lose_nothing(killer, reference) -> None:
    _, phases = reference
    draw = random.Random(3)
    began = time.monotonic()
    killer.run(killer.folder / "timed.png")
    whole_run = time.monotonic() - began
    by_time = 0
    for number in range(100):
        if number % 4:
            check(killer, reference, f"many{number}", draw.randrange(len(phases)), torn=draw.random() < 0.5)
            continue
        target = killer.folder / f"many{number}.png"
        began = time.monotonic()
        child, _ = killer.start(target)
        child.join(draw.uniform(0.02, whole_run))
        if not child.is_alive():
            # The first run was slowed down by something else: without this, most later ones would end unharmed.
            whole_run = min(whole_run, time.monotonic() - began)
        child.kill()
        child.join()
        by_time += child.exitcode == -signal.SIGKILL
        if not target.exists() or journal_folder(target).exists():
            assert killer.run(target)[0] == 0
        assert target.read_bytes() == reference[0] and not journal_folder(target).exists()
    assert by_time >= 10
