"""Work over processes: results in order, interruptions that end quickly and lose nothing, deaths that are told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from dreamsr_cli.errors import DreamSRError
from dreamsr_cli.worker_pool import run_in_order, stop_asked, usable_cores

Answer = tuple[int, int, int, int]
LONG = -1


def squarer() -> Callable[[int], Answer]:
    """Squares; task `LONG` takes half a minute unless it is told to stop."""

    def work(number: int) -> Answer:
        for _ in range(300 if number == LONG else 1):
            if stop_asked():
                break
            time.sleep(0.1 if number == LONG else 0.01 * (number % 3))
        return number, number * number, os.getpid(), torch.get_num_threads()

    return work


def killer() -> Callable[[int], None]:
    def work(_: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return work


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    taken: list[Answer] = []
    torch.set_num_threads(2)
    run_in_order(range(20), workers, squarer, taken.append)
    assert [(number, square) for number, square, *_ in taken] == [(n, n * n) for n in range(20)]
    assert {threads for *_, threads in taken} == {1} and torch.get_num_threads() == 2
    assert ({pid for _, _, pid, _ in taken} == {os.getpid()}) == (workers == 1)


def test_an_interruption_ends_long_tasks_and_keeps_finished_ones() -> None:
    taken: list[int] = []
    interrupted = 0.0

    def take(answer: Answer) -> None:
        nonlocal interrupted
        taken.append(answer[0])
        if len(taken) == 1:
            time.sleep(0.5)
            interrupted = time.monotonic()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_order([1, LONG, 2, 3, 4, 5, 6, 7, 8, 9], 2, squarer, take)
    assert time.monotonic() - interrupted < 10
    assert taken[0] == 1 and len(set(taken)) == len(taken) > 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_dead_worker_is_an_error_a_person_can_act_on() -> None:
    with pytest.raises(DreamSRError, match="worker process died"):
        run_in_order([1, 2], 2, killer, lambda _: None)


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1
