"""Training sets that tests make: pictures, folders of pairs, shards."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dreamsr_cli import draws
from dreamsr_cli.training.dead_leaves import dead_leaves


def picture(seed: int, size: int = 96) -> np.ndarray:
    """Leaves, (size, size, 3) uint8."""
    leaves = dead_leaves(size, draws.generator(seed, "test-photo")).permute(1, 2, 0).numpy()
    return (leaves * 255).astype(np.uint8)


def encoded(rgb_PQC: np.ndarray, format: str = "PNG") -> bytes:
    """The picture as a file's content."""
    stream = io.BytesIO()
    Image.fromarray(rgb_PQC).save(stream, format)
    return stream.getvalue()


def small(rgb_PQC: np.ndarray, scale: int = 4) -> np.ndarray:
    """Every block of pixels by its mean: where a pixel came from stays visible."""
    height, width = rgb_PQC.shape[:2]
    blocks = rgb_PQC.reshape(height // scale, scale, width // scale, scale, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def plan_json(name: str, width: int, height: int, global_text: str, local_text: str) -> dict:
    """A prompts object with one tile."""
    tile = {"box": [0, 0, width, height], "text": local_text, "shared_with": None}
    return {
        "format": 1,
        "photo": {"name": name, "sha256": "", "width": width, "height": height},
        "canvas": [width, height],
        "tile": max(width, height),
        "overlap": 0,
        "global": {"text": global_text, "source": "user"},
        "tiles": [tile],
        "captioner": {"name": "", "revision": "", "instruction": "", "tile_instruction": ""},
    }


def write_pairs(folder: Path, count: int = 4, texture: bool = False) -> None:
    """hq/ and lq/ without records: what anybody may have. "Erased" pictures are negatives: tests can tell them."""
    for side in ("hq", "lq"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        hq = picture(i)
        other = 255 - hq if texture else small(hq)
        (folder / "hq" / f"p{i}.png").write_bytes(encoded(hq))
        (folder / "lq" / f"p{i}.png").write_bytes(encoded(other))


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    """A tar with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
