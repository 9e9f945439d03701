"""weights.lock: rows, verification, refused pickles, remembered hashes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from dreamsr_cli import weights
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.weights import file_sha256, locate, lock_rows, verify, write_builtin
from dreamsr_cli.weights_lock import LockEntry, LockRow, load_lock, lock_entry, toml_row


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "vae").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    (folder / "vae" / "model.safetensors").write_bytes(bytes(range(256)) * 5)
    (folder / "README.md").write_text("card")
    (folder / ".DS_Store").write_text("x")
    return folder


def entry(folder) -> LockEntry:
    return LockEntry("mini", lock_rows(folder), bundled=True)


def test_rows_hold_every_file_but_the_card_and_hidden_ones(folder):
    rows = lock_rows(folder, "CC0-1.0")
    content = bytes(range(256)) * 5
    assert [row.path for row in rows] == ["bundle.json", "vae/model.safetensors"]
    assert rows[1] == LockRow("vae/model.safetensors", 1280, hashlib.sha256(content).hexdigest(), "CC0-1.0")


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_rows_of_nothing_are_an_error(tmp_path, make):
    if make == "empty":
        (tmp_path / "nothing").mkdir()
    with pytest.raises(WeightsError, match="nothing"):
        lock_rows(tmp_path / "nothing")


def test_verify_accepts_what_was_locked(folder):
    verify(folder, entry(folder))
    (folder / "README.md").write_text("another card")
    verify(folder, entry(folder))


def test_verify_sees_a_changed_byte_of_the_same_size(folder):
    locked = entry(folder)
    path = folder / "vae" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"model\.safetensors was altered"):
        verify(folder, locked)


def test_verify_sees_size_absence_and_additions(folder):
    locked = entry(folder)
    extra = folder / "vae" / "more.safetensors"
    extra.write_bytes(b"1")
    with pytest.raises(WeightsError, match=r"more\.safetensors is not listed"):
        verify(folder, locked)
    extra.unlink()
    (folder / "bundle.json").write_text("{ }")
    with pytest.raises(WeightsError, match="has 3 bytes, weights.lock says 2"):
        verify(folder, locked)
    (folder / "bundle.json").unlink()
    with pytest.raises(WeightsError, match=r"bundle\.json is missing"):
        verify(folder, locked)


def test_verify_of_an_empty_entry_is_an_error(folder):
    with pytest.raises(WeightsError, match="lists no file"):
        verify(folder, LockEntry("mini", (), bundled=True))


@pytest.mark.parametrize("name", ["a.bin", "vae/b.PT", "c.pth", "d.ckpt"])
def test_pickles_are_refused(folder, name):
    locked = entry(folder)
    (folder / name).write_bytes(b"\x80\x04.")
    for check in (lambda: verify(folder, locked), lambda: lock_rows(folder)):
        with pytest.raises(WeightsError, match="pickle"):
            check()


def test_hashes_are_remembered_until_the_file_changes(folder, own_cache):
    path = folder / "bundle.json"
    os.utime(path, (1_000_000, 1_000_000))
    first = file_sha256(path)
    assert first == hashlib.sha256(b"{}").hexdigest()
    store = own_cache / "hashes.json"
    store.write_text(store.read_text().replace(first, "0" * 64))
    assert file_sha256(path) == "0" * 64  # it was read from the cache
    os.utime(path, (1_000_001, 1_000_001))
    assert file_sha256(path) == first


def test_a_file_just_written_is_not_remembered(folder, own_cache):
    file_sha256(folder / "bundle.json")
    assert not (own_cache / "hashes.json").exists()


@pytest.mark.parametrize("content", ["", "no json", "[1]", '{"x": 1}'])
def test_a_broken_cache_is_only_slow(folder, own_cache, content):
    os.utime(folder / "bundle.json", (1_000_000, 1_000_000))
    own_cache.mkdir()
    (own_cache / "hashes.json").write_text(content)
    assert file_sha256(folder / "bundle.json") == hashlib.sha256(b"{}").hexdigest()


def test_writing_the_builtin_rows_keeps_the_rest(folder, tmp_path):
    path = tmp_path / "weights.lock"
    head = '# why\nformat = 1\n\n[entries."flux.1-dev"]\nrepository = "a/b"\nrevision = "c"\nfiles = []\n\n'
    tail = "\n[entries.other]\nbundled = true\nfiles = [\n]\n"
    path.write_text(head + "[entries.mini]\nbundled = true\nfiles = [\n  # old\n]\n" + tail)
    write_builtin(path, lock_rows(folder))
    text = path.read_text()
    assert text.startswith(head) and text.endswith(tail)
    assert lock_entry("mini", path) == entry(folder)
    assert load_lock(path)["flux.1-dev"].revision == "c"
    write_builtin(path, lock_rows(folder))
    assert path.read_text() == text


ROW = '{{path = "{path}", size = {size}, sha256 = "{sha}", licence = "MIT"}}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (ROW.format(path="../x", size=1, sha="0" * 64), "leaves its folder"),
        (ROW.format(path="/x", size=1, sha="0" * 64), "leaves its folder"),
        (ROW.format(path="x", size=-1, sha="0" * 64), "bad size"),
        (ROW.format(path="x", size=1, sha="0" * 63), "bad size or sha256"),
        (",".join([ROW.format(path="x", size=1, sha="0" * 64)] * 2), "listed twice"),
        ('{path = "x", size = 1}', "sha256.*missing"),
    ],
)
def test_bad_rows_are_refused(tmp_path, files, message):
    path = tmp_path / "weights.lock"
    path.write_text(f"format = 1\n[entries.mini]\nfiles = [{files}]\n")
    with pytest.raises(WeightsError, match=message):
        load_lock(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("format = 2\n[entries]\n", "format 2"), ("format = [", "not valid TOML"), ("[entries]\n", "format.*missing")],
)
def test_a_bad_lock_file_is_a_weights_error(tmp_path, text, message):
    path = tmp_path / "weights.lock"
    path.write_text(text)
    with pytest.raises(WeightsError, match=message):
        load_lock(path)
    with pytest.raises(WeightsError, match="can't read"):
        load_lock(tmp_path / "gone.lock")


def test_an_unknown_entry_names_the_known_ones():
    with pytest.raises(WeightsError) as caught:
        lock_entry("nothing")
    assert "mini" in caught.value.hint


def test_the_shipped_rows_are_those_of_the_built_in_model():
    assert lock_entry(weights.BUILTIN).files == lock_rows(weights.BUILTIN_FOLDER)
    assert lock_entry(weights.BUILTIN).bundled


def test_the_maintainer_command_says_what_it_needs():
    result = subprocess.run([sys.executable, "-m", "dreamsr_cli.weights"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "--lock-builtin" in result.stderr


# ---------------------------------------------------------------- sources that are fetched


def write_lock(path, folder, *, sha256=None, size=None, status=None, extra=""):
    """A lock file with the entry "far", its first row changed as asked."""
    rows = list(lock_rows(folder, "MIT"))
    first = rows[0]
    rows[0] = LockRow(
        first.path, size if size is not None else first.size, sha256 or first.sha256, "MIT", status or "two sources"
    )
    body = "\n".join(map(toml_row, rows))
    path.write_text(
        f'format = 1\n[entries.far]\nrepository = "a/b"\nrevision = "c0ffee"\n{extra}files = [\n{body}\n]\n'
    )
    return path


def test_locate_finds_and_checks_a_fetched_source(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMSR_LOCK", str(write_lock(tmp_path / "my.lock", folder)))
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "weights"))
    with pytest.raises(WeightsError, match="weights of far are not on this machine") as missing:
        locate("far", "use --captioner describe")
    assert missing.value.hint == "dreamsr fetch-weights far, or use --captioner describe"
    (tmp_path / "weights").mkdir()
    folder.rename(tmp_path / "weights" / "far")
    assert locate("far") == tmp_path / "weights" / "far"
    (tmp_path / "weights" / "far" / "bundle.json").write_text("[]")
    with pytest.raises(WeightsError, match="was altered") as altered:
        locate("far")
    assert altered.value.hint == "dreamsr fetch-weights far"


def test_weights_lie_in_the_cache_folder_by_default(own_cache, monkeypatch):
    monkeypatch.delenv("DREAMSR_WEIGHTS_DIR", raising=False)
    assert weights.weights_folder("far") == own_cache / "weights" / "far"
    assert weights.weights_folder(weights.BUILTIN) == locate(weights.BUILTIN) == weights.BUILTIN_FOLDER


@pytest.mark.parametrize("status", ["derived", "assumed"])
def test_a_mismatch_in_an_unsure_row_doubts_the_pin(folder, tmp_path, status):
    locked = lock_entry("far", write_lock(tmp_path / "my.lock", folder, status=status, sha256="0" * 64))
    with pytest.raises(WeightsError, match="the pin is in doubt") as caught:
        verify(folder, locked)
    assert status in caught.value.message and "0" * 64 in caught.value.message
    assert hashlib.sha256(b"{}").hexdigest() in caught.value.message


def test_a_mismatch_in_a_sure_row_speaks_against_the_file(folder, tmp_path):
    locked = lock_entry("far", write_lock(tmp_path / "my.lock", folder, status="one source", sha256="0" * 64))
    with pytest.raises(WeightsError, match="was altered"):
        verify(folder, locked)


def test_figures_that_nobody_has_published_are_not_compared(folder, tmp_path):
    path = write_lock(tmp_path / "my.lock", folder)
    text = path.read_text().replace("size = 2,", 'size = "not found",')
    path.write_text(text.replace(hashlib.sha256(b"{}").hexdigest(), "not found"))
    locked = lock_entry("far", path)
    assert locked.files[0] == LockRow("bundle.json", None, None, "MIT")
    assert toml_row(locked.files[0]) in path.read_text()
    (folder / "bundle.json").write_text("other")
    verify(folder, locked)
    (folder / "bundle.json").unlink()
    with pytest.raises(WeightsError, match=r"bundle\.json is missing"):
        verify(folder, locked)


def test_what_an_entry_says_about_itself(folder, tmp_path):
    extra = 'licence = "MIT"\ngated = true\nnote = "1 GB"\n'
    locked = lock_entry("far", write_lock(tmp_path / "my.lock", folder, extra=extra))
    assert (locked.licence, locked.gated, locked.note, locked.repository) == ("MIT", True, "1 GB", "a/b")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('licence = "MIT" }', 'licence = "MIT", status = "sure" }', "status 'sure'"),
        ("[entries.far]", '[entries."../far"]', "can't name a folder"),
        ('revision = "c0ffee"\n', "", "no repository and revision"),
        ("size = 2,", 'size = "unknown",', "size"),
    ],
)
def test_bad_entries_are_refused(folder, tmp_path, before, after, message):
    path = write_lock(tmp_path / "my.lock", folder)
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(WeightsError, match=message):
        load_lock(path)


def test_the_captioners_are_pinned():
    for name in ("llava-1.5-7b", "llava-onevision-0.5b"):
        entry = lock_entry(name)
        assert len(entry.revision or "") == 40 and entry.licence and not entry.bundled
        weighty = [row for row in entry.files if row.path.endswith(".safetensors")]
        assert weighty and all(row.sha256 for row in weighty)
        assert all(row.sha256 or row.status == "assumed" for row in entry.files)
