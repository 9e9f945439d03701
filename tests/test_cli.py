"""`dreamsr` as a person types it, on a tiny bundle with the real engine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dreamsr_cli import __version__
from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.console import BarDisplay, PlainDisplay, QuietDisplay, explain, make_display, report
from dreamsr_cli.errors import DreamSRError, InputError


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DREAMSR_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def small(tiny_bundle) -> list[str]:
    """Flags that make a run tiny."""
    return [
        "--model",
        str(tiny_bundle),
        "--tile",
        "64",
        "--overlap",
        "16",
        "--scale",
        "2",
        "--steps",
        "1",
        "--seed",
        "1",
    ]


def photo(name: str, width: int = 36, height: int = 28) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def two_lines(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  try: ")


# ---------------------------------------------------------------- without the engine


def test_version_and_bare_help(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dreamsr {__version__}\n"
    assert run([]) == 0
    assert "upscale" in capsys.readouterr().out


def test_help_has_examples_and_units(capsys):
    assert run(["upscale", "--help"]) == 0
    text = capsys.readouterr().out
    assert "dreamsr upscale cat.jpg" in text
    assert "output pixels" in " ".join(text.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["upscale"],
        ["upscale", "a.jpg", "--bogus"],
        ["upscale", "a.jpg", "--tile", "wide"],
        ["upscale", "a.jpg", "--scale", "9"],
        ["upscale", "a.jpg", "--scale", "2", "--long-side", "100"],
        ["upscale", "a.jpg", "--overwrite", "--skip-existing"],
        ["upscale", "a.jpg", "b.jpg", "-o", "one.png"],
        ["upscale", "a.jpg", "-o", "one.png", "--suffix", "x"],
        ["upscale", "a.jpg", "-o", "one.png", "--format", "jpg"],
        ["bogus"],
    ],
)
def test_usage_errors_are_two_lines_and_exit_2(arguments, capsys):
    photo("a.jpg")
    photo("b.jpg")
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and two_lines(err)


def test_an_unknown_key_of_the_settings_file_is_a_usage_error(capsys):
    photo("a.jpg")
    Path("dreamsr.toml").write_text("[upscale]\nsteeps = 2\n")
    assert run(["upscale", "a.jpg"]) == 2
    assert two_lines(err := capsys.readouterr().err) and "steps" in err


def test_a_missing_photo_is_two_lines_and_exit_1(capsys):
    assert run(["upscale", "missing.jpg"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and two_lines(err) and "missing.jpg" in err


def test_missing_photos_in_json(capsys):
    assert run(["upscale", "missing.jpg", "gone/*.png", "--json", "-q"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(first) == {"input", "error", "hint", "exit_code"}
    assert (first["input"], first["exit_code"]) == ("missing.jpg", 1)
    assert second["input"] == "gone/*.png"


def test_doctor_tells_what_it_finds(capsys):
    code = run(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["dreamsr"] == __version__
    assert answer["auto"]["precision"] in ("bf16", "fp16", "fp32")
    assert answer["ok"] is (code == 0)
    assert not answer["problems"]
    assert run(["doctor"]) == 0
    assert "bytes, as listed in weights.lock" in capsys.readouterr().out


# ---------------------------------------------------------------- errors and progress


def test_any_exception_becomes_two_lines(capsys):
    report(explain(ZeroDivisionError("x\ny"), "upscaling a.jpg"))
    assert two_lines(err := capsys.readouterr().err) and "bug" in err
    report(explain(PermissionError(13, "Permission denied", "out/a.png"), "upscaling a.jpg"))
    assert two_lines(err := capsys.readouterr().err) and "out/a.png: Permission denied" in err
    report(explain(MemoryError(), "upscaling a.jpg"))
    assert two_lines(err := capsys.readouterr().err) and "--tile" in err
    report(explain(UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "upscaling x"))
    assert two_lines(err := capsys.readouterr().err) and "rename" in err
    known = InputError("a", "b")
    assert explain(known, "x") is known


def test_file_names_cannot_steer_the_terminal(capsys):
    report(DreamSRError("bad\x1b[31m name\u202e", "rename it"))
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\u202e" not in err and two_lines(err)


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("DREAMSR_DEBUG", "1")
    try:
        raise ZeroDivisionError("deep")
    except ZeroDivisionError as error:
        report(explain(error, "trying"))
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError: deep" in err and err.splitlines()[-2].startswith("error: ")


def test_plain_progress_has_a_line_per_phase_and_no_control_codes():
    stream = io.StringIO()
    display = PlainDisplay(stream)
    with display.photo("[1/2] a.jpg"):
        display.phase("texture, step 1 of 16", 9)
        display.advance(4)
        display.note("the prompt\x1b[2J was cut")
    assert stream.getvalue() == "[1/2] a.jpg: texture, step 1 of 16 (9)\nnote: the prompt�[2J was cut\n"


def test_the_bar_shows_photo_phase_and_count_and_goes_away():
    stream = io.StringIO()
    display = BarDisplay(Console(file=stream, force_terminal=True, width=120))
    with display.photo("[1/2] a[b].jpg"):
        display.phase("remove", 9)
        display.advance(4)
        display.phase("texture", 7)
        display.advance(7)
    text = stream.getvalue()
    assert "a[b].jpg  texture" in text and "7/7" in text
    assert text.endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[2K" in text.splitlines()[-1]
    display.note("after")
    assert stream.getvalue().endswith("note: after\n")


def test_which_display_is_chosen(monkeypatch):
    assert isinstance(make_display(True), QuietDisplay)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_display(False), PlainDisplay)


# ---------------------------------------------------------------- with the engine


def test_one_photo_beside_itself(small, capsys):
    photo("a.png")
    assert run(["upscale", "a.png", *small]) == 0
    out, err = capsys.readouterr()
    assert out == "a_x2.png\n"
    assert "error" not in err and "\x1b" not in err
    assert Image.open("a_x2.png").size == (72, 56)


def test_to_a_named_file_of_another_format(small, capsys):
    photo("a.png")
    assert run(["upscale", "a.png", "-o", "deep/b.JPG", "-q", *small]) == 0
    assert capsys.readouterr() == ("deep/b.JPG\n", "")
    with Image.open("deep/b.JPG") as image:
        assert (image.format, image.size) == ("JPEG", (72, 56))


def test_long_side_and_its_name(small, capsys):
    photo("a.png")
    sizes = small[: small.index("--scale")] + small[small.index("--scale") + 2 :]
    assert run(["upscale", "a.png", "--long-side", "90", *sizes]) == 0
    assert capsys.readouterr().out == "a_x2.5.png\n"
    assert Image.open("a_x2.5.png").size == (90, 70)


def test_a_folder_keeps_its_tree_and_survives_a_bad_photo(small, capsys):
    photo("in/a.png")
    photo("in/sub/b.webp")
    bad = photo("in/c.jpg", 64, 64)
    bad.write_bytes(bad.read_bytes()[:300])
    Path("in/notes.txt").write_text("x")
    assert run(["upscale", "in", "-o", "out", "--json", *small]) == 3
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("output") for line in lines] == ["out/a_x2.png", None, "out/sub/b_x2.webp"]
    assert lines[1]["exit_code"] == 1 and lines[1]["input"] == "in/c.jpg"
    assert {"width", "height", "seed", "bundle_sha256", "seconds"} <= set(lines[0])
    assert (lines[0]["width"], lines[0]["height"]) == (72, 56)
    assert "2 of 3 photos done, 1 failed" in err
    assert sorted(p.as_posix() for p in Path("out").rglob("*.*")) == ["out/a_x2.png", "out/sub/b_x2.webp"]


def test_all_bad_is_exit_1(small, capsys):
    Path("a.png").write_bytes(b"")
    Path("b.png").write_text("no photo")
    assert run(["upscale", "a.png", "b.png", "-q", *small]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == 2 and err.count("  try: ") == 2


def test_existing_results(small, capsys):
    photo("a.png")
    Path("a_x2.png").write_bytes(b"mine")
    assert run(["upscale", "a.png", *small]) == 1
    assert two_lines(capsys.readouterr().err)
    assert run(["upscale", "a.png", "--skip-existing", *small]) == 0
    assert capsys.readouterr().out == "a_x2.png\n"
    assert run(["upscale", "a.png", "--skip-existing", "--json", *small]) == 0
    assert json.loads(capsys.readouterr().out) == {"input": "a.png", "output": "a_x2.png", "skipped": True}
    assert Path("a_x2.png").read_bytes() == b"mine"
    assert run(["upscale", "a.png", "--overwrite", *small]) == 0
    assert Image.open("a_x2.png").size == (72, 56)


def test_an_existing_result_does_not_stop_a_batch(small, capsys):
    photo("in/a.png")
    photo("in/b.png")
    photo("out/a_x2.png")
    assert run(["upscale", "in", "-o", "out", *small]) == 3
    assert capsys.readouterr().out == "out/b_x2.png\n"


def test_overlap_against_tile_names_the_flags(tiny_bundle, capsys):
    photo("a.png")
    assert run(["upscale", "a.png", "--model", str(tiny_bundle), "--overlap", "600", "--tile", "512"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and two_lines(err) and "--overlap" in err and "--tile" in err
    assert not list(Path().glob("a_*"))


def test_an_unknown_model_is_two_lines(capsys):
    photo("a.png")
    assert run(["upscale", "a.png", "--model", "nowhere"]) == 1
    assert two_lines(err := capsys.readouterr().err) and "nowhere" in err


def test_the_same_command_twice_gives_the_same_bytes(small):
    photo("a.png")
    assert run(["upscale", "a.png", "-o", "1.png", "-q", *small]) == 0
    assert run(["upscale", "a.png", "-o", "2.png", "-q", *small]) == 0
    assert Path("1.png").read_bytes() == Path("2.png").read_bytes()
    assert run(["upscale", "a.png", "-o", "3.png", "-q", *small[:-1], "2"]) == 0
    assert Path("3.png").read_bytes() != Path("1.png").read_bytes()


def test_settings_of_file_and_environment_reach_the_engine(small, monkeypatch, capsys):
    photo("a.png")
    Path("dreamsr.toml").write_text("[upscale]\nseed = 7\nsuffix = '_big'\n")
    monkeypatch.setenv("DREAMSR_STRENGTH", "0.5")
    assert run(["upscale", "a.png", "--json", *small[:-2]]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["seed"], line["strength"], line["output"]) == (7, 0.5, "a_big.png")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_leaves_nothing_half_written(small, sent):
    photo("a.png", 120, 120)
    flags = [*small, "--steps", "100", "--scale", "8"]
    # Started in the background of a shell, a test run would hand down an ignored Ctrl-C.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    start += "from dreamsr_cli.cli.app import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "upscale", "a.png", "-o", "out/", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert process.stderr is not None
    seen = process.stderr.readline()
    assert "a.png: " in seen, seen
    time.sleep(0.2)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted: 0 of 1 photos done")
    assert "Traceback" not in err
    assert not [path for path in Path("out").rglob("*") if path.is_file()]


def test_report_lies_beside_the_result(small, capsys):
    photo("a.png", 64, 48)
    assert run(["upscale", "a.png", "-o", "out.png", "--report", "--json", "--strength", "0", *small]) == 0
    line = json.loads(capsys.readouterr().out)
    page = Path(line["report"])
    assert page.name == "out.png.report.html" and "<svg" in page.read_text(encoding="utf-8")
    assert line["fidelity"]["width"] == 128 and line["fidelity"]["delta_e_mean"] > 0
