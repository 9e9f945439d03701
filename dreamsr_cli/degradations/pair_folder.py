"""The folder of a pair set: lq/, hq/, params.jsonl, captions.jsonl; finished pairs survive an interruption.

While the set is being made, lines of finished pairs are appended to `params.jsonl.part`; the sorted params.jsonl takes
its place at the end, so its bytes don't depend on who finished first.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from dreamsr_cli.degradations.pair_records import FORMAT
from dreamsr_cli.errors import JournalError, OutputError

PARAMS, CAPTIONS, PART = "params.jsonl", "captions.jsonl", "params.jsonl.part"
SIDES = ("lq", "hq")
_TEMPORARY = ".dreamsr-"
_PNG_LEVEL = 3
"""zlib level: level 6 takes three times as long for 8 % less."""


@dataclass(frozen=True)
class FinishedPair:
    """A pair whose files are in place."""

    line: str
    """Its line of params.jsonl."""
    caption: str | None
    """Its line of captions.jsonl."""


class PairFolder:
    """One process' hold on the folder `out`; a context manager.

    `settings`: plain data that all pairs share (a set never mixes two). `names`: all pairs of the set. `OutputError` if
    the folder holds other pairs or files in their place, unless `overwrite`: then they are removed. `JournalError` if
    another process works on it.
    """

    def __init__(self, out: Path, settings: dict[str, Any], names: Iterable[str], overwrite: bool) -> None:
        self.out = out
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._names = set(names)
        self._overwrite = overwrite
        self.earlier: dict[str, FinishedPair] = {}
        """Pairs of earlier runs, by name; their files are yet to be checked."""

    def __enter__(self) -> PairFolder:
        try:
            for side in SIDES:
                (self.out / side).mkdir(parents=True, exist_ok=True)
            self._part = os.open(self.out / PART, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(self.out, error) from error
        try:
            fcntl.flock(self._part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._claim()
        except BlockingIOError as error:
            os.close(self._part)
            raise JournalError(f"another process is making pairs in {self.out}", "wait for it to end") from error
        except OSError as error:
            self._leave()
            raise write_error(self.out, error) from error
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def add(self, pair: FinishedPair) -> None:
        """A pair whose files are new; it is remembered from now on."""
        data = (json.dumps({"record": pair.line, "caption": pair.caption}) + "\n").encode()
        try:
            os.write(self._part, data)
        except OSError as error:
            raise write_error(self.out / PART, error) from error

    def finish(self, pairs: dict[str, FinishedPair]) -> None:
        """Write params.jsonl and captions.jsonl of the whole set, by name, and forget the appended lines."""
        ordered = [pairs[name] for name in sorted(pairs)]
        captions = [pair.caption for pair in ordered if pair.caption is not None]
        self._write_lines(CAPTIONS, captions)
        self._write_lines(PARAMS, [pair.line for pair in ordered])
        os.ftruncate(self._part, 0)

    # ---------------------------------------------------------------- beginning

    def _claim(self) -> None:
        began, appended = self._read_part()
        finished = self._read_finished()
        there = {**finished, **appended}
        stray = [] if there or began is not None else self._stray()
        if self._overwrite:
            self._remove(there)
        else:
            if stray:
                raise OutputError(f"{stray[0]} exists already", "choose another folder with -o, or add --overwrite")
            if began is not None and began != self._settings:
                self._refuse(began)
            for name, pair in there.items():
                self._check(name, pair)
            self.earlier = there
        for side in SIDES:
            for path in (self.out / side).glob(f"{_TEMPORARY}*"):
                path.unlink(missing_ok=True)
        if began is None or self._overwrite:
            os.ftruncate(self._part, 0)
            os.lseek(self._part, 0, os.SEEK_SET)
            os.write(self._part, (json.dumps({"format": FORMAT, "settings": self._settings}) + "\n").encode())
        else:
            os.lseek(self._part, 0, os.SEEK_END)

    def _read_part(self) -> tuple[dict[str, Any] | None, dict[str, FinishedPair]]:
        """Settings of an interrupted run (None: there was none) and its pairs; a line cut short is dropped."""
        text = (self.out / PART).read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        os.ftruncate(self._part, len(whole))
        try:
            head, *rest = [json.loads(line) for line in whole.splitlines()] or [None]
            if head is None or head["format"] != FORMAT:
                return None, {}
            pairs = [FinishedPair(line["record"], line["caption"]) for line in rest]
            return head["settings"], {json.loads(pair.line)["pair"]: pair for pair in pairs}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{self.out / PART} is damaged", "add --overwrite to make all pairs anew") from error

    def _read_finished(self) -> dict[str, FinishedPair]:
        if not (self.out / PARAMS).exists():
            return {}
        try:
            lines = (self.out / PARAMS).read_text(encoding="utf-8").splitlines()
            found = {json.loads(line)["pair"]: line for line in lines}
            captions = {}
            if (self.out / CAPTIONS).exists():
                for line in (self.out / CAPTIONS).read_text(encoding="utf-8").splitlines():
                    captions[Path(json.loads(line)["photo"]["name"]).stem] = line
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.out}: {PARAMS} or {CAPTIONS} was not written by dreamsr degrade, or is damaged",
                "choose another folder with -o, or remove them",
            ) from error
        return {name: FinishedPair(line, captions.get(name)) for name, line in found.items()}

    def _check(self, name: str, pair: FinishedPair) -> None:
        """Refuse an earlier pair that this set would not have."""
        shared = json.loads(pair.line).get("settings", {})
        if "replay" not in self._settings and shared != self._settings:
            self._refuse(shared)
        if name not in self._names:
            raise OutputError(
                f"{self.out} holds pair {name}, which this command doesn't make",
                "name the same photos and --crops as before, choose another -o, or add --overwrite",
            )

    def _refuse(self, other: dict[str, Any]) -> None:
        differing = [key for key in self._settings if other.get(key) != self._settings[key]]
        key = differing[0] if differing else "replay"
        what = f"{key} {other.get(key)!r}, not {self._settings.get(key)!r}"
        raise OutputError(
            f"{self.out} holds pairs of other settings ({what})", "choose another folder with -o, or add --overwrite"
        )

    def _stray(self) -> list[Path]:
        there = {(side, name) for side in SIDES for name in os.listdir(self.out / side)}
        return [
            self.out / side / f"{name}.png"
            for name in sorted(self._names)
            for side in SIDES
            if (side, f"{name}.png") in there
        ]

    def _remove(self, pairs: Iterable[str]) -> None:
        for name in pairs:
            for side in SIDES:
                if name == Path(name).name:
                    (self.out / side / f"{name}.png").unlink(missing_ok=True)
        for name in (PARAMS, CAPTIONS):
            (self.out / name).unlink(missing_ok=True)

    # ---------------------------------------------------------------- end

    def _write_lines(self, name: str, lines: list[str]) -> None:
        path = self.out / name
        if lines:
            write_whole(path, "".join(f"{line}\n" for line in lines).encode())
        else:
            path.unlink(missing_ok=True)

    def _leave(self) -> None:
        """Let go; what was finished stays remembered, and nothing is left where there is nothing to remember."""
        with contextlib.suppress(OSError):
            if os.fstat(self._part).st_size == 0:
                os.unlink(self.out / PART)
            for side in SIDES:
                os.rmdir(self.out / side)
            os.rmdir(self.out)
        os.close(self._part)


def write_picture(path: Path, picture: Image.Image) -> bytes:
    """Write a PNG in one piece; its bytes."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=_PNG_LEVEL)
    write_whole(path, stream.getvalue())
    return stream.getvalue()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one piece or not at all. `OutputError` if it can't be written."""
    part = path.with_name(f"{_TEMPORARY}{os.getpid()}")  # a name of its own: the file's may be as long as names can be
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> OutputError:
    """Why something can't be written, for people."""
    return OutputError(
        f"{path}: can't be written ({error.strerror or error})",
        "check the folder, its permissions and free space; the same command goes on",
    )
