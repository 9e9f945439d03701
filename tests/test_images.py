"""Photos in and out: every kind comes back as its own kind; bad files are told apart; nothing is left behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms, ImageOps

from dreamsr_cli.errors import InputError, OutputError, UsageError
from dreamsr_cli.images import (
    Photo,
    PhotoInfo,
    PhotoWriter,
    is_photo_name,
    list_formats,
    open_photo,
    resolve_format,
)

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
KINDS: dict[str, tuple[Image.Image, dict[str, Any], str]] = {
    "rgb.png": (RGB, {}, "RGB"),
    "rgba.png": (with_alpha(), {}, "RGBA"),
    "grey.png": (RGB.convert("L"), {}, "L"),
    "grey_alpha.png": (with_alpha().convert("LA"), {}, "LA"),
    "palette.png": (RGB.quantize(32), {}, "P"),
    "palette_transparent.png": (RGB.quantize(32), {"transparency": 3}, "P"),
    "palette_alpha.png": (with_alpha().quantize(32), {}, "P"),
    "rgb.jpg": (RGB, {"quality": 98, "subsampling": 0}, "RGB"),
    "grey.jpg": (RGB.convert("L"), {"quality": 98}, "L"),
    "alpha.webp": (with_alpha(), {"lossless": True}, "RGBA"),
    "rgb.webp": (RGB, {"lossless": True}, "RGB"),
    "rgb.tiff": (RGB, {}, "RGB"),
    "rgba.tiff": (with_alpha(), {}, "RGBA"),
    "grey.tif": (RGB.convert("L"), {}, "L"),
    "grey_alpha.tif": (with_alpha().convert("LA"), {}, "LA"),
    "palette.tif": (RGB.quantize(32), {}, "P"),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_comes_back_as_itself(tmp_path: Path, name: str) -> None:
    image, options, mode = KINDS[name]
    source, out = tmp_path / name, tmp_path / "out" / name
    image.save(source, **options)
    photo = open_photo(source)
    info = photo.info
    assert (info.width, info.height, info.bit_depth) == (31, 22, 8)
    assert (info.grey, info.palette) == (mode in ("L", "LA"), mode == "P")
    assert info.alpha == ("alpha" in name or "rgba" in name or "transparent" in name)
    format = resolve_format("auto", out, info)
    assert format == resolve_format("auto", None, info)
    assert copy(photo, out, format) == []
    assert Image.open(out).mode == mode
    before, after = pixels(source), pixels(out)
    visible = before[..., 3] > 0
    np.testing.assert_array_equal(after[..., 3] == 0, ~visible)
    tolerance = 8 if out.suffix in (".jpg", ".webp") else 0  # palettes of at most 64 colours fit the table exactly
    assert np.abs(after - before)[..., :3][visible].max() <= tolerance
    assert np.abs(after - before)[..., 3].max() == 0


def test_rows_are_the_pixels(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    rows = photo.read_rows(3, 9)
    assert rows.dtype == np.float32 and rows.shape == (6, 31, 3)
    np.testing.assert_allclose(rows, scene()[3:9] / 255, atol=1e-7)
    assert photo.read_alpha(0, 5) is None
    with pytest.raises(ValueError, match="outside"):
        photo.read_rows(20, 23)


def test_sixteen_bits_are_read_in_full_and_the_writer_says_that_it_writes_eight(tmp_path: Path) -> None:
    levels = scene().astype(np.uint16) * 256 + 77
    image = pyvips.Image.new_from_array(levels).copy(interpretation="rgb16")
    for name in ("a.png", "a.tif"):
        image.write_to_file(str(tmp_path / name))
        photo = open_photo(tmp_path / name)
        assert photo.info.bit_depth == 16
        np.testing.assert_allclose(photo.read_rows(0, 22), levels / 65535, atol=1e-7)
        notes = copy(photo, tmp_path / "out" / name, resolve_format("auto", None, photo.info))
        assert notes == ["written with 8 bits per channel"]
        np.testing.assert_array_equal(pixels(tmp_path / "out" / name)[..., :3], np.rint(levels / 257))


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_becomes_rgb(tmp_path: Path, name: str) -> None:
    RGB.convert("CMYK").save(tmp_path / name)
    photo = open_photo(tmp_path / name)
    assert not photo.info.grey and not photo.info.alpha and photo.info.icc is None
    assert any("CMYK" in note for note in photo.notes)
    copy(photo, tmp_path / "out" / name, resolve_format("auto", None, photo.info))
    assert Image.open(tmp_path / "out" / name).mode == "RGB"
    white = Image.new("CMYK", (8, 8))
    white.save(tmp_path / name)
    assert open_photo(tmp_path / name).read_rows(0, 8).min() > 0.97


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


def test_what_lies_under_transparency_takes_the_colour_beside_it(tmp_path: Path) -> None:
    levels = np.zeros((33, 47, 4), np.uint8)
    levels[10:20, 12:30] = (200, 100, 50, 255)
    Image.fromarray(levels).save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    np.testing.assert_allclose(photo.read_rows(0, 33) * 255, np.broadcast_to([200, 100, 50], (33, 47, 3)), atol=1)
    alpha = photo.read_alpha(0, 33)
    assert alpha is not None
    np.testing.assert_array_equal(alpha * 255, levels[..., 3])


def test_visible_pixels_stay_and_each_side_takes_its_own_colour(tmp_path: Path) -> None:
    levels = np.zeros((16, 32, 4), np.uint8)
    levels[:, :8], levels[:, 24:] = (250, 0, 0, 255), (0, 0, 250, 1)
    Image.fromarray(levels).save(tmp_path / "a.png")
    rows = open_photo(tmp_path / "a.png").read_rows(0, 16) * 255
    np.testing.assert_allclose(rows[:, :8], np.broadcast_to([250, 0, 0], (16, 8, 3)), atol=1e-4)
    np.testing.assert_allclose(rows[:, 24:], np.broadcast_to([0, 0, 250], (16, 8, 3)), atol=1e-4)
    assert rows[:, 8:10, 0].min() > 240 and rows[:, 22:24, 2].min() > 240


def test_a_wholly_transparent_photo_is_left_alone(tmp_path: Path) -> None:
    levels = np.full((5, 7, 4), 90, np.uint8)
    levels[..., 3] = 0
    Image.fromarray(levels).save(tmp_path / "a.png")
    np.testing.assert_allclose(open_photo(tmp_path / "a.png").read_rows(0, 5) * 255, 90, atol=1e-4)


def test_jpeg_lays_alpha_over_white_and_says_so(tmp_path: Path) -> None:
    with_alpha().save(tmp_path / "a.png")
    notes = copy(open_photo(tmp_path / "a.png"), tmp_path / "out" / "a.jpg", "jpg")
    assert any("white" in note for note in notes)
    written = np.asarray(Image.open(tmp_path / "out" / "a.jpg")).astype(int)
    assert written[:5].min() > 250
    assert np.abs(written[13:] - scene()[13:]).max() <= 8
    half = (scene()[8:11].astype(int) * 128 + 255 * 127) / 255
    assert np.abs(written[8:11] - half).max() <= 8


def test_a_rich_palette_photo_is_quantised_closely(tmp_path: Path) -> None:
    """An upscaled palette photo holds many more than 256 colours and soft edges of transparency."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[0:96, 0:128] / 128
    rgb = np.stack([rows, cols, 1 - rows * cols], axis=2).astype(np.float32)
    alpha = (np.clip(np.hypot(rows - 0.4, cols - 0.5) * 6 - 1, 0, 1)).astype(np.float32)
    RGB.quantize(16).save(tmp_path / "a.png", transparency=2)
    info = open_photo(tmp_path / "a.png").info
    with PhotoWriter(tmp_path / "b.png", info, 128, 96, "png", 95) as writer:
        writer.write_strip(rgb + rng.normal(0, 0.01, rgb.shape).astype(np.float32), alpha)
    assert Image.open(tmp_path / "b.png").mode == "P"
    written = pixels(tmp_path / "b.png")
    levels = np.rint(alpha * 255)
    np.testing.assert_array_equal(written[..., 3] == 0, levels == 0)
    np.testing.assert_array_equal(written[..., 3] == 255, levels == 255)
    assert np.abs(written[..., 3] - levels).max() <= 16  # 254 becomes 238; 9 elsewhere
    assert np.abs(written[..., :3] - rgb * 255)[levels == 255].mean() < 8


@pytest.mark.parametrize(("target", "mode"), [("b.webp", "RGBA"), ("b.tif", "RGBA"), ("b.jpg", "RGB")])
def test_formats_without_palettes_say_so(tmp_path: Path, target: str, mode: str) -> None:
    RGB.quantize(16).save(tmp_path / "a.png", transparency=2)
    photo = open_photo(tmp_path / "a.png")
    notes = copy(photo, tmp_path / "out" / target, resolve_format("auto", Path(target), photo.info))
    assert any("full colour" in note for note in notes)
    assert Image.open(tmp_path / "out" / target).mode == mode


def test_gif_is_read_and_further_frames_are_told(tmp_path: Path) -> None:
    frames = [RGB.quantize(8), ImageOps.flip(RGB).quantize(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    photo = open_photo(tmp_path / "a.gif")
    assert photo.info.palette and "2 frames" in "".join(photo.notes)
    assert resolve_format("auto", None, photo.info) == "png"


def test_tiff_is_plain_deflate_readable_by_tifffile(tmp_path: Path) -> None:
    with_alpha().save(tmp_path / "a.png")
    copy(open_photo(tmp_path / "a.png"), tmp_path / "out" / "a.tif", "tiff")
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as tiff:
        page = tiff.pages.first
        assert page.shape == (22, 31, 4)
        assert page.tags["ExtraSamples"].value == (2,)
        assert "Software" not in page.tags and "DateTime" not in page.tags


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    with_alpha().save(tmp_path / "a.png", exif=exif(3), icc_profile=SRGB)
    photo = open_photo(tmp_path / "a.png")
    for name in ("b.png", "b.jpg", "b.webp", "b.tif"):
        written = []
        for strip in (1, 22):
            copy(photo, tmp_path / "out" / name, resolve_format("auto", Path(name), photo.info), strip)
            written.append((tmp_path / "out" / name).read_bytes())
        assert written[0] == written[1]


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for level in (10, 200):
        Image.new("RGB", (6, 6), (level,) * 3).save(path)
        photo = open_photo(path)
        np.testing.assert_allclose(photo.read_rows(0, 6) * 255, level, atol=1e-4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("format", "cut"), [("JPEG", 0.5), ("JPEG", 0.98), ("PNG", 0.5), ("PNG", 0.98), ("WEBP", 0.5), ("TIFF", 0.5)]
)
def test_a_truncated_photo_is_refused(tmp_path: Path, format: str, cut: float) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{format.lower()}"
    Image.fromarray(noise).save(path, format)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(InputError, match="damaged or cut short") as caught:
        open_photo(path)
    assert path.name in caught.value.message and caught.value.hint


def test_a_broken_checksum_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        open_photo(tmp_path / "a.png")


def test_other_bad_inputs_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is not a photo\n" * 5)
    (tmp_path / "numbers.jpg").write_text("2 2\n1 2\n3 4\n")
    (tmp_path / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (tmp_path / "folder.jpg").mkdir()
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb")
    expected = {
        "missing.jpg": "no such file",
        "folder.jpg": "is a folder",
        "empty.jpg": "is empty",
        "text.jpg": "not a photo",
        "numbers.jpg": "not a photo",
        "drawing.png": "not a photo",
        "float.tif": "samples are of type float",
    }
    for name, words in expected.items():
        with pytest.raises(InputError, match=words) as caught:
            open_photo(tmp_path / name)
        assert name in caught.value.message and caught.value.hint
        assert "\n" not in caught.value.message + caught.value.hint


def test_a_png_called_jpg_is_read_for_what_it_is(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.jpg", "PNG")
    assert open_photo(tmp_path / "a.jpg").info.format == "png"


def test_names() -> None:
    assert is_photo_name(Path("A.JPG")) and is_photo_name(Path("x/b.tiff")) and not is_photo_name(Path("notes.txt"))
    assert ".webp" in list_formats()


# ---------------------------------------------------------------- bad output


def info_of(tmp_path: Path) -> PhotoInfo:
    RGB.save(tmp_path / "a.png")
    return open_photo(tmp_path / "a.png").info


def test_an_exception_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    (tmp_path / "b.png").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer:
        writer.write_strip(np.zeros((4, 31, 3), np.float32), None)
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]
    assert (tmp_path / "b.png").read_bytes() == b"old"


def test_missing_rows_and_wrong_strips_are_refused(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    with pytest.raises(ValueError, match="4 of 22 rows"), PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as w:
        w.write_strip(np.zeros((4, 31, 3), np.float32), None)
    for strip, alpha in (((4, 30, 3), False), ((23, 31, 3), False), ((4, 31, 3), True)):
        with pytest.raises(ValueError), PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as w:
            w.write_strip(np.zeros(strip, np.float32), np.ones(strip[:2], np.float32) if alpha else None)
    assert os.listdir(tmp_path) == ["a.png"]


def test_values_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    with (
        pytest.raises(OutputError, match="not numbers"),
        PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer,
    ):
        writer.write_strip(np.full((22, 31, 3), np.nan, np.float32), None)
    assert os.listdir(tmp_path) == ["a.png"]


def test_format_limits_are_known_beforehand(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    for format, side in (("jpg", 65536), ("webp", 16384)):
        with pytest.raises(OutputError, match=str(side - 1)):
            PhotoWriter(tmp_path / "b", info, 10, side, format, 95)
        PhotoWriter(tmp_path / "b", info, 10, side - 1, format, 95)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    with pytest.raises(OutputError) as caught, PhotoWriter(tmp_path / "a.png" / "b.png", info, 31, 22, "png", 95):
        pass
    assert "b.png" in caught.value.message and caught.value.hint
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError), PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer:
        writer.write_strip(np.zeros((22, 31, 3), np.float32), None)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always-full device")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = info_of(tmp_path)
    with (
        pytest.raises(OutputError, match="No space"),
        PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        monkeypatch.setattr(writer, "_raw", full)
        writer.write_strip(np.zeros((22, 31, 3), np.float32), None)
    assert os.listdir(tmp_path) == ["a.png"]


def test_formats_are_resolved() -> None:
    info = PhotoInfo(4, 4, False, False, False, 8, "jpeg", None, None, None, None)
    assert resolve_format("auto", None, info) == "jpg"
    assert resolve_format("auto", Path("x.TIF"), info) == "tiff"
    assert resolve_format("auto", Path("folder.v2"), info) == "jpg"
    assert resolve_format("webp", Path("x"), info) == "webp"
    assert resolve_format("jpg", Path("x.jpeg"), info) == "jpg"
    with pytest.raises(UsageError, match="--format png"):
        resolve_format("png", Path("x.jpg"), info)
    with pytest.raises(UsageError, match="gif"):
        resolve_format("auto", Path("x.gif"), info)
    with pytest.raises(UsageError, match="unknown"):
        resolve_format("bmp", None, info)
