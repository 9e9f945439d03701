"""The journal's files: what is written is read back, what is torn is noticed, and a journal belongs to one job."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from dreamsr_cli.errors import JournalError, OutputError
from dreamsr_cli.journal import Journal, journal_folder
from dreamsr_cli.journal_files import RowFile, Slots
from dreamsr_cli.multidiffusion import blend, slots_needed
from dreamsr_cli.tiling import make_grid

JOB = {"input_sha256": "abc", "steps": 3}


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_canvas_rows_and_crops_come_back(tmp_path) -> None:
    z_CHW = values(3, 10, 7)
    file = RowFile(tmp_path / "z", 10, 7, 3, create=True)
    file.write_rows(4, z_CHW[:, 4:])
    file.write_rows(0, z_CHW[:, :4])
    assert np.array_equal(file.rows(0, 10), z_CHW)
    assert np.array_equal(file.rows(3, 5), z_CHW[:, 3:5])
    assert np.array_equal(file.crop(2, 1, 5, 6), z_CHW[:, 2:7, 1:7])
    assert (tmp_path / "z").stat().st_size == 4 * 3 * 10 * 7
    with pytest.raises(OSError, match="shorter"):
        file.rows(9, 11)


def test_a_slot_counts_only_whole_and_for_its_step_and_tile(tmp_path) -> None:
    slots = Slots(tmp_path, 4, (2, 3, 3))
    slots.begin(7)
    assert not slots.holds(5)
    slots.put(5, values(2, 3, 3))
    assert slots.holds(5) and np.array_equal(slots[5], values(2, 3, 3))
    assert not slots.holds(1) and not slots.holds(9)
    again = Slots(tmp_path, 4, (2, 3, 3))
    again.begin(7)
    assert again.holds(5)
    again.begin(8)
    assert not again.holds(5)
    again.begin(7)
    with (tmp_path / "slots.f32").open("r+b") as file:
        file.seek(4 * 18 + 11)
        file.write(b"\x01")
    assert not again.holds(5)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(("size", "overlap"), [((128, 176), 16), ((130, 70), 32), ((400, 64), 32), ((64, 64), 0)])
def test_slots_are_never_overwritten_before_they_are_blended(tmp_path, batch, size, overlap) -> None:
    grid = make_grid(*size, 64, overlap)
    count = slots_needed(grid, batch)
    slots = Slots(tmp_path, count, (2, 8, 8))
    slots.begin(1)
    given = {tile.index: values(2, 8, 8) + tile.index for tile in grid.tiles}
    from dreamsr_cli.multidiffusion import blend_rows, finished_rows

    ready, bands = 0, []
    for tiles in grid.batches(batch):
        for tile in tiles:
            slots.put(tile.index, given[tile.index])
        finished = finished_rows(grid, tiles[-1].index + 1)
        if finished > ready:
            bands.append(blend_rows(grid, slots, ready, finished))
            ready = finished
    assert np.array_equal(np.concatenate(bands, 1), blend(grid, given))
    assert count <= len(grid.tiles)


def test_a_piece_goes_on_where_it_stopped_and_is_committed_by_a_rename(tmp_path) -> None:
    z_CHW = values(2, 6, 3)
    folder = tmp_path / "a.png.dreamsr"
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        piece = journal.piece("z", 1, (2, 6, 3))
        piece.append(z_CHW[:, :4])
        assert not journal.has("z")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        assert journal.resumed
        piece = journal.piece("z", 1, (2, 6, 3))
        assert piece.rows_done == 4
        piece.append(z_CHW[:, 4:])
        assert np.array_equal(piece.finish().rows(0, 6), z_CHW)
        assert journal.has("z")
        raise KeyboardInterrupt
    with Journal(folder, JOB, 0) as journal:
        assert journal.piece("z", 1, (2, 6, 3)).done
        assert journal.piece("other", 2, (2, 6, 3)).rows_done == 0
    assert not folder.exists()


def test_a_torn_progress_record_counts_as_nothing(tmp_path) -> None:
    folder = tmp_path / "a.png.dreamsr"
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        journal.set_progress(3, 40)
        raise KeyboardInterrupt
    record = (folder / "progress.bin").read_bytes()
    (folder / "progress.bin").write_bytes(record[:8] + b"\x99" + record[9:])
    with Journal(folder, JOB, 0) as journal:
        assert journal.progress(3) == 0


def test_after_a_power_cut_only_flushed_rows_count(tmp_path, monkeypatch) -> None:
    folder, z_CHW = tmp_path / "a.png.dreamsr", values(2, 6, 3)
    monkeypatch.setattr("dreamsr_cli.journal.SYNC_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        piece = journal.piece("z", 1, (2, 6, 3))
        piece.append(z_CHW[:, :2])
        monkeypatch.setattr("dreamsr_cli.journal.SYNC_SECONDS", 1e9)
        piece.append(z_CHW[:, 2:4])
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        assert journal.progress(1) == 4
        raise KeyboardInterrupt
    monkeypatch.setattr("dreamsr_cli.journal._boot_id", lambda: "another start of the machine")
    with Journal(folder, JOB, 0) as journal:
        piece = journal.piece("z", 1, (2, 6, 3))
        assert journal.resumed and piece.rows_done == 2
        piece.append(z_CHW[:, 2:])
        assert np.array_equal(piece.finish().rows(0, 6), z_CHW)


def test_another_job_leaves_the_journal_alone_and_says_what_differs(tmp_path) -> None:
    folder = tmp_path / "a.png.dreamsr"
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        journal.set_progress(1, 5)
        raise KeyboardInterrupt
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(JournalError, match="steps was 3, is 4") as error:
        Journal(folder, {**JOB, "steps": 4}, 0)
    assert "--restart" in error.value.hint
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with Journal(folder, {**JOB, "steps": 4}, 0, restart=True) as journal:
        assert not journal.resumed and journal.progress(1) == 0


def test_two_processes_cannot_share_a_journal(tmp_path) -> None:
    folder = tmp_path / "a.png.dreamsr"
    with Journal(folder, JOB, 0), pytest.raises(JournalError, match="another process is working on a.png"):
        Journal(folder, JOB, 0)
    assert not folder.exists()


def test_without_resume_nothing_is_left_and_nothing_is_found(tmp_path) -> None:
    folder = tmp_path / "a.png.dreamsr"
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0, keep=False) as journal:
        journal.set_progress(1, 5)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_failure_before_any_work_leaves_no_folder(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "a.png.dreamsr", JOB, 0):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_told_before_the_start(tmp_path) -> None:
    with pytest.raises(OutputError, match="GiB free"):
        Journal(tmp_path / "a.png.dreamsr", JOB, 2**60)


def test_a_disk_that_fills_up_leaves_a_journal_that_resumes(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "a.png.dreamsr"
    real, room = os.pwrite, [3]

    def pwrite(fd: int, data, offset: int) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="disk is full") as error, Journal(folder, JOB, 0) as journal:
        piece = journal.piece("z", 1, (2, 6, 3))
        for row in range(6):
            piece.append(values(2, 1, 3) + row)
    assert "same command again" in error.value.hint
    monkeypatch.setattr(os, "pwrite", real)
    with Journal(folder, JOB, 0) as journal:
        assert journal.piece("z", 1, (2, 6, 3)).rows_done == 1


def test_prompts_and_plan_are_made_once(tmp_path) -> None:
    folder = tmp_path / "a.png.dreamsr"
    with pytest.raises(KeyboardInterrupt), Journal(folder, JOB, 0) as journal:
        assert journal.text(lambda: {"global": "första"}) == {"global": "första"}
        journal.set_progress(1, 1)
        raise KeyboardInterrupt
    with Journal(folder, JOB, 0) as journal:
        assert journal.text(lambda: {"global": "another"}) == {"global": "första"}


def test_names_at_the_file_systems_limit(tmp_path) -> None:
    for name in ("a" * 251 + ".png", "é" * 125 + ".png"):
        folder = journal_folder(tmp_path / name)
        assert len(os.fsencode(folder.name)) <= 255 and folder.name.endswith(".dreamsr")
        folder.mkdir()
    assert journal_folder(Path("b/x.png")) == Path("b/x.png.dreamsr")
