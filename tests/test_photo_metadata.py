"""EXIF, XMP, ICC profile and DPI come through, orientation once; damaged ones are left out and told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_photos import CAPTURED, RGB, SRGB, XMP, copy, exif, scene

from dreamsr_cli.images import open_photo
from dreamsr_cli.photo_writer import PhotoWriter, resolve_format


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_then_said_to_be_upright(tmp_path: Path, name: str, orientation: int) -> None:
    stored = Image.fromarray(scene())
    source, out = tmp_path / name, tmp_path / "out" / name
    kinds: dict[str, dict[str, Any]] = {"a.jpg": {"quality": 98, "subsampling": 0}, "a.webp": {"lossless": True}}
    options = kinds.get(name, {})
    stored.save(source, exif=exif(orientation), **options)
    stored.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored))
    photo = open_photo(source)
    assert (photo.info.height, photo.info.width) == expected.shape[:2]
    assert np.abs(photo.read_rows(0, photo.info.height) * 255 - expected).max() <= (6 if name == "a.jpg" else 0.01)
    copy(photo, out, resolve_format("auto", None, photo.info))
    written = Image.open(out)
    assert written.size == (photo.info.width, photo.info.height)
    assert written.getexif().get(0x0112, 1) == 1
    assert np.abs(np.asarray(ImageOps.exif_transpose(written)).astype(int) - expected).max() <= 12


def test_avif_is_not_turned_twice(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.avif", exif=exif(6), quality=95)
    photo = open_photo(tmp_path / "a.avif")
    expected = np.rot90(scene(), -1)
    assert np.abs(photo.read_rows(0, 31) * 255 - expected).max() < 24
    copy(photo, tmp_path / "out" / "a.png", resolve_format("auto", None, photo.info))
    assert Image.open(tmp_path / "out" / "a.png").getexif()[0x0112] == 1


@pytest.mark.parametrize("target", ["b.jpg", "b.png", "b.webp", "b.tif", "palette.png"])
@pytest.mark.parametrize("source", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_metadata_is_kept(tmp_path: Path, source: str, target: str) -> None:
    options: dict[str, Any] = {"xmp": XMP} if source not in ("a.png", "a.tif") else {}
    image = RGB.quantize(16) if target == "palette.png" and source == "a.png" else RGB
    image.save(tmp_path / source, exif=exif(6).tobytes(), icc_profile=SRGB, dpi=(300, 300), **options)
    photo = open_photo(tmp_path / source)
    out = tmp_path / "out" / target
    copy(photo, out, resolve_format("auto", out, photo.info))
    written = Image.open(out)
    assert written.info["icc_profile"] == SRGB
    block = written.getexif()
    assert block[0x010F].rstrip("\0") == "Maker" and block.get(0x0112, 1) == 1
    inner = block.get_ifd(0x8769)
    assert inner[0x9003] == CAPTURED
    assert (inner[0xA002], inner[0xA003]) == (22, 31)
    assert block.get_ifd(0x8825)[1] == "N"
    if options:
        packet = open_photo(out).info.xmp
        assert packet is not None and packet.rstrip(b"\0") == XMP.replace(b'"6"', b'"1"')
    if source != "a.webp" and target != "b.webp":
        assert written.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert open_photo(out).info.dpi == pytest.approx((300, 300), abs=0.02)


def test_a_photo_without_metadata_gets_none(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.jpg")
    photo = open_photo(tmp_path / "a.jpg")
    assert (photo.info.icc, photo.info.exif, photo.info.xmp, photo.info.dpi) == (None, None, None, None)
    for name in ("b.jpg", "b.png", "b.webp", "b.tif"):
        copy(photo, tmp_path / "out" / name, resolve_format("auto", Path(name), photo.info))
        back = open_photo(tmp_path / "out" / name).info
        assert (back.icc, back.exif, back.xmp, back.dpi) == (None, None, None, None)


def test_damaged_exif_and_a_misfit_profile_are_left_out_and_told(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    info = replace(photo.info, exif=b"II*\0\x08\0\0\0\xff", icc=SRGB[:16] + b"GRAY" + SRGB[20:])
    with PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer:
        writer.write_strip(photo.read_rows(0, 22), None)
    assert len(writer.notes) == 2 and "EXIF" in "".join(writer.notes) and "profile" in "".join(writer.notes)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), scene())
