"""Photos in: every kind becomes the same float rows, what is hidden does no harm, and bad files are told apart."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageOps
from sample_photos import RGB, bomb, copy, exif, scene

from dreamsr_cli import photo_pixels
from dreamsr_cli.errors import InputError, OutputError
from dreamsr_cli.images import is_photo_name, list_formats, open_photo, read_info
from dreamsr_cli.photo_writer import resolve_format


def test_rows_are_the_pixels(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png")
    rows = photo.read_rows(3, 9)
    assert rows.dtype == np.float32 and rows.shape == (6, 31, 3)
    np.testing.assert_allclose(rows, scene()[3:9] / 255, atol=1e-7)
    assert photo.read_alpha(0, 5) is None
    with pytest.raises(ValueError, match="outside"):
        photo.read_rows(20, 23)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cmyk_with_alpha(tmp_path: Path, dtype: type[np.integer]) -> None:
    levels = np.zeros((8, 8, 5), dtype)
    levels[..., 1], levels[..., 4], levels[:4, :, 4] = np.iinfo(dtype).max, np.iinfo(dtype).max // 3, 0
    options: dict[str, Any] = {"extrasamples": ["unassalpha"], "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="separated", **options)
    photo = open_photo(tmp_path / "a.tif")
    assert photo.info.alpha and photo.info.bit_depth == 8 * np.dtype(dtype).itemsize
    alpha = photo.read_alpha(0, 8)
    assert alpha is not None
    np.testing.assert_allclose(alpha, np.where(np.arange(8) < 4, 0, 1 / 3)[:, None].repeat(8, 1), atol=1e-4)
    red, green, blue = photo.read_rows(0, 8)[6, 3]
    assert red > 0.7 and green < 0.3 and 0.3 < blue < 0.7


def test_gif_is_read_and_further_frames_are_told(tmp_path: Path) -> None:
    frames = [RGB.quantize(8), ImageOps.flip(RGB).quantize(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    photo = open_photo(tmp_path / "a.gif")
    assert photo.info.palette and "2 frames" in "".join(photo.notes)
    assert resolve_format("auto", None, photo.info) == "png"


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


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for level in (10, 200):
        Image.new("RGB", (6, 6), (level,) * 3).save(path)
        photo = open_photo(path)
        np.testing.assert_allclose(photo.read_rows(0, 6) * 255, level, atol=1e-4)


def test_a_png_called_jpg_is_read_for_what_it_is(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.jpg", "PNG")
    photo = open_photo(tmp_path / "a.jpg")
    assert photo.info.format == "png"
    assert photo.notes == ("it is a PNG file, whatever its name says",)
    RGB.save(tmp_path / "a.jpe", "JPEG")
    assert open_photo(tmp_path / "a.jpe").notes == ()


@pytest.mark.parametrize("name", ["caf\u00e9 \u65e5\u672c.png", "a[1].png", "n" * 251 + ".png", b"caf\xe9.png"])
def test_any_name_can_be_read(tmp_path: Path, name: str | bytes) -> None:
    path = tmp_path / (os.fsdecode(name) if isinstance(name, bytes) else name)
    data = io.BytesIO()
    RGB.save(data, "PNG")
    try:
        path.write_bytes(data.getvalue())
    except OSError:
        pytest.skip("this file system has no such names")
    np.testing.assert_allclose(open_photo(path).read_rows(0, 22), scene() / 255, atol=1e-7)


# ---------------------------------------------------------------- huge photos


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_spilled_photo_is_the_same_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int) -> None:
    rng = np.random.default_rng(orientation)
    levels = rng.integers(0, 255, (301, 75, 4), dtype=np.uint8)
    levels[20:290, 10:60, 3] = 0
    Image.fromarray(levels).save(tmp_path / "a.png", exif=exif(orientation))
    spill = tmp_path / "spill"
    kept = open_photo(tmp_path / "a.png", spill)
    assert not kept.pixels.spilled
    monkeypatch.setattr(photo_pixels, "IN_MEMORY", 100)
    monkeypatch.setattr(photo_pixels, "_AT_ONCE", 75 * 4 * 128)
    with open_photo(tmp_path / "a.png", spill) as photo:
        assert photo.pixels.spilled and os.listdir(spill) == []
        height = photo.info.height
        for top, bottom in ((0, height), (3, 40), (height - 1, height), (0, 1)):
            np.testing.assert_array_equal(photo.read_rows(top, bottom), kept.read_rows(top, bottom))
            alpha, expected = photo.read_alpha(top, bottom), kept.read_alpha(top, bottom)
            assert alpha is not None and expected is not None
            np.testing.assert_array_equal(alpha, expected)
    with pytest.raises(ValueError):
        photo.read_rows(0, 1)


def test_a_full_disk_is_told_while_spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RGB.save(tmp_path / "a.png")
    monkeypatch.setattr(photo_pixels, "IN_MEMORY", 100)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="no room for the decoded photo"):
        open_photo(tmp_path / "a.png", tmp_path / "file")

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space"):
        open_photo(tmp_path / "a.png", tmp_path)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"40000x40000 .*--max-pixels") as caught:
        open_photo(bomb(tmp_path / "a.png", 40_000))
    assert "--max-pixels 1600000000" in caught.value.hint
    with pytest.raises(InputError, match="allows \\(681\\)"):
        RGB.save(tmp_path / "b.png")
        open_photo(tmp_path / "b.png", max_pixels=681)
    assert open_photo(tmp_path / "b.png", max_pixels=682).info.width == 31


def test_headers_of_huge_photos_are_read_without_their_pixels(tmp_path: Path) -> None:
    info = read_info(bomb(tmp_path / "a.png", 90_000))
    assert (info.width, info.height, info.grey, info.bit_depth) == (90_000, 90_000, False, 8)
    RGB.save(tmp_path / "b.tif", exif=exif(6))
    assert read_info(tmp_path / "b.tif") == open_photo(tmp_path / "b.tif").info


def test_names() -> None:
    assert is_photo_name(Path("A.JPG")) and is_photo_name(Path("x/b.tiff")) and not is_photo_name(Path("notes.txt"))
    assert ".webp" in list_formats()
    assert not is_photo_name(Path(".DS_Store"))


@pytest.mark.parametrize("compression", ["zlib", None])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_tiled_compressed_and_big_tiffs(tmp_path: Path, compression: str | None, tile: tuple[int, int] | None) -> None:
    levels = scene(75, 61).astype(np.uint16) * 257
    options: Any = {"tile": tile, "compression": compression, "bigtiff": True, "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb", **options)
    np.testing.assert_allclose(open_photo(tmp_path / "a.tif").read_rows(0, 75), levels / 65535, atol=1e-7)


@pytest.mark.parametrize("compression", ["lzw", "jpeg", "packbits", "webp"])
def test_tiffs_of_other_programs(tmp_path: Path, compression: str) -> None:
    image = pyvips.Image.new_from_array(scene()).copy(interpretation="srgb")
    image.tiffsave(str(tmp_path / "a.tif"), compression=compression, tile=True, tile_width=16, tile_height=16, Q=95)
    tolerance = 0.01 if compression in ("lzw", "packbits") else 4
    assert np.abs(open_photo(tmp_path / "a.tif").read_rows(0, 22) * 255 - scene()).mean() < tolerance


def test_an_ultra_hdr_jpeg_is_read_as_a_jpeg(tmp_path: Path) -> None:
    bright = pyvips.Image.new_from_array(scene()).copy(interpretation="srgb").colourspace("scrgb") * 3
    bright.cast("float").copy(interpretation="scrgb").uhdrsave(str(tmp_path / "a.jpg"))
    assert pyvips.Image.new_from_file(str(tmp_path / "a.jpg")).get("vips-loader") == "uhdrload"
    photo = open_photo(tmp_path / "a.jpg")
    plain = pyvips.Image.jpegload(str(tmp_path / "a.jpg")).numpy()
    assert (photo.info.format, photo.info.bit_depth) == ("jpeg", 8)
    np.testing.assert_allclose(photo.read_rows(0, 22) * 255, plain, atol=1e-4)


def test_avif_of_ten_bits_is_read_in_full(tmp_path: Path) -> None:
    levels = scene().astype(np.uint16) * 257
    image = pyvips.Image.new_from_array(levels).copy(interpretation="rgb16")
    image.heifsave(str(tmp_path / "a.avif"), compression="av1", bitdepth=10, Q=95)
    photo = open_photo(tmp_path / "a.avif")
    assert (photo.info.format, photo.info.bit_depth, photo.notes) == ("avif", 16, ())
    assert np.abs(photo.read_rows(0, 22) - levels / 65535).max() < 0.03


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
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60))
    (tmp_path / "new.jxl").write_bytes(b"\xff\x0a" + bytes(60))
    (tmp_path / "boxed.jxl").write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60))
    expected = {
        "missing.jpg": "no such file",
        "folder.jpg": "is a folder",
        "empty.jpg": "is empty",
        "text.jpg": "not a photo",
        "numbers.jpg": "not a photo",
        "drawing.png": "not a photo",
        "float.tif": "samples are of type float",
        "phone.heic": "HEIC files can't be read here",
        "new.jxl": "JPEG XL files can't be read here",
        "boxed.jxl": "JPEG XL files can't be read here",
    }
    for name, words in expected.items():
        with pytest.raises(InputError, match=words) as caught:
            open_photo(tmp_path / name)
        assert name in caught.value.message and caught.value.hint
        assert "\n" not in caught.value.message + caught.value.hint
