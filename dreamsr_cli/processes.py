"""Messages between process 0 and the others, through torch.distributed (gloo).

Gloo also with GPUs: what travels comes from process 0's files and goes back to them, so it lies in RAM at both ends,
and a dead process closes its connection instead of leaving the others waiting. Each connection has a thread that
receives at all times, so a message never waits for its receiver's work. Signs of life are sent both ways; a process
that is silent for `SILENCE` counts as lost.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# Remarks of the C++ side about host names would appear once per process.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist

from dreamsr_cli.errors import ProcessError
from dreamsr_cli.ranks import Place, again

JOIN = timedelta(minutes=10)
"""How long processes wait for each other at the start."""
BEAT_SECONDS = 10.0
SILENCE = timedelta(minutes=5)
"""A process that says nothing for so long is lost: its machine is down, or stopped."""


class Processes:
    """The connections of this process: of process 0 to all others, of any other to process 0."""

    def __init__(self, place: Place) -> None:
        """Join the others; Ctrl-C works meanwhile. Raises `ProcessError` where some don't come."""
        self.place = place
        self.peers = range(1, place.world) if place.rank == 0 else range(1)
        self.host = socket.gethostname()
        self._locks = {peer: threading.Lock() for peer in self.peers}
        self._closing = threading.Event()
        _join()

    def listen(self, take: Callable[[int, Any], None], lost: Callable[[int, str], None]) -> None:
        """From now on call `take(peer, message)` for what arrives and `lost(peer, reason)` once a peer is gone, in a
        thread per peer; and send signs of life."""
        for peer in self.peers:
            threading.Thread(target=self._receive, args=(peer, take, lost), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, peer: int, message: Any) -> None:
        """Send any picklable object. A peer that is gone is told by `lost`, not here."""
        self._send(peer, pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def close(self) -> None:
        """What happens to the connections from now on is of no interest."""
        self._closing.set()

    def _send(self, peer: int, body: bytes) -> None:
        try:
            with self._locks[peer]:
                _wait(dist.isend(torch.tensor([len(body)]), peer))
                if body:
                    _wait(dist.isend(torch.frombuffer(bytearray(body), dtype=torch.uint8), peer))
        except RuntimeError:
            return  # the receiving thread hears of it as well

    def _receive(self, peer: int, take: Callable[[int, Any], None], lost: Callable[[int, str], None]) -> None:
        length = torch.zeros(1, dtype=torch.int64)
        while True:
            try:
                _wait(dist.irecv(length, peer))
                body = torch.empty(int(length), dtype=torch.uint8)
                if len(body):
                    _wait(dist.irecv(body, peer))
            except RuntimeError as error:
                if not self._closing.is_set():
                    silent = "Timed out" in str(error)
                    lost(peer, f"said nothing for {SILENCE.seconds} s" if silent else "died, or its machine did")
                return
            if len(body):
                take(peer, pickle.loads(body.numpy().data))

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            for peer in self.peers:
                self._send(peer, b"")


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "this process is in the group"
    work.wait(SILENCE)


def _join() -> None:
    """`init_process_group` in a thread: its waiting can't be interrupted."""
    errors: list[BaseException] = []

    def join() -> None:
        try:
            dist.init_process_group("gloo", timeout=JOIN)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise ProcessError(f"the processes did not find each other: {errors[0]}", again()) from errors[0]
