"""Photos out: every kind comes back as its own kind, losses are told, and a failure leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image
from sample_photos import RGB, SRGB, copy, exif, pixels, scene, with_alpha

from dreamsr_cli import photo_writer
from dreamsr_cli.errors import UsageError
from dreamsr_cli.images import PhotoInfo, open_photo
from dreamsr_cli.photo_writer import PhotoWriter, resolve_bit_depth, resolve_format

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
    "rgb.avif": (RGB, {"quality": 95}, "RGB"),
    "alpha.avif": (with_alpha(), {"quality": 95}, "RGBA"),
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
    tolerance = (
        8 if out.suffix in (".jpg", ".webp", ".avif") else 0
    )  # palettes of at most 64 colours fit the table exactly
    assert np.abs(after - before)[..., :3][visible].max() <= tolerance
    assert np.abs(after - before)[..., 3].max() == 0


def _as_rgb(levels_PQC: np.ndarray, bands: int) -> np.ndarray:
    return levels_PQC[..., :3] if bands >= 3 else levels_PQC[..., :1].repeat(3, axis=2)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_sixteen_bits_come_back_as_sixteen(tmp_path: Path, name: str, bands: int) -> None:
    levels = np.concatenate([scene(), scene()[..., :1]], axis=2).astype(np.uint16)[..., :bands] * 256 + 77
    kind = "rgb16" if bands > 2 else "grey16"
    pyvips.Image.new_from_array(levels).copy(interpretation=kind).write_to_file(str(tmp_path / name))
    photo = open_photo(tmp_path / name)
    assert (photo.info.bit_depth, photo.info.alpha, photo.info.grey) == (16, bands in (2, 4), bands < 3)
    np.testing.assert_allclose(photo.read_rows(0, 22), _as_rgb(levels, bands) / 65535, atol=1e-7)
    assert copy(photo, tmp_path / "out" / name, resolve_format("auto", None, photo.info)) == []
    back = pyvips.Image.new_from_file(str(tmp_path / "out" / name))
    assert back.format == "ushort"
    np.testing.assert_array_equal(back.numpy().reshape(levels.shape), levels)


def test_eight_bits_on_request_and_where_the_format_has_no_more(tmp_path: Path) -> None:
    levels = scene().astype(np.uint16) * 256 + 77
    pyvips.Image.new_from_array(levels).copy(interpretation="rgb16").write_to_file(str(tmp_path / "a.png"))
    photo = open_photo(tmp_path / "a.png")
    for name, asked in (("b.png", "8"), ("b.tif", "8"), ("b.jpg", "auto")):
        format = resolve_format("auto", Path(name), photo.info)
        notes = copy(photo, tmp_path / "out" / name, format, bit_depth=asked)
        assert notes == ["written with 8 bits per channel"]
        tolerance = 6 if name == "b.jpg" else 0
        assert np.abs(pixels(tmp_path / "out" / name)[..., :3] - np.rint(levels / 257)).max() <= tolerance


def test_sixteen_bits_on_request(tmp_path: Path) -> None:
    RGB.quantize(16).save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    notes = copy(photo, tmp_path / "out" / "b.png", "png", bit_depth="16")
    assert any("full colour" in note for note in notes)
    assert open_photo(tmp_path / "out" / "b.png").info.bit_depth == 16
    assert resolve_bit_depth("auto", "png", photo.info) == 8
    for format in ("jpg", "webp", "avif"):
        with pytest.raises(UsageError, match="--bit-depth 16"):
            resolve_bit_depth("16", format, photo.info)
    with pytest.raises(UsageError, match="--bit-depth 12"):
        resolve_bit_depth("12", "png", photo.info)


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
    assert resolve_format("auto", Path("x.avif"), info) == "avif"
    with pytest.raises(UsageError, match="gif"):
        resolve_format("auto", Path("x.gif"), info)
    with pytest.raises(UsageError, match="unknown"):
        resolve_format("bmp", None, info)


def test_a_large_palette_photo_becomes_full_colour_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RGB.quantize(16).save(tmp_path / "a.png")
    monkeypatch.setattr(photo_writer, "PALETTE_PIXELS", 31 * 22 - 1)
    notes = copy(open_photo(tmp_path / "a.png"), tmp_path / "out" / "a.png", "png")
    assert notes == ["written in full colour: too large for a palette"]
    assert Image.open(tmp_path / "out" / "a.png").mode == "RGB"
