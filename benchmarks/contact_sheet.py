"""Pictures of the README: each photo degraded, enlarged by Lanczos, restored, and as it was, side by side.

    python benchmarks/contact_sheet.py PHOTO[@X,Y,W,H] ... -o sheet.jpg --preset seesr-mild

A photo is degraded as a whole (sides cropped to multiples of 4) and restored as a whole; the box, in pixels of the good
photo, is what the sheet shows of it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

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
        path, _, box = word.partition("@")
        if not box:
            return cls(Path(path), None)
        left, top, width, height = (int(n) for n in box.split(","))
        return cls(Path(path), (left, top, width, height))


def degraded(path: Path, preset: str, seed: int, scale: int = 4) -> tuple[Image.Image, Image.Image]:
    """(good photo, small bad one)."""
    from dreamsr_cli.degradations import pixel
    from dreamsr_cli.images import open_photo

    with open_photo(path) as photo:
        rgb_PQC = photo.read_rows(0, photo.info.height)
    rows, columns = (n // scale * scale for n in rgb_PQC.shape[:2])
    good = torch.from_numpy(np.ascontiguousarray(rgb_PQC[:rows, :columns])).permute(2, 0, 1).float()
    params = pixel.draw(preset, seed, hashlib.sha256(path.read_bytes()).hexdigest(), 0, scale, False)
    return _picture(good), _picture(pixel.degrade(good, params))


def _picture(rgb_CPQ: torch.Tensor) -> Image.Image:
    return Image.fromarray((rgb_CPQ.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def panels(shown: Shown, options: argparse.Namespace) -> dict[str, Image.Image]:
    """Titles and pictures of one row."""
    from dreamsr_cli.config import OutputConfig, UpscaleConfig
    from dreamsr_cli.engine import upscale
    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.progress import SilentProgress

    good, bad = degraded(shown.path, options.preset, options.seed)
    name, made = shown.path.stem, {"Lanczos": bad.resize(good.size, Image.Resampling.LANCZOS)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "photo.png"
        bad.save(source)
        for title, config in (("--strength 0", UpscaleConfig(strength=0.0)), ("dreamsr upscale", UpscaleConfig())):
            result = Path(folder) / "result.png"
            upscale(source, result, open_bundle(options.model), config, OutputConfig(overwrite=True), SilentProgress())
            made[title] = Image.open(result).convert("RGB").copy()
    made["original"] = good
    left, top, width, height = shown.box or (0, 0, *good.size)
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
