"""Batches of training samples in the order of steps, made here or ahead of time by other processes.

Any split of a step's global batch over processes and parts sees the same samples: each is a function of (seed, step,
index in the global batch), see crop_samples.py.

Axes: B batch, C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import wait

import numpy as np
import torch

from dreamsr_cli.config import Looks
from dreamsr_cli.degradations import pixel
from dreamsr_cli.errors import TrainingError
from dreamsr_cli.training.crop_samples import (
    DEAD_LEAVES,
    SAMPLES_PER_STEP,
    CropSettings,
    Sample,
    check_source,
    make_sample,
)
from dreamsr_cli.training.sources import BadLimit, SkippedPhoto, Source

__all__ = ["DEAD_LEAVES", "Batch", "CropSettings", "Sample", "batches", "make_sample"]


@dataclass(frozen=True)
class Batch:
    """The samples of one step."""

    step: int
    hq_BCPQ: torch.Tensor
    """Good crops, float32 in [0, 1]."""
    lq_up_BCPQ: torch.Tensor
    """Bad crops enlarged to the same size by the field's cubic, float32 in [0, 1]."""
    lq_BCPQ: torch.Tensor
    """Bad crops as they are, float32 in [0, 1]."""
    looks: list[Looks | None]
    """See `Sample.looks`."""
    local_texts: list[str]
    global_texts: list[str]
    erased_BCPQ: torch.Tensor | None = None
    """Good crops with their texture erased, float32 in [0, 1]; None where the set has none."""
    first: int = 0
    """Index in the step's global batch of the first sample."""


def batches(
    source: Source,
    settings: CropSettings,
    batch: int,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 3,
    *,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    on_bad: Callable[[SkippedPhoto], None] | None = None,
) -> Generator[Batch]:
    """Endless batches of `batch` samples from `start_step` on, in the order of steps.

    The global batch of a step has `world * accumulate * batch` samples; process `rank` yields its `accumulate` batches
    of them one after the other, so that any split of the same global batch sees the same samples (`Batch.first` says
    which).

    `workers` processes make them ahead (each with one thread, `prefetch` batches per process); 0 makes them in this one
    when asked. Both give the same bytes. Close the iterator to end the processes; they also end with their parent.

    Each unreadable item is told once to `on_bad`; `TrainingError` once their share exceeds `source.max_bad`.
    """
    if not 0 <= rank < world or accumulate < 1 or world * accumulate * batch > SAMPLES_PER_STEP:
        raise ValueError(f"rank {rank} of {world}, {accumulate} batches of {batch}")
    check_source(source, settings)
    limit = BadLimit(source.max_bad)

    def ready(step: int, first: int, arrays: _Arrays) -> Batch:
        for photo in limit.count(batch, arrays.bad):
            if on_bad is not None:
                on_bad(photo)
        return _to_batch(step, first, arrays)

    sites = ((step, (rank * accumulate + part) * batch) for step in count(start_step) for part in range(accumulate))
    if workers == 0:
        for step, first in sites:
            with _one_thread():
                arrays = _make_batch(source, settings, batch, step, first)
            yield ready(step, first, arrays)
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch's thread pool can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (source, settings, batch))
    try:
        ahead: deque[tuple[int, int, Future[_Arrays]]] = deque()
        while True:
            while len(ahead) < workers * prefetch:
                step, first = next(sites)
                ahead.append((step, first, pool.submit(_work, step, first)))
            step, first, future = ahead.popleft()
            yield ready(step, first, future.result())
    except BrokenProcessPool as error:
        raise TrainingError("a process that prepares crops died", "check the memory, or lower workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Arrays:
    """What travels between processes: numpy, since torch tensors would each hold a file descriptor."""

    hq_BCPQ: np.ndarray
    lq_up_BCPQ: np.ndarray
    lq_BCPQ: np.ndarray
    looks: list[Looks | None]
    erased_BCPQ: np.ndarray | None
    local_texts: list[str]
    global_texts: list[str]
    bad: list[SkippedPhoto]


_job: tuple[Source, CropSettings, int] | None = None


def _start_worker(source: Source, settings: CropSettings, batch: int) -> None:
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


def _work(step: int, first: int) -> _Arrays:
    assert _job is not None, "called outside a worker"
    source, settings, batch = _job
    return _make_batch(source, settings, batch, step, first)


def _make_batch(source: Source, settings: CropSettings, batch: int, step: int, first: int) -> _Arrays:
    samples = [make_sample(source, settings, step, index) for index in range(first, first + batch)]
    P, Q = samples[0].hq_CPQ.shape[1:]
    lq_up = [pixel.enlarge(torch.from_numpy(s.lq_CPQ).float() / 255, P, Q) for s in samples]
    erased = [s.erased_CPQ for s in samples if s.erased_CPQ is not None]
    return _Arrays(
        np.stack([s.hq_CPQ for s in samples]),
        torch.stack(lq_up).numpy(),
        np.stack([s.lq_CPQ for s in samples]),
        [s.looks for s in samples],
        np.stack(erased) if len(erased) == batch else None,
        [s.local_text for s in samples],
        [s.global_text for s in samples],
        [photo for s in samples for photo in s.bad],
    )


def _to_batch(step: int, first: int, arrays: _Arrays) -> Batch:
    erased = arrays.erased_BCPQ
    return Batch(
        step,
        torch.from_numpy(arrays.hq_BCPQ).float() / 255,
        torch.from_numpy(arrays.lq_up_BCPQ),
        torch.from_numpy(arrays.lq_BCPQ).float() / 255,
        arrays.looks,
        arrays.local_texts,
        arrays.global_texts,
        None if erased is None else torch.from_numpy(erased).float() / 255,
        first,
    )


@contextmanager
def _one_thread() -> Generator[None]:
    """One torch thread inside, as in a worker, so that both make the same bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
