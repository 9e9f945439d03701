"""Two threads hand values over in order, and an error of either side ends both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dreamsr_cli.overlap import SWITCH, Background, beside, prefetched, threads_left


@pytest.fixture(params=["overlapping", "in turn"], autouse=True)
def both_ways(request, monkeypatch) -> str:
    monkeypatch.setenv(SWITCH, "1" if request.param == "in turn" else "0")
    return request.param


@pytest.fixture(autouse=True)
def no_thread_is_left(both_ways) -> Iterator[None]:
    yield
    assert not threads_left()


def numbers(count: int, log: list[str] | None = None) -> Iterator[tuple[int, int]]:
    for number in range(count):
        if log is not None:
            log.append(f"made {number}")
        yield number, number * number


def test_values_arrive_in_order_and_are_made_only_a_little_ahead(both_ways) -> None:
    log: list[str] = []
    threads: set[str] = set()

    def use(take: Callable[[int], int]) -> None:
        for number in range(20):
            assert take(number) == number * number
            time.sleep(0.002)
            threads.add(threading.current_thread().name)
            log.append(f"used {number}")

    beside(numbers(20, log), use)
    assert [line for line in log if line.startswith("used")] == [f"used {n}" for n in range(20)]
    ahead = [log.index(f"used {n}") - log.index(f"made {n}") for n in range(20)]
    assert max(ahead) <= 5, "more than a few values waited"
    assert (threads == {"MainThread"}) == (both_ways == "in turn")


def test_an_error_of_the_user_is_raised_and_nothing_more_is_made() -> None:
    log: list[str] = []

    def use(take: Callable[[int], int]) -> None:
        take(0)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        beside(numbers(1000, log), use)
    assert len(log) < 10


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_error_of_the_maker_ends_the_user(error) -> None:
    used: list[int] = []

    def make() -> Iterator[tuple[int, int]]:
        yield from numbers(3)
        raise error

    def use(take: Callable[[int], int]) -> None:
        for number in range(1000):
            used.append(take(number))

    with pytest.raises(type(error)):
        beside(make(), use)
    assert len(used) <= 3


def test_another_order_is_a_mistake_that_is_seen() -> None:
    def use(keys: list[int]) -> Callable[[Callable[[int], int]], None]:
        def take_all(take: Callable[[int], int]) -> None:
            for key in keys:
                take(key)

        return take_all

    with pytest.raises(ValueError, match="5 was asked for where 0 comes"):
        beside(numbers(3), use([5]))
    with pytest.raises(ValueError, match="asked for where None"):
        beside(numbers(1), use([0, 1]))


def test_values_that_are_read_ahead() -> None:
    assert list(prefetched(lambda n: n + 1, range(5))) == [1, 2, 3, 4, 5]
    assert list(prefetched(lambda n: n, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda n: 1 // n, [2, 1, 0, 5]))


def test_background_work_is_done_in_order_and_errors_stay_with_their_work() -> None:
    done: list[int] = []
    with Background() as thread:
        futures = [thread.submit(lambda n=n: done.append(1 // n)) for n in (2, 0, 1)]
    assert done == [0, 1]
    assert isinstance(futures[1].exception(), ZeroDivisionError) and futures[2].result() is None
    assert not thread._thread.is_alive()
