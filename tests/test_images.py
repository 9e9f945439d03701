"""Photos in: every kind becomes the same float rows, what is hidden does no harm, and bad files are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from sample_photos import RGB, copy, scene

from dreamsr_cli.errors import InputError
from dreamsr_cli.images import is_photo_name, list_formats, open_photo
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
    assert open_photo(tmp_path / "a.jpg").info.format == "png"


def test_names() -> None:
    assert is_photo_name(Path("A.JPG")) and is_photo_name(Path("x/b.tiff")) and not is_photo_name(Path("notes.txt"))
    assert ".webp" in list_formats()


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
