"""Bad inputs and bad commands: each has its exit code, and two lines that say what happened and what to type."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from sample_photos import bomb

from dreamsr_cli.cli.app import run


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DREAMSR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny(tiny_bundle: Path) -> list[str]:
    """Flags that make a run tiny; later ones win."""
    model = ["--model", str(tiny_bundle), "--precision", "fp32"]
    return ["upscale", *model, "--tile", "64", "--overlap", "16", "--strength", "0"]


def photo(name: str, width: int = 20, height: int = 16, **options: Any) -> None:
    noise = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(name, **options)


def cut(name: str, share: float, **options: Any) -> None:
    """A photo whose file ends too early."""
    photo(name, 90, 90, **options)
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(len(data) * share)])


def flip_a_byte(name: str) -> None:
    photo(name, 90, 90)
    data = bytearray(Path(name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    Path(name).write_bytes(data)


def link_loop() -> None:
    Path("a.jpg").symlink_to("b.jpg")
    Path("b.jpg").symlink_to("a.jpg")


def stray_files_only() -> None:
    Path("folder").mkdir()
    Path("folder/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    Path("folder/._a.jpg").write_bytes(b"\0\5\26\7")


def looping_folder() -> None:
    photo("a.png")
    Path("loop").symlink_to("loop")


def result_is_a_folder() -> None:
    photo("a.png")
    Path("out/a_x1.png").mkdir(parents=True)


def prompts(name: str = "p.json", **changes: Any) -> None:
    """A photo a.png and a prompts file for it at --scale 1, but for the changes."""
    photo("a.png")
    plan = {"format": 1, "photo": {"name": "a.png"}, "canvas": [20, 16], "global": {"text": "noise"}}
    tiles = [{"box": [0, 0, 32, 16], "text": "noise"}]
    Path(name).write_text(json.dumps({**plan, "tile": 32, "tiles": tiles, **changes}, indent=1))


def raw_prompts(data: bytes, name: str = "p.json") -> None:
    photo("a.png")
    Path(name).write_bytes(data)


Make = Callable[[], Any]
PHOTOS: dict[str, tuple[Make, list[str], int, str]] = {
    "empty": (lambda: Path("a.jpg").touch(), ["a.jpg"], 1, "the file is empty"),
    "text": (lambda: Path("a.jpg").write_text("no photo\n" * 9), ["a.jpg"], 1, "not a photo that can be read"),
    "numbers": (lambda: Path("a.ppm").write_text("P3 1 1 255 1 2 3"), ["a.ppm"], 1, "not a photo that can be read"),
    "drawing": (lambda: Path("a.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), ["a.png"], 1, "not a"),
    "only a signature": (lambda: Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n"), ["a.png"], 1, "damaged or cut"),
    "only a start": (lambda: cut("a.jpg", 0.01), ["a.jpg"], 1, "a.jpg"),
    "cut JPEG": (lambda: cut("a.jpg", 0.6), ["a.jpg"], 1, "damaged or cut short"),
    "JPEG without its end": (lambda: cut("a.jpg", 0.98), ["a.jpg"], 1, "damaged or cut short"),
    "cut progressive JPEG": (lambda: cut("a.jpg", 0.5, progressive=True), ["a.jpg"], 1, "damaged or cut short"),
    "cut PNG": (lambda: cut("a.png", 0.6), ["a.png"], 1, "damaged or cut short"),
    "cut WebP": (lambda: cut("a.webp", 0.6), ["a.webp"], 1, "damaged or cut short"),
    "cut TIFF": (lambda: cut("a.tif", 0.6), ["a.tif"], 1, "damaged or cut short"),
    "cut compressed TIFF": (lambda: cut("a.tif", 0.6, compression="tiff_lzw"), ["a.tif"], 1, "damaged or cut short"),
    "cut GIF": (lambda: cut("a.gif", 0.5), ["a.gif"], 1, "damaged or cut short"),
    "cut AVIF": (lambda: cut("a.avif", 0.6), ["a.avif"], 1, "damaged or cut short"),
    "broken checksum": (lambda: flip_a_byte("a.png"), ["a.png"], 1, "damaged or cut short"),
    "floating point": (
        lambda: tifffile.imwrite("a.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb"),
        ["a.tif"],
        1,
        "samples are of type float",
    ),
    "HEIC": (
        lambda: Path("a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)),
        ["a.heic"],
        1,
        "HEIC files can't be read here",
    ),
    "JPEG XL": (lambda: Path("a.jxl").write_bytes(b"\xff\x0a" + bytes(60)), ["a.jxl"], 1, "JPEG XL files can't be"),
    "bomb": (lambda: bomb(Path("a.png"), 50_000), ["a.png"], 1, "50000x50000 pixels are more than --max-pixels"),
    "too many pixels in": (lambda: photo("a.png"), ["a.png", "--max-pixels", "319"], 1, "--max-pixels allows (319)"),
    "too many pixels out": (
        lambda: photo("a.png"),
        ["a.png", "--scale", "2", "--max-pixels", "1279"],
        1,
        "40x32 pixels are more than --max-pixels allows (1,279)",
    ),
    "stray file by name": (lambda: stray_files_only(), ["folder/.DS_Store"], 1, "not a photo that can be read"),
    "stray files only": (stray_files_only, ["folder"], 1, "holds no photo"),
    "missing": (lambda: None, ["a.jpg"], 1, "doesn't exist"),
    "no match": (lambda: None, ["*.jpg"], 1, "no photo matches"),
    "link loop": (link_loop, ["a.jpg"], 1, "is not a regular file"),
    "dangling link": (lambda: Path("a.jpg").symlink_to("gone.jpg"), ["a.jpg"], 1, "is not a regular file"),
    "pipe": (lambda: os.mkfifo("a.jpg"), ["a.jpg"], 1, "is not a regular file"),
    "device": (lambda: None, ["/dev/null"], 1, "is not a regular file"),
    "endless name": (lambda: None, ["n" * 300 + ".png"], 1, "doesn't exist"),
    "side of another photo": (lambda: photo("a.png"), ["a.png", "--long-side", "9"], 1, "out of range for a photo of"),
    "too wide for WebP": (
        lambda: Image.new("L", (5000, 2)).save("a.png"),
        ["a.png", "--format", "webp", "--scale", "4"],
        1,
        "more than WEBP can hold (16383 per side)",
    ),
    "too wide for JPEG": (
        lambda: Image.new("L", (20_000, 2)).save("a.jpg"),
        ["a.jpg", "--scale", "4"],
        1,
        "more than JPG can hold (65535 per side)",
    ),
    "one of two": (lambda: (photo("a.png"), Path("b.png").touch()), ["a.png", "b.png", "--scale", "1"], 3, "is empty"),
}
_WITH = ["a.png", "--scale", "1", "--prompts", "p.json"]
PROMPTS: dict[str, tuple[Make, list[str], int, str]] = {
    "missing prompts": (lambda: photo("a.png"), _WITH, 1, "p.json doesn't exist"),
    "missing folder of prompts": (lambda: photo("a.png"), ["a.png", "--prompt-dir", "p"], 1, "--prompt-dir p doesn't"),
    "prompts of another photo": (
        lambda: prompts(photo={"sha256": "0" * 64}),
        _WITH,
        1,
        "p.json, line 4: the prompts are of another photo",
    ),
    "prompts of another name": (lambda: prompts(photo={"name": "b.png"}), _WITH, 1, "are of b.png, not of a.png"),
    "prompts without a tile": (lambda: prompts(tiles=[]), _WITH, 1, "tile 0 with the box [0, 0, 32, 16] is missing"),
    "prompts of another shape": (lambda: prompts(canvas=[20, 20], tile=0), _WITH, 1, "line 6: a canvas of"),
    "prompts that are text": (lambda: raw_prompts(b"a cat"), _WITH, 1, "p.json, line 1, column 1: not valid JSON"),
    "prompts in a folder of that name": (
        lambda: (photo("a.png"), Path("p/a.png.prompts.json").mkdir(parents=True)),
        ["a.png", "--prompts", "p"],
        1,
        "a.png.prompts.json is a folder, not a file of prompts",
    ),
    "folder without prompts": (
        lambda: (photo("a.png"), Path("p").mkdir()),
        ["a.png", "--prompts", "p"],
        1,
        "a.png: p holds no prompts for it",
    ),
    "10 MB of prompts": (lambda: raw_prompts(b'"' + b"a" * 10**7), _WITH, 1, "p.json is larger than 10 MB"),
    "prompts with control characters": (
        lambda: prompts(tiles=[{"box": [0, 0, 32, 16], "text": "a\x1b]0;x"}]),
        _WITH,
        1,
        "the text holds the control character U+001B",
    ),
    "raw control characters": (lambda: raw_prompts(b'{"caption": "\x1b"}'), _WITH, 1, "Invalid control character"),
    "empty prompts": (lambda: raw_prompts(b""), _WITH, 1, "p.json is empty"),
    "prompts in UTF-16": (lambda: raw_prompts('{"caption": "a"}'.encode("utf-16")), _WITH, 1, "line 1: not UTF-8"),
    "prompts from a device": (lambda: photo("a.png"), ["a.png", "--prompts", "/dev/zero"], 1, "not a regular file"),
    "point outside": (lambda: photo("a.png"), ["a.png", "--tile-prompt", "80,0=a"], 1, "lies outside of the result"),
    "no LLaVA": (lambda: photo("a.png"), ["a.png", "--captioner", "llava-1.5-7b"], 1, "llava-1.5-7b are not on this"),
    "prompts are there already": (
        lambda: raw_prompts(b"", "a.png.prompts.json"),
        ["a.png", "--save-prompts"],
        1,
        "a.png.prompts.json exists already",
    ),
    "bad prompts of one of two": (
        lambda: (prompts("a.png.prompts.json", format=2), photo("b.png"), Path("b.txt").write_text("noise")),
        ["a.png", "b.png", "--scale", "1", "--prompts", "."],
        3,
        "a.png.prompts.json, line 2: format is 2",
    ),
}
PLACES: dict[str, tuple[Make, list[str], int, str]] = {
    "result exists": (lambda: (photo("a.png"), photo("b.png")), ["a.png", "-o", "b.png"], 1, "exists already"),
    "result is a folder": (result_is_a_folder, ["a.png", "-o", "out", "--scale", "1"], 1, "is a folder"),
    "folder is a file": (lambda: photo("a.png"), ["a.png", "-o", "a.png/out/"], 1, "can't make the folder"),
    "folder is a link loop": (looping_folder, ["a.png", "-o", "loop/out/"], 1, "can't make the folder"),
    "folder of the system": (lambda: photo("a.png"), ["a.png", "-o", "/proc/dreamsr/"], 1, "can't make the folder"),
    "name too long": (
        lambda: photo("n" * 251 + ".png"),
        ["n" * 251 + ".png", "--scale", "1"],
        1,
        "name would be too long",
    ),
    "out is a file": (lambda: (photo("a.png"), Path("out").touch()), ["a.png", "-o", "out"], 2, "is a file, not a"),
    "out is a GIF": (lambda: photo("a.png"), ["a.png", "-o", "b.gif"], 2, ".gif can't be written"),
    "out is a HEIC": (lambda: photo("a.png"), ["a.png", "-o", "b.heic"], 2, ".heic can't be written"),
    "out is the input": (lambda: photo("a.png"), ["a.png", "-o", "a.png", "--overwrite"], 2, "would be replaced"),
    "no suffix": (lambda: photo("a.png"), ["a.png", "--suffix", ""], 2, "would be replaced"),
    "one name for two": (lambda: (photo("a.png"), photo("b.png")), ["a.png", "b.png", "-o", "c.png"], 2, "one file"),
    "suffix with a folder": (lambda: photo("a.png"), ["a.png", "--suffix", "/x"], 2, "path separator"),
}
FLAGS: dict[str, tuple[list[str], str]] = {
    "16 bits into a JPEG": (["--bit-depth", "16", "-o", "b.jpg"], "--bit-depth 16"),
    "16 bits into a WebP": (["--bit-depth", "16", "--format", "webp"], "--bit-depth 16"),
    "16 bits into an AVIF": (["--bit-depth", "16", "--format", "avif"], "--bit-depth 16"),
    "12 bits": (["--bit-depth", "12"], "--bit-depth '12'"),
    "no pixels": (["--max-pixels", "0"], "--max-pixels 0"),
    "format": (["--format", "bmp"], "--format 'bmp'"),
    "tile": (["--tile", "100"], "--tile 100"),
    "overlap": (["--overlap", "15"], "--overlap 15"),
    "overlap of more than half": (["--tile", "64", "--overlap", "48"], "--overlap 48"),
    "scale too small": (["--scale", "0.5"], "--scale 0.5"),
    "scale too large": (["--scale", "9"], "--scale 9"),
    "scale not a number": (["--scale", "nan"], "--scale nan"),
    "two sizes": (["--scale", "2", "--long-side", "99"], "contradict"),
    "steps": (["--steps", "0"], "--steps 0"),
    "strength": (["--strength", "1.5"], "--strength 1.5"),
    "guidance": (["--guidance", "3"], "--guidance"),
    "seed": (["--seed", "-1"], "--seed -1"),
    "quality": (["--quality", "101"], "--quality 101"),
    "batch": (["--tile-batch", "0"], "--tile-batch 0"),
    "device": (["--device", "tpu"], "--device 'tpu'"),
    "precision": (["--precision", "int8"], "--precision 'int8'"),
    "captioner": (["--captioner", "poet"], "--captioner 'poet'"),
    "colour fix": (["--color-fix", "sepia"], "--color-fix 'sepia'"),
    "both at once": (["--overwrite", "--skip-existing"], "contradict"),
    "no such flag": (["--sharpen"], "--sharpen"),
}


def check(code: int, expected: int, words: str, err: str) -> None:
    assert code == expected, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors and any(words in line for line in errors), err
    hints = [line for line in err.splitlines() if line.startswith("  try: ")]
    assert len(hints) == len(errors) and all(len(hint) > 12 for hint in hints)
    assert "Traceback" not in err and "this is a bug" not in err


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


@pytest.mark.parametrize("name", [*PHOTOS, *PROMPTS, *PLACES])
def test_bad_photos_and_places(name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make, arguments, expected, words = (PHOTOS | PROMPTS | PLACES)[name]
    make()
    before = files()
    code = run([*tiny, *arguments])
    out, err = capsys.readouterr()
    check(code, expected, words, err)
    if expected != 3:
        assert out == ""
        left = [path for path in files() if path not in before and not Path(path).is_dir()]
        assert left == []


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    photo("a.png")
    arguments, words = FLAGS[name]
    code = run([*tiny, "a.png", *arguments])
    out, err = capsys.readouterr()
    check(code, 2, words, err)
    assert out == "" and files() == ["a.png"]


@pytest.mark.parametrize(
    ("toml", "environ", "words"),
    [
        ("[upscale]\ntile = 'wide'\n", {}, "tile"),
        ("[upscale]\nbit-depth = 12\n", {}, "bit_depth"),
        ("[upscale]\nstrip-metadata = 'yes'\n", {}, "strip_metadata"),
        ("[upscale\n", {}, "not valid TOML"),
        ("[resize]\nscale = 2\n", {}, "not a table"),
        ("", {"DREAMSR_MAX_PIXELS": "many"}, "DREAMSR_MAX_PIXELS"),
        ("", {"DREAMSR_STRIP_METADATA": "maybe"}, "DREAMSR_STRIP_METADATA"),
        ("", {"DREAMSR_BIT_DEPTH": "10"}, "DREAMSR_BIT_DEPTH"),
    ],
)
def test_bad_settings(
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    toml: str,
    environ: dict[str, str],
    words: str,
) -> None:
    photo("a.png")
    Path("dreamsr.toml").write_text(toml)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    code = run([*tiny, "a.png"])
    check(code, 2, words, capsys.readouterr().err)


@pytest.mark.parametrize("model", ["--model", "--weights"])
def test_a_model_that_is_not_there(model: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    photo("a.png")
    code = run([*tiny, "a.png", model, "gone"])
    check(code, code or 1, "gone", capsys.readouterr().err)
    assert files() == ["a.png"]


# ---------------------------------------------------------------- odd, but good


@pytest.mark.parametrize(
    "name",
    ["caf\u00e9 \u65e5\u672c \U0001f431.png", "a[1].png", "-a.png", "n" * 248 + ".png", os.fsdecode(b"caf\xe9.png")],
)
def test_odd_names_are_upscaled(name: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = io.BytesIO()
    Image.new("RGB", (20, 16), (90, 120, 60)).save(data, "PNG")
    try:
        Path("in").mkdir()
        Path("in", name).write_bytes(data.getvalue())
    except OSError:
        pytest.skip("this file system has no such names")
    assert run([*tiny, "in", "-o", "out", "--scale", "1", "--json", "-q"]) == 0
    output = Path(json.loads(capsys.readouterr().out)["output"])
    assert output.name == f"{Path(name).stem}_x1.png"
    with output.open("rb") as file:
        assert Image.open(file).size == (20, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (20_000, 10)])
def test_odd_sizes_are_upscaled(size: tuple[int, int], tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", size, (90, 120, 60)).save("a.png")
    assert run([*tiny, "a.png", "-o", "b.png", "--scale", "1", "--tile", "512", "--tile-batch", "8"]) == 0
    assert Image.open("b.png").size == size


def test_a_mislabelled_photo_is_upscaled_with_a_note(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    photo("a.jpg", format="PNG")
    assert run([*tiny, "a.jpg", "--scale", "1"]) == 0
    assert "it is a PNG file, whatever its name says" in capsys.readouterr().err
    assert Image.open("a_x1.jpg").format == "JPEG"


def test_a_folder_with_stray_files_and_loops_is_upscaled(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stray_files_only()
    photo("folder/a.png")
    Path("folder/again").symlink_to("../folder")
    Path("folder/loop.png").symlink_to("loop.png")
    assert run([*tiny, "folder", "-o", "out", "--scale", "1"]) == 0
    assert [path for path in files() if path.startswith("out/")] == ["out/a_x1.png"]
