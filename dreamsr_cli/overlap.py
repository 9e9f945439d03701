"""One thing beside another: a thread that works through what it is given, and values handed from thread to thread.

`DREAMSR_NO_OVERLAP=1` does everything in turn, in one thread, with the same results.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
SWITCH = "DREAMSR_NO_OVERLAP"
THREAD_NAME = "dreamsr-background"


def overlap_wanted() -> bool:
    """Whether work may overlap; `SWITCH` forbids it."""
    return os.environ.get(SWITCH, "") in ("", "0")


def threads_left() -> bool:
    """Whether a background thread is still at work: the process can then only leave by `os._exit`."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


class Background:
    """One thread that does what it is given, in order. It doesn't keep the process alive."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Value]) -> Future[Value]:
        """Do `work` after all that was given before; its result or exception is the future's."""
        future: Future[Value] = Future()
        self._queue.put((future, work))
        return future

    def close(self, seconds: float | None = None) -> bool:
        """Take no more work and wait for the thread, at most `seconds`; whether it has ended."""
        self._queue.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            future, work = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            # What it holds may be large, and the thread may wait long.
            del given, future, work
            result = None


def prefetched(read: Callable[[Key], Value], keys: Iterable[Key]) -> Generator[Value]:
    """`read(key)` for each key, the next one in a thread while the caller works on the present one."""
    if not overlap_wanted():
        yield from map(read, keys)
        return
    with Background() as thread:
        waiting: deque[Future[Value]] = deque()
        for key in keys:
            waiting.append(thread.submit(lambda key=key: read(key)))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def beside(
    made: Iterable[tuple[Key, Value]], use: Callable[[Callable[[Key], Value]], None], *, overlap: bool = True
) -> None:
    """Make values here while `use(take)` works on earlier ones in a thread; `take(key)` waits for the next value.

    Keys must be taken in the order in which `made` yields them (else ValueError). One value waits at most. Any
    exception of either side ends the other at its next value and is raised here.
    """
    values = iter(made)
    if not (overlap and overlap_wanted()):

        def pull(key: Key) -> Value:
            return _expected(key, next(values, None))

        use(pull)
        return
    handover: _Handover[Key, Value] = _Handover()

    def work() -> None:
        try:
            use(handover.take)
        finally:
            handover.close()

    thread = Background()
    future = thread.submit(work)
    try:
        for item in values:
            if not handover.put(item):
                break
        handover.end()
        future.result()
    except BaseException:
        handover.close()
        raise
    finally:
        _wait_for(thread)


class _Handover(Generic[Key, Value]):
    """A queue with room for one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._item: tuple[Key, Value] | None = None
        self._ended = self._closed = False

    def put(self, item: tuple[Key, Value]) -> bool:
        """Wait for room; False if nobody will take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._item is None or self._closed)
            if self._closed:
                return False
            self._item = item
            self._changed.notify_all()
            return True

    def take(self, key: Key) -> Value:
        with self._changed:
            self._changed.wait_for(lambda: self._item is not None or self._ended or self._closed)
            if self._closed:
                raise InterruptedError("the other side gave up")
            item, self._item = self._item, None
            self._changed.notify_all()
        return _expected(key, item)

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed, self._item = True, None
            self._changed.notify_all()


def _expected(key: Key, item: tuple[Key, Value] | None) -> Value:
    if item is None or item[0] != key:
        raise ValueError(f"{key} was asked for where {None if item is None else item[0]} comes next")
    return item[1]


def _wait_for(thread: Background) -> None:
    """Wait until the thread has let go of its files, whatever signals come meanwhile: it is within one value of it."""
    interrupted: BaseException | None = None
    while True:
        try:
            thread.close()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
