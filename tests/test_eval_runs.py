"""Runs of `dreamsr eval` on a tiny bundle: rows, resume after a kill, bad photos, comparisons, statistics."""

from __future__ import annotations

import csv
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
from dreamsr_cli.evaluation.compare import compare_runs, load_run
from dreamsr_cli.evaluation.rows import read_rows
from dreamsr_cli.evaluation.statistics import RESAMPLES, bootstrap_interval, paired_difference, summarise
from dreamsr_cli.models.bundle import Bundle


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DREAMSR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def make_pairs(folder: str, names: tuple[str, ...] = ("a", "b", "c"), width: int = 40, height: int = 32) -> Path:
    """Pairs at x2 in lq/ and hq/."""
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
        good = Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        for half, image in (("hq", good), ("lq", good.resize((width, height), Image.Resampling.BOX))):
            path = Path(folder, half, f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return Path(folder)


PLAIN = ["eval", "--dataset", "set", "--scale", "2", "--model", "none", "--metrics", "psnr,ssim", "-o", "run"]


def with_model(bundle: Path) -> list[str]:
    small = ["--tile", "96", "--overlap", "16", "--steps", "2", "--seed", "1"]
    chosen = ["--model", str(bundle), *small, "--metrics", "psnr,ssim,delta-e,seam"]
    return ["eval", "--dataset", "set", "--scale", "2", *chosen, "-o", "run"]


def rows_without_timings(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
        row.pop("peak_bytes")
    return rows


# ---------------------------------------------------------------- rows


def test_rows_carry_definitions_and_lie_in_jsonl_and_csv(capsys):
    make_pairs("set")
    assert run([*PLAIN, "--baseline", "bicubic", "--baseline", "lanczos"]) == 0
    rows = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["name"]) for r in rows] == [(m, n) for m in ("bicubic", "lanczos") for n in "abc"]
    for row in rows:
        assert set(row["values"]) == set(row["metrics"]) == {"psnr-rgb", "psnr-y", "ssim-rgb", "ssim-y"}
        for entry in row["metrics"].values():
            assert entry["definition"] and entry["variant"] and "weights_sha256" in entry
        assert row["seconds"] > 0 and row["peak_bytes"] > 2**20 and row["dataset"] == "set (3 photos)"
    table = list(csv.DictReader(Path("run/results.csv").read_text().splitlines()))
    assert len(table) == 6 and float(table[0]["psnr-y"]) == rows[0]["values"]["psnr-y"]
    summary = json.loads(Path("run/evaluation.json").read_text())
    values = [r["values"]["psnr-y"] for r in rows if r["method"] == "lanczos"]
    found = summary["summaries"]["lanczos"]["psnr-y"]
    assert found["mean"] == pytest.approx(np.mean(values)) and found["median"] == pytest.approx(np.median(values))
    assert found["low"] <= found["mean"] <= found["high"] and found["count"] == 3
    (difference,) = [d for d in summary["differences"] if d["metric"] == "psnr-y"]
    other = [r["values"]["psnr-y"] for r in rows if r["method"] == "bicubic"]
    assert difference["mean"] == pytest.approx(np.mean(other) - np.mean(values))
    out = capsys.readouterr().out
    assert "bicubic" in out and out.rstrip().endswith("run/report.html") and Path("run/report.html").is_file()
    assert Path("run/table.md").read_text().splitlines()[0] in out and "begin{" in Path("run/table.tex").read_text()


def test_the_bicubic_baseline_is_the_fields_and_lanczos_is_pillows():
    make_pairs("set", ("a",))
    assert run([*PLAIN, "--baseline", "bicubic", "--baseline", "lanczos", "-q"]) == 0
    photo = Image.open("set/lq/a.png")
    lanczos = np.asarray(photo.resize((80, 64), Image.Resampling.LANCZOS))
    assert (np.asarray(Image.open("run/sr/lanczos/a.png")) == lanczos).all()
    bicubic = np.asarray(Image.open("run/sr/bicubic/a.png")).astype(int)
    nearby = np.asarray(photo.resize((80, 64), Image.Resampling.BICUBIC)).astype(int)
    assert bicubic.shape == (64, 80, 3) and 0 < np.abs(bicubic - nearby).mean() < 6


def test_adding_a_metric_and_a_method_keeps_what_is_there():
    make_pairs("set")
    assert run([*PLAIN, "--baseline", "bicubic", "-q"]) == 0
    before = Path("run/results.jsonl").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in Path("run/sr").rglob("*.png")}
    assert run([*PLAIN, "--baseline", "bicubic", "-q"]) == 0
    assert Path("run/results.jsonl").read_text() == before
    more = [w if w != "psnr,ssim" else "psnr,ssim,delta-e" for w in PLAIN]
    assert run([*more, "--baseline", "bicubic", "--baseline", "lanczos", "-q"]) == 0
    rows = read_rows(Path("run/results.jsonl"))
    assert len(rows) == 6 and all("delta-e" in s.row.values for s in rows)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


def test_a_changed_photo_is_made_and_scored_again():
    make_pairs("set", ("a", "b"))
    assert run([*PLAIN, "-q"]) == 0
    before = {s.row.name: s.row.values["psnr-y"] for s in read_rows(Path("run/results.jsonl"))}
    make_pairs("other", ("b", "a"))
    shutil.copy("other/lq/a.png", "set/lq/a.png")
    shutil.copy("other/hq/a.png", "set/hq/a.png")
    assert run([*PLAIN, "-q"]) == 0
    after = {s.row.name: s.row.values["psnr-y"] for s in read_rows(Path("run/results.jsonl"))}
    assert after["b"] == before["b"] and after["a"] == before["b"] != before["a"]


# ---------------------------------------------------------------- bad photos


def test_bad_photos_are_listed_and_stop_nothing(capsys):
    make_pairs("set", tuple("abcde"))
    Path("set/lq/b.png").write_bytes(b"no picture")
    Image.new("RGB", (80, 60)).save("set/hq/c.png")
    Path("set/hq/d.png").unlink()
    assert run([*PLAIN, "--json"]) == 3
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    errors = {line["name"]: line["error"] for line in lines if "error" in line}
    assert (
        set(errors) == {"b", "c", "d"} and "sizes don't match" in errors["c"] and "hq/d.png is missing" in errors["d"]
    )
    assert [line["name"] for line in lines if "values" in line] == ["a", "e"]
    assert lines[-1]["summary"] and len(lines[-1]["failures"]) == 3 and "Traceback" not in err
    assert [s.row.name for s in read_rows(Path("run/results.jsonl"))] == ["a", "e"]
    for name in "ae":
        Path(f"set/lq/{name}.png").write_bytes(b"no picture")
    assert run([*PLAIN, "-q", "-o", "none"]) == 1


def test_an_equal_picture_has_no_psnr_but_is_no_failure(capsys):
    make_pairs("set", ("a", "b"))
    Path("mine").mkdir()
    shutil.copy("set/hq/a.png", "mine/a.png")
    shutil.copy("set/hq/a.png", "mine/b_x2.png")
    assert run([*PLAIN, "--baseline", "none", "--sr-dir", "me=mine", "--json", "-q"]) == 0
    first, second, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["values"]["psnr-y"] is None and "infinite" in first["reasons"]["psnr-y"]
    assert first["values"]["ssim-y"] == pytest.approx(1) and second["values"]["psnr-y"] < 20
    assert first["seconds"] is None and first["peak_bytes"] is None


def test_somebodys_results_of_another_size_or_missing_are_listed(capsys):
    make_pairs("set", ("a", "b", "c"))
    Path("mine").mkdir()
    shutil.copy("set/hq/a.png", "mine/a.png")
    Image.new("RGB", (80, 62)).save("mine/b.png")
    assert run([*PLAIN, "--sr-dir", "mine", "-q"]) == 3
    err = capsys.readouterr().err
    assert "80x62 pixels, expected 80x64" in err and "no result for c" in err
    assert {(s.row.method, s.row.name) for s in read_rows(Path("run/results.jsonl"))} == {
        ("mine", "a"),
        *(("bicubic", n) for n in "abc"),
    }


# ---------------------------------------------------------------- the folder


def test_another_job_in_the_same_folder_is_refused(capsys):
    make_pairs("set")
    make_pairs("set2")
    assert run([*PLAIN, "-q"]) == 0
    other = [w if w != "set" else "set2" for w in PLAIN]
    assert run(other) == 1 and "holds an evaluation of set" in capsys.readouterr().err
    wider = [w if w != "2" else "1" for w in PLAIN]
    assert run(wider) == 1 and "another scale (2.0, now 1.0)" in capsys.readouterr().err
    assert run([*other, "--restart", "-q"]) == 0


def test_a_torn_line_is_passed_over():
    make_pairs("set")
    assert run([*PLAIN, "-q"]) == 0
    path = Path("run/results.jsonl")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert len(read_rows(path)) == 1
    assert run([*PLAIN, "-q"]) == 0
    assert path.read_text() == whole


def test_killed_and_resumed_the_result_is_the_same(tiny_bundle):
    make_pairs("set", width=128, height=48)
    arguments = with_model(tiny_bundle)
    assert run([*arguments, "-q"]) == 0
    whole = rows_without_timings(Path("run/results.jsonl"))
    table = Path("run/table.md").read_text()
    assert len(whole) == 6 and whole[0]["values"]["seam"] is not None
    shutil.move("run", "whole")

    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    child = subprocess.Popen([sys.executable, "-m", "dreamsr_cli", *arguments, "-q"], env=environ)
    path = Path("run/results.jsonl")
    while child.poll() is None and (not path.exists() or not path.read_bytes().count(b"\n")):
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL and path.read_bytes().count(b"\n") < 6
    assert not Path("run/evaluation.json").exists()
    assert run([*arguments, "-q"]) == 0
    assert rows_without_timings(Path("run/results.jsonl")) == whole
    assert Path("run/table.md").read_text() == table
    for name in "abc":
        assert Path(f"run/sr/tiny/{name}.png").read_bytes() == Path(f"whole/sr/tiny/{name}.png").read_bytes()
    assert not list(Path("run").rglob("*.dreamsr")) and not list(Path("run").rglob("*.part"))


def test_networks_are_opened_once_for_all_photos(tiny_bundle, monkeypatch):
    make_pairs("set", width=48)
    opened = []
    whole = Bundle.open_restorer
    monkeypatch.setattr(Bundle, "open_restorer", lambda *a, **k: opened.append(1) or whole(*a, **k))
    arguments = with_model(tiny_bundle)
    assert run([*arguments, "-q"]) == 0 and len(opened) == 1
    # One result that is gone opens them again; where all are there nothing is opened.
    Path("run/sr/tiny/c.png").unlink()
    assert run([*arguments, "-q"]) == 0
    assert run([*arguments, "-q"]) == 0 and len(opened) == 2
    settings = ["--scale", "2", "--model", str(tiny_bundle), "--tile", "96", "--overlap", "16", "--steps", "2"]
    for name in "abc":
        assert run(["upscale", f"set/lq/{name}.png", *settings, "--seed", "1", "-o", "alone.png", "--overwrite"]) == 0
        assert Path(f"run/sr/tiny/{name}.png").read_bytes() == Path("alone.png").read_bytes()


def test_two_processes_do_not_share_a_folder(capsys):
    import fcntl

    make_pairs("set", ("a",))
    Path("run").mkdir()
    with Path("run/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(PLAIN) == 1
    assert "another process" in capsys.readouterr().err


# ---------------------------------------------------------------- runs against runs


def test_compare_gives_paired_differences_with_intervals(capsys):
    make_pairs("set", tuple("abcdef"))
    first = [w if w != "run" else "one" for w in PLAIN]
    second = [w if w != "run" else "two" for w in PLAIN]
    assert run([*first, "-q"]) == 0
    assert run([*second, "--baseline", "lanczos", "--limit", "5", "-q"]) == 0
    capsys.readouterr()
    assert run(["eval", "--compare", "one", "two", "--json"]) == 0
    out, err = capsys.readouterr()
    found = {d["metric"]: d for d in map(json.loads, out.splitlines())}
    rows = {side: {s.row.name: s.row.values for s in read_rows(Path(side, "results.jsonl"))} for side in ("one", "two")}
    one, two = ([rows[side][n]["ssim-y"] or 0.0 for n in "abcde"] for side in ("one", "two"))
    deltas = np.subtract(one, two)
    assert set(found) == {"psnr-rgb", "psnr-y", "ssim-rgb", "ssim-y"}
    assert found["ssim-y"]["mean"] == pytest.approx(np.mean(deltas)) and found["ssim-y"]["count"] == 5
    assert found["ssim-y"]["low"] <= found["ssim-y"]["mean"] <= found["ssim-y"]["high"]
    assert found["ssim-y"]["better"] == sum(d > 0 for d in deltas)
    assert "5 photos compared, 1 are not in both" in err
    assert run([*first, "--compare", "two", "-q"]) == 0
    summary = json.loads(Path("one/evaluation.json").read_text())
    assert "two: lanczos" in {d["second"] for d in summary["differences"]}


def test_figures_of_another_definition_or_other_photos_are_not_compared(capsys):
    make_pairs("set")
    assert run([*PLAIN, "-q"]) == 0
    cropped = [w if w != "run" else "cropped" for w in PLAIN]
    assert run([*cropped, "--crop-border", "4", "-q"]) == 0
    found = compare_runs(load_run(Path("run")), [load_run(Path("cropped"))])
    assert found.differences == ()
    assert run(["eval", "--compare", "run", "cropped"]) == 1
    assert "nothing could be compared" in capsys.readouterr().err
    text = Path("cropped/results.jsonl").read_text().replace("-crop4", "")
    Path("cropped/results.jsonl").write_text(text)
    found = compare_runs(load_run(Path("run")), [load_run(Path("cropped"))])
    assert found.differences == () and "psnr-y is defined differently in cropped: not compared" in found.notes
    make_pairs("set", ("c", "b", "a"))
    again = [w if w != "run" else "again" for w in PLAIN]
    assert run([*again, "-q"]) == 0
    found = compare_runs(load_run(Path("run")), [load_run(Path("again"))])
    assert {d.count for d in found.differences} == {1} and len(found.notes) == 1


# ---------------------------------------------------------------- statistics


def test_the_bootstrap_interval_is_seeded_and_covers():
    values = np.random.default_rng(0).normal(10, 2, 100).tolist()
    low, high = bootstrap_interval(values, 1, "a")
    assert (low, high) == bootstrap_interval(values, 1, "a") != bootstrap_interval(values, 2, "a")
    spread = 1.96 * np.std(values) / 10
    assert (low, high) == pytest.approx((np.mean(values) - spread, np.mean(values) + spread), abs=0.08)
    hits = 0
    for trial in range(200):
        drawn = np.random.default_rng(trial + 1).normal(0, 1, 30).tolist()
        low, high = bootstrap_interval(drawn, 0, trial)
        hits += low <= 0 <= high
    assert 180 <= hits <= 199
    assert RESAMPLES == 10_000 and summarise([3.0], 0) == summarise([3.0], 5)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([], 0)


def test_paired_differences_know_the_better_direction():
    first, second = {"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 2.0, "b": 1.0, "d": 0.0}
    up = paired_difference("psnr", False, ("x", first), ("y", second), 0)
    down = paired_difference("lpips", True, ("x", {"a": 1.0, "b": 1.0}), ("y", {"a": 2.0, "b": 1.5}), 0)
    assert up and (up.mean, up.count, up.better) == (0.0, 2, 1)
    assert down and (down.mean, down.better) == (-0.75, 2) and down.high < 0
    assert paired_difference("psnr", False, ("x", first), ("y", {"z": 1.0}), 0) is None
