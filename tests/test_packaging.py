"""What a wheel holds: code, weights.lock, the built-in model and the recipes; and dependencies that fit."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dreamsr_cli

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = {Requirement(text).name for group in PROJECT["optional-dependencies"].values() for text in group}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dreamsr_cli").rglob("*")
        if path.is_file() and path.suffix in (".py", ".toml", ".json", ".safetensors", ".md")
    }
    assert "dreamsr_cli/bundles/mini/bundle.json" in names
    assert "dreamsr_cli/recipes/mini.toml" in names
    assert tracked <= names
    assert {name.split("/")[0] for name in names} == {"dreamsr_cli", f"dreamsr-{dreamsr_cli.__version__}.dist-info"}


def test_the_wheel_holds_weights_lock_and_the_licence(wheel):
    assert wheel.read("dreamsr_cli/weights.lock") == (ROOT / "weights.lock").read_bytes()
    (licence,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert b"Apache License" in wheel.read(licence)


def test_the_wheel_installs_the_command(wheel):
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "dreamsr = dreamsr_cli.cli.app:main" in wheel.read(entry).decode()


def test_a_bare_install_takes_a_tested_torch_and_no_torchvision():
    torch = CORE["torch"].specifier
    assert torch.contains("2.13.0") and torch.contains("2.9.0")
    assert not torch.contains("2.14.0") and not torch.contains("2.8.0")
    assert "torchvision" not in EXTRAS | set(CORE)
    assert all(requirement.specifier for requirement in CORE.values()), "every dependency has a bound"


def test_every_import_is_a_dependency():
    distributions = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    foreign = set()
    for path in (ROOT / "dreamsr_cli").rglob("*.py"):
        foreign |= set(re.findall(r"^\s*(?:import|from) (\w+)[\w.]*(?: import .*| as \w+)?$", path.read_text(), re.M))
    foreign -= set(sys.stdlib_module_names) | {"dreamsr_cli"}
    assert {"torch", "typer"} <= foreign
    assert {distributions.get(name, name) for name in foreign} <= set(CORE)


def test_the_changelog_has_a_section_for_what_comes():
    assert re.search(r"^## \[", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
