"""Small photos, and copying them through the writer, for the tests of everything that reads or writes one."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from dreamsr_cli.images import Photo
from dreamsr_cli.photo_writer import PhotoWriter

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
CAPTURED = "2020:02:03 04:05:06"


def scene(height: int = 22, width: int = 31) -> np.ndarray:
    """Smooth colours, uint8 (height, width, 3), lopsided so that no flip or turn leaves it as it was."""
    rows, cols = np.mgrid[0:height, 0:width]
    planes = [40 + 6 * rows, 30 + 5 * cols, 200 - 3 * rows - 2 * cols]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def with_alpha() -> Image.Image:
    image = Image.fromarray(scene()).convert("RGBA")
    alpha = np.full((22, 31), 255, np.uint8)
    alpha[:6], alpha[6:12] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    return image


def exif(orientation: int = 1) -> Image.Exif:
    block = Image.Exif()
    block[0x0112], block[0x010F] = orientation, "Maker"
    block.get_ifd(0x8769)[0x9003] = CAPTURED
    block.get_ifd(0x8825)[1] = "N"
    return block


def copy(photo: Photo, path: Path, format: str, strip: int = 5, quality: int = 98, **options: Any) -> list[str]:
    """Write the photo at its own size, strip by strip; the writer's notes. `options`: the writer's."""
    info = photo.info
    with PhotoWriter(path, info, info.width, info.height, format, quality, **options) as writer:
        for top in range(0, info.height, strip):
            bottom = min(top + strip, info.height)
            writer.write_strip(photo.read_rows(top, bottom), photo.read_alpha(top, bottom))
    assert os.listdir(path.parent).count(path.name) == 1
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    return writer.notes


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes whose header promises side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC display profile (ICC.1:2001) for `space` b"RGB " or b"GRAY" of gamma 563/256."""
    name = b"a test's profile\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0CC0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(table + body), 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    return (head + xyz(0.9642, 1.0, 0.8249)[8:]).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


_GAMMA = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563)
ADOBE_RGB = profile(
    b"RGB ",
    {
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        b"rTRC": _GAMMA,
        b"gTRC": _GAMMA,
        b"bTRC": _GAMMA,
    },
)
"""Primaries and gamma of Adobe RGB (1998)."""
GREY = profile(b"GRAY", {b"kTRC": _GAMMA})


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGBA")).astype(int)


RGB = Image.fromarray(scene())
