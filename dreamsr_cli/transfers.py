"""Copies between RAM and a device that don't stop the work: pinned memory, and results read one batch late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Key = TypeVar("Key")


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on `device`; to a CUDA card from pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Reading:
    """A tensor on its way into RAM as float32."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.float()
        self._ready: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(tensor.device))
        else:
            self._copy = tensor.cpu()

    def array(self) -> np.ndarray:
        """The values, once they have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._copy.numpy()


class LookAhead(Generic[Key]):
    """Results of `compute` for keys asked for in the order of `keys`; while one is read, the next is computed.

    `ahead`: how many are begun beyond the one asked for; 0 on a CPU, where nothing runs beside.
    """

    def __init__(self, compute: Callable[[Key], Tensor], keys: Sequence[Key], ahead: int) -> None:
        self._compute, self._keys, self._ahead = compute, list(keys), ahead
        self._begun: dict[int, Reading] = {}
        self._next = 0

    def read(self, key: Key) -> np.ndarray:
        """The result for `key`, which must be the next of `keys`, else `ValueError`."""
        if self._next >= len(self._keys) or self._keys[self._next] != key:
            raise ValueError("results are read in the order in which they were announced")
        for index in range(self._next, min(self._next + 1 + self._ahead, len(self._keys))):
            if index not in self._begun:
                self._begun[index] = Reading(self._compute(self._keys[index]))
        found = self._begun.pop(self._next).array()
        self._next += 1
        return found


def lead(device: torch.device) -> int:
    """How many batches to begin ahead on this device."""
    return 1 if device.type == "cuda" else 0
