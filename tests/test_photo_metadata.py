"""EXIF, XMP, ICC profile and DPI come through, orientation once; damaged ones are left out and told."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from PIL.ExifTags import IFD
from sample_photos import CAPTURED, RGB, SRGB, XMP, copy, exif, scene

from dreamsr_cli import __version__, photo_encoders
from dreamsr_cli.images import open_photo
from dreamsr_cli.photo_metadata import RECORD
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


def test_the_density_turns_with_the_photo(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.jpg", exif=exif(6), dpi=(300, 150))
    photo = open_photo(tmp_path / "a.jpg")
    assert photo.info.dpi == pytest.approx((150, 300), abs=0.02)
    copy(photo, tmp_path / "out" / "a.tif", "tiff")
    assert open_photo(tmp_path / "out" / "a.tif").info.dpi == pytest.approx((150, 300), abs=0.02)


def test_a_photo_without_metadata_gets_none(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.jpg")
    photo = open_photo(tmp_path / "a.jpg")
    assert (photo.info.icc, photo.info.exif, photo.info.xmp, photo.info.dpi) == (None, None, None, None)
    for name in ("b.jpg", "b.png", "b.webp", "b.tif"):
        copy(photo, tmp_path / "out" / name, resolve_format("auto", Path(name), photo.info))
        back = open_photo(tmp_path / "out" / name).info
        assert (back.icc, back.exif, back.xmp, back.dpi) == (None, None, None, None)


@pytest.mark.parametrize("name", ["b.jpg", "b.png", "b.webp", "b.tif", "b.avif"])
def test_how_it_was_made_is_recorded_once(tmp_path: Path, name: str) -> None:
    RGB.save(tmp_path / "a.jpg", exif=exif(6), xmp=XMP)
    made_by: dict[str, Any] = {"model": "mini", "global_prompt": 'a <"cat"> & it\'s 日本'}
    source = tmp_path / "a.jpg"
    for seed in (1, 2):
        photo = open_photo(source)
        format = resolve_format("auto", Path(name), photo.info)
        assert copy(photo, tmp_path / str(seed) / name, format, made_by=made_by | {"seed": seed}) == []
        source = tmp_path / str(seed) / name
    info = open_photo(source).info
    assert info.xmp is not None and info.exif is not None
    tree = ElementTree.fromstring(info.xmp.rstrip(b"\0"))
    records = [node.attrib[f"{{{RECORD}}}madeBy"] for node in tree.iter() if f"{{{RECORD}}}madeBy" in node.attrib]
    assert [json.loads(record) for record in records] == [made_by | {"seed": 2}]
    assert b'tiff:Orientation="1"' in info.xmp
    block = Image.open(source).getexif()
    assert block[0x0131].rstrip("\0") == f"dreamsr {__version__}" and block[0x010F].rstrip("\0") == "Maker"


@pytest.mark.parametrize("name", ["b.jpg", "b.png", "b.webp", "b.tif", "b.avif"])
def test_stripped_results_hold_nothing_but_pixels_and_profile(tmp_path: Path, name: str) -> None:
    RGB.save(tmp_path / "a.jpg", exif=exif(6), xmp=XMP, icc_profile=SRGB, dpi=(300, 300))
    photo = open_photo(tmp_path / "a.jpg")
    format = resolve_format("auto", Path(name), photo.info)
    copy(photo, tmp_path / "out" / name, format, strip_metadata=True, made_by={"seed": 1})
    info = open_photo(tmp_path / "out" / name).info
    assert (info.icc, info.exif, info.xmp, info.dpi) == (SRGB, None, None, None)
    assert b"Maker" not in (tmp_path / "out" / name).read_bytes()


def test_a_photo_without_metadata_gets_the_record_alone(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    copy(open_photo(tmp_path / "a.png"), tmp_path / "out" / "a.png", "png", made_by={"seed": 1})
    info = open_photo(tmp_path / "out" / "a.png").info
    assert info.xmp is not None and b'"seed": 1' in info.xmp
    assert (info.icc, info.dpi) == (None, None)


def test_the_thumbnail_is_dropped(tmp_path: Path) -> None:
    thumbnail = io.BytesIO()
    RGB.save(thumbnail, "JPEG")
    data = thumbnail.getvalue()
    first = struct.pack("<HHHII", 1, 0x010F, 2, 4, 0x006B614D)  # Make: "Mak"
    second = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(data))
    block = b"II*\0\x08\0\0\0" + first + struct.pack("<I", 26) + second + bytes(4)
    block = block.ljust(56, b"\0") + data
    RGB.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    assert Image.open(tmp_path / "a.jpg").getexif().get_ifd(IFD.IFD1)[0x0202] == len(data)
    photo = open_photo(tmp_path / "a.jpg")
    for name in ("b.jpg", "b.png", "b.tif"):
        copy(photo, tmp_path / "out" / name, resolve_format("auto", Path(name), photo.info))
        kept = Image.open(tmp_path / "out" / name).getexif()
        assert kept[0x010F].startswith("Mak")
        assert data[20:60] not in (tmp_path / "out" / name).read_bytes()


def test_what_is_too_long_for_a_jpeg_is_left_out_and_told(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.webp", xmp=XMP.replace(b"<rdf:RDF", b" " * 70000 + b"<rdf:RDF"))
    photo = open_photo(tmp_path / "a.webp")
    notes = copy(photo, tmp_path / "out" / "b.jpg", "jpg", made_by={"seed": 5})
    assert notes == ["its XMP is too long for a JPEG and was left out"]
    packet = open_photo(tmp_path / "out" / "b.jpg").info.xmp
    assert packet is not None and b"madeBy" in packet and b"tiff:" not in packet
    block = exif(1)
    block.get_ifd(0x8769)[0x9286] = "x" * 70000
    info = replace(photo.info, xmp=None, exif=block.tobytes()[6:])
    with PhotoWriter(tmp_path / "c.jpg", info, 31, 22, "jpg", 95) as writer:
        writer.write_strip(photo.read_rows(0, 22), None)
    assert writer.notes == ["its EXIF block is too long for a JPEG and was left out"]


def test_xmp_that_cannot_be_added_to_is_kept_and_told(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.webp", xmp=b"<x/>")
    photo = open_photo(tmp_path / "a.webp")
    notes = copy(photo, tmp_path / "out" / "b.webp", "webp", made_by={"seed": 5})
    assert len(notes) == 1 and "not recorded" in notes[0]
    assert open_photo(tmp_path / "out" / "b.webp").info.xmp == b"<x/>"


def test_a_bigtiff_keeps_its_exif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as BigTIFF when it is larger than classic TIFF can be."""
    RGB.save(tmp_path / "a.jpg", exif=exif(6), quality=95)
    photo = open_photo(tmp_path / "a.jpg")
    monkeypatch.setattr(photo_encoders, "_CLASSIC_LIMIT", 100)
    copy(photo, tmp_path / "out" / "b.tif", "tiff")
    with tifffile.TiffFile(tmp_path / "out" / "b.tif") as tiff:
        assert tiff.is_bigtiff
        assert tiff.pages.first.tags[0x8769].value["DateTimeOriginal"] == CAPTURED
    block = open_photo(tmp_path / "out" / "b.tif").info.exif
    assert block is not None
    back = Image.Exif()
    back.load(block)
    assert back[0x010F].rstrip("\0") == "Maker"
    assert back.get_ifd(0x8769)[0x9003].rstrip("\0") == CAPTURED and back.get_ifd(0x8825)[1].rstrip("\0") == "N"


def test_damaged_exif_and_a_misfit_profile_are_left_out_and_told(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    info = replace(photo.info, exif=b"II*\0\x08\0\0\0\xff", icc=SRGB[:16] + b"GRAY" + SRGB[20:])
    with PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer:
        writer.write_strip(photo.read_rows(0, 22), None)
    assert len(writer.notes) == 2 and "EXIF" in "".join(writer.notes) and "profile" in "".join(writer.notes)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), scene())
