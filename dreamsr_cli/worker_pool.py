"""Work spread over processes, with the same results as in one: spawned, one torch thread each, answered in order.

An interruption stops it within one piece of a task, and what was finished is still handed over.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

import torch

from dreamsr_cli.errors import DreamSRError

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task], Result]
AHEAD = 3
"""Tasks per process that are handed out before their turn."""

_work: Work[Any, Any] | None = None
_stop: Event | None = None


def usable_cores() -> int:
    """Cores this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_asked() -> bool:
    """Whether the work of this process is no longer wanted; long tasks ask between their pieces and end early."""
    return _stop is not None and _stop.is_set()


def run_in_order(
    tasks: Iterable[Task], workers: int, open_work: Callable[[], Work[Task, Result]], take: Callable[[Result], None]
) -> None:
    """`take(work(task))` for every task, in their order, whichever process was first.

    `open_work` makes the function that does the work, once in each process; with more than one worker it and the tasks
    travel to spawned processes and must be picklable. One worker: everything happens here. Torch has one thread inside,
    so both give the same bytes. Any exception, `KeyboardInterrupt` among them, ends the other tasks early, hands over
    what they finished, and is raised. `DreamSRError` where a process died.
    """
    if workers <= 1:
        with _one_thread():
            work = open_work()
            for task in tasks:
                take(work(task))
        return
    # forking a process that has run torch's thread pool can hang
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start, (open_work, stop))
    waiting: deque[Future[Result]] = deque()
    try:
        with _ctrl_c_for_the_parent():
            for _ in range(workers):  # the pool starts a process for each, as none is idle yet
                pool.submit(_ready)
        for task in tasks:
            waiting.append(pool.submit(_run, task))
            if len(waiting) >= workers * AHEAD:
                take(_next(waiting))
        while waiting:
            take(_next(waiting))
    except BrokenProcessPool as error:
        raise DreamSRError("a worker process died", "check the free memory, or lower --workers") from error
    except BaseException:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for future in waiting:
            if future.done() and not future.cancelled() and future.exception() is None:
                with contextlib.suppress(KeyboardInterrupt):  # it is on its way already
                    take(future.result())
        raise
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque[Future[Result]]) -> Result:
    """The oldest result; it stays in the queue until it is there, so that an interruption can't lose it."""
    result = waiting[0].result()
    waiting.popleft()
    return result


def _start(open_work: Callable[[], Work[Any, Any]], stop: Event) -> None:
    global _work, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _work, _stop = open_work(), stop


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _ready() -> None:
    """The first submitted task: it makes the pool start its processes."""


def _run(task: Any) -> Any:
    if stop_asked():
        raise CancelledError
    assert _work is not None, "called outside a worker"
    return _work(task)


@contextlib.contextmanager
def _ctrl_c_for_the_parent() -> Generator[None]:
    """Processes started inside don't get SIGINT: one that is still importing would print a traceback."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def _one_thread() -> Generator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
