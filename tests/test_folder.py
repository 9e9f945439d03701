"""A folder of photos through one engine: same bytes as alone, networks opened once, nothing lost on the way."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_child
import numpy as np
import pytest
import torch
from PIL import Image

from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.console import QuietDisplay
from dreamsr_cli.cli.photo_line import PhotoLine
from dreamsr_cli.cli.photos import Found, Job
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import Engine, Order, UpscaleResult, upscale
from dreamsr_cli.errors import DreamSRError, OutputError
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.overlap import SWITCH, threads_left
from dreamsr_cli.progress import NotedProgress, Progress, SilentProgress

CONFIG = UpscaleConfig(tile=64, overlap=16, steps=2, precision="fp32", scale=2.0, seed=3)
FLAGS = ["--tile", "64", "--overlap", "16", "--steps", "2", "--precision", "fp32", "--scale", "2", "--seed", "3"]
NAMES = ("a.png", "b.jpg", "c.webp")
TOO_SMALL = "0.6GB"
"""Memory that holds the libraries, and no network beside another's work."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(NAMES):
        draw = np.random.default_rng(number)
        coarse = Image.fromarray(draw.integers(20, 230, (7, 9, 3), dtype=np.uint8))
        coarse.resize((50 + 16 * number, 40), Image.Resampling.BICUBIC).save(folder / name, quality=95)
    return folder


@pytest.fixture(scope="module")
def alone(photos, tiny_bundle, tmp_path_factory) -> dict[str, bytes]:
    """The results' bytes of each photo upscaled alone, by name."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    for name in NAMES:
        bundle = open_bundle(str(tiny_bundle))
        upscale(photos / name, out / name, bundle, CONFIG, OutputConfig(), SilentProgress())
    return {name: (out / name).read_bytes() for name in NAMES}


class Watched(QuietDisplay):
    """What a person would see, and something done at one moment."""

    def __init__(self, at: str = "", do: Any = None) -> None:
        self.lines: list[str] = []
        self._label, self._at, self._do = "", at, do

    @contextmanager
    def photo(self, label: str) -> Generator[None]:
        self._label = label
        yield

    def phase(self, name: str, total: int) -> None:
        self.lines.append(f"{self._label}: {name}")
        if self.lines[-1] == self._at:
            self._do()
        super().phase(name, total)

    def note(self, text: str) -> None:
        self.lines.append(text)


def send(
    bundle: Bundle,
    photos: Path,
    out: Path,
    names: tuple[str, ...] = NAMES,
    memory: str | None = None,
    display: Any = None,
    **output: Any,
) -> dict[str, Any]:
    """The photos through a line; the outcomes by name, in the order in which they were told."""
    told: dict[str, Any] = {}

    def order_of(job: Job, progress: Progress) -> Order:
        return Order(job.source, job.target)

    def finish(result: UpscaleResult, progress: Progress) -> dict[str, Any]:
        return result.to_json()

    def tell(entry: Job | Found, outcome: Any) -> None:
        told[entry.source.name] = outcome

    out.mkdir(exist_ok=True)
    entries = [Job(photos / name, out / name) for name in names]
    with Engine(bundle, CONFIG, OutputConfig(**output), len(names), memory) as engine:
        PhotoLine(engine, entries, order_of, finish, display or Watched(), tell).run()
    return told


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("memory", [None, TOO_SMALL])
def test_a_photo_has_the_same_bytes_alone_and_in_any_folder(
    tiny_bundle, photos, alone, tmp_path, monkeypatch, overlap, memory
) -> None:
    monkeypatch.setenv(SWITCH, "0" if overlap else "1")
    bundle = open_bundle(str(tiny_bundle))
    told = send(bundle, photos, tmp_path / "out", NAMES, memory)
    assert list(told) == list(NAMES) and all("output" in line for line in told.values())
    assert results(tmp_path / "out") == alone
    count = len(NAMES)
    if memory is None:
        assert bundle.opened == {"text_encoder": 1, "autoencoder": 1, "restorer": 1}
    else:
        assert bundle.opened == {"text_encoder": 1, "autoencoder": 2 * count, "restorer": count}
    send(bundle, photos, tmp_path / "back", NAMES[::-1], memory)
    assert results(tmp_path / "back") == alone


def test_one_photo_opens_every_network_once(tiny_bundle, photos, alone, tmp_path) -> None:
    bundle = open_bundle(str(tiny_bundle))
    upscale(photos / "a.png", tmp_path / "a.png", bundle, CONFIG, OutputConfig(), SilentProgress())
    assert bundle.opened == {"text_encoder": 1, "autoencoder": 1, "restorer": 1}
    bundle.opened.clear()
    order, progress = Order(photos / "b.jpg", tmp_path / "b.jpg"), SilentProgress()
    with Engine(bundle, CONFIG, OutputConfig(), memory=TOO_SMALL) as engine, engine.read(order, progress) as job:
        engine.compute(job, progress)
        job.write()
    assert bundle.opened == {"text_encoder": 1, "autoencoder": 2, "restorer": 1}
    assert results(tmp_path) == {name: alone[name] for name in ("a.png", "b.jpg")}


def test_freed_networks_hold_no_weights(tiny_bundle, photos, tmp_path) -> None:
    bundle = open_bundle(str(tiny_bundle))
    with Engine(bundle, CONFIG, OutputConfig(), photos=2) as engine:
        autoencoder, restorer = engine.parts.autoencoder(), engine.parts.restorer(True)
        assert engine.parts.autoencoder() is autoencoder and engine.parts.restorer(True) is restorer
        engine.parts.release()
        assert engine.parts.autoencoder() is autoencoder, "it is kept"
        assert engine.parts.make_room(but="restorer")
        assert isinstance(autoencoder, torch.nn.Module) and not list(autoencoder.parameters())
        assert list(restorer.dit.parameters()) and engine.parts.restorer(True) is restorer
        engine.parts.release()
        assert not list(restorer.dit.parameters()), "nothing is kept any more"
    assert bundle.opened == {"autoencoder": 1, "restorer": 1}


def test_out_of_memory_with_everything_open_closes_what_can_be_closed(tiny_bundle, photos, alone, tmp_path) -> None:
    bundle, notes = open_bundle(str(tiny_bundle)), NotedProgress()
    with Engine(bundle, CONFIG, OutputConfig(), photos=3) as engine:
        greedy = engine.parts.autoencoder()
        assert isinstance(greedy, torch.nn.Module)
        strips = 0

        def no_room(*_: object) -> None:
            nonlocal strips
            strips += 1
            raise torch.OutOfMemoryError("no room beside the restorer")

        greedy.get_submodule("refiner").register_forward_pre_hook(no_room)
        for name in NAMES:
            with engine.read(Order(photos / name, tmp_path / name), notes) as job:
                engine.compute(job, notes)
                job.write()
    assert results(tmp_path) == alone
    assert strips == 1 and bundle.opened["restorer"] == len(NAMES), "from then on one after the other"
    assert [note for note in notes.notes if "out of memory" in note] == notes.notes != []


def test_the_next_photo_is_read_while_one_is_computed(tiny_bundle, photos, alone, tmp_path) -> None:
    """And the one before is written: its result is there before the next one's last phase, and is told early."""
    seen: dict[str, list[str]] = {}

    def look() -> None:
        seen["journals"] = sorted(p.name for p in (tmp_path / "out").iterdir())

    display = Watched("[2/3] b.jpg: decode", look)
    told = send(open_bundle(str(tiny_bundle)), photos, tmp_path / "out", display=display)
    assert "c.webp.dreamsr" in seen["journals"] and "a.png" in seen["journals"]
    assert "[1/3] a.png: describe" in display.lines
    assert "[2/3] b.jpg: describe" not in display.lines, "it was described in the background"
    assert list(told) == list(NAMES) and results(tmp_path / "out") == alone


def test_a_photo_that_cannot_be_written_in_the_background_stops_no_other(tiny_bundle, photos, alone, tmp_path) -> None:
    """A folder appears where the first result goes, while the photo is computed."""
    out = tmp_path / "out"
    display = Watched("[1/3] a.png: decode", lambda: (out / "a.png").mkdir())
    told = send(open_bundle(str(tiny_bundle)), photos, out, display=display)
    assert list(told) == list(NAMES)
    assert isinstance(told["a.png"], DreamSRError) and "a.png" in told["a.png"].message and told["a.png"].exit_code == 1
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "a.png.dreamsr", *NAMES[1:]]
    (out / "a.png").rmdir()
    display = Watched()
    assert "output" in send(open_bundle(str(tiny_bundle)), photos, out, ("a.png",), display=display)["a.png"]
    assert results(out) == alone
    assert not any("texture" in line for line in display.lines), "only the encoding was left"


def test_rows_that_cannot_be_written_are_that_photos_error(tiny_bundle, photos, alone, tmp_path) -> None:
    """No file may grow from the last phase on: the thread that writes strips meets it, the caller hears of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    stop = Watched(": decode", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1])))
    bundle, arguments = open_bundle(str(tiny_bundle)), (CONFIG, OutputConfig())
    try:
        with pytest.raises(OutputError, match=r"b.jpg: can't be written \(File too large\)"):
            upscale(photos / "b.jpg", tmp_path / "b.jpg", bundle, *arguments, stop)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not threads_left() and [p.name for p in tmp_path.iterdir()] == ["b.jpg.dreamsr"]
    upscale(photos / "b.jpg", tmp_path / "b.jpg", bundle, *arguments, SilentProgress())
    assert results(tmp_path) == {"b.jpg": alone["b.jpg"]}


def test_without_resume_jobs_side_by_side_have_journals_of_their_own(tiny_bundle, photos, alone, tmp_path) -> None:
    told = send(open_bundle(str(tiny_bundle)), photos, tmp_path / "out", resume=False)
    assert all("output" in line for line in told.values()) and results(tmp_path / "out") == alone


def test_bad_photos_in_between_and_lines_in_order(tiny_bundle, photos, tmp_path, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes((photos / name).read_bytes())
    (folder / "aa.png").write_bytes(b"no photo")
    (folder / "bb.png").write_bytes((photos / "a.png").read_bytes()[:200])
    out = str(tmp_path / "out")
    assert run(["upscale", str(folder), "-o", out, "--json", "-q", "--model", str(tiny_bundle), *FLAGS]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["input"]).name for line in lines] == ["a.png", "aa.png", "b.jpg", "bb.png", "c.webp"]
    assert ["error" in line for line in lines] == [False, True, False, True, False]
    assert run(["upscale", str(folder), "-o", out, "--json", "-q", "--skip-existing", *FLAGS]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("skipped", False) for line in lines] == [True, False, True, False, True]


def test_long_prompts_are_noted_for_their_photo_when_embedded_ahead(tiny_bundle, photos, tmp_path) -> None:
    config = replace(CONFIG, prompt="a wall of bricks " * 100)
    told: dict[str, Any] = {}
    bundle = open_bundle(str(tiny_bundle))
    orders = [Order(photos / name, tmp_path / name) for name in NAMES]
    with Engine(bundle, config, OutputConfig(), 3, TOO_SMALL) as engine:
        assert engine.wants_preparing and engine.prepare(orders, SilentProgress()) == 3
        assert not list(tmp_path.iterdir()), "describing alone leaves nothing behind"
        for order in orders:
            with engine.read(order, SilentProgress()) as job:
                engine.compute(job, SilentProgress())
                told[order.photo.name] = job.write().notes
    assert bundle.opened["text_encoder"] == 1
    assert all(any("the global prompt is longer" in note for note in notes) for notes in told.values())


# ---------------------------------------------------------------- killed and interrupted


@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dreamsr_cli.engine", "dreamsr_cli.cli.app"])
    return context


@pytest.mark.parametrize(
    ("moment", "sent"),
    [
        ("b.jpg: texture, step 2 of 2", signal.SIGKILL),
        ("b.jpg: encode (1)", signal.SIGKILL),
        ("c.webp: decode (1)", signal.SIGKILL),
        ("b.jpg: texture, step 2 of 2", signal.SIGINT),
        ("b.jpg: decode (1)", signal.SIGTERM),
    ],
)
def test_stopped_in_the_middle_of_the_overlap_and_resumed(
    children, photos, alone, tiny_bundle, tmp_path, moment, sent
) -> None:
    out = tmp_path / "out"
    arguments = ["upscale", str(photos), "-o", str(out), "--suffix", "", "--skip-existing", *FLAGS]
    arguments += ["--model", str(tiny_bundle)]

    def start(signal_number: int) -> tuple[int | None, str]:
        messages = tmp_path / f"messages{signal_number}"
        child = children.Process(target=folder_child.work, args=(arguments, moment, signal_number, str(messages)))
        child.start()
        child.join()
        return child.exitcode, messages.read_text()

    code, messages = start(sent)
    assert code == (-signal.SIGKILL if sent == signal.SIGKILL else 130), messages
    for path in out.iterdir():
        assert path.is_dir() or path.read_bytes() == alone[path.name], "half a result"
    if sent != signal.SIGKILL:
        assert "interrupted: 1 of 3 photos done" in messages and "Traceback" not in messages
        assert "threads left: False" in messages
        assert not (out / "c.webp.dreamsr").exists(), "it was read, and nothing worth keeping was done"
    code, messages = start(0)
    assert code == 0, messages
    assert results(out) == alone
