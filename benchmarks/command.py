"""What the benchmarks' commands share: a `DreamSRError` is two lines, figures go to stdout as text or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any


def report(
    measure: Callable[[], dict[str, Any]], text: Callable[[dict[str, Any]], Iterable[str]], as_json: bool
) -> int:
    """Measure and print; exit code 0 once measured, whatever the figures; a `DreamSRError`'s own else."""
    from dreamsr_cli.errors import DreamSRError

    try:
        found = measure()
    except DreamSRError as error:
        print(f"{error.message}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found) if as_json else "\n".join(text(found)))
    return 0
