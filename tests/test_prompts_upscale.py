"""Prompts that people give, through the engine and the command: their effect, their place, precedence and resuming."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamsr_cli.cli.app import run
from dreamsr_cli.cli.options import upscale_options
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import UpscaleResult, upscale
from dreamsr_cli.errors import DreamSRError, InputError, JournalError, OutputError, UsageError
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.prompts_file import PromptsError
from dreamsr_cli.weights import file_sha256

OFF: dict[str, Any] = {"strength": 0.0, "color_fix": "none"}


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DREAMSR_")]:
        monkeypatch.delenv(name)
    return tmp_path


pytestmark = pytest.mark.usefixtures("in_a_folder")


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """The engine collects garbage between phases; what the libraries made before these tests is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def restored(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png, plain.png (a restored without texture or colour fix) and a.png.prompts.json."""
    folder = tmp_path_factory.mktemp("restored")
    source = photo(str(folder / "a.png"))
    upscaled(bundle, source, str(folder / "plain.png"), **OFF)
    return folder


@pytest.fixture
def source(restored: Path, in_a_folder: Path) -> Path:
    """a.png in the current folder, with plain.png and a.png.prompts.json beside it."""
    shutil.copytree(restored, in_a_folder, dirs_exist_ok=True)
    return Path("a.png")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(str(tiny_bundle))


@pytest.fixture
def tiny(tiny_bundle: Path) -> list[str]:
    """Flags that make a run of 3 x 3 tiles tiny."""
    size = ["--scale", "2", "--tile", "64", "--overlap", "16", "--strength", "0", "--color-fix", "none"]
    return ["upscale", "--model", str(tiny_bundle), "--precision", "fp32", *size]


def photo(name: str = "a.png", seed: int = 0) -> Path:
    """80 x 80 pixels: 160 x 160 output pixels, 3 x 3 tiles of 64."""
    coarse = np.random.default_rng(seed).integers(40, 215, (8, 8, 3), dtype=np.uint8)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((80, 80), Image.Resampling.BICUBIC).save(path)
    return path


def upscaled(bundle: Bundle, source: Path, target: str, prompts: str | None = None, **settings: Any) -> UpscaleResult:
    base = UpscaleConfig(tile=64, overlap=16, steps=2, precision="fp32", scale=2.0, tile_batch=4)
    config = dataclasses.replace(base, **settings)
    output = OutputConfig(save_prompts=prompts is None, overwrite=True)
    return upscale(source, Path(target), bundle, config, output, SilentProgress(), Path(prompts) if prompts else None)


def levels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB")).astype(int)


def edit(source: str, target: str, index: int | None, text: str, **changes: Any) -> None:
    """A prompts file with one text changed: of a tile, or (None) the global one."""
    data = json.loads(Path(source).read_text(encoding="utf-8"))
    (data["global"] if index is None else data["tiles"][index])["text"] = text
    Path(target).write_text(json.dumps(data | changes, indent=1), encoding="utf-8")


# ---------------------------------------------------------------- effect


def test_editing_one_tiles_text_changes_that_tile_and_nothing_else(bundle: Bundle, source: Path) -> None:
    data = json.loads(Path("a.png.prompts.json").read_text())
    assert len(data["tiles"]) == 9
    left, top, right, bottom = data["tiles"][4]["box"]
    edit("a.png.prompts.json", "edited.json", 4, "a tall wall of red bricks, " + "with ivy on it, " * 20)
    result = upscaled(bundle, source, "edited.png", "edited.json", **OFF)
    assert result.to_json()["prompts"] == "edited.json"
    change_PQ = np.abs(levels("plain.png") - levels("edited.png")).max(axis=2)
    halo = bundle.open_autoencoder(torch.device("cpu"), torch.float32).halo
    assert 0 < halo <= top, "else there is no outside"
    assert change_PQ[top:bottom, left:right].max() > 1
    change_PQ[top - halo : bottom + halo, left - halo : right + halo] = 0
    assert change_PQ.max() == 0


def test_an_unedited_file_gives_the_same_picture(bundle: Bundle, source: Path) -> None:
    result = upscaled(bundle, source, "again.png", "a.png.prompts.json", **OFF)
    assert np.array_equal(levels("plain.png"), levels("again.png"))
    assert result.notes == () and result.saved_prompts is None


def test_a_file_of_another_grid_is_mapped_with_a_note(bundle: Bundle, source: Path) -> None:
    made_for = "the prompts were made for 9 tiles on 160 x 160 pixels, this run has"
    bigger = upscaled(bundle, source, "big.png", "a.png.prompts.json", **OFF | {"scale": 3.0})
    assert any(note.startswith(f"{made_for} 25 on 240 x 240") for note in bigger.notes)
    whole = upscaled(bundle, source, "whole.png", "a.png.prompts.json", **OFF | {"tile": 0})
    assert any(note.startswith(f"{made_for} 1 on 160 x 160") for note in whole.notes)
    assert whole.to_json()["notes"] == list(whole.notes)


def test_a_text_that_is_too_long_is_cut_and_named(bundle: Bundle, source: Path) -> None:
    edit("a.png.prompts.json", "long.json", 4, "wall " * 300)
    result = upscaled(bundle, source, "long.png", "long.json", **OFF)
    (note,) = result.notes
    assert note == "the prompt of tile 4, [48, 48, 112, 112], is longer than 128 tokens and was cut"


# ---------------------------------------------------------------- modes


class Texts:
    """The texts that the two real networks were given, as embeddings of one tile each."""

    def __init__(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dit: list[Any] = []
        self.control: list[Any] = []
        opened = bundle.open_restorer

        def watched(*args: Any) -> Any:
            restorer = opened(*args)
            restorer.dit.register_forward_pre_hook(lambda _, given: self.dit.append(given[2]))
            restorer.controlnet.register_forward_pre_hook(lambda _, given: self.control.append(given[2]))
            return restorer

        monkeypatch.setattr(bundle, "open_restorer", watched)


@pytest.mark.parametrize("mode", ["both", "global", "local"])
def test_modes_give_both_networks_that_text(
    bundle: Bundle, source: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    data = json.loads(Path("a.png.prompts.json").read_text())
    for index, tile in enumerate(data["tiles"]):
        tile["text"] = f"text of tile {index}"
    Path("own.json").write_text(json.dumps(data))
    seen = Texts(bundle, monkeypatch)
    upscaled(bundle, source, "b.png", "own.json", prompt_mode=mode, tile_batch=1, steps=2)
    encoder = bundle.open_text_encoder(torch.device("cpu"), torch.float32)
    (glob, *local), _ = encoder.encode([data["global"]["text"], *(t["text"] for t in data["tiles"])], 128)
    longest = 32  # the bucket of these short texts
    for_control = [glob] * 9 if mode == "global" else local
    for_dit = local if mode == "local" else [glob] * 9
    assert len(seen.dit) == 9 * (1 + 2) and len(seen.control) == 9 * 2
    for number, given in enumerate(seen.control):
        assert torch.equal(given.tokens_BTD, stack([for_control[number % 9]], longest).tokens_BTD)
    for number, given in enumerate(seen.dit):
        length = longest if mode == "local" else glob.tokens_BTD.shape[1]
        assert torch.equal(given.tokens_BTD, stack([for_dit[number % 9]], length).tokens_BTD)
        assert torch.equal(given.pooled_BD, for_dit[number % 9].pooled_BD)


def test_modes_make_other_pictures_and_batches_only_round(bundle: Bundle, source: Path) -> None:
    for mode in ("global", "local"):
        upscaled(bundle, source, f"{mode}.png", prompt_mode=mode, **OFF)
    made = [levels(f"{name}.png") for name in ("plain", "global", "local")]
    assert not np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    assert not np.array_equal(made[1], made[2])
    upscaled(bundle, source, "1.png", prompt_mode="local", tile_batch=1, **OFF)
    assert np.abs(levels("1.png") - made[2]).max() <= 1


def test_with_equal_texts_the_modes_are_one(bundle: Bundle) -> None:
    """The transformer's text is then the same, at batch 1 or at batch B."""
    source = photo()
    same = tuple(f"{x},{y}=a wall" for x in (10, 80, 150) for y in (10, 80, 150))
    upscaled(bundle, source, "both.png", prompt="a wall", tile_prompt=same, **OFF)
    upscaled(bundle, source, "local.png", tile_prompt=same, prompt_mode="local", **OFF)
    upscaled(bundle, source, "global.png", prompt="a wall", prompt_mode="global", **OFF)
    assert np.array_equal(levels("both.png"), levels("global.png"))
    assert np.abs(levels("both.png") - levels("local.png")).max() <= 1


# ---------------------------------------------------------------- whose text


def used(name: str = "a.png.prompts.json") -> tuple[str, list[str]]:
    data = json.loads(Path(name).read_text())
    return data["global"]["text"], [tile["text"] for tile in data["tiles"]]


def test_typed_texts_come_first_then_the_file_then_the_captioner(
    tiny: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described, tiles = used()
    assert described.endswith("surface.") and len(tiles) == 9
    edit("a.png.prompts.json", "file.json", None, "of the file")
    typed = ["--tile-prompt", "80,80=the middle", "--tile-prompt", "159,0=a corner = right"]
    assert run([*tiny, "a.png", "-o", "second/", "--save-prompts", "--prompts", "file.json", *typed]) == 0
    glob, now = used("second/a.png.prompts.json")
    assert glob == "of the file"
    assert now == [*tiles[:2], "a corner = right", tiles[3], "the middle", *tiles[5:]]
    capsys.readouterr()
    more = ["--prompt", "typed", "--json", "--overwrite"]
    assert run([*tiny, "a.png", "-o", "second/", "--save-prompts", "--prompts", "file.json", *typed, *more]) == 0
    assert used("second/a.png.prompts.json") == ("typed", now)
    result = json.loads(capsys.readouterr().out)
    assert (result["prompts"], result["saved_prompts"]) == ("file.json", "second/a.png.prompts.json")
    assert (result["global_prompt"], result["prompt_mode"]) == ("typed", "both")


def test_one_text_is_the_global_prompt_and_the_tiles_are_described(tiny: list[str], source: Path) -> None:
    Path("a.txt").write_text("a cat\non a wall\n")
    Path("a.json").write_text('{"caption": "a dog"}')
    _, tiles = used()
    Path("a.png.prompts.json").unlink()
    for flags, text in ((["--prompts", "a.txt"], "a cat on a wall"), (["--prompt-dir", "."], "a dog")):
        assert run([*tiny, "a.png", "-o", "1/", "--save-prompts", "--overwrite", *flags]) == 0
        assert used("1/a.png.prompts.json") == (text, tiles)
    assert run([*tiny, "a.png", "-o", "1/", "--save-prompts", "--overwrite", "--prompt-mode", "global", *flags]) == 0
    assert used("1/a.png.prompts.json") == ("a dog", ["a dog"] * 9)


def test_a_folder_of_prompts_for_a_folder_of_photos(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["in/a.png", "in/deep/a.png", "in/b.png"]):
        photo(name, number)
    assert run([*tiny, "in", "-o", "prompts", "--save-prompts", "--tile", "0"]) == 0
    assert sorted(p.name for p in Path("prompts").rglob("*.json")) == ["a.png.prompts.json"] * 2 + [
        "b.png.prompts.json"
    ]
    Path("prompts/b.png.prompts.json").unlink()
    capsys.readouterr()
    assert run([*tiny, "in", "-o", "out", "--json", "-q", "--prompts", "prompts"]) == 3
    out, err = capsys.readouterr()
    results = {Path(r["input"]).as_posix(): r for r in map(json.loads, out.splitlines())}
    assert results["in/a.png"]["prompts"] == "prompts/a.png.prompts.json"
    assert results["in/deep/a.png"]["prompts"] == "prompts/deep/a.png.prompts.json"
    assert "prompts holds no prompts for it, none of b.png.prompts.json, b.prompts.json" in results["in/b.png"]["error"]
    assert err.count("error: ") == 1 and "dreamsr caption in/b.png -o prompts/b.png.prompts.json" in err
    assert run([*tiny, "in", "-o", "out", "--json", "--skip-existing", "--prompt-dir", "prompts"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line).get("prompts") for line in out.splitlines()] == [None] * 3
    assert "b.png: no prompts in prompts, it is described" in err


def test_one_bad_file_does_not_stop_the_other_photos(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("p").mkdir()
    for number, name in enumerate(["a.png", "b.png", "c.png"]):
        path = photo(f"in/{name}", number)
        plan: dict[str, Any] = {"format": 1, "photo": {"sha256": file_sha256(path), "name": name}, "canvas": [160, 160]}
        plan |= {"global": {"text": "a"}, "tiles": [{"box": [0, 0, 160, 160], "text": "b"}]}
        Path("p", name + ".prompts.json").write_text(json.dumps(plan, indent=1))
    shutil.copy("p/a.png.prompts.json", "p/b.png.prompts.json")
    assert run([*tiny, "in", "-o", "p", "-q", "--prompts", "p"]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines() == ["p/a_x2.png", "p/c_x2.png"]
    assert (
        len(err.splitlines()) == 2 and "p/b.png.prompts.json, line 4: the prompts are of another photo (a.png)" in err
    )
    assert not list(Path("p").glob("*.dreamsr"))


def test_settings_of_file_and_environment(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    photo()
    Path("dreamsr.toml").write_text("[upscale]\ntile-prompt = ['80,80=from toml']\nsave-prompts = true\n")
    assert run([*tiny, "a.png", "-o", "1/"]) == 0
    assert used("1/a.png.prompts.json")[1][4] == "from toml"
    monkeypatch.setenv("DREAMSR_TILE_PROMPT", "80,80=from environment\n0,0=corner")
    assert run([*tiny, "a.png", "-o", "2/"]) == 0
    assert [used("2/a.png.prompts.json")[1][i] for i in (0, 4)] == ["corner", "from environment"]
    monkeypatch.setenv("DREAMSR_PROMPTS", "1")
    assert run([*tiny, "a.png", "-o", "3/", "--tile-prompt", "80,80=typed"]) == 0
    assert used("3/a.png.prompts.json")[1][4] == "typed"
    asked = upscale_options({"prompt_dir": "2"}, dict(os.environ), Path.cwd())
    assert (asked.run.prompts, asked.run.prompt_dir) == (None, "2"), "a flag replaces its rival of a lower layer"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompts", "p.json", "--prompt-dir", "."], "--prompts and --prompt-dir contradict"),
        (["--prompts", "p.json", "--captioner", "none"], "--prompts and --captioner contradict"),
        (["--prompt-dir", "p.json"], "is a file, not a folder"),
        (["--prompts", "p.json", "b.png"], "--prompts p.json is one file, but there are 2 photos"),
        (["--prompts", ""], "--prompts is empty"),
        (["--prompt-mode", "neither"], "--prompt-mode 'neither'"),
        (["--prompt-mode", "global", "--tile-prompt", "0,0=a"], "--tile-prompt has no effect"),
        (["--prompt-mode", "local", "--prompt", "a"], "--prompt has no effect"),
        (["--tile-prompt", "middle"], "--tile-prompt 'middle' is not X,Y=TEXT"),
        (["--tile-prompt", "1,1=a", "--tile-prompt", "1,1=b"], "1,1 was typed twice"),
        (["--prompt", "a\x1b[0m"], "--prompt: the text holds the control character U+001B"),
        (["--captioner", "llava"], "or a LLaVA folder"),
    ],
)
def test_contradictions_are_usage_errors(
    tiny: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    photo()
    photo("b.png", 1)
    Path("p.json").write_text("{}")
    before = sorted(Path().iterdir())
    assert run([*tiny, "a.png", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 2 and words in err
    assert sorted(Path().iterdir()) == before


def test_a_point_outside_of_one_result_is_that_photos_error(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photo()
    Image.new("RGB", (90, 80), (90, 120, 60)).save("wide.png")
    assert run([*tiny, "a.png", "wide.png", "-o", "out", "--tile-prompt", "170,5=sky", "-q"]) == 3
    out, err = capsys.readouterr()
    assert out.splitlines() == ["out/wide_x2.png"]
    assert "a.png: --tile-prompt 170,5 lies outside of the result, 160 x 160 pixels" in err


def test_a_text_that_would_go_unused_is_an_error(bundle: Bundle) -> None:
    source = photo()
    Path("a.txt").write_text("a cat")
    for settings in ({"prompt": "a dog"}, {"prompt_mode": "local"}):
        with pytest.raises(PromptsError, match="it has no effect"):
            upscaled(bundle, source, "b.png", "a.txt", **settings)


def test_a_dry_run_reads_and_fits_the_prompts(
    tiny: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = [*tiny, "a.png", "-o", "2/", "--dry-run", "--json", "-q", "--prompts", "a.png.prompts.json"]
    assert run(dry) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["prompts"], plan["notes"]) == ("a.png.prompts.json", [])
    assert run([*dry, "--scale", "3"]) == 0
    assert "made for 9 tiles" in json.loads(capsys.readouterr().out)["notes"][0]
    edit("a.png.prompts.json", "a.png.prompts.json", None, "a", canvas=[160, 10])
    assert run(dry) == 1
    assert "a.png.prompts.json, line 21: tile 0: [0, 0, 64, 64] is no tile of 64 pixels" in capsys.readouterr().err
    assert not Path("2").exists()


# ---------------------------------------------------------------- journal


class StopAt(SilentProgress):
    """An error at the beginning of one phase."""

    def __init__(self, phase: str) -> None:
        self.wanted = phase

    def phase(self, name: str, total: int) -> None:
        if name == self.wanted:
            raise DreamSRError("stop", "now")


def test_a_run_with_an_edited_file_does_not_go_on_with_the_old_texts(bundle: Bundle, source: Path) -> None:
    config = UpscaleConfig(tile=64, overlap=16, scale=2.0, tile_batch=4, **OFF)
    edit("a.png.prompts.json", "p.json", 4, "a brick wall")

    def go(progress: SilentProgress, **output: Any) -> UpscaleResult:
        return upscale(source, Path("b.png"), bundle, config, OutputConfig(**output), progress, Path("p.json"))

    with pytest.raises(DreamSRError, match="stop"):
        go(StopAt("decode"))
    kept = sorted(Path("b.png.dreamsr").iterdir())
    edit("p.json", "p.json", 4, "a wooden fence")
    with pytest.raises(JournalError, match="prompts was '.*', is '") as caught:
        go(SilentProgress())
    assert "--restart" in caught.value.hint and sorted(Path("b.png.dreamsr").iterdir()) == kept
    edit("p.json", "p.json", 4, "a brick  wall", captioner={})  # the same words
    go(SilentProgress())
    first = Path("b.png").read_bytes()
    edit("p.json", "p.json", 4, "a wooden fence")
    go(SilentProgress(), restart=True)
    assert Path("b.png").read_bytes() != first and not Path("b.png.dreamsr").exists()


def test_bad_prompts_leave_no_journal(bundle: Bundle) -> None:
    source = photo()
    Path("p.json").write_text("{}")
    for settings, prompts in (({}, "p.json"), ({"tile_prompt": ("999,0=a",)}, None)):
        with pytest.raises(InputError):
            upscaled(bundle, source, "b.png", prompts, **settings)
    assert sorted(p.name for p in Path().iterdir()) == ["a.png", "p.json"]


def test_saved_prompts_replace_nothing_unasked(bundle: Bundle) -> None:
    source, config = photo(), UpscaleConfig(tile=64, overlap=16, scale=2.0, tile_batch=4, **OFF)
    Path("a.png.prompts.json").write_text("mine")
    with pytest.raises(OutputError, match=r"a.png.prompts.json exists already"):
        upscale(source, Path("b.png"), bundle, config, OutputConfig(save_prompts=True), SilentProgress())
    assert Path("a.png.prompts.json").read_text() == "mine" and not Path("b.png").exists()
    with pytest.raises(UsageError, match="--captioner 'nobody'"):
        upscaled(bundle, source, "b.png", captioner="nobody")


class StopAfter(SilentProgress):
    """Ctrl-C at the n-th sign of progress."""

    def __init__(self, advances: int) -> None:
        self.left = advances

    def advance(self, count: int = 1) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_llavas_captions_survive_an_interruption_in_the_journal(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_llava
    from transformers import LlavaForConditionalGeneration

    source = photo()
    folder = tiny_llava.save_llava(Path("llava"))
    config = UpscaleConfig(tile=64, overlap=16, scale=2.0, tile_batch=4, captioner=str(folder), **OFF)
    questions: list[int] = []
    generate = LlavaForConditionalGeneration.generate

    def counted(self: Any, **given: Any) -> Any:
        questions.append(len(given["input_ids"]))
        return generate(self, **given)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", counted)
    upscale(source, Path("whole.png"), bundle, config, OutputConfig(save_prompts=True), SilentProgress())
    asked, _ = sum(questions), Path("a.png.prompts.json").rename("whole.json")
    assert asked > 2 and used("whole.json")[0]
    questions.clear()
    with pytest.raises(KeyboardInterrupt):
        upscale(source, Path("b.png"), bundle, config, OutputConfig(save_prompts=True), StopAfter(1))
    assert Path("b.png.dreamsr/captions.jsonl").read_text() and sum(questions) < asked
    upscale(source, Path("b.png"), bundle, config, OutputConfig(save_prompts=True), SilentProgress())
    assert sum(questions) == asked, "nothing was asked twice"
    assert used() == used("whole.json") and Path("b.png").read_bytes() == Path("whole.png").read_bytes()
    assert not Path("b.png.dreamsr").exists()
