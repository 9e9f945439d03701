"""Photos out: every kind comes back as its own kind, losses are told, and a failure leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image
from sample_photos import RGB, SRGB, copy, exif, pixels, scene, with_alpha

from dreamsr_cli.errors import OutputError, UsageError
from dreamsr_cli.images import PhotoInfo, open_photo
from dreamsr_cli.photo_writer import PhotoWriter, resolve_format

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
