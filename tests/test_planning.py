"""What a dry run says, against what a run does; and that it loads and writes nothing, however large the photo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dreamsr_cli import canvas
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.cli.app import run
from dreamsr_cli.config import CONTROL_BYTES, OutputConfig, UpscaleConfig
from dreamsr_cli.engine import check_settings, upscale
from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.images import read_info
from dreamsr_cli.machine import Machine, estimate
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.conditioned_dit import ConditionedDiT
from dreamsr_cli.models.mm_controlnet import MMControlNet
from dreamsr_cli.planning import Plan, plan, record_efficiency
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.workload import Limits

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(strip_rows=canvas.STRIP, control_bytes=CONTROL_BYTES)
MACHINE = Machine("cpu", "tester", "fp32", 1, 8 * 2**30, None, 1e9)
SMALL = UpscaleConfig(tile=64, overlap=16, steps=3, precision="fp32", scale=2.0, device="cpu")


@pytest.fixture(autouse=True)
def without_a_probe(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bundle(tiny_bundle) -> Bundle:
    return open_bundle(str(tiny_bundle))


def photo(path: Path, width: int = 70, height: int = 50) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def planned(
    bundle: Bundle,
    source: Path,
    config: UpscaleConfig = SMALL,
    output: OutputConfig | None = None,
    limits: Limits = LIMITS,
    on: Machine = MACHINE,
    to: str = "out.png",
) -> Plan:
    settings = check_settings(config, bundle)
    sizes = read_sizes(bundle.config, bundle.part_folder)
    output = output or OutputConfig()
    return plan(source, read_info(source), Path(to), settings, output, sizes, on, limits)


def empty_tiff(path: Path, side: int) -> Path:
    """A TIFF whose pixels were never written: the file is sparse."""
    tifffile.memmap(path, shape=(side, side, 3), dtype=np.uint8, photometric="rgb")
    return path


# ---------------------------------------------------------------- a plan against a run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strength": 0.0},
        {"removal": False},
        {"tile": 0},
        {"tiling": "shifted"},
        {"tiling": "shifted", "steps": 1, "tile_batch": 3},
        {"tile_batch": 5, "steps": 1},
        {"captioner": "describe", "prompt": None},
    ],
)
def test_the_run_does_what_the_plan_says(bundle, changes, monkeypatch):
    source = photo(Path("a.png"))
    config = replace(SMALL, **{"captioner": "none", "prompt": "a cat on a mat", **changes})
    made = planned(bundle, source, config)
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # fused, it isn't counted
    seen: Counter[str] = Counter()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.update([type(module).__name__])
    )
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = upscale(source, Path("out.png"), bundle, config, OutputConfig(), SilentProgress())
    finally:
        hook.remove()
    assert (result.width, result.height, result.tiles) == (made.width, made.height, len(made.grid.tiles))
    calls = made.calls
    assert seen[ConditionedDiT.__name__] == calls["remove"] + calls["texture"]
    assert seen[MMControlNet.__name__] == calls["remove_control"] + calls["texture_control"]
    assert seen["Refiner"] == calls["decode"]
    assert 0 < seen["ByteTextEncoder"] <= calls["text"]
    # How long a describer's words will be is a guess, and in tiles this small they are most of the tokens.
    near = 0.03 if config.captioner == "none" else 0.25
    assert made.total_flops == pytest.approx(counter.get_total_flops(), rel=near)


def test_features_beyond_the_budget_are_counted_in_every_step(bundle):
    source, config = photo(Path("a.png")), replace(SMALL, tile_batch=2)
    everything = planned(bundle, source, config)
    batches, features = everything.batches, everything.memory["features"]
    assert batches >= 3 and everything.calls["texture_control"] == batches
    tight = planned(bundle, source, config, limits=replace(LIMITS, control_bytes=features * 2 // batches))
    assert tight.calls["texture_control"] == 2 + 3 * (batches - 2)
    assert tight.memory["features"] == features * 2 // batches
    assert tight.total_flops > everything.total_flops
    sampled = Bundle(bundle.folder, replace(bundle.config, control=replace(bundle.config.control, timestep="sampled")))
    every_step = planned(sampled, source, config)
    assert every_step.calls["texture_control"] == 3 * batches and every_step.memory["features"] == 0


def test_adain_decodes_twice_what_is_too_tall_to_be_kept(bundle):
    tall = photo(Path("tall.png"), 20, 700)
    assert planned(bundle, tall).calls["decode"] == 6
    assert planned(bundle, tall, replace(SMALL, color_fix="adain")).calls["decode"] == 12
    low = photo(Path("low.png"), 20, 400)
    assert planned(bundle, low, replace(SMALL, color_fix="adain")).calls["decode"] == 4


def test_prompts_are_counted_once_each(bundle):
    source = photo(Path("a.png"))
    tiles = len(planned(bundle, source).grid.tiles)
    assert planned(bundle, source).calls["text"] == tiles + 1
    assert planned(bundle, source, replace(SMALL, tile=0)).calls["text"] == 1
    assert planned(bundle, source, replace(SMALL, captioner="none")).calls["text"] == 1
    assert planned(bundle, source, replace(SMALL, captioner="none", prompt="a cat")).calls["text"] == 2


def test_disk_and_memory_are_those_of_the_design(bundle):
    made = planned(bundle, photo(Path("a.png")))
    assert made.disk["canvases"] == 3 * 4 * 8 * (112 // 8) * (144 // 8)
    assert made.disk["pixels"] == 140 * 100 * 3
    assert made.disk["total"] == sum(value for name, value in made.disk.items() if name != "total")
    assert made.fits_disk and made.fits_memory and not made.stops_because
    assert made.memory["device"] == 0
    poor = planned(bundle, photo(Path("a.png")), on=replace(MACHINE, memory=made.memory["host"] - 1))
    assert poor.fits_memory is False and not poor.stops_because
    unknown = planned(bundle, photo(Path("a.png")), on=replace(MACHINE, memory=None))
    assert unknown.fits_memory is None
    card = planned(bundle, photo(Path("a.png")), on=replace(MACHINE, device="cuda", device_memory=100))
    assert card.fits_memory is False and card.memory["device"] > card.memory["features"] > 0
    assert card.calls["trial"] == 1 and card.flops["trial"] > 0


def test_sixteen_bits_and_alpha_take_more_disk(bundle):
    tifffile.imwrite("deep.tif", np.zeros((50, 70, 4), np.uint16), photometric="rgb", extrasamples=["unassalpha"])
    deep = planned(bundle, Path("deep.tif"), to="out.tif")
    assert (deep.bit_depth, deep.format, deep.disk["pixels"]) == (16, "tiff", 140 * 100 * 4 * 2)
    assert planned(bundle, Path("deep.tif"), output=OutputConfig(bit_depth="8")).disk["pixels"] == 140 * 100 * 4


# ---------------------------------------------------------------- what stops a run


@pytest.mark.parametrize(("name", "side"), [("out.jpg", 65535), ("out.webp", 16383), ("out.avif", 16384)])
def test_what_a_format_cannot_hold_is_told(bundle, name, side):
    source = photo(Path("long.png"), 9000, 1)
    stops = planned(bundle, source, replace(SMALL, scale=8.0), to=name).stops_because
    assert len(stops) == 1 and f"{side:,}" in stops[0] and name.split(".")[1].upper() in stops[0]
    assert not planned(bundle, source, replace(SMALL, scale=1.0), to=name).stops_because
    assert not planned(bundle, source, replace(SMALL, scale=8.0), to="out.png").stops_because


def test_max_pixels_and_the_disk_stop_a_run_and_not_a_plan(bundle, monkeypatch):
    source = photo(Path("a.png"))
    assert not planned(bundle, source, output=OutputConfig(max_pixels=14_000)).stops_because
    (result,) = planned(bundle, source, output=OutputConfig(max_pixels=13_999)).stops_because
    assert "the result has 14,000" in result
    assert len(planned(bundle, source, output=OutputConfig(max_pixels=3_499)).stops_because) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    full = planned(bundle, source)
    assert not full.fits_disk and "the disk has 5 bytes free" in full.stops_because[0]


def test_sides_that_do_not_suit_the_photo_are_its_own_error(bundle):
    source = photo(Path("a.png"))
    with pytest.raises(InputError, match="a.png"):
        planned(bundle, source, replace(SMALL, scale=None, long_side=10_000))
    with pytest.raises(UsageError, match="--scale"):
        planned(bundle, source, replace(SMALL, scale=9.0))


# ---------------------------------------------------------------- time


def test_time_is_a_range_that_history_narrows(bundle):
    made = planned(bundle, photo(Path("a.png")))
    assert made.time is not None and made.time.runs == 0
    seconds = made.total_flops / 1e9 / 0.5
    assert made.time.low == pytest.approx(seconds / 1.5) and made.time.high == pytest.approx(seconds * 1.5)
    for _ in range(3):
        record_efficiency(made, made.total_flops / 1e9 / 0.2)
    after = planned(bundle, Path("a.png")).time
    assert after is not None and (after.runs, after.efficiency) == (3, pytest.approx(0.2))
    assert after.high / after.low == pytest.approx(1.21)
    assert after.low < made.total_flops / 1e9 / 0.2 < after.high
    # The machine is busy now: the same share of half the speed.
    slower = estimate(made.total_flops, replace(MACHINE, flops_per_second=5e8), made.model)
    assert slower is not None and slower.low == pytest.approx(2 * after.low)
    for other in (replace(MACHINE, threads=2), replace(MACHINE, precision="bf16"), replace(MACHINE, name="x")):
        fresh = estimate(made.total_flops, other, made.model)
        assert fresh is not None and fresh.runs == 0


def test_a_run_without_a_probe_counts_against_the_next_one(bundle):
    made = planned(bundle, photo(Path("a.png")), on=replace(MACHINE, flops_per_second=None))
    assert made.time is None and made.to_json()["seconds"] is None
    record_efficiency(made, made.total_flops / 3e8)
    after = planned(bundle, Path("a.png")).time
    assert after is not None and (after.runs, after.efficiency) == (1, pytest.approx(0.3))


# ---------------------------------------------------------------- without torch, without weights, of any size


def test_a_huge_photo_is_planned_without_torch_and_in_little_memory(tiny_bundle):
    source = empty_tiff(Path("huge.tif"), 30_000)
    code = f"""
import json, resource, sys
from pathlib import Path
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.config import BundleConfig, OutputConfig
from dreamsr_cli.plain_data import from_dict
from dreamsr_cli.images import read_info
from dreamsr_cli.machine import Machine
from dreamsr_cli.planning import plan
from dreamsr_cli.workload import Limits
from types import SimpleNamespace
folder = Path({str(tiny_bundle)!r})
config = from_dict(BundleConfig, json.loads((folder / "bundle.json").read_text()), "x")
settings = SimpleNamespace(scale=4.0, long_side=None, short_side=None, tile=512, overlap=64, steps=16, strength=0.8,
                           removal=True, tile_batch=4, prompt=None, captioner="describe", color_fix="wavelet",
                           quantize="none", offload="none", tiling="overlap", fit_batch=False, text_bucket=None,
                           memory=None, looks="auto", consistency=None, texture=1.0, grain=0.0, enlarger=None,
                           cleaner=None)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
made = plan(Path({str(source)!r}), read_info(Path({str(source)!r})), Path("huge_x4.tif"), settings, OutputConfig(),
            read_sizes(config, lambda name: folder / name), Machine("cpu", "x", "bf16", 1, None, None, None),
            Limits(256, 2**29)).to_json()
assert "torch" not in sys.modules
print(json.dumps([made, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    made, kilobytes = json.loads(done.stdout)
    assert (made["width"], made["height"], made["tiles"]) == (120_000, 120_000, 268 * 268)
    assert any("--max-pixels" in reason for reason in made["stops_because"])
    assert kilobytes < 200_000


def test_a_dry_run_needs_no_weights_and_writes_nothing(tiny_bundle, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bundle, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    photo(Path("in/a.png"))
    photo(Path("in/sub/b.jpg"), 30, 90)
    Path("in/bad.png").write_bytes(b"no photo")

    def files() -> list[Path]:
        # A CPU with bfloat16 keeps in the cache folder how much faster that is.
        return sorted(p for p in tmp_path.rglob("*") if tmp_path / "cache" not in (p, *p.parents))

    before = files()
    flags = ["upscale", "in", "-o", "out", "--model", str(bare), "--tile", "64", "--overlap", "16", "--scale", "2"]
    assert run([*flags, "--dry-run", "--json", "-q"]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("output") for line in lines] == ["out/a_x2.png", None, "out/sub/b_x2.jpg"]
    assert (lines[0]["width"], lines[0]["height"], lines[0]["rows"], lines[0]["columns"]) == (140, 100, 2, 3)
    assert "error" in lines[1] and lines[2]["format"] == "jpg"
    assert run([*flags[:1], "in/a.png", *flags[2:], "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("in/a.png -> out/a_x2.png\n") and "6 (2 rows x 3 columns)" in out
    assert "not estimated" in out and "STOPS" not in out
    assert files() == before


def test_a_plan_that_would_stop_says_why_and_exits_0(tiny_bundle, capsys):
    photo(Path("a.png"))
    Path("a_x2.png").write_bytes(b"mine")
    flags = ["--model", str(tiny_bundle), "--tile", "64", "--overlap", "16", "--scale", "2", "--max-pixels", "100"]
    assert run(["upscale", "a.png", "--dry-run", *flags]) == 0
    stops = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  STOPS")]
    assert len(stops) == 3 and "a_x2.png exists already" in stops[2]
    assert run(["upscale", "a.png", "--dry-run", "--json", "--overwrite", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["stops_because"]) == 2


def test_wrong_settings_are_usage_errors_in_a_dry_run_too(tiny_bundle, capsys):
    photo(Path("a.png"))
    assert run(["upscale", "a.png", "--dry-run", "--model", str(tiny_bundle), "--overlap", "600"]) == 2
    assert "--overlap" in capsys.readouterr().err
