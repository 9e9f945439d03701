"""The README's commands run, its links lead somewhere, and CI runs its test command."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from dreamsr_cli.cli.app import run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
DREAMSR = [step for line in COMMANDS for step in line.split(" && ") if re.match(r"(\.venv/bin/)?dreamsr ", step)]


def test_the_first_two_commands_do_all_the_set_up():
    for command in COMMANDS[:2]:
        steps = command.split(" && ")
        assert steps[0] == "python3 -m venv .venv"
        assert steps[1].startswith(".venv/bin/pip install ")
        assert steps[2].startswith(".venv/bin/")
    assert COMMANDS[0].endswith(".venv/bin/dreamsr upscale examples/chelsea.jpg -o out/")
    assert COMMANDS[1].endswith(".venv/bin/pytest")


def test_ci_runs_the_readme_test_command_and_stops_where_it_fails():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert f"{COMMANDS[1]} || exit" in lines
    assert "set -euo pipefail" in lines


@pytest.mark.parametrize("command", DREAMSR)
def test_readme_commands_run(command, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    # Smaller and shorter, where the command doesn't say itself; flags win over these.
    for name, value in {"DREAMSR_LONG_SIDE": "192", "DREAMSR_STEPS": "1", "DREAMSR_TILE": "128"}.items():
        monkeypatch.setenv(name, value)
    words = shlex.split(command)[1:]
    assert run(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    if words[0] == "upscale":
        out = tmp_path / words[words.index("-o") + 1]
        assert out.is_file() or [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not missing


def test_the_example_photo_is_small_and_credited():
    photo = ROOT / "examples" / "chelsea.jpg"
    assert photo.stat().st_size <= 300_000
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert photo.name in text and "CC0" in text
