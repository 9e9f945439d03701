"""Never lose a run: SIGKILL and SIGTERM in real processes, a resume that knows its own settings, the last run found."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_data import save_photos

from dreamsr_cli.cli.app import run as dreamsr

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def given(tiny_bundle, tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    data = save_photos(tmp_path / "photos")
    return {"stage": "joint", "steps": 8, "bundle": str(tiny_bundle), "data": str(data), "out": str(tmp_path / "run")}


def child(given: dict) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(TESTS / "training_child.py"), json.dumps(given)], env=environment())


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def steps_done(given: dict) -> int:
    diary = Path(given["out"] + ".steps")
    return len(diary.read_text().splitlines()) if diary.is_file() else 0


def wait_for_step(process: subprocess.Popen, given: dict, step: int) -> None:
    limit = time.monotonic() + 120
    while steps_done(given) < step and process.poll() is None:
        assert time.monotonic() < limit, "the child makes no progress"
        time.sleep(0.005)


def parameters(out: str, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(out, f"checkpoint-{step}").glob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["joint", "backbone"])
def test_killed_at_random_moments_and_resumed_the_bytes_are_the_same(given, stage) -> None:
    whole = {**given, "stage": stage, "out": given["out"] + "-whole"}
    assert child(whole).wait() == 0
    parts = {**given, "stage": stage, "out": given["out"] + "-parts"}
    chance, kills = random.Random(5), 0
    while True:
        process = child(parts)
        before = steps_done(parts)
        wait_for_step(process, parts, before + chance.randint(1, 4))
        time.sleep(chance.random() * 0.1)  # in the middle of something
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        parts["resume"] = Path(parts["out"], "run.json").is_file()
        if kills == 3:
            assert child(parts).wait() == 0
            break
    assert kills >= 1
    made = parameters(parts["out"], 8)
    assert made and made == parameters(whole["out"], 8)
    for path in sorted(Path(whole["out"], "bundle").rglob("*.safetensors")):
        assert (
            path.read_bytes() == Path(parts["out"], "bundle", path.relative_to(whole["out"] + "/bundle")).read_bytes()
        )


RECIPE_TOML = """
name = "from-toml"
steps = 40
condition = "removed"
log_every = 1
[data]
crops = [{ size = 32, batch = 2, share = 1.0 }]
hold_out = 0
workers = 0
[loss]
perceptual = "none"
"""


def command(*arguments: str, cwd: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "dreamsr_cli", "train", "--device", "cpu", "--precision", "fp32", *arguments]
    return subprocess.Popen(words, cwd=cwd, env=environment(), stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_resume_needs_no_flags(given, tmp_path, number) -> None:
    (tmp_path / "own.toml").write_text(RECIPE_TOML)
    start = [
        "--stage",
        "joint",
        "--config",
        "own.toml",
        "--data",
        given["data"],
        "--model",
        given["bundle"],
        "-o",
        "run",
    ]
    process = command(*start, cwd=tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in told
    step = int((tmp_path / "run" / "latest").read_text().strip().removeprefix("checkpoint-"))
    assert 3 <= step < 40 and f"stopped at step {step}" in told and not (tmp_path / "run" / "bundle").exists()
    (tmp_path / "own.toml").unlink()  # the run's own copy is what counts
    process = command("--resume", "-o", "run", "--max-steps", "2", "-q", cwd=tmp_path)
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (0, "run/bundle\n", "")
    assert (tmp_path / "run" / "latest").read_text() == f"checkpoint-{step + 2}\n"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_the_stage_alone_goes_on_with_the_last_run_or_follows_it(given, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "own.toml").write_text(RECIPE_TOML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DREAMSR_DEVICE", "cpu")
    monkeypatch.setenv("DREAMSR_PRECISION", "fp32")
    assert dreamsr(["train", "--stage", "joint"]) == 2
    told = capsys.readouterr().err
    assert "missing --data and --out" in told and "dreamsr train --stage joint --data PHOTOS -o runs/joint" in told

    first = ["--stage", "controlnet", "--config", "own.toml", "--data", given["data"], "--model", given["bundle"]]
    assert dreamsr(["train", *first, "-o", "runs/controlnet", "--max-steps", "1"]) == 0
    (tmp_path / "own.toml").unlink()
    capsys.readouterr()
    assert dreamsr(["train", "--stage", "controlnet", "--max-steps", "1"]) == 0
    captured = capsys.readouterr()
    assert "going on with the run" in captured.err and captured.out.endswith("runs/controlnet/bundle\n")
    assert dreamsr(["train", "--stage", "joint", "--max-steps", "2"]) == 0
    assert "those of the last run" in capsys.readouterr().err
    run = json.loads((tmp_path / "runs" / "joint" / "run.json").read_text())
    assert run["stage"] == "joint" and run["init_from"].endswith("runs/controlnet/bundle")
    assert run["recipe"]["steps"] == 40 and run["recipe_name"] == "own.toml"
    assert {"versions", "git", "machine", "command", "data_sha256", "photos"} <= run.keys()
    assert dreamsr(["train", "--resume", "--max-steps", "1"]) == 0  # the last run of all
    assert (tmp_path / "runs" / "joint" / "latest").read_text() == "checkpoint-3\n"
    assert dreamsr(["train", "--resume", "-o", "runs/joint", "--set", "seed=9"]) == 1
    assert "other settings (recipe)" in capsys.readouterr().err
    assert dreamsr(["train", "--resume", "-o", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err


def test_settings_of_the_folder(given, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "own.toml").write_text(RECIPE_TOML)
    monkeypatch.chdir(tmp_path)
    table = f'[train]\ndata = "{given["data"]}"\nout = "here"\nconfig = "own.toml"\nmodel = "{given["bundle"]}"\n'
    (tmp_path / "dreamsr.toml").write_text(table + 'device = "cpu"\nprecision = "fp32"\nmax-steps = 1\nkeep = 1\n')
    assert dreamsr(["train", "--stage", "restoration", "-q"]) == 0
    assert capsys.readouterr().out == "here/bundle\n"
    assert dreamsr(["train", "--stage", "restoration", "-q", "--resume"]) == 0
    assert [p.name for p in (tmp_path / "here").glob("checkpoint-*")] == ["checkpoint-2"]
    (tmp_path / "dreamsr.toml").write_text(table + "photos = 1\n")
    assert dreamsr(["train", "--stage", "restoration"]) == 2
    assert "[train] has an unknown key 'photos'" in capsys.readouterr().err


def test_dry_run_trains_nothing(given, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ["train", "--stage", "joint", "--dry-run", "--perceptual", "none", "--precision", "fp32"]
    assert dreamsr(plan) == 0
    told = capsys.readouterr().out
    assert "controlnet" in told and "3,000 steps" in told
    assert dreamsr([*plan, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3000
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_an_earlier_version_still_resumes(given, tmp_path, monkeypatch) -> None:
    """Version 0's backbone runs: run.json without today's keys, one checkpoint, no discriminator and no watch."""
    from training_child import job

    from dreamsr_cli.models.bundle import open_bundle
    from dreamsr_cli.progress import SilentProgress
    from dreamsr_cli.training.trainer import train

    made = job({**given, "stage": "backbone", "steps": 4})
    train(made, SilentProgress())
    whole = parameters(given["out"], 4)
    again = job({**given, "stage": "backbone", "steps": 4, "out": str(tmp_path / "old"), "resume": True})
    again.out.mkdir()
    run = json.loads((made.out / "run.json").read_text())
    for key in ("condition", "fresh", "accumulate", "ablation", "texture_share", "checkpointing", "explosion", "model"):
        del run["recipe"][key]
    old = {k: run[k] for k in ("stage", "recipe", "data")} | {"start": open_bundle(given["bundle"]).sha256}
    (again.out / "run.json").write_text(json.dumps(old))
    source = made.out / "checkpoint-2"
    source.rename(again.out / "checkpoint-2")
    (again.out / "checkpoint-2" / "state.json").write_text('{"recipe": "tiny.toml", "version": "0.1.0", "step": 2}')
    (again.out / "latest").write_text("checkpoint-2\n")
    train(again, SilentProgress())
    assert parameters(str(again.out), 4) == whole and load_file(again.out / "checkpoint-4" / "weights.safetensors")
