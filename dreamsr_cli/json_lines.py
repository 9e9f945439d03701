"""JSON that people edit: what it says, and the line on which each key and value stands."""

from __future__ import annotations

import json
import re
from typing import Any

KeyPath = tuple[str | int, ...]
"""Where a value lies: ("tiles", 3, "text")."""

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


class JsonError(ValueError):
    """Text that is no JSON. `reason` says why; `line` counts from 1, `column` too, or is None."""

    def __init__(self, reason: str, line: int, column: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


def parse_json(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """(the data, line of every key and value). A value that belongs to a key has the line of that key.

    Raises `JsonError` for what is no JSON, for a key that stands twice in one table (json alone would keep the last
    in silence), and for nesting that is too deep.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, error.lineno, error.colno) from error
    except RecursionError as error:
        raise JsonError("nested too deeply", 1) from error
    except ValueError as error:
        raise JsonError(str(error), 1) from error
    return data, _lines(text)


class _Open:
    """A table or list whose end has not come yet."""

    def __init__(self, path: KeyPath, is_table: bool) -> None:
        self.path, self.is_table = path, is_table
        self.key: str | int | None = None if is_table else 0


def _lines(text: str) -> dict[KeyPath, int]:
    """Lines of all keys and values of valid JSON."""
    lines: dict[KeyPath, int] = {}
    stack: list[_Open] = []
    line, seen_to = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", seen_to, match.start())
        seen_to = match.start()
        token, inner = match[0], stack[-1] if stack else None
        if token in ("}", "]"):
            stack.pop()
        elif token == ",":
            assert inner is not None
            inner.key = None if inner.is_table else int(inner.key or 0) + 1
        elif token == ":":
            continue
        elif inner is not None and inner.is_table and inner.key is None:
            inner.key = json.loads(token)
            path = (*inner.path, str(inner.key))
            if path in lines:
                raise JsonError(f"{inner.key!r} stands twice, on line {lines[path]} and here", line)
            lines[path] = line
        else:
            path = () if inner is None else (*inner.path, inner.key if inner.key is not None else 0)
            lines.setdefault(path, line)
            if token in ("{", "["):
                stack.append(_Open(path, token == "{"))
    return lines
