"""What a process other than the first does: it opens what process 0 says, does the jobs it is sent, and leaves when it
is told to, or when process 0 is gone."""

from __future__ import annotations

import _thread
import gc
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from dreamsr_cli.processes import Processes
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.work_sharing import Service, facts_here, packed

TIDY_SECONDS = 10.0
"""A helper that is sent home in the middle of a photo gets so long to remove what it may not leave behind."""


class Helper:
    """One process' life as a helper."""

    def __init__(
        self, processes: Processes, orphaned: Callable[[str], None], prepare: Callable[[], None] = lambda: None
    ) -> None:
        """`orphaned(reason)` is called once process 0 is gone, before this process ends; `prepare()` while process 0
        reads the first photo: what every job needs."""
        self._processes, self._orphaned, self._prepare = processes, orphaned, prepare
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._session = 0
        self._service: Service | None = None
        self._leaving = threading.Event()
        self._tidied = threading.Event()

    @property
    def leaving(self) -> bool:
        """Whether what is in work is no longer wanted."""
        return self._leaving.is_set()

    def serve(self) -> None:
        """Work until process 0 says that it is enough; this process then ends, so it never returns."""
        self._processes.listen(self._take, self._lost)
        self._processes.send(0, ("hello", facts_here(self._processes.host)))
        try:
            self._prepare()
            while True:
                self._do(self._inbox.get())
        except KeyboardInterrupt:
            self._service = None
            self._tidied.set()
            threading.Event().wait()  # the receiving thread ends the process

    def _do(self, message: Any) -> None:
        match message:
            case ("welcome", int(threads)):
                torch.set_num_threads(threads)
            case ("open", int(session), setup):
                self._answer(session, "opened", lambda: self._open(session, setup))
            case ("ask", int(session), payload):
                self._answer(session, "answer", lambda: self._call(payload))
            case ("job", int(session), key, payload):
                self._answer(session, "done", lambda: self._call(payload), key)
            case ("close", int()):
                self._close()

    def _answer(self, session: int, kind: str, work: Callable[[], Any], *head: Any) -> None:
        if session != self._session or (kind != "opened" and self._service is None):
            return  # nobody waits for it any more
        try:
            result = work()
        except Exception as error:
            self._processes.send(0, ("failed", session, kind, *packed(error)))
        else:
            self._processes.send(0, (kind, session, *head, result))

    def _open(self, session: int, setup: Any) -> None:
        self._close()
        self._service = setup.open(_Forwarded(self._processes, session))

    def _call(self, payload: Any) -> Any:
        assert self._service is not None
        return self._service(payload)

    def _close(self) -> None:
        self._service = None
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _take(self, peer: int, message: Any) -> None:
        match message:
            case ("end",):
                self._end(0)
            case ("open", int(session), _):
                self._session = session
            case ("close", int()):
                self._session = 0
        self._inbox.put(message)

    def _lost(self, peer: int, reason: str) -> None:
        self._orphaned(reason)
        self._end(1)

    def _end(self, code: int) -> None:
        self._processes.close()
        if getattr(self._service, "tidies", False):
            self._leaving.set()
            _thread.interrupt_main()
            self._tidied.wait(TIDY_SECONDS)
        os._exit(code)


class _Forwarded(SilentProgress):
    """Notes go to process 0."""

    def __init__(self, processes: Processes, session: int) -> None:
        self._processes, self._session = processes, session

    def note(self, text: str) -> None:
        self._processes.send(0, ("note", self._session, text))
