"""`dreamsr caption` as a user meets it: files, names, bad photos, settings, and a SIGKILL at a real moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llava
from PIL import Image

from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.captioning_run import part_file
from dreamsr_cli.draws import generator
from dreamsr_cli.prompts_file import read_prompts

SMALL = (
    "--tile",
    "96",
    "--overlap",
    "16",
    "--scale",
    "2",
    "--device",
    "cpu",
    "--max-words",
    "5",
    "--tile-max-words",
    "3",
)


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("DREAMSR_WEIGHTS_DIR", str(tmp_path / "no-weights"))
    for name in [name for name in os.environ if name.startswith("DREAMSR_") and name[8:] not in ("CACHE", "WEIGHTS")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def llavas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("captioners")
    return {
        "llava": tiny_llava.save_llava(base / "llava"),
        "onevision": tiny_llava.save_onevision(base / "onevision"),
    }


def save_photo(path: Path, seed: int = 1, rows: int = 90, columns: int = 120) -> Path:
    blocks = generator(seed, "photo").integers(0, 256, (rows // 10, columns // 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.repeat(blocks, 10, 0), 10, 1)).save(path)
    return path


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["llava", "onevision"])
def test_a_folder_is_captioned(
    llavas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Two photos, one of them deeper, and a bad one between them."""
    save_photo(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no photo")
    save_photo(tmp_path / "in" / "deep" / "a.png", 2)
    command = ["caption", "in", "-o", "out", "--captioner", str(llavas[name]), "--json", *SMALL]
    assert run(command) == 3
    first, bad, second = lines(capsys)
    assert first["output"] == "out/a.png.prompts.json" and second["output"] == "out/deep/a.png.prompts.json"
    assert "b.jpg" in bad["error"] and bad["exit_code"] == 1
    for result in (first, second):
        plan = read_prompts(Path(result["output"])).plan
        assert plan is not None
        assert plan.canvas == (240, 180) == (result["width"], result["height"])
        assert len(plan.tiles) == result["tiles"] == 9 and plan.captioner.name == name == result["captioner"]
        assert plan.global_text == result["global_prompt"]
        assert all(tile.text for tile in plan.tiles) and len({tile.text for tile in plan.tiles}) > 1
    assert Path(first["output"]).read_text() != Path(second["output"]).read_text()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and "json" in p.name) == ["a.png.prompts.json"] * 2
    assert run([*command, "--skip-existing"]) == 3
    assert [line.get("skipped") for line in lines(capsys)] == [True, None, True]
    assert run(command) == 1
    assert all("exists already" in line["error"] or "b.jpg" in line["error"] for line in lines(capsys))


@pytest.mark.parametrize(("name", "answers"), [("llava", 4), pytest.param("onevision", 9, marks=pytest.mark.slow)])
def test_killed_and_typed_again_the_file_is_the_same(
    llavas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, answers: int
) -> None:
    save_photo(tmp_path / "photo.png", 3, 120, 200)
    command = ["caption", "photo.png", "--captioner", str(llavas[name]), "--batch", "2", "--no-share", *SMALL]
    assert run([*command, "-o", "whole.json"]) == 0
    target = tmp_path / "killed.json"
    part = part_file(target)
    command += ["-o", target.name]
    child = subprocess.Popen(
        [sys.executable, "-m", "dreamsr_cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not part.exists() or part.read_bytes().count(b"\n") < answers:
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not target.exists()
    kept = part.read_bytes()
    capsys.readouterr()
    assert run(command) == 0
    assert "going on with the captions of the last run" in capsys.readouterr().err
    assert target.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert kept.count(b"\n") >= answers and not part.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "photo.png", "whole.json"]


def test_the_describer_writes_beside_the_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photo(tmp_path / "cat.png")
    assert run(["caption", "cat.png", "-q"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("cat.png.prompts.json\n", "")
    plan = read_prompts(tmp_path / "cat.png.prompts.json").plan
    assert plan is not None
    assert plan.captioner.name == "describe" and (plan.tile, plan.overlap, plan.canvas) == (
        480 // 16 * 16,
        64,
        (480, 360),
    )
    assert run(["caption", "cat.png", "-q", "--overwrite", "--prompt", "A cat", "--captioner", "none"]) == 0
    plan = read_prompts(tmp_path / "cat.png.prompts.json").plan
    assert plan is not None and (plan.global_text, plan.global_source) == ("A cat", "user")


def test_settings_come_from_flags_the_environment_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photo(tmp_path / "cat.png")
    (tmp_path / "dreamsr.toml").write_text("[caption]\ntile = 64\noverlap = 16\nlong-side = 480\n")
    monkeypatch.setenv("DREAMSR_TILE", "80")
    assert run(["caption", "cat.png", "-o", "a.json", "--short-side", "270", "-q"]) == 0
    plan = read_prompts(tmp_path / "a.json").plan
    assert plan is not None
    assert (plan.tile, plan.overlap, plan.canvas) == (80, 16, (360, 270))


def test_instructions_and_sharing_are_used(
    llavas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_photo(tmp_path / "cat.png")
    Image.new("RGB", (120, 90), (90, 120, 200)).save(tmp_path / "sky.png")
    base = ["caption", "--captioner", str(llavas["llava"]), "-q", "--json", *SMALL]
    assert run([*base, "cat.png", "-o", "a.json"]) == 0
    assert run([*base, "cat.png", "-o", "b.json", "--tile-instruction", "Which fabrics are these?"]) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert b["captioner"]["tile_instruction"] == "Which fabrics are these?"
    assert a["global"] == b["global"] and [t["text"] for t in a["tiles"]] != [t["text"] for t in b["tiles"]]
    assert run([*base, "sky.png", "-o", "c.json"]) == 0
    shared = [tile["shared_with"] for tile in json.loads((tmp_path / "c.json").read_text())["tiles"]]
    assert shared == [None, *[0] * 8]
    assert lines(capsys)[-1]["shared"] == 8


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--captioner", "lava"], "'lava'"),
        (["--captioner", "llava-1.5-7b"], "dreamsr fetch-weights llava-1.5-7b, or use --captioner describe"),
        (["--tile", "100"], "use --tile"),
        (["--scale", "9"], "use 1 to 8"),
        (["--scale", "2", "--long-side", "400"], "contradict"),
        (["--max-words", "0"], "use 1 to 300"),
        (["--batch", "65"], "use 1 to 64"),
        (["--quantize", "int3"], "none, int8, nf4"),
        (["--instruction", "  "], "--instruction is empty"),
        (["--overwrite", "--skip-existing"], "contradict"),
        (["-o", "cat.png"], "is a file, not a folder"),
        (["--device", "gpu"], "--device"),
        (["--model", "nothing"], "no such model"),
    ],
)
def test_mistakes_are_told_in_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    save_photo(tmp_path / "cat.png")
    before = sorted(tmp_path.iterdir())
    assert run(["caption", "cat.png", *flags]) in (1, 2)
    captured = capsys.readouterr()
    error = captured.err.splitlines()
    assert error[-2].startswith("error: ") and error[-1].startswith("  try: ") and not captured.out
    assert told in captured.err
    assert sorted(tmp_path.iterdir()) == before


def test_one_file_takes_one_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photo(tmp_path / "in" / "cat.png")
    assert run(["caption", "in", "-o", "a.json"]) == 2
    assert "names one file" in capsys.readouterr().err


def test_an_unknown_key_of_the_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photo(tmp_path / "cat.png")
    (tmp_path / "dreamsr.toml").write_text("[caption]\ntiles = 64\n")
    assert run(["caption", "cat.png"]) == 2
    assert "[caption]" in (err := capsys.readouterr().err) and "'tiles'" in err


def test_a_size_out_of_range_skips_that_photo_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photo(tmp_path / "in" / "a.png", rows=20, columns=20)
    save_photo(tmp_path / "in" / "b.png")
    assert run(["caption", "in", "--long-side", "400", "--json", "-o", "out"]) == 3
    bad, good = lines(capsys)
    assert "out of range" in bad["error"] and good["output"] == "out/b.png.prompts.json"


def test_long_names_keep_their_part_file_within_the_limit() -> None:
    target = Path("x") / ("n" * 240 + ".json")
    assert len(part_file(target).name) <= 255 and part_file(target).parent == target.parent
    assert part_file(Path("a.json")) == Path("a.json.part.jsonl")
