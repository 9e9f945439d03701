"""Sheets of sample photos in the run folder: the same validation crops every time, so that one sees the model learn.

Axes: C channels, P Q pixel rows and columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dreamsr_cli.errors import OutputError
from dreamsr_cli.resample import resize

FOLDER = "samples"
LABELS = ("LQ", "removed", "textured", "HQ")
"""Columns of a sheet, in this order; others follow in the order given."""
LARGEST_CELL = 512
MARGIN, HEADER, NAME_ROW = 8, 22, 18
_GROUND, _INK, _FAINT = (250, 250, 250), (20, 20, 20), (110, 110, 110)

Row = tuple[str, Mapping[str, torch.Tensor]]
"""(name of the photo, picture (3, P, Q) in [0, 1] by label). The pictures of a row may differ in size: each is shown at
the size of the largest."""


def write(folder: Path, step: int, rows: Sequence[Row]) -> Path:
    """Write `folder/samples/step-NNNNNN.png`, labelled, one row per photo, and return its path.

    Cells larger than `LARGEST_CELL` show the middle of the picture, pixel by pixel: shrinking would hide what is
    learned. ValueError for no rows; `OutputError` where the file can't be written.
    """
    if not rows:
        raise ValueError("a sheet needs at least one row")
    path = folder / FOLDER / f"step-{step:06d}.png"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(rows, f"step {step:,}").save(part, "PNG")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(f"{path}: {error.strerror or error}", "make room; the run goes on with --resume") from error
    return path


def sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """The rows as one picture."""
    found = dict.fromkeys(label for _, pictures in rows for label in pictures)
    labels = [label for label in LABELS if label in found] + [label for label in found if label not in LABELS]
    cells = [[_cell(pictures, label) for label in labels] for _, pictures in rows]
    side = max(cell.width for row in cells for cell in row if cell is not None)
    heights = [max(cell.height for cell in row if cell is not None) for row in cells]
    width = MARGIN + len(labels) * (side + MARGIN)
    height = MARGIN + 2 * HEADER + sum(h + NAME_ROW + MARGIN for h in heights)
    canvas = Image.new("RGB", (width, height), _GROUND)
    painter, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    painter.text((MARGIN, MARGIN), title, _INK, font)
    for column, label in enumerate(labels):
        painter.text((MARGIN + column * (side + MARGIN), MARGIN + HEADER), label, _INK, font)
    top = MARGIN + 2 * HEADER
    for (name, _), row, tall in zip(rows, cells, heights, strict=True):
        for column, cell in enumerate(row):
            if cell is not None:
                canvas.paste(cell, (MARGIN + column * (side + MARGIN), top))
        painter.text((MARGIN, top + tall + 1), _shortened(name, painter, small, width - 2 * MARGIN), _FAINT, small)
        top += tall + NAME_ROW + MARGIN
    return canvas


def _cell(pictures: Mapping[str, torch.Tensor], label: str) -> Image.Image | None:
    if label not in pictures:
        return None
    P, Q = (max(x.shape[i] for x in pictures.values()) for i in (1, 2))
    x_CPQ = pictures[label].detach().float().cpu()
    if x_CPQ.shape[1:] != (P, Q):
        x_CPQ = resize(x_CPQ[None], P, Q)[0]
    top, left = max(0, (P - LARGEST_CELL) // 2), max(0, (Q - LARGEST_CELL) // 2)
    x_CPQ = x_CPQ[:, top : top + LARGEST_CELL, left : left + LARGEST_CELL]
    levels_PQC = (x_CPQ.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels_PQC.numpy()))


def _shortened(
    text: str, painter: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float
) -> str:
    if painter.textlength(text, font) <= room:
        return text
    while text and painter.textlength(text + "…", font) > room:
        text = text[:-1]
    return text + "…"
