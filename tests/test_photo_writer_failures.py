"""Photos out: interrupted writing goes on, and a failure leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import pyvips
from PIL import Image
from sample_photos import RGB, copy, scene

from dreamsr_cli.errors import OutputError
from dreamsr_cli.images import PhotoInfo, open_photo
from dreamsr_cli.photo_writer import PhotoWriter, check_canvas, resolve_format

# ---------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("name", ["b.png", "b.tif", "b.jpg"])
def test_rows_that_are_there_need_not_be_written_again(tmp_path: Path, name: str) -> None:
    levels = scene().astype(np.uint16) * 257
    pyvips.Image.new_from_array(levels).copy(interpretation="rgb16").write_to_file(str(tmp_path / "a.png"))
    photo = open_photo(tmp_path / "a.png")
    format = resolve_format("auto", Path(name), photo.info)
    copy(photo, tmp_path / "whole" / name, format)
    journal = tmp_path / "journal"
    journal.mkdir()
    raw, out = journal / "pixels.raw", tmp_path / name

    def writer(rows_done: int) -> PhotoWriter:
        return PhotoWriter(out, photo.info, 31, 22, format, 98, raw=raw, rows_done=rows_done)

    with pytest.raises(KeyboardInterrupt), writer(0) as first:
        first.write_strip(photo.read_rows(0, 9))
        first.write_strip(photo.read_rows(9, 11))
        raise KeyboardInterrupt
    assert raw.stat().st_size == 11 * first.row_bytes and not out.exists()
    with writer(9) as second:  # the rows after the ninth count as unfinished
        second.write_strip(photo.read_rows(9, 22))
    assert out.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    out.unlink()
    with writer(22):
        pass
    assert out.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    out.unlink()
    second.encode()
    assert out.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert os.listdir(journal) == ["pixels.raw"]


def test_a_raw_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    (tmp_path / "pixels.raw").write_bytes(bytes(31 * 3 * 4))
    raw = tmp_path / "pixels.raw"
    with (
        pytest.raises(OutputError, match="4 rows where 5"),
        PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95, raw=raw, rows_done=5),
    ):
        pass
    assert raw.stat().st_size == 31 * 3 * 4


# ---------------------------------------------------------------- bad output


def test_names_as_long_as_they_can_be(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    for name in ("n" * 251 + ".png", "\u65e5" * 83 + "nn.png"):
        with PhotoWriter(tmp_path / name, info, 31, 22, "png", 95) as writer:
            writer.write_strip(np.zeros((22, 31, 3), np.float32), None)
        assert Image.open(tmp_path / name).size == (31, 22)
    with (
        pytest.raises(OutputError, match="name is too long"),
        PhotoWriter(tmp_path / ("n" * 252 + ".png"), info, 31, 22, "png", 95) as writer,
    ):
        writer.write_strip(np.zeros((22, 31, 3), np.float32), None)
    assert len(os.listdir(tmp_path)) == 3


def test_a_canvas_of_too_many_pixels(tmp_path: Path) -> None:
    check_canvas(tmp_path, 50_000, 50_000, "png", None)
    with pytest.raises(OutputError, match=r"50001x50000 .*--max-pixels"):
        check_canvas(tmp_path, 50_001, 50_000, "png", None)
    with pytest.raises(OutputError, match="99"):
        check_canvas(tmp_path, 10, 10, "png", 99)
    check_canvas(tmp_path, 50_001, 50_000, "tiff", 10**10)
    with pytest.raises(OutputError, match="more than WEBP can hold"):
        check_canvas(tmp_path, 50_001, 50_000, "webp", 10**10)


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
    for format, side in (("jpg", 65536), ("webp", 16384), ("avif", 16385)):
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
        pytest.raises(OutputError, match="disk is full"),
        PhotoWriter(tmp_path / "b.png", info, 31, 22, "png", 95) as writer,
        open("/dev/full", "wb", buffering=0) as full,
    ):
        monkeypatch.setattr(writer, "_raw", full)
        writer.write_strip(np.zeros((22, 31, 3), np.float32), None)
    assert os.listdir(tmp_path) == ["a.png"]
