"""Training samples: a good crop, its bad small version, and the two prompts, pure functions of (seed, step, index).

Receptive-Field Enhancement (method.md, Training): crops come from native photos with the crop's own local prompt, and
in a share of the steps from shrunk photos with local prompt = global prompt.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import wait

import numpy as np
import torch

from dreamsr_cli import draws
from dreamsr_cli.config import GRAIN
from dreamsr_cli.degradations import pixel
from dreamsr_cli.degradations.presets import PRESETS
from dreamsr_cli.errors import ConfigError, TrainingError
from dreamsr_cli.models.captioner import Describer
from dreamsr_cli.training.dead_leaves import dead_leaves
from dreamsr_cli.training.photos import PhotoSource, TrainingPhoto, turned

DEAD_LEAVES = "dead leaves"
SAMPLES_PER_STEP = 1 << 20
"""More than any global batch: keeps crop indices of different steps apart."""
PALETTE_COLOURS = 512
FLAT_ENERGY = 0.5
"""Gradient energy (levels) every candidate has at least: flat crops stay possible."""


@dataclass(frozen=True)
class CropSettings:
    """How samples are cut and degraded."""

    crop: int = 256
    """Side of the good crop in pixels, a multiple of 16."""
    preset: str = "seesr-pairs"
    """Degradation preset, a key of `presets.PRESETS`."""
    mix: tuple[tuple[str, float], ...] = ()
    """(preset, share of samples) of further presets; the rest of the samples use `preset`."""
    seed: int = 42
    """Seed of every draw."""
    scale: int = 4
    """Crop side over the bad crop's side."""
    dead_leaves: float = 0.0
    """Share of samples that are dead leaves instead of photos."""
    p_full: float = 0.2
    """Chance of a step that its photos are shrunk first and local prompt = global prompt."""
    full_side: int = 1024
    """Short side of a shrunk photo."""
    candidates: int = 3
    """Crops drawn per sample, one of which is kept with a chance that grows with its gradient energy."""
    usm: bool | None = None
    """Sharpening of the good crop; None: the preset's."""
    held_out: bool = False
    """Take the validation photos instead of the training ones."""

    def __post_init__(self) -> None:
        for preset in (self.preset, *(name for name, _ in self.mix)):
            if preset not in PRESETS:
                raise ConfigError(f"unknown preset {preset!r}", f"choose one of: {', '.join(PRESETS)}")
        if any(share < 0 for _, share in self.mix) or sum(share for _, share in self.mix) > 1 + 1e-9:
            raise ConfigError(f"shares of mix {dict(self.mix)} exceed 1", "the rest is left to preset")
        if self.crop < GRAIN or self.crop % GRAIN or self.crop % self.scale:
            raise ConfigError(f"crop {self.crop} is not a multiple of {GRAIN} and of the scale", "try crop = 256")
        for name in ("dead_leaves", "p_full"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not a share", "give a number from 0 to 1")
        if self.full_side < self.crop:
            raise ConfigError(f"full_side {self.full_side} is below crop {self.crop}", "raise full_side")
        if self.candidates < 1:
            raise ConfigError(f"candidates = {self.candidates}", "give 1 or more")


@dataclass(frozen=True)
class Sample:
    """One pair with its prompts."""

    hq_CPQ: np.ndarray
    """Good crop (3, P, P) uint8, sharpened where the preset says so."""
    lq_CPQ: np.ndarray
    """Bad crop (3, P/scale, P/scale) uint8."""
    local_text: str
    """Words for the good crop."""
    global_text: str
    """Words for the whole photo, turned as the crop is."""
    origin: str
    """Name of the photo, or `DEAD_LEAVES`."""


@dataclass(frozen=True)
class Batch:
    """The samples of one step."""

    step: int
    hq_BCPQ: torch.Tensor
    """Good crops, float32 in [0, 1]."""
    lq_up_BCPQ: torch.Tensor
    """Bad crops enlarged to the same size by the field's cubic, float32 in [0, 1]."""
    local_texts: list[str]
    global_texts: list[str]


def make_sample(source: PhotoSource, settings: CropSettings, step: int, index: int) -> Sample:
    """The sample at `index` of the global batch of `step`: the same whatever was made before, and wherever."""
    site = "validation-crop" if settings.held_out else "crop"
    rng = draws.generator(settings.seed, site, step, index)
    photos = source.validation if settings.held_out else source.training
    if not photos:
        raise TrainingError("no photo is held out to validate on", "hold out at least one")
    if source.smallest < settings.crop:
        raise TrainingError(
            f"photos may be as small as {source.smallest} pixels, crops are {settings.crop}",
            "open the folder with smallest = crop",
        )
    photo = photos[int(rng.integers(len(photos)))]
    turn = int(rng.integers(8))
    describer = Describer()
    global_text: str | None = None
    full = False
    if rng.random() < settings.dead_leaves:
        origin, sha256 = DEAD_LEAVES, DEAD_LEAVES
        hq_CPQ = dead_leaves(settings.crop, rng, _palette(photo, rng) if rng.random() < 0.75 else None)
    else:
        origin, sha256 = photo.name, photo.sha256
        # one draw for the whole step and all ranks, so that a later change of crop size keeps batches of one size
        full = draws.generator(settings.seed, f"{site}-full", step).random() < settings.p_full
        rgb_PQC = source.shrunk(photo, settings.full_side) if full else photo.read()
        crop_PQC = turned(_sharp_crop(rgb_PQC, settings, rng), turn)
        hq_CPQ = torch.from_numpy(np.ascontiguousarray(crop_PQC.transpose(2, 0, 1))).float() / 255
        global_text = source.global_text(photo, turn, describer)
    preset, crop_index = _preset(settings, step, index), step * SAMPLES_PER_STEP + index
    params = pixel.draw(preset, settings.seed, sha256, crop_index, settings.scale, settings.usm)
    hq_CPQ = _levels(pixel.sharpen(hq_CPQ) if params.sharpen else hq_CPQ)
    lq_CPQ = _levels(pixel.degrade(hq_CPQ.float() / 255, params))
    if full and global_text is not None:
        local_text = global_text
    else:
        local_text = describer.describe(np.ascontiguousarray(hq_CPQ.permute(1, 2, 0).numpy(), np.float32) / 255)
    if global_text is None:
        global_text = local_text
    return Sample(hq_CPQ.numpy(), lq_CPQ.numpy(), local_text, global_text, origin)


def _preset(settings: CropSettings, step: int, index: int) -> str:
    """The sample's preset, drawn from seed, step and index alone."""
    draw = draws.generator(settings.seed, "preset", step, index).random() if settings.mix else 1.0
    for name, share in settings.mix:
        draw -= share
        if draw < 0:
            return name
    return settings.preset


def batches(
    source: PhotoSource,
    settings: CropSettings,
    batch: int,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 3,
) -> Generator[Batch]:
    """Endless batches of `batch` samples from `start_step` on, in the order of steps.

    `workers` processes make them ahead (each with one thread, `prefetch` batches per process); 0 makes them in this one
    when asked. Both give the same bytes. Close the iterator to end the processes; they also end with their parent.
    """
    if workers == 0:
        for step in count(start_step):
            with _one_thread():
                arrays = _make_batch(source, settings, batch, step)
            yield _to_batch(step, arrays)
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's thread pool can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (source, settings, batch))
    try:
        steps = count(start_step)
        ahead: deque[tuple[int, Future[_Arrays]]] = deque()
        while True:
            while len(ahead) < workers * prefetch:
                step = next(steps)
                ahead.append((step, pool.submit(_work, step)))
            step, future = ahead.popleft()
            yield _to_batch(step, future.result())
    except BrokenProcessPool as error:
        raise TrainingError("a process that prepares crops died", "check the memory, or lower workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# what travels between processes: numpy arrays, since torch tensors would each hold a file descriptor
_Arrays = tuple[np.ndarray, np.ndarray, list[str], list[str]]
_job: tuple[PhotoSource, CropSettings, int] | None = None


def _start_worker(source: PhotoSource, settings: CropSettings, batch: int) -> None:
    global _job
    _job = (source, settings, batch)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(step: int) -> _Arrays:
    assert _job is not None, "called outside a worker"
    source, settings, batch = _job
    return _make_batch(source, settings, batch, step)


def _make_batch(source: PhotoSource, settings: CropSettings, batch: int, step: int) -> _Arrays:
    samples = [make_sample(source, settings, step, index) for index in range(batch)]
    lq_up = [pixel.enlarge(torch.from_numpy(s.lq_CPQ).float() / 255, settings.crop, settings.crop) for s in samples]
    return (
        np.stack([s.hq_CPQ for s in samples]),
        torch.stack(lq_up).numpy(),
        [s.local_text for s in samples],
        [s.global_text for s in samples],
    )


def _to_batch(step: int, arrays: _Arrays) -> Batch:
    hq_BCPQ, lq_up_BCPQ, local_texts, global_texts = arrays
    return Batch(step, torch.from_numpy(hq_BCPQ).float() / 255, torch.from_numpy(lq_up_BCPQ), local_texts, global_texts)


def _sharp_crop(rgb_PQC: np.ndarray, settings: CropSettings, rng: np.random.Generator) -> np.ndarray:
    """One of several random crops (crop, crop, 3) uint8, kept with a chance proportional to its gradient energy."""
    rows, cols = (n - settings.crop + 1 for n in rgb_PQC.shape[:2])
    corners = [(int(rng.integers(rows)), int(rng.integers(cols))) for _ in range(settings.candidates)]
    crops = [rgb_PQC[top : top + settings.crop, left : left + settings.crop] for top, left in corners]
    energy = np.array([_gradient_energy(crop) for crop in crops]) + FLAT_ENERGY
    return crops[int(rng.choice(len(crops), p=energy / energy.sum()))]


def _gradient_energy(rgb_PQC: np.ndarray) -> float:
    """Mean absolute difference of neighbouring green values, in levels of 255."""
    green = rgb_PQC[..., 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def _palette(photo: TrainingPhoto, rng: np.random.Generator) -> np.ndarray:
    """(PALETTE_COLOURS, 3) uint8 pixels of the photo."""
    rows, cols = rng.integers(photo.height, size=PALETTE_COLOURS), rng.integers(photo.width, size=PALETTE_COLOURS)
    return photo.read()[rows, cols]


def _levels(x_CPQ: torch.Tensor) -> torch.Tensor:
    return (x_CPQ * 255).round().to(torch.uint8)


@contextmanager
def _one_thread() -> Generator[None]:
    """One torch thread inside, as in a worker, so that both make the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
