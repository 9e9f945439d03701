"""Two and three processes on the CPU: the bytes of one, whatever dies; only process 0 speaks and writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import process_child
import pytest
import tiny_llava
from PIL import Image

from dreamsr_cli.cli.several_processes import role
from dreamsr_cli.errors import UsageError
from dreamsr_cli.journal import journal_folder
from dreamsr_cli.ranks import Place, this_place

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120


class Run:
    """One command in several processes, as a launcher starts them."""

    def __init__(self, launcher: Launcher, name: str, children: list[Any]) -> None:
        self._folder, self.name, self.children = launcher.folder, name, children

    def join(self) -> list[int | None]:
        end = time.monotonic() + SECONDS
        for child in self.children:
            child.join(max(0.0, end - time.monotonic()))
        codes = [child.exitcode for child in self.children]
        for child in self.children:
            child.kill()
        return codes

    def text(self, rank: int, stream: str) -> str:
        path = self._folder / f"{self.name}.{rank}.{stream}"
        return path.read_text() if path.exists() else ""

    def diary(self, rank: int) -> list[str]:
        return self.text(rank, "diary").splitlines()

    def wait_for(self, rank: int, line: str) -> None:
        end = time.monotonic() + SECONDS
        while line not in self.text(rank, "diary"):
            assert time.monotonic() < end and self.children[0].is_alive(), self.text(0, "err")
            time.sleep(0.01)


class Launcher:
    """Starts commands from a process that has the imports."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self.runs = folder, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["process_child", "dreamsr_cli.engine", "dreamsr_cli.helping"])
        self.common = ["--model", str(bundle), "--tile", "64", "--overlap", "16", "--tile-batch", "2", "--steps", "3"]

    def start(self, words: list[str], world: int = 1, **special: dict[int, Any]) -> Run:
        """`special`: values of `process_child.main` for single ranks."""
        self.runs += 1
        name = f"run{self.runs}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(world):
            given = {"name": str(self.folder / name), "rank": rank, "world": world, "port": port, "words": words}
            given |= {"folder": str(self.folder), "cache": str(self.folder / "cache")}
            given |= {key: values[rank] for key, values in special.items() if rank in values}
            child = self.context.Process(target=process_child.main, args=(given,))
            child.start()
            children.append(child)
        return Run(self, name, children)

    def upscale(self, source: str, *words: str, world: int = 1, **special: dict[int, Any]) -> Run:
        return self.start(["upscale", source, *self.common, *words], world, **special)


@pytest.fixture(scope="module")
def launcher(tiny_bundle, tmp_path_factory) -> Launcher:
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    sizes = {"photo.png": 45, "tall.png": 150, "photos/a.png": 20, "photos/c.png": 28, "photos/d.png": 16}
    for name, rows in {**sizes, "photos/e.png": 18}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (rows, 60, 3), dtype=np.uint8)).save(folder / name)
    (folder / "photos/b.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a photo")
    return Launcher(folder, tiny_bundle)


@pytest.fixture(scope="module")
def whole(launcher) -> bytes:
    """The result of one process."""
    run = launcher.upscale("photo.png", "-o", "whole.png")
    assert run.join() == [0], run.text(0, "err")
    return (launcher.folder / "whole.png").read_bytes()


def batches(run: Run, ranks: int) -> list[Counter[str]]:
    return [Counter(line for line in run.diary(rank) if line.startswith("velocity")) for rank in range(ranks)]


@pytest.mark.parametrize("world", [2, 3])
def test_same_bytes_and_every_batch_once(launcher, whole, world) -> None:
    run = launcher.upscale("photo.png", "-o", f"by{world}.png", "--json", world=world)
    assert run.join() == [0] * world, run.text(0, "err")
    assert (launcher.folder / f"by{world}.png").read_bytes() == whole
    assert not journal_folder(launcher.folder / f"by{world}.png").exists()
    told = batches(run, world)
    assert all(told), "a process had nothing to do"
    (line,) = run.text(0, "out").splitlines()
    steps = 1 + json.loads(line)["steps"]
    tiles = json.loads(line)["tiles"]
    every = sum(told, Counter())
    assert len(every) == steps * -(-tiles // 2) and set(every.values()) == {1}
    for rank in range(1, world):
        assert (run.text(rank, "out"), run.text(rank, "err")) == ("", "")


def test_control_features_stay_where_they_were_made(launcher, whole) -> None:
    run = launcher.upscale("photo.png", "-o", "kept.png", "--steps", "6", world=2)
    assert run.join() == [0, 0], run.text(0, "err")
    all_batches = sum(batches(run, 2), Counter())
    in_a_step = sum(line.startswith("velocity 1 ") for line in all_batches)
    assert in_a_step > 2
    for rank in range(2):
        lines = run.diary(rank)
        textures = [line for line in lines if line.startswith("velocity") and " -" not in line]
        controls = Counter(line for line in lines[lines.index(textures[0]) :] if line.startswith("control"))
        assert set(controls.values()) == {1} and len(controls) <= in_a_step
        assert len(textures) > len(controls), "features were computed for every batch"


@pytest.mark.parametrize(("died", "world"), [(1, 1), (0, 3)])
def test_killed_with_two_and_resumed_with_any_number(launcher, whole, died, world) -> None:
    name = f"dead{died}.png"
    run = launcher.upscale("photo.png", "-o", name, "-q", world=2, kill_after={died: 12})
    codes = run.join()
    assert codes[died] == -signal.SIGKILL and codes[1 - died] == 1
    lines = run.text(1 - died, "err").splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"error: process {died} of 2 died")
    assert "torchrun --nproc-per-node 2 -m dreamsr_cli upscale photo.png" in lines[1]
    assert run.text(0, "out") == run.text(1, "out") == ""
    assert journal_folder(launcher.folder / name).is_dir()
    again = launcher.upscale("photo.png", "-o", name, world=world)
    assert again.join() == [0] * world, again.text(0, "err")
    assert "going on where the last run stopped" in again.text(0, "err")
    assert (launcher.folder / name).read_bytes() == whole
    steps = {line.split()[1] for rank in range(world) for line in again.diary(rank) if line.startswith("velocity")}
    assert "-2" not in steps and "3" in steps, "stage 1 was done again"


def test_signals_to_all_end_the_job_as_in_one_process(launcher, whole) -> None:
    run = launcher.upscale("photo.png", "-o", "stopped.png", "--steps", "40", world=2)
    run.wait_for(0, "velocity 2 ")
    for child in run.children:
        os.kill(child.pid, signal.SIGTERM)
    assert run.join() == [130, 0]
    assert "interrupted: 0 of 1 photos done; the same command goes on" in run.text(0, "err")
    assert run.text(1, "err") == "" and journal_folder(launcher.folder / "stopped.png").is_dir()


def test_out_of_memory_in_a_helper_is_told_by_process_0(launcher) -> None:
    run = launcher.upscale("photo.png", "-o", "memory.png", world=2, fail_after={1: 4})
    assert run.join() == [1, 0]
    told = run.text(0, "err")
    assert "note: process 1 of 2: out of memory" in told
    assert "error: photo.png: out of memory on cpu" in told and "Traceback" not in told


def test_a_helper_without_the_model_is_told_by_process_0(launcher, tmp_path) -> None:
    words = ["upscale", "photo.png", "-o", "lost.png", "--model", "here", "--tile", "64"]
    (launcher.folder / "here").symlink_to(launcher.common[1])
    run = launcher.start(words, 2, folder={1: str(tmp_path)})
    assert run.join() == [1, 0]
    assert "error: process 1 of 2: here: no such model" in run.text(0, "err")


@pytest.mark.parametrize("elsewhere", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_is_done_as_by_one_process(launcher, tmp_path, elsewhere) -> None:
    """Whole photos are shared out; where a helper doesn't see the files (`elsewhere`), batches of tiles are."""
    names = ["one", f"two{elsewhere}"]
    runs = [launcher.upscale("photos", "-o", names[0], "--json", "--overwrite")]
    special = {"folder": {1: str(tmp_path)}} if elsewhere else {}
    runs.append(launcher.upscale("photos", "-o", names[1], "--json", world=2, **special))
    assert [run.join() for run in runs] == [[3], [3, 0]], runs[1].text(0, "err")

    def told(run: Run, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line.replace(f"{name}/", "")) for line in run.text(0, "out").splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert told(runs[1], names[1]) == told(runs[0], names[0])
    found = [sorted((launcher.folder / name).iterdir()) for name in names]
    assert [p.name for p in found[0]] == [p.name for p in found[1]] == [f"{name}_x4.png" for name in "acde"]
    for a, b in zip(*found, strict=True):
        assert a.read_bytes() == b.read_bytes()
    errors = [line for line in runs[1].text(0, "err").splitlines() if line.startswith("error: ")]
    assert errors == [line for line in runs[0].text(0, "err").splitlines() if line.startswith("error: ")]
    mixed = {
        rank: {line.split()[2] for line in runs[1].diary(rank) if line.startswith("velocity -2")} for rank in (0, 1)
    }
    assert all(mixed.values()), "a process had nothing to do"
    assert not [path.name for path in launcher.folder.rglob(".dreamsr-*")]

    again = launcher.upscale("photos", "-o", names[1], "--json", "--skip-existing", world=2, **special)
    assert again.join() == [3, 0]
    assert [line.get("skipped") for line in told(again, names[1])] == [True, None, True, True, True]


def test_an_interrupted_folder_leaves_what_one_process_leaves(launcher) -> None:
    """Whole photos with --no-resume: the helper, too, removes its journal."""
    run = launcher.upscale("photos", "-o", "left", "--no-resume", "--steps", "90", "--seed", "7", world=2)
    for rank in (0, 1):
        run.wait_for(rank, "velocity 2 ")
    for child in run.children:
        os.kill(child.pid, signal.SIGTERM)
    assert run.join() == [130, 0]
    assert list((launcher.folder / "left").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "fix"), [("tiny_bundle", "adain"), pytest.param("tiny_flux_bundle", "wavelet", marks=pytest.mark.slow)]
)
def test_strips_are_decoded_by_all(launcher, request, kind, fix) -> None:
    words = ["tall.png", *launcher.common, "--model", str(request.getfixturevalue(kind)), "--color-fix", fix]
    words += ["--tile", "128", "--steps", "1"]
    # Decoding is quick at this size: alone process 0 has done all before the helper has opened its decoder.
    meet = {0: True}
    runs = [launcher.start(["upscale", *words, "-o", f"{kind}{n}.png"], n, meet_at_strips=meet) for n in (1, 2)]
    assert [run.join() for run in runs] == [[0], [0, 0]], runs[1].text(0, "err")
    one, two = ((launcher.folder / f"{kind}{n}.png").read_bytes() for n in (1, 2))
    assert one == two
    strips = [run.diary(rank).count("strip") for run, rank in ((runs[0], 0), (runs[1], 0), (runs[1], 1))]
    assert strips[0] >= 3 and all(strips)


def test_captions_are_asked_of_all(launcher, tmp_path) -> None:
    llava = tiny_llava.save_llava(tmp_path / "llava")
    words = [
        "caption",
        "tall.png",
        "--captioner",
        str(llava),
        "--batch",
        "2",
        "--no-share",
        "--tile",
        "64",
    ]  # enough that both come in
    runs = [launcher.start([*words, "--overlap", "16", "-o", f"texts{n}.json"], n) for n in (1, 2)]
    assert [run.join() for run in runs] == [[0], [0, 0]], runs[1].text(0, "err")
    one, two = ((launcher.folder / f"texts{n}.json").read_bytes() for n in (1, 2))
    assert one == two
    questions = [[line for line in runs[1].diary(rank) if line.startswith("question")] for rank in (0, 1)]
    assert all(questions) and "question 2" in questions[1]


def test_without_texture_steps(launcher) -> None:
    runs = [launcher.upscale("photo.png", "-o", f"s{n}.png", "--strength", "0", world=n) for n in (1, 2)]
    assert [run.join() for run in runs] == [[0], [0, 0]]
    assert (launcher.folder / "s1.png").read_bytes() == (launcher.folder / "s2.png").read_bytes()
    assert all(batches(runs[1], 2))


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--json"], ["upscale", "photo.png", "--dry-run", "--json"]])
def test_where_nothing_is_shared_only_process_0_speaks(launcher, words) -> None:
    run = launcher.start(words, 2)
    assert run.join()[1] == 0
    assert run.text(0, "out") and (run.text(1, "out"), run.text(1, "err")) == ("", "")


@pytest.mark.slow
def test_under_torchrun(launcher, whole) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["upscale", "photo.png", *launcher.common, "-o", "torchrun.png", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "dreamsr_cli", *words],
        cwd=launcher.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "torchrun.png"
    assert (launcher.folder / "torchrun.png").read_bytes() == whole


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Place()),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
    ],
)
def test_place_of_a_process(monkeypatch, environment, place) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert this_place() == place


@pytest.mark.parametrize("rank", ["", "two", "2"])
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, rank) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(UsageError, match="torchrun"):
        this_place()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["upscale", "a.jpg"], "helper"),
        (["caption", "a.jpg"], "helper"),
        (["upscale", "a.jpg", "--dry-run"], "nobody"),
        (["doctor"], "nobody"),
        (["train", "--resume"], "command"),
        ([], "nobody"),
    ],
)
def test_what_the_other_processes_do(words, expected) -> None:
    assert role(words, Place(1, 2, 1)) == expected
    assert role(words, Place(0, 2, 0)) == "command"
