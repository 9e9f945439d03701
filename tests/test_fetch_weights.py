"""`dreamsr fetch-weights` against a hub on the loopback interface: what arrives, what is refused, and what is said."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, HubState, running_hub

from dreamsr_cli.cli.app import run
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.weights import locate
from dreamsr_cli.weights_lock import LockEntry, LockRow, load_lock, write_entry

BIG = bytes(range(256)) * 4096
FILES = {"unet/model.safetensors": BIG, "unet/config.json": b'{"width": 4}', "merges.txt": b"a b\n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubState]:
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The library writes what it received in pieces of 10 MB; here a file has one.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    with running_hub() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        source = tmp_path / "source"
        for name, data in FILES.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        state.add("us/thing", source)
        yield state


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., LockEntry]:
    """Writes an entry "thing" into a weights.lock of the test's own; keywords change the entry or, as (path, field),
    one row."""
    path = tmp_path / "weights.lock"
    monkeypatch.setenv("DREAMSR_LOCK", str(path))

    def make(rows: dict[str, dict] | None = None, **options: object) -> LockEntry:
        path.write_text("format = 1\n\n[entries.thing]\nfiles = [\n]\n", encoding="utf-8")
        files = []
        for name, data in sorted(FILES.items()):
            fields: dict[str, Any] = {
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "status": "two sources",
            }
            files.append(LockRow(path=name, licence="MIT", **{**fields, **(rows or {}).get(name, {})}))
        plain: dict[str, Any] = {"repository": "us/thing", "revision": COMMIT, "licence": "MIT", **options}
        write_entry(
            path, LockEntry(name="thing", files=tuple(files) if plain.get("repository") or rows else (), **plain)
        )
        return load_lock()["thing"]

    return make


def have(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "weights" / "thing"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_arrives_and_is_found(
    hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lock()
    assert run(["fetch-weights", "thing", "--json"]) == 0
    shown = capsys.readouterr()
    line = json.loads(shown.out)
    assert line["state"] == "ready" and line["fetched"] == sum(map(len, FILES.values()))
    assert "licence MIT" in shown.err and "GB free" in shown.err
    assert have(tmp_path) == FILES
    assert locate("thing") == tmp_path / "weights" / "thing"
    asked = len(hub.requests)
    assert run(["fetch-weights", "thing"]) == 0
    assert len(hub.requests) == asked, "files that are there were asked for again"


def test_dry_run_and_list_fetch_nothing(
    hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lock()
    assert run(["fetch-weights", "thing", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to_fetch"] == sum(map(len, FILES.values()))
    assert run(["fetch-weights", "--list"]) == 0
    assert "missing" in capsys.readouterr().out
    assert not hub.requests and not (tmp_path / "weights").exists()


def test_a_cut_download_goes_on_by_range(
    hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lock()
    hub.cut_after["unet/model.safetensors"] = [300_000] * 12
    assert run(["fetch-weights", "thing"]) in (0, 1)
    hub.cut_after.clear()
    assert run(["fetch-weights", "thing"]) == 0
    assert have(tmp_path) == FILES
    spans = hub.sent("unet/model.safetensors")
    assert any(span and span.startswith("bytes=") and span != "bytes=0-" for span in spans)
    assert sum(span is None for span in spans) == 1, "began at zero more than once"


def test_a_killed_download_goes_on(hub: HubState, lock: Callable, tmp_path: Path) -> None:
    lock()
    hub.cut_after["unet/model.safetensors"] = [500_000]
    folder = tmp_path / "weights" / "thing" / "unet"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(BIG[:123_456])
    assert run(["fetch-weights", "thing"]) == 0
    assert have(tmp_path) == FILES
    assert hub.sent("unet/model.safetensors")[0] == "bytes=123456-"


def test_wrong_bytes_in_a_part_are_not_kept(hub: HubState, lock: Callable, tmp_path: Path) -> None:
    lock()
    folder = tmp_path / "weights" / "thing" / "unet"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"x" * 1000)
    assert run(["fetch-weights", "thing"]) == 0
    assert have(tmp_path) == FILES


def test_wrong_hash_of_a_sure_row_fails_closed(
    hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    entry = lock()
    hub.altered["unet/model.safetensors"] = BIG[:-1] + b"!"
    hub.late["unet/config.json"] = 1.0
    assert run(["fetch-weights", "thing"]) == 1
    error = capsys.readouterr().err
    assert "unet/model.safetensors is not the file" in error and entry.files[-1].sha256 in error
    rest = {name: data for name, data in FILES.items() if name != "unet/model.safetensors"}
    assert have(tmp_path) == rest, "a download under way was left half done, or goes on by itself"


def test_unsure_pin_shows_both_hashes_and_can_be_accepted(
    hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lock({"merges.txt": {"sha256": "ab" * 32, "status": "derived"}, "unet/config.json": {"sha256": None, "size": None}})
    assert run(["fetch-weights", "thing"]) == 1
    error = capsys.readouterr().err
    assert "pin is in doubt" in error and "ab" * 32 in error
    assert hashlib.sha256(FILES["merges.txt"]).hexdigest() in error
    assert run(["fetch-weights", "thing", "--accept-doubtful"]) == 0
    assert locate("thing")
    (tmp_path / "weights" / "thing" / "merges.txt").write_bytes(b"other\n")
    assert run(["fetch-weights", "thing", "--verify"]) == 1, "another change passed as accepted"


def test_damage_is_found_by_verify_and_mended(
    hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lock()
    assert run(["fetch-weights", "thing"]) == 0
    path = tmp_path / "weights" / "thing" / "unet" / "model.safetensors"
    before = path.stat()
    path.write_bytes(b"!" + BIG[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(["fetch-weights", "thing", "--verify", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "altered"
    assert run(["fetch-weights", "thing", "--verify"]) == 0
    assert have(tmp_path) == FILES


@pytest.mark.parametrize(("token", "words"), [(None, "no valid token"), ("wrong", "has not accepted")])
def test_gate(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture, token: str | None, words: str) -> None:
    lock(gated=True)
    hub.repositories["us/thing"].gated = True
    hub.repositories["us/thing"].accepted_tokens = ("right",)
    assert run(["fetch-weights", "thing", *(["--token", token] if token else [])]) == 1
    error = capsys.readouterr().err
    assert words in error and f"{hub.address}/us/thing" in error
    assert run(["fetch-weights", "thing", "--token", "right"]) == 0


def test_what_isnt_there(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture) -> None:
    lock(revision="f" * 40)
    assert run(["fetch-weights", "thing"]) == 1
    assert "no revision" in capsys.readouterr().err
    lock(repository="us/nothing")
    assert run(["fetch-weights", "thing"]) == 1
    assert "knows no repository" in capsys.readouterr().err
    lock()
    del hub.repositories["us/thing"].files["merges.txt"]
    assert run(["fetch-weights", "thing"]) == 1
    assert "merges.txt is not there" in capsys.readouterr().err
    lock({"merges.txt": {"size": 5}})
    hub.repositories["us/thing"].files["merges.txt"] = b"123456"
    assert run(["fetch-weights", "thing"]) == 1
    assert "6 bytes there, weights.lock says 5" in capsys.readouterr().err


def test_no_network(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture) -> None:
    lock()
    assert run(["fetch-weights", "thing", "--mirror", "http://127.0.0.1:9"]) == 1
    assert "can't be reached" in capsys.readouterr().err


def test_offline_with_and_without_the_files(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture) -> None:
    lock()
    assert run(["fetch-weights", "thing", "--offline"]) == 1
    assert "not found on this disk" in capsys.readouterr().err
    assert run(["fetch-weights", "thing"]) == 0
    asked = len(hub.requests)
    assert run(["fetch-weights", "thing", "--offline", "--verify"]) == 0
    assert len(hub.requests) == asked


def test_from_folder(hub: HubState, lock: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lock()
    assert run(["fetch-weights", "thing", "--from-folder", str(tmp_path / "source")]) == 0
    assert have(tmp_path) == FILES and not hub.requests
    other = tmp_path / "other" / "unet"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(BIG[:-1] + b"!")
    (tmp_path / "weights" / "thing" / "unet" / "model.safetensors").unlink()
    assert run(["fetch-weights", "thing", "--from-folder", str(tmp_path / "other")]) == 1
    assert "is not what weights.lock says" in capsys.readouterr().err


def test_small_disk_is_said_before_the_start(
    hub: HubState, lock: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    lock({"unet/model.safetensors": {"size": 10**15}})
    assert run(["fetch-weights", "thing"]) == 1
    assert "GB are needed" in capsys.readouterr().err
    assert not hub.requests


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_full_disk_while_fetching(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    lock()
    folder = tmp_path / "weights" / "thing"
    folder.mkdir(parents=True)
    (folder / "merges.txt.part").symlink_to("/dev/full")
    assert run(["fetch-weights", "thing"]) == 1
    assert "disk is full" in capsys.readouterr().err


def test_unknown_and_unpublished_names(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture) -> None:
    lock(repository=None, revision=None, note="train it")
    assert run(["fetch-weights", "nothing"]) == 2
    assert "no entry 'nothing'" in capsys.readouterr().err
    assert run(["fetch-weights", "thing"]) == 1
    error = capsys.readouterr().err
    assert "thing is not published" in error and "train it" in error


def test_repin_writes_what_the_hub_says(hub: HubState, lock: Callable, capsys: pytest.CaptureFixture) -> None:
    lock({name: {"sha256": "cd" * 32, "status": "derived"} for name in FILES})
    assert run(["fetch-weights", "thing", "--lock"]) == 0
    assert {r.path: r.sha256 for r in load_lock()["thing"].files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }
    assert run(["fetch-weights", "thing"]) == 0


def test_stopped_from_outside_it_keeps_what_arrived(
    hub: HubState, lock: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = BIG * 26
    hub.repositories["us/thing"].files["unet/model.safetensors"] = large
    lock({"unet/model.safetensors": {"size": len(large), "sha256": hashlib.sha256(large).hexdigest()}})
    hub.slow = 0.002
    command = [sys.executable, "-m", "dreamsr_cli", "fetch-weights", "thing"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    part = tmp_path / "weights" / "thing" / "unet" / "model.safetensors.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 130
    arrived = part.stat().st_size
    assert 0 < arrived < len(large)
    hub.slow = 0.0
    assert run(["fetch-weights", "thing"]) == 0
    assert hub.sent("unet/model.safetensors")[-1] == f"bytes={arrived}-"
    assert have(tmp_path)["unet/model.safetensors"] == large


def test_a_row_may_lie_at_an_address_of_its_own(hub: HubState, lock: Callable, tmp_path: Path) -> None:
    lock({name: {"url": f"{hub.address}/storage/us/thing/{name}"} for name in FILES}, repository=None, revision=None)
    assert run(["fetch-weights", "thing"]) == 0
    assert have(tmp_path) == FILES
    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_pickles_only_by_their_hash(hub: HubState, lock: Callable, tmp_path: Path) -> None:
    lock()
    assert run(["fetch-weights", "thing"]) == 0
    (tmp_path / "weights" / "thing" / "extra.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match="pickle"):
        locate("thing")
