"""The captioning job: one global and one local text for each tile, from a LLaVA or from the weight-free describer.

The unit of work is a batch of tiles: what an interrupted run has finished is kept, and the texts don't depend on where
it was interrupted. Tiles are seen at the photo's own resolution, with a margin of what lies around them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dreamsr_cli import __version__
from dreamsr_cli.caption_journal import CaptionJournal
from dreamsr_cli.caption_texts import clean
from dreamsr_cli.config import CAPTIONERS, CaptionConfig, is_captioner
from dreamsr_cli.device import choose_device, dtype_name
from dreamsr_cli.errors import UsageError, WeightsError
from dreamsr_cli.images import Photo
from dreamsr_cli.models.llava import Llava, caption_dtype, check_quantize, open_llava, read_config, release
from dreamsr_cli.plain_data import to_dict
from dreamsr_cli.progress import Progress
from dreamsr_cli.prompts import CaptionerId, PromptPlan, TilePrompt, make_plan, photo_id
from dreamsr_cli.resample import resize_rows
from dreamsr_cli.tile_likeness import STRIP_ROWS, Area, look_at, share
from dreamsr_cli.tiling import Tile, TileGrid
from dreamsr_cli.weights import file_sha256, locate, lock_entry
from dreamsr_cli.work_sharing import Crew, Job, Service, SharedWork

WEIGHTLESS = ("describe", "none")
PHOTO_SIDE = 768
"""Pixels of the longer side of what a LLaVA sees of the whole photo; LLaVA-1.5 looks at 336, OneVision at up to 768
without paying for more crops than 2 x 2."""
_REPORT_SECONDS = 30.0


def plan_prompts(
    photo: Photo,
    grid: TileGrid,
    out_width: int,
    out_height: int,
    captioner: str,
    config: CaptionConfig,
    device: torch.device,
    global_prompt: str | None,
    resume_file: Path | None,
    progress: Progress,
    crew: Crew | None = None,
) -> PromptPlan:
    """All texts of one photo; a network is opened, used and freed in here. Arguments and errors as in `Captioner`."""
    with Captioner(captioner, config, device) as opened:
        return opened.plan(photo, grid, out_width, out_height, global_prompt, resume_file, progress, crew)


class Captioner:
    """A captioner for one photo after another: "describe", "none", a LLaVA of weights.lock, or a folder with one.

    A network is opened when the first picture needs it, and freed by `close` or at the end of the `with`.
    """

    def __init__(self, name: str, config: CaptionConfig, device: torch.device) -> None:
        """Raises `UsageError` for an unknown name or setting, `WeightsError` if its weights are missing or altered,
        `DeviceError`; nothing is opened yet."""
        self.config, self.device, self._asked = config, device, name
        self._folder: Path | None = None
        self._open: Llava | None = None
        if name in WEIGHTLESS:
            self.name, self.revision = name, ""
            return
        if not is_captioner(name):
            hint = f"use {', '.join(CAPTIONERS)}, or a folder that holds a LLaVA"
            raise UsageError(f"--captioner {name!r} is not known", hint)
        check_quantize(config.quantize, device)
        if name in CAPTIONERS:
            self._folder, self.name = locate(name, "use --captioner describe"), name
            self.revision = lock_entry(name).revision or ""
            read_config(self._folder)
        else:
            self._folder = Path(name)
            self.name = self._folder.resolve().name
            read_config(self._folder)
            self.revision = _contents(self._folder)

    def plan(
        self,
        photo: Photo,
        grid: TileGrid,
        out_width: int,
        out_height: int,
        global_prompt: str | None,
        resume_file: Path | None,
        progress: Progress,
        crew: Crew | None = None,
    ) -> PromptPlan:
        """One text for the photo and one for each tile of `grid`, on a canvas of out_width x out_height pixels.

        `global_prompt` stands in for the global text; with one tile, local text = global text. `resume_file` keeps
        finished batches, so that the same call goes on where a killed one stopped; deleting it is the caller's. `crew`
        are processes that answer batches as well. Raises
        `WeightsError`, `DeviceError`, `OutputError` and `JournalError` (the file).
        """
        if self._folder is None:
            return make_plan(photo, grid, out_width, out_height, self.name, global_prompt)
        tiles = [photo_area(tile, photo, out_width, out_height, 0) for tile in grid.tiles]
        seen = [photo_area(tile, photo, out_width, out_height, self.config.tile_context) for tile in grid.tiles]
        with CaptionJournal(resume_file, self._header(photo, grid, out_width, out_height)) as journal:
            if journal.resumed:
                progress.note(f"{photo.path.name}: going on with the captions of the last run")
            if len(tiles) == 1:
                work = _Work(self, photo, journal, progress)
                global_text = work.whole() if global_prompt is None else global_prompt
                texts, shared = [global_text], [None]
            else:
                shared = self._shared(photo, tiles)
                asked = [index for index, owner in enumerate(shared) if owner is None]
                progress.phase("caption", len(asked) + (global_prompt is None))
                setup = CaptionSetup(self._asked, self.revision, self.config, self.device.type)
                with nullcontext() if crew is None else crew.share(setup, progress) as others:
                    work = _Work(self, photo, journal, progress, others)
                    work.announce(asked, seen, global_prompt is None)
                    global_text = work.whole() if global_prompt is None else global_prompt
                    texts = _spread(work.tiles(asked, seen), asked, shared)
        if empty := sum(not text for text in texts):
            progress.note(f"{photo.path.name}: {self.name} said nothing of use about {empty} of {len(texts)} tiles")
        return PromptPlan(
            photo=photo_id(photo.path, photo.sha256, photo.info),
            canvas=(out_width, out_height),
            tile=max(grid.tile_height, grid.tile_width),
            overlap=grid.overlap,
            global_text=global_text,
            global_source=self.name if global_prompt is None else "user",
            tiles=tuple(
                TilePrompt(tile.box, text or global_text, owner)
                for tile, text, owner in zip(grid.tiles, texts, shared, strict=True)
            ),
            captioner=CaptionerId(self.name, self.revision, self.config.instruction, self.config.tile_instruction),
        )

    def network(self) -> Llava:
        """The network, opened if it isn't."""
        if self._open is None:
            assert self._folder is not None
            self._open = open_llava(self._folder, self.device, self.config.quantize)
        return self._open

    def answer(self, question: Question) -> list[str]:
        """A cleaned text for each picture."""
        answers = self.network().caption(question.pictures, question.instruction, question.max_words)
        return [clean(answer, question.max_words) for answer in answers]

    def close(self) -> None:
        """Free the network."""
        if self._open is not None:
            self._open = None
            release(self.device)

    def __enter__(self) -> Captioner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _shared(self, photo: Photo, areas: list[Area]) -> list[int | None]:
        if not self.config.share:
            return [None] * len(areas)
        return share(look_at(photo, areas), self.config.flat, self.config.flat_colour, self.config.alike)

    def _header(self, photo: Photo, grid: TileGrid, out_width: int, out_height: int) -> dict[str, Any]:
        """All that decides the texts of one photo."""
        return {
            "photo_sha256": photo.sha256,
            "canvas": [out_width, out_height],
            "tile": [grid.tile_width, grid.tile_height],
            "overlap": grid.overlap,
            "captioner": self.name,
            "revision": self.revision,
            **to_dict(self.config),
            "device": self.device.type,
            "precision": dtype_name(caption_dtype(self.device)),
            "torch": torch.__version__,
            "dreamsr": __version__,
        }


@dataclass(frozen=True)
class Question:
    """A batch of pictures and what is asked about each."""

    pictures: list[np.ndarray]
    instruction: str
    max_words: int


@dataclass(frozen=True)
class CaptionSetup:
    """A captioner in another process: payloads are `Question`s, results their answers."""

    captioner: str
    revision: str
    config: CaptionConfig
    device: str

    def open(self, progress: Progress) -> Service:
        """Find the weights; the network is loaded with the first question. Raises `WeightsError`."""
        opened = Captioner(self.captioner, self.config, choose_device(self.device))
        if opened.revision != self.revision:
            raise WeightsError(f"its captioner {opened.name} is not that of process 0", "copy it to every machine")
        return opened.answer


class _Work:
    """The questions about one photo, with what was answered before."""

    def __init__(
        self,
        captioner: Captioner,
        photo: Photo,
        journal: CaptionJournal,
        progress: Progress,
        others: SharedWork | None = None,
    ) -> None:
        self._captioner, self._photo, self._journal, self._progress = captioner, photo, journal, progress
        self._others = others

    def announce(self, asked: list[int], areas: list[Area], with_photo: bool) -> None:
        """Let other processes answer what is open of this; nothing without them."""
        if self._others is None:
            return
        batches = {f"tiles {first}": batch for first, batch in self._batches(asked)}
        questions = {key: partial(self._about_tiles, batch, areas) for key, batch in batches.items()}
        sizes = {key: len(batch) for key, batch in batches.items()}
        if with_photo:
            questions, sizes = {"photo": self._about_photo, **questions}, {"photo": 1, **sizes}
        self._others.announce(
            Job(key, question, lambda question=question: self._captioner.answer(question()))
            for key, question in questions.items()
            if self._journal.get(key, sizes[key]) is None
        )

    def _batches(self, asked: list[int]) -> list[tuple[int, list[int]]]:
        size = self._captioner.config.batch
        return [(first, asked[first : first + size]) for first in range(0, len(asked), size)]

    def _about_photo(self) -> Question:
        config = self._captioner.config
        return Question([whole_picture(self._photo)], config.instruction, config.max_words)

    def _about_tiles(self, batch: list[int], areas: list[Area]) -> Question:
        config = self._captioner.config
        pictures = crops(self._photo, [areas[index] for index in batch])
        return Question(pictures, config.tile_instruction, config.tile_max_words)

    def _ask(self, key: str, question: Callable[[], Question]) -> list[str]:
        texts = self._captioner.answer(question()) if self._others is None else self._others.take(key)
        self._journal.put(key, texts)
        return texts

    def whole(self) -> str:
        """The global text."""
        texts = self._journal.get("photo", 1)
        if texts is None:
            texts = self._ask("photo", self._about_photo)
        self._progress.advance()
        return texts[0]

    def tiles(self, asked: list[int], areas: list[Area]) -> list[str]:
        """Texts of the tiles `asked`, in their order."""
        found: list[str] = []
        began, told, fresh = time.monotonic(), time.monotonic(), 0
        for first, batch in self._batches(asked):
            key = f"tiles {first}"
            texts = self._journal.get(key, len(batch))
            if texts is None:
                texts = self._ask(key, partial(self._about_tiles, batch, areas))
                fresh += len(batch)
            found += texts
            self._progress.advance(len(batch))
            now = time.monotonic()
            if fresh and now - told > _REPORT_SECONDS:
                left = (now - began) / fresh * (len(asked) - len(found))
                self._progress.at(f"{len(found)} of {len(asked)} tiles, about {max(1, round(left / 60))} min left")
                told = now
        return found


def _spread(texts: list[str], asked: list[int], shared: list[int | None]) -> list[str]:
    """A text for each tile: its own, or that of the tile it shares with."""
    own = dict(zip(asked, texts, strict=True))
    return [own[index if owner is None else owner] for index, owner in enumerate(shared)]


def _contents(folder: Path) -> str:
    """sha256 over the files that decide what a network says, as its revision."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            total.update(f"{path.name} {file_sha256(path)}\n".encode())
    return total.hexdigest()


# ---------------------------------------------------------------- pictures


def photo_area(tile: Tile, photo: Photo, out_width: int, out_height: int, margin: int) -> Area:
    """(left, top, right, bottom) in photo pixels of all that a tile touches, grown by `margin` output pixels to all
    sides, without the canvas' padding."""
    left, top, right, bottom = tile.box
    width, height = photo.info.width, photo.info.height
    return (
        max(left - margin, 0) * width // out_width,
        max(top - margin, 0) * height // out_height,
        -(-min(right + margin, out_width) * width // out_width),
        -(-min(bottom + margin, out_height) * height // out_height),
    )


def crops(photo: Photo, areas: list[Area]) -> list[np.ndarray]:
    """uint8 (rows, columns, 3) of each area, read a strip at a time."""
    found = [np.empty((bottom - top, right - left, 3), np.uint8) for left, top, right, bottom in areas]
    last = max(bottom for _, _, _, bottom in areas)
    for start in range(min(top for _, top, _, _ in areas), last, STRIP_ROWS):
        end = min(start + STRIP_ROWS, last)
        strip_PQC = _levels(photo.read_rows(start, end))
        for picture_PQC, (left, top, right, bottom) in zip(found, areas, strict=True):
            first, stop = max(start, top), min(end, bottom)
            if first < stop:
                picture_PQC[first - top : stop - top] = strip_PQC[first - start : stop - start, left:right]
    return found


def whole_picture(photo: Photo) -> np.ndarray:
    """uint8 (rows, columns, 3): the photo, at most `PHOTO_SIDE` pixels long, by the antialiased cubic."""
    width, height = photo.info.width, photo.info.height
    factor = min(1.0, PHOTO_SIDE / max(width, height))
    rows, columns = max(1, round(height * factor)), max(1, round(width * factor))
    step = max(1, round(STRIP_ROWS * factor))
    strips = []
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        strips.append(_levels(resize_rows(photo.read_rows, height, width, rows, columns, top, bottom)))
    return np.concatenate(strips)


def _levels(rgb_PQC: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(rgb_PQC, 0, 1) * 255).astype(np.uint8)
