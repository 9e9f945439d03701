"""Pictures of the README: each photo degraded, enlarged by Lanczos, restored, and as it was, side by side.

    python benchmarks/contact_sheet.py PHOTO[@X,Y,W,H] ... -o sheet.jpg --preset seesr-mild

A photo is degraded as a whole (sides cropped to multiples of 4) and restored as a whole; the box, in pixels of the good
photo, is what the sheet shows of it.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

SCALE = 4
"""Of the degraded photo; what the built-in model enlarges by."""
GAP, TITLE = 5, 22
"""Pixels between panels, and above them for their words."""


@dataclass(frozen=True)
class Shown:
    """A photo and the box of it that the sheet shows."""

    path: Path
    box: tuple[int, int, int, int] | None
    """Left, top, width, height; None: all of it."""

    @classmethod
    def parse(cls, word: str) -> Shown:
        """From PHOTO or PHOTO@X,Y,W,H."""
        found = re.fullmatch(r"(.+)@(\d+),(\d+),(\d+),(\d+)", word)
        if found is None:
            return cls(Path(word), None)
        left, top, width, height = (int(n) for n in found.groups()[1:])
        return cls(Path(found[1]), (left, top, width, height))


def _picture(rgb_CPQ: torch.Tensor) -> Image.Image:
    """(3, P, Q) in [0, 1] as 8 bits."""
    return Image.fromarray((rgb_CPQ.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def panels(shown: Shown, options: argparse.Namespace) -> dict[str, Image.Image]:
    """Titles and pictures of one row. `UsageError` for a box that isn't inside the photo."""
    from bad_photo import degraded

    from dreamsr_cli.config import OutputConfig, UpscaleConfig
    from dreamsr_cli.engine import upscale
    from dreamsr_cli.errors import UsageError
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.progress import SilentProgress

    good, bad = (_picture(x_CPQ) for x_CPQ in degraded(shown.path, SCALE, options.preset, options.seed))
    left, top, width, height = shown.box or (0, 0, *good.size)
    if not width or not height or left + width > good.width or top + height > good.height:
        raise UsageError(f"{shown.path}: its box isn't inside {good.width} x {good.height} pixels", "give X,Y,W,H")
    name, made = shown.path.stem, {"Lanczos": bad.resize(good.size, Image.Resampling.LANCZOS)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "photo.png"
        bad.save(source)
        for title, config in (("--strength 0", UpscaleConfig(strength=0.0)), ("dreamsr upscale", UpscaleConfig())):
            result = Path(folder) / "result.png"
            upscale(source, result, open_bundle(options.model), config, OutputConfig(overwrite=True), SilentProgress())
            made[title] = Image.open(result).convert("RGB").copy()
    made["original"] = good
    return {f"{name}: {k}": v.crop((left, top, left + width, top + height)) for k, v in made.items()}


def sheet(rows: list[dict[str, Image.Image]]) -> Image.Image:
    """All rows on white, each panel with its title above."""
    width = max(sum(p.width + GAP for p in row.values()) for row in rows) - GAP
    height = sum(max(p.height for p in row.values()) + TITLE for row in rows)
    made, y = Image.new("RGB", (width, height), "white"), 0
    draw = ImageDraw.Draw(made)
    for row in rows:
        x = 0
        for title, panel in row.items():
            draw.text((x + 4, y + 5), title, fill="black")
            made.paste(panel, (x, y + TITLE))
            x += panel.width + GAP
        y += max(p.height for p in row.values()) + TITLE
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    made = sheet([panels(Shown.parse(word), options) for word in options.photos])
    made.save(options.out, quality=90)
    return {"sheet": str(options.out), "width": made.width, "height": made.height}


def text(found: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    yield f"{found['sheet']}: {found['width']} x {found['height']} pixels"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="good photos, each with a box to show: PHOTO@X,Y,W,H")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the sheet (.jpg, .png)")
    parser.add_argument("--model", default="mini", help="bundle: a name or a folder")
    parser.add_argument("--preset", default="seesr-mild", help="degradation preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    from command import report

    return report(lambda: measure(options), text, options.json)


if __name__ == "__main__":
    sys.exit(main())
