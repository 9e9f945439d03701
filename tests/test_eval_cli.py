"""`dreamsr eval` as a person types it: where the data root comes from, usage errors, the model, `--json`."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
from pathlib import Path

import pytest
from test_eval_data import public
from test_eval_runs import make_pairs, with_model

from dreamsr_cli.cli import eval as eval_command
from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.eval_options import SHARED, EvalSettings, eval_options
from dreamsr_cli.errors import ConfigError
from dreamsr_cli.evaluation import pyiqa_metrics


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DREAMSR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def two_lines(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  try: ")


def test_every_flag_is_a_setting_and_every_setting_a_flag():
    flags = set(inspect.signature(eval_command.command).parameters)
    settings = set(EvalSettings.__dataclass_fields__) | set(SHARED)
    assert flags - {"runs", "compare", "restart", "as_json", "quiet"} == settings


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--dataset", "RealRS"],
        ["--dataset", "set", "--metrics", "psnt"],
        ["--dataset", "set", "--baseline", "nearest"],
        ["--dataset", "set", "--baseline", "none", "--baseline", "bicubic"],
        ["--dataset", "set", "--model", "none", "--baseline", "none"],
        ["--dataset", "set", "--model", "none", "--weights", "x"],
        ["--dataset", "set", "--channel", "u"],
        ["--dataset", "set", "--crop-border", "-1"],
        ["--dataset", "set", "--limit", "0"],
        ["--dataset", "set", "--sr-dir", "me=gone"],
        ["--dataset", "set", "--sr-dir", "a/b=set"],
        ["--dataset", "set", "--sr-dir", "bicubic=set/hq"],
        ["--dataset", "set", "--strength", "2"],
        ["--dataset", "set", "-o", "file"],
        ["--dataset", "RealSR", "--data-root", ".", "--scale", "2"],
        ["--dataset", "set", "stray"],
        ["--compare", "only"],
    ],
)
def test_usage_errors_are_two_lines_and_exit_2(arguments, capsys):
    make_pairs("set", ("a",))
    public(Path("."), "RealSR", 1)
    Path("file").write_text("x")
    assert run(["eval", *arguments, "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and two_lines(err), err


def test_compare_of_something_else_than_a_run(capsys):
    Path("empty").mkdir()
    assert run(["eval", "--compare", "empty", "empty"]) == 1
    assert two_lines(capsys.readouterr().err)


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_typed_just_so_it_finds_the_data_below_the_data_root(how, monkeypatch, capsys):
    public(Path("sets"), "RealDeg", 2)
    arguments = ["eval", "--dataset", "RealDeg", "--model", "none", "--metrics", "delta-e", "-o", "run"]
    assert run([*arguments, "-q"]) == 1
    err = capsys.readouterr().err
    assert two_lines(err) and "FaithDiff" in err and "--data-root" in err
    if how == "flag":
        arguments += ["--data-root", "sets"]
    elif how == "environment":
        monkeypatch.setenv("DREAMSR_DATA_ROOT", "sets")
    else:
        Path("dreamsr.toml").write_text("[eval]\ndata-root = 'sets'\n")
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert "RealDeg partial 2/238" in out and "not the same photos" in err
    assert run([*arguments, "--strict-dataset", "-q"]) == 1


def test_flag_beats_environment_beats_file(tmp_path):
    Path("dreamsr.toml").write_text(
        "[eval]\ndata_root = 'a'\nmetrics = ['psnr', 'ssim']\nsteps = 3\nseed = 4\ntile = 128\n[upscale]\nsteps = 9\n"
    )
    environ = {"DREAMSR_DATA_ROOT": "b", "DREAMSR_SEED": "5", "DREAMSR_TILE": "256", "DREAMSR_LONG_SIDE": "99"}
    settings, shared = eval_options({"tile": 64, "sr_dir": [], "limit": None}, environ, tmp_path)
    assert (settings.data_root, settings.metrics) == ("b", "psnr,ssim")
    assert (shared.config.steps, shared.config.seed, shared.config.tile) == (3, 5, 64)
    assert shared.config.long_side is None and settings.sr_dir == ()
    assert eval_options({"data_root": "c"}, environ, tmp_path)[0].data_root == "c"
    assert eval_options({}, {}, tmp_path)[0].data_root == str(tmp_path / "a")
    Path("dreamsr.toml").write_text("[eval]\ndataroot = 'a'\n")
    with pytest.raises(ConfigError, match="dataroot") as error:
        eval_options({}, {}, tmp_path)
    assert "data_root" in error.value.hint
    Path("dreamsr.toml").write_text("[eval]\nlimit = 'many'\n")
    with pytest.raises(ConfigError, match="limit"):
        eval_options({}, {}, tmp_path)


def test_the_model_with_a_baseline_in_json(tiny_bundle, capsys):
    make_pairs("set", ("a", "b"), width=128, height=48)
    assert run([*with_model(tiny_bundle), "--json", "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    *rows, summary = map(json.loads, out.splitlines())
    assert [(r["method"], r["name"]) for r in rows] == [(m, n) for m in ("tiny", "bicubic") for n in "ab"]
    assert summary["methods"] == ["tiny", "bicubic"] and summary["versions"]["bundle:tiny"]
    assert rows[0]["values"]["seam"] is not None and rows[2]["values"]["seam"] is None
    assert {d["first"] for d in summary["differences"]} == {"tiny"}
    assert "texture" in err and Path("run/fidelity/tiny/a.json").is_file()
    assert run([*with_model(tiny_bundle), "--precision", "fp32", "--steps", "3"]) == 1
    err = capsys.readouterr().err
    assert "another steps (2, now 3)" in err and "--restart" in err


def test_others_results_are_scored_without_the_model(capsys):
    make_pairs("set", ("a", "b"))
    arguments = ["eval", "--dataset", "set", "--scale", "2", "--sr-dir", "copy=set/hq", "--metrics", "ssim"]
    assert run([*arguments, "--json", "-q"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["methods"] == ["copy", "bicubic"] and Path("eval-set/report.html").is_file()
    assert summary["summaries"]["copy"]["ssim-rgb"]["mean"] == pytest.approx(1)


def test_without_pyiqa_it_says_in_one_line_what_would_be_added_and_exits_0(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        pyiqa_metrics.importlib.util, "find_spec", lambda name, *rest: None if name == "pyiqa" else real(name, *rest)
    )
    make_pairs("set", ("a", "b"))
    arguments = ["eval", "--dataset", "set", "--scale", "2", "--model", "none", "--metrics", "psnr,musiq,maniqa"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "pyiqa" in line] == [f"note: {pyiqa_metrics.OFFER}"]
    assert "musiq" in out and " 0.0000" not in out
    summary = json.loads(Path("eval-set/evaluation.json").read_text())
    assert set(summary["unavailable"]) == {"musiq", "maniqa"}


def test_a_set_without_references(capsys):
    make_pairs("set", ("a", "b"))
    arguments = ["eval", "--dataset", "set/lq", "--scale", "2", "--model", "none", "--metrics", "psnr,delta-e"]
    assert run([*arguments, "--json", "-q", "-o", "run"]) == 0
    row, _, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(row["values"]) == ["delta-e"] and row["hq"] is None
    assert summary["unavailable"]["psnr-y"] == "this set has no references"
