"""`dreamsr degrade` as a person types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.degrade import degrade_settings
from dreamsr_cli.errors import ConfigError


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        photo(f"in/p{i}.png", seed=i)


def photo(name: str, width: int = 96, height: int = 80, seed: int = 0) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def content(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def two_lines(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  try: ")


SMALL = ["--size", "32", "--crops", "2"]


def test_a_set_its_json_and_its_second_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["degrade", "in", "-o", "out", *SMALL, "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    *photos, summary = map(json.loads, out.splitlines())
    assert err == "" and [line["pairs"] for line in photos] == [[f"p{i}_0000", f"p{i}_0001"] for i in range(3)]
    assert (summary["made"], summary["kept"], summary["failed"]) == (6, 0, 0) and summary["captions"] is None
    assert summary["params"] == "out/params.jsonl"
    before = content("out")
    assert set(before) == {
        "params.jsonl",
        *(f"{s}/p{i}_000{c}.png" for s in ("lq", "hq") for i in range(3) for c in "01"),
    }
    assert run(["degrade", "in", "-o", "out", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out == "out/params.jsonl\n" and "6 kept" in err and content("out") == before


def test_flags_reach_the_pairs() -> None:
    flags = ["--preset", "seesr-mild", "--usm", "on", "--scale", "2", "--seed", "9", "--captioner", "describe"]
    assert run(["degrade", "in", "-o", "out", *SMALL, *flags, "-q"]) == 0
    record = json.loads(Path("out/params.jsonl").read_text().splitlines()[0])
    assert record["settings"] == {
        "kind": "pixel", "preset": "seesr-mild", "scale": 2, "seed": 9, "size": 32, "sharpen": True, "small": "skip",
        "captioner": "describe", "model": None,
    }  # fmt: skip
    assert record["pixel"]["sharpen"] and record["pixel"]["scale"] == 2
    assert Image.open("out/lq/p0_0000.png").size == (16, 16)
    assert len(Path("out/captions.jsonl").read_text().splitlines()) == 6


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["degrade", "in", "-o", "out", *SMALL, "-q"]) == 0
    shutil.move("in/p1.png", "in/other.png")
    assert run(["degrade", "in", "-o", "again", "--replay", "out/params.jsonl", "-q"]) == 0
    assert content("again") == content("out")
    Path("in/p2.png").unlink()
    lines = Path("out/params.jsonl").read_text()
    Path("altered.jsonl").write_text(lines.replace('"torch": "', '"torch": "1.'))
    capsys.readouterr()
    assert run(["degrade", "in", "-o", "part", "--replay", "altered.jsonl"]) == 3
    err = capsys.readouterr().err
    assert "p2.png" in err and "is not among the photos" in err and "bytes may differ" in err
    assert len(content("part")) == 9
    Path("altered.jsonl").write_text(lines.replace('"lq_sha256": "', '"lq_sha256": "0'))
    assert run(["degrade", "in", "-o", "part2", "--replay", "altered.jsonl", "-q"]) == 3
    assert "pair p0_0000 differs from the record" in capsys.readouterr().err


def test_bad_photos_are_named_and_stop_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in/cut.png").write_bytes(Path("in/p0.png").read_bytes()[:700])
    Path("in/text.jpg").write_text("no photo")
    photo("in/tiny.png", 24, 200)
    shutil.copy("in/p0.png", "in/zcopy.png")
    assert run(["degrade", "in", "missing.png", "-o", "out", *SMALL, "--json"]) == 3
    out, err = capsys.readouterr()
    lines = {line.get("input", "set"): line for line in map(json.loads, out.splitlines())}
    assert {name for name, line in lines.items() if "error" in line} == {"in/cut.png", "in/text.jpg", "missing.png"}
    assert all(line["hint"] and line["exit_code"] == 1 for line in lines.values() if "error" in line)
    assert "below --size 32" in lines["in/tiny.png"]["skipped"]
    assert lines["in/zcopy.png"]["skipped"] == "a copy of in/p0.png"
    assert (lines["set"]["made"], lines["set"]["failed"]) == (6, 3)
    assert err.count("error: ") == 3 and "Traceback" not in err
    assert run(["degrade", "in/tiny.png", "-o", "small", *SMALL, "--small", "shrink", "-q"]) == 0
    assert Image.open("small/hq/tiny_0000.png").size == (24, 32)


def test_only_bad_photos_are_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in/text.jpg").write_text("no photo")
    assert run(["degrade", "in/text.jpg", "-o", "out"]) == 1
    assert "not a photo" in capsys.readouterr().err and not Path("out").exists()
    Path("in/text.jpg").unlink()
    assert run(["degrade", "in", "-o", "out", "-q"]) == 1
    assert two_lines(err := capsys.readouterr().err) and "no photo gives a pair" in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--kind", "video"],
        ["--preset", "strong"],
        ["--usm", "maybe"],
        ["--small", "grow"],
        ["--captioner", "poet"],
        ["--size", "30"],
        ["--scale", "9"],
        ["--crops", "0"],
        ["--workers", "0"],
        ["--kind", "texture", "--preset", "bicubic"],
        ["--kind", "texture", "--workers", "2"],
        ["--device", "cpu"],
        ["--batch", "2"],
        ["--replay", "p.jsonl", "--seed", "1"],
    ],
)
def test_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text("")
    assert run(["degrade", "in", "-o", "out", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and two_lines(err) and not Path("out").exists()


def test_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["degrade", "in", "-o", "out", *SMALL, "-q"]) == 0
    assert run(["degrade", "in", "-o", "out", "--size", "16", "-q"]) == 1
    assert two_lines(err := capsys.readouterr().err) and "other settings" in err and "--overwrite" in err
    assert run(["degrade", "in", "-o", "out", "--size", "16", "--overwrite", "-q"]) == 0
    assert run(["degrade", "in", "-o", "new", "--size", "16", "-q"]) == 0
    assert content("out") == content("new")


def test_whole_photos_for_evaluation() -> None:
    assert run(["degrade", "in", "-o", "out", "--size", "0", "--preset", "bicubic", "-q"]) == 0
    assert sorted(os.listdir("out/lq")) == sorted(os.listdir("out/hq")) == ["p0.png", "p1.png", "p2.png"]
    assert np.array_equal(np.asarray(Image.open("out/hq/p1.png")), np.asarray(Image.open("in/p1.png")))
    assert Image.open("out/lq/p1.png").size == (24, 20)


def test_texture_kind(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--kind", "texture", "--size", "32", "--model", str(tiny_bundle), "--device", "cpu", "--precision", "fp32"]
    assert run(["degrade", "in", "-o", "out", *flags, "--batch", "2", "-q"]) == 0
    record = json.loads(Path("out/params.jsonl").read_text().splitlines()[0])
    assert record["pixel"] is None and 0.3 <= record["texture"]["strength"] <= 0.5
    assert record["settings"]["model"]["batch"] == 2 and record["settings"]["scale"] == 1
    replay = ["--replay", "out/params.jsonl", "--model", str(tiny_bundle), "--device", "cpu"]
    assert run(["degrade", "in", "-o", "again", *replay, "-q"]) == 0
    assert content("again") == content("out") and len(content("out")) == 8
    capsys.readouterr()


# ---------------------------------------------------------------- a process of its own


def start(*arguments: str) -> subprocess.Popen[str]:
    code = "import sys; from dreamsr_cli.cli.app import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip


def wait_for_pairs(process: subprocess.Popen[str], part: Path, pairs: int) -> None:
    deadline = time.monotonic() + 120
    while not part.exists() or part.read_bytes().count(b"\n") <= pairs:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_bytes(how: signal.Signals) -> None:
    """Ctrl-C reaches the whole group of processes, the others the first alone."""
    flags = ["--size", "64", "--crops", "100", "--workers", "2"]
    process = start("degrade", "in", "-o", "out", *flags)
    wait_for_pairs(process, Path("out/params.jsonl.part"), 20)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    stopped = time.monotonic()
    _, err = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 130 and time.monotonic() - stopped < 20
        assert err.splitlines()[-1] == "interrupted: finished pairs are kept; the same command goes on"
        assert "Traceback" not in err
    assert not Path("out/params.jsonl").exists()
    assert run(["degrade", "in", "-o", "out", *flags[:-2], "--workers", "1", "-q"]) == 0
    assert run(["degrade", "in", "-o", "whole", *flags[:-2], "--workers", "1", "-q"]) == 0
    assert content("out") == content("whole") and len(content("out")) == 601


def test_settings_from_file_environment_and_flags(tmp_path):
    (tmp_path / "dreamsr.toml").write_text('[degrade]\npreset = "bicubic"\ncrops = 3\nseed = 1\n', encoding="utf-8")
    names = dict.fromkeys(("preset", "crops", "seed", "model", "device", "precision", "size"))
    assert degrade_settings(names, {}, tmp_path) == {"preset": "bicubic", "crops": 3, "seed": 1}
    given = degrade_settings({**names, "crops": 5}, {"DREAMSR_SEED": "7"}, tmp_path)
    assert given == {"preset": "bicubic", "crops": 5, "seed": 7}
    for line, words in (("cropz = 3", "unknown key 'cropz'"), ('crops = "3"', "crops = '3'")):
        (tmp_path / "dreamsr.toml").write_text(f"[degrade]\n{line}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            degrade_settings(names, {}, tmp_path)
