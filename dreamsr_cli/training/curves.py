"""Loss curves of a run as one PNG: a panel per figure of log.jsonl, drawn with Pillow.

Pillow is there already; matplotlib would be 30 MiB more for one picture. Faint: every line of the log. Dark: their
running mean. Dots: validation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreamsr_cli.errors import InputError, OutputError

NOT_CURVES = frozenset({"step", "seconds", "variance_kept"})
"""Numbers of a log line that are no figure of the training."""
SPAN = 0.04
"""Share of the lines that the running mean looks back on."""
_FINER = 2
"""Drawn this many times larger and shrunk: smooth lines."""
_WIDE, _TALL, _COLUMNS, _GAP = 420, 220, 3, 18
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 26, 24
_GROUND, _INK, _FAINT, _GRID = (255, 255, 255), (30, 30, 30), (120, 120, 120), (228, 228, 228)
_PALE, _DARK = (178, 205, 235), (24, 90, 170)
_VALID_PALE, _VALID = (240, 200, 160), (205, 92, 20)

Series = list[tuple[float, float]]


def draw(log_path: Path, out_png: Path) -> bool:
    """Draw the curves of `log_path` (a run's log.jsonl) into `out_png`, whole or not at all; False where the log holds
    too little to draw.

    A line cut short by a kill is passed over, and where a run went back to a checkpoint the later line of a step
    counts. `InputError` where the log can't be read, `OutputError` where the picture can't be written.
    """
    training, validation = read_log(log_path)
    panels = [(name, series, False) for name, series in training.items()]
    panels += [(f"validation: {name}", series, True) for name, series in validation.items()]
    panels = [(name, series, held) for name, series, held in panels if len(series) > 1 or held]
    if not panels:
        return False
    part = out_png.with_name(f".{out_png.name}.{os.getpid()}.part")
    try:
        _sheet(panels).save(part, "PNG")
        os.replace(part, out_png)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{out_png}: {error.strerror or error}", "check the folder and free space") from error
    return True


def read_log(path: Path) -> tuple[dict[str, Series], dict[str, Series]]:
    """(training, validation): finite values by step, for every figure of the log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "name the log.jsonl of a run folder") from error
    training: dict[str, dict[float, float]] = {}
    validation: dict[str, dict[float, float]] = {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), (int, float)):
            continue
        held = line.get("validation")
        for target, figures in ((training, line), (validation, held if isinstance(held, dict) else {})):
            for name, value in figures.items():
                plain = isinstance(value, (int, float)) and not isinstance(value, bool)
                if name not in NOT_CURVES and plain and math.isfinite(value):
                    target.setdefault(name, {})[line["step"]] = value
    made = [{name: sorted(found.items()) for name, found in group.items()} for group in (training, validation)]
    return made[0], made[1]


def running_mean(values: Sequence[float], span: int) -> list[float]:
    """Exponential mean over about `span` values, its start corrected for missing ones."""
    keep, weight, sum_, made = 1 - 1 / max(1, span), 0.0, 0.0, []
    for value in values:
        weight, sum_ = keep * weight + 1, keep * sum_ + value
        made.append(sum_ / weight)
    return made


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Logarithms, within [low, high], of 1, 2 and 5 times powers of ten, or of the powers alone where they suffice."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for marks in ((1,), (1, 2, 5)):
        found = [decade + math.log10(mark) for decade in decades for mark in marks]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            break
    return found


def _sheet(panels: Sequence[tuple[str, Series, bool]]) -> Image.Image:
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (columns * (_WIDE + _GAP) + _GAP, rows * (_TALL + _GAP) + _GAP)
    canvas = Image.new("RGB", (size[0] * _FINER, size[1] * _FINER), _GROUND)
    painter = ImageDraw.Draw(canvas)
    for number, (name, series, held) in enumerate(panels):
        left = _GAP + number % columns * (_WIDE + _GAP)
        top = _GAP + number // columns * (_TALL + _GAP)
        _panel(painter, left, top, name, series, held)
    return canvas.resize(size, Image.Resampling.LANCZOS)


def _panel(painter: ImageDraw.ImageDraw, left: int, top: int, name: str, series: Series, held: bool) -> None:
    font, small = ImageFont.load_default(14 * _FINER), ImageFont.load_default(11 * _FINER)
    x0, x1, y0, y1 = left + _LEFT, left + _WIDE - _RIGHT, top + _TOP, top + _TALL - _BOTTOM
    steps, values = [step for step, _ in series], [value for _, value in series]
    mean = values if held else running_mean(values, max(1, round(SPAN * len(values))))
    low, high, log = _range(values, mean)
    first, last = steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1

    def place(step: float, value: float) -> tuple[float, float]:
        height = math.log10(max(value, 1e-12)) if log else value
        share = min(1.02, max(-0.02, (height - low) / (high - low)))
        return (x0 + (step - first) / (last - first) * (x1 - x0)) * _FINER, (y1 - share * (y1 - y0)) * _FINER

    head = f"{name}   {_short(mean[-1])}" + ("   (log)" if log else "")
    painter.text((left * _FINER, top * _FINER), head, _INK, font)
    for tick in log_ticks(low, high) if log else ticks(low, high):
        y = (y1 - (tick - low) / (high - low) * (y1 - y0)) * _FINER
        painter.line([(x0 * _FINER, y), (x1 * _FINER, y)], _GRID, _FINER)
        painter.text(((x0 - 6) * _FINER, y), _short(10**tick if log else tick), _FAINT, small, anchor="rm")
    for tick in ticks(first, last):
        x = place(tick, 1.0)[0]
        painter.line([(x, y1 * _FINER), (x, (y1 + 4) * _FINER)], _FAINT, _FINER)
        painter.text((x, (y1 + 6) * _FINER), _short(tick), _FAINT, small, anchor="mt")
    painter.line([(x0 * _FINER, y1 * _FINER), (x1 * _FINER, y1 * _FINER)], _FAINT, _FINER)
    points = [place(*point) for point in series]
    if len(points) > 1:
        painter.line(points, _VALID_PALE if held else _PALE, _FINER)
    if held:
        for x, y in points:
            painter.ellipse([x - 3 * _FINER, y - 3 * _FINER, x + 3 * _FINER, y + 3 * _FINER], fill=_VALID)
    else:
        painter.line([place(*point) for point in zip(steps, mean, strict=True)], _DARK, 2 * _FINER, joint="curve")


def _range(values: Sequence[float], mean: Sequence[float]) -> tuple[float, float, bool]:
    """(low, high, logarithmic): all but the wildest hundredth of the values, on a log scale over a factor of 20."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = min(ordered[cut], *mean), max(ordered[-1 - cut], *mean)
    log = low > 0 and high / low > 20
    if log:
        low, high = math.log10(low), math.log10(high)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room, log


def _short(value: float) -> str:
    """At most about six characters."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
