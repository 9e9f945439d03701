"""Small photos, and copying them through the writer, for the tests of everything that reads or writes one."""

from __future__ import annotations

import os
from pathlib import Path

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


def copy(photo: Photo, path: Path, format: str, strip: int = 5, quality: int = 98) -> list[str]:
    """Write the photo at its own size, strip by strip; the writer's notes."""
    info = photo.info
    with PhotoWriter(path, info, info.width, info.height, format, quality) as writer:
        for top in range(0, info.height, strip):
            bottom = min(top + strip, info.height)
            writer.write_strip(photo.read_rows(top, bottom), photo.read_alpha(top, bottom))
    assert os.listdir(path.parent).count(path.name) == 1
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    return writer.notes


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGBA")).astype(int)


RGB = Image.fromarray(scene())
