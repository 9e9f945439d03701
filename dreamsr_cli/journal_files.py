"""The journal's data files: canvases by rows, and tiles' velocities in slots. Read and written with pread and pwrite.

Never mapped: mapped pages count as resident memory. Axes: C channels, H W latent rows and columns.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from dreamsr_cli.errors import OutputError

_MARK = struct.Struct("<qqI")


class Syncs(Protocol):
    """A file that can be flushed to the disk."""

    def sync(self) -> None:
        """Flush to the disk."""
        ...


class RowFile:
    """A canvas on disk: float32 (H, W, C) in row-major order."""

    def __init__(self, path: Path, rows: int, width: int, channels: int, create: bool = False) -> None:
        self.path, self.shape = path, (channels, rows, width)
        self._pixel = 4 * channels
        self._row = self._pixel * width
        self._fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows [top, bottom), float32 (C, bottom - top, W)."""
        channels, _, width = self.shape
        return self._read(top * self._row, (bottom - top, width, channels)).transpose(2, 0, 1)

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A rectangle, float32 (C, height, width)."""
        out_HWC = np.empty((height, width, self.shape[0]), np.float32)
        for row in range(height):
            read_into(self._fd, out_HWC[row], (top + row) * self._row + left * self._pixel)
        return out_HWC.transpose(2, 0, 1)

    def write_rows(self, top: int, values_CHW: np.ndarray) -> None:
        """Put rows from `top` on; (C, rows, W)."""
        write_all(self._fd, np.ascontiguousarray(values_CHW.transpose(1, 2, 0), np.float32), top * self._row, self.path)

    def sync(self) -> None:
        """Flush to the disk."""
        flush(self._fd)

    def close(self) -> None:
        """Close the file; it stays on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        out = np.empty(shape, np.float32)
        read_into(self._fd, out, offset)
        return out


class Slots:
    """Velocities of the tiles whose rows are not blended yet; slot of a tile = its index modulo their number.

    A slot is written first, then its mark (step, tile, crc32): a slot whose mark doesn't fit is computed again.
    """

    def __init__(self, folder: Path, count: int, shape_CHW: tuple[int, int, int]) -> None:
        self.count, self._shape = count, shape_CHW
        self._bytes = 4 * int(np.prod(shape_CHW))
        self._data, self._marks = (folder / name for name in ("slots.f32", "marks.bin"))
        self._data_fd = os.open(self._data, os.O_RDWR | os.O_CREAT, 0o644)
        self._marks_fd = os.open(self._marks, os.O_RDWR | os.O_CREAT, 0o644)
        self._step = 0

    def begin(self, step: int) -> None:
        """Slots now belong to `step`; those of other steps count as empty."""
        self._step = step

    def put(self, tile: int, v_CHW: np.ndarray) -> None:
        """Keep the velocity of a tile. Writing twice is harmless."""
        slot, data = tile % self.count, np.ascontiguousarray(v_CHW, np.float32)
        write_all(self._data_fd, data, slot * self._bytes, self._data)
        mark = _MARK.pack(self._step, tile, zlib.crc32(data.data.cast("B")))
        write_all(self._marks_fd, np.frombuffer(mark, np.uint8), slot * _MARK.size, self._marks)

    def holds(self, tile: int) -> bool:
        """Whether this step's velocity of the tile is there, whole."""
        slot = tile % self.count
        mark = os.pread(self._marks_fd, _MARK.size, slot * _MARK.size)
        if len(mark) < _MARK.size:
            return False
        step, index, crc = _MARK.unpack(mark)
        if (step, index) != (self._step, tile):
            return False
        data = os.pread(self._data_fd, self._bytes, slot * self._bytes)
        return len(data) == self._bytes and zlib.crc32(data) == crc

    def __getitem__(self, tile: int) -> np.ndarray:
        out = np.empty(self._shape, np.float32)
        read_into(self._data_fd, out, tile % self.count * self._bytes)
        return out

    def close(self) -> None:
        """Close both files."""
        for fd in (self._data_fd, self._marks_fd):
            os.close(fd)


def flush(fd: int) -> None:
    """Flush a file's data to the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync


def read_into(fd: int, out: np.ndarray, offset: int) -> None:
    """Fill `out` from the file at `offset`; OSError where the file ends too early."""
    view = memoryview(out.data).cast("B")
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise OSError(errno.EIO, "the journal is shorter than it should be")
        done += got


def write_all(fd: int, values: np.ndarray, offset: int, path: Path) -> None:
    """Write all of `values` at `offset`; `OutputError` names `path`."""
    view = memoryview(values.data).cast("B")
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
    except OSError as error:
        raise failure(path, error) from error


def failure(path: Path, error: OSError) -> OutputError:
    """The error a person can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full", "free some space and run the same command again: it goes on")
    return OutputError(f"{path}: {error.strerror or error}", "check the folder and its permissions")
