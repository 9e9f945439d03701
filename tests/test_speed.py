"""What makes steps faster leaves the picture as it is: batches, text lengths, kept features, copies, --compile."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamsr_cli import control_room
from dreamsr_cli.backoff import WorkPlan, next_plan
from dreamsr_cli.batch_choice import automatic_batch, fitting_batch
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.canvas import STRIP
from dreamsr_cli.config import CONTROL_BYTES, OutputConfig, UpscaleConfig
from dreamsr_cli.control_room import with_control_room
from dreamsr_cli.engine import check_settings, upscale
from dreamsr_cli.errors import DeviceError, UsageError
from dreamsr_cli.kept_control import KeptControl
from dreamsr_cli.machine import Machine
from dreamsr_cli.models import compiling
from dreamsr_cli.models.attention import attention_kernels, join_attention
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.conditioned_dit import Injections
from dreamsr_cli.models.quantization import PLAIN, MemoryMode
from dreamsr_cli.models.text_encoder import stack
from dreamsr_cli.models.tokens import joint_mask, rotary
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.sampler import Texts
from dreamsr_cli.text_buckets import BYTE_BUCKETS, T5_BUCKETS, bucket_of
from dreamsr_cli.tiling import make_grid
from dreamsr_cli.transfers import LookAhead
from dreamsr_cli.workload import Limits, Workload

CPU = torch.device("cpu")
MIB = 2**20


@given(st.integers(1, 2000), st.integers(1, 64))
def test_the_batch_leaves_the_fewest_padded_tiles(tiles, most) -> None:
    batch = fitting_batch(tiles, most)
    assert 1 <= batch <= min(most, tiles)
    padding = {size: -(-tiles // size) * size - tiles for size in range(1, min(most, tiles) + 1)}
    assert padding[batch] == min(padding.values())
    assert all(padding[size] > padding[batch] for size in range(batch + 1, min(most, tiles) + 1))


@pytest.mark.parametrize(("tiles", "batch"), [(24, 4), (9, 3), (6, 3), (7, 1), (16, 4), (3, 3)])
def test_batches_by_hand(tiles, batch) -> None:
    assert automatic_batch(tiles, 4, 1024, "cuda", 1) == batch == automatic_batch(tiles, 4, 1024, "cpu", 16)
    assert automatic_batch(tiles, 4, 16, "cpu", 1) == batch  # small tiles leave a CPU idle one by one
    assert automatic_batch(tiles, 4, 1024, "cpu", 1) == 1


@pytest.mark.parametrize(("tokens", "length"), [(1, 64), (64, 64), (65, 128), (300, 512), (512, 512), (513, 512)])
def test_the_bucket_holds_the_longest_text(tokens, length) -> None:
    assert bucket_of(tokens, 512, T5_BUCKETS) == length
    assert bucket_of(tokens, 100, T5_BUCKETS) == min(length, 100)
    assert bucket_of(tokens, 512, ()) == 512


def test_texts_are_padded_to_their_bucket_and_flux_sees_it(tiny_bundle, tiny_flux_bundle) -> None:
    encoder = open_bundle(str(tiny_bundle)).open_text_encoder(CPU, torch.float32)
    (short, long), _ = encoder.encode(["a wall", "b" * 150], 128, BYTE_BUCKETS)
    assert Texts(short, [short, short], False, 128, BYTE_BUCKETS).length == 32
    assert Texts(short, [short, long], False, 128, BYTE_BUCKETS).length == 64
    assert Texts(short, [short, short], False, 128).length == 128
    assert Texts(short, [short]).length == short.tokens_BTD.shape[1]
    flux = open_bundle(str(tiny_flux_bundle)).open_text_encoder(CPU, torch.float32)
    for texts, buckets, length in ((["ab"], (4, 8, 16), 4), (["ab", "abcdef"], (4, 8, 16), 8), (["ab"], (), 16)):
        found, cut = flux.encode(texts, 16, buckets)
        assert {e.tokens_BTD.shape[1] for e in found} == {length} and not cut


def test_stack_believes_who_knows_whether_texts_are_whole() -> None:
    whole, padded = tiny_models.text(1, 5, words=5), tiny_models.text(1, 5, words=3)
    assert whole.fills(5) and not whole.fills(6) and not padded.fills(5)
    assert stack([whole, whole], 5, True).mask_BT is None
    assert stack([whole, padded], 5, False).mask_BT is not None


@pytest.mark.parametrize("words", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_attention_gives_diffusers_numbers(words, dtype) -> None:
    transformer = tiny_models.flux_transformer().to(dtype)
    text, hidden = tiny_models.text(2, 5, words=words), torch.randn(2, 6, transformer.inner_dim, dtype=dtype)
    encoder = transformer.context_embedder(text.tokens_BTD.to(dtype))
    temb = torch.randn(2, transformer.inner_dim, dtype=dtype)
    rope, kwargs = rotary(transformer.pos_embed, 5, 6, 4, CPU), joint_mask(text.mask_BT, 6)
    made = []
    for ours in (False, True):
        for module in transformer.modules():
            if type(module).__name__ == "FluxAttention":
                module.set_processor(FluxAttnProcessor())
        if ours:
            join_attention([transformer])
        with torch.no_grad(), attention_kernels(CPU):
            streams = [encoder, hidden]
            for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
                streams = list(block(streams[1], streams[0], temb, rope, kwargs))
        made.append(streams)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def features(value: float) -> Injections:
    """256 KiB."""
    image = [torch.full((1, 128, 256), value)]
    return Injections(image, [(torch.full((1, 128, 128), value), torch.full((1, 128, 128), value))], None)


def test_features_are_kept_on_the_device_then_in_ram_then_not() -> None:
    kept = KeptControl(torch.device("meta"), 2 * features(0).size, features(0).size)
    for tile in range(4):
        kept.keep((0, tile), features(tile))
    assert (kept.on_device, kept.in_ram) == (2, 1)
    near, far = kept.find((0, 1)), kept.find((0, 2))
    assert near is not None and near.image[0][0, 0, 0] == 1
    assert far is not None and far.image[0].device.type == "meta" and far.keys_values is not None
    assert kept.find((0, 3)) is None
    assert kept.leave_device() and kept.find((0, 1)) is None and kept.find((0, 2)) is not None
    assert not kept.leave_device()
    plain = KeptControl(CPU, 0, 2**30)  # RAM is the device
    plain.keep((0, 0), features(0))
    assert plain.find((0, 0)) is None


def workload(bundle_folder, machine: Machine, side: int = 512, limits: Limits | None = None, **config) -> Workload:
    bundle = open_bundle(str(bundle_folder))
    settings = check_settings(UpscaleConfig(tile=64, overlap=16, steps=4, strength=0.8, **config), bundle)
    sizes = read_sizes(bundle.config, bundle.part_folder)
    return Workload(make_grid(side, side, 64, 16), settings, sizes, machine, limits or Limits(STRIP))


def machine(device: str = "cpu", memory: int | None = None, card: int | None = None) -> Machine:
    return Machine(device, "x", "fp32", 1, memory, card, None)


def test_room_for_features_follows_the_free_memory(tiny_bundle) -> None:
    for ram, most in ((None, CONTROL_BYTES), (8 * MIB, MIB), (2**40, control_room.CPU_MOST)):
        work = with_control_room(workload(tiny_bundle, machine("cpu", ram)))
        limits, whole = work.limits, work.batches * work.feature_bytes
        assert limits.control_bytes is not None and limits.control_host == 0
        assert limits.control_bytes == min(whole, most // work.feature_bytes * work.feature_bytes)
        kept = work.kept_features[0]
        assert work.calls()["texture_control"] == kept + (work.batches - kept) * 4
    given_room = workload(tiny_bundle, machine("cpu", 2**40), limits=Limits(STRIP, 0))
    assert with_control_room(given_room).limits.control_bytes == 0
    asked = with_control_room(workload(tiny_bundle, machine("cpu", 8 * MIB), memory="8GB"))
    assert (asked.limits.control_bytes or 0) > MIB  # --memory has counted on it


def test_a_full_card_leaves_features_to_ram(tiny_bundle) -> None:
    roomy = with_control_room(workload(tiny_bundle, machine("cuda", 2**34, 2**34)))
    assert roomy.limits.control_bytes == roomy.batches * roomy.feature_bytes and roomy.limits.control_host == 0
    full = with_control_room(workload(tiny_bundle, machine("cuda", 2**34, 2**29)))
    assert full.limits.control_bytes == 0
    assert full.limits.control_host == full.batches * full.feature_bytes
    assert full.kept_features == (full.batches, 0) and full.calls()["texture_control"] == full.batches
    none = with_control_room(workload(tiny_bundle, machine("cuda", None, 2**29)))
    assert none.kept_features == (0, 0)


def test_backing_off_leaves_features_in_ram() -> None:
    smaller = next_plan(WorkPlan(1, 2**20, "none", 2**21), torch.device("cuda"))
    assert smaller is not None and smaller[0] == WorkPlan(1, 0, "none", 2**21) and "RAM" in smaller[1]
    halved = next_plan(WorkPlan(3, 2**20), torch.device("cuda"))
    assert halved is not None and halved[0].tile_batch == 1
    assert WorkPlan(tile_batch=4, control_bytes=5, offload="none").control_host == 0  # older journals


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_results_come_in_order_and_so_many_are_begun(ahead) -> None:
    begun: list[int] = []

    def compute(key: int) -> torch.Tensor:
        begun.append(key)
        return torch.full((2,), key, dtype=torch.bfloat16)

    results = LookAhead(compute, [3, 5, 7], ahead)
    for number, key in enumerate([3, 5, 7], start=1):
        read = results.read(key)
        assert read.dtype == np.float32 and (read == key).all()
        assert len(begun) == min(3, number + ahead)
    assert begun == [3, 5, 7]
    with pytest.raises(ValueError, match="order"):
        LookAhead(compute, [3, 5], ahead).read(5)


def write_photo(path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)


def made(folder, bundle, name: str, **config) -> tuple[np.ndarray, dict]:
    settings: dict[str, Any] = {"tile": 64, "overlap": 16, "device": "cpu", "precision": "fp32", **config}
    out = folder / name
    result = upscale(
        folder / "photo.png", out, open_bundle(str(bundle)), UpscaleConfig(**settings), OutputConfig(), SilentProgress()
    )
    return np.asarray(Image.open(out)).astype(int), result.to_json()


def test_batch_and_bucket_are_in_the_result(tiny_bundle, tmp_path) -> None:
    write_photo(tmp_path / "photo.png")
    automatic, told = made(tmp_path, tiny_bundle, "a.png")
    assert told["tiles"] == 9 and told["tile_batch"] == 3 and told["text_bucket"] is None and not told["compile"]
    assert "fit_batch" not in told
    typed, _ = made(tmp_path, tiny_bundle, "b.png", tile_batch=3)
    assert (automatic == typed).all()
    longer, told = made(tmp_path, tiny_bundle, "c.png", text_bucket=128)
    assert told["text_bucket"] == 128 and np.abs(longer - automatic).max() <= 1
    cut, told = made(tmp_path, tiny_bundle, "d.png", text_bucket=2)
    assert any("longer than 2 tokens" in note for note in told["notes"]) and (cut != automatic).any()


def test_a_text_bucket_beyond_the_model_is_refused(tiny_bundle) -> None:
    bundle = open_bundle(str(tiny_bundle))
    with pytest.raises(UsageError, match="--text-bucket 129"):
        check_settings(UpscaleConfig(text_bucket=129), bundle)


def test_compile_says_what_is_missing(tiny_bundle, monkeypatch) -> None:
    compiling.check_compile(CPU, PLAIN)
    bundle = open_bundle(str(tiny_bundle))
    with pytest.raises(UsageError, match="--quantize int8"):
        compiling.check_compile(CPU, MemoryMode("int8"))
    with pytest.raises(UsageError, match="--offload block"):
        check_settings(UpscaleConfig(compile=True, offload="block", device="cpu"), bundle)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceError, match="compiler") as raised:
        check_settings(UpscaleConfig(compile=True, device="cpu"), bundle)
    assert "g++" in raised.value.hint


def test_a_failed_translation_is_one_line() -> None:
    def broken(graph, inputs):
        raise RuntimeError("no such instruction\nand a long story")

    with pytest.raises(DeviceError, match="torch.compile failed") as raised, compiling.compile_errors():
        torch.compile(lambda x: x + 1, backend=broken)(torch.ones(2))
    assert "\n" not in raised.value.message and "--compile" in raised.value.hint


@pytest.mark.slow
@pytest.mark.timeout(900)  # translating takes 40 s on one machine and five minutes on another
def test_compiled_blocks_make_the_same_picture(tiny_bundle, tmp_path) -> None:
    """In a process of its own, with a cache of its own; the second run finds what the first one translated."""
    write_photo(tmp_path / "photo.png")
    plain, _ = made(tmp_path, tiny_bundle, "plain.png")
    cache = tmp_path / "cache"
    environ = {**os.environ, "DREAMSR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environ.pop(compiling.CACHE_VARIABLE, None)
    pictures = []
    for name in ("first.png", "second.png"):
        words = ["upscale", "photo.png", "-o", name, "--model", str(tiny_bundle), "--tile", "64", "--overlap", "16"]
        command = [sys.executable, "-m", "dreamsr_cli", *words, "--compile", "--device", "cpu", "--precision", "fp32"]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert str(cache) in done.stderr
        pictures.append(np.asarray(Image.open(tmp_path / name)).astype(int))
    assert any((cache / "inductor").iterdir())
    assert np.abs(pictures[0] - plain).max() <= 1 and (pictures[0] == pictures[1]).all()


def test_settings_know_whether_the_batch_is_free(tiny_bundle) -> None:
    bundle = open_bundle(str(tiny_bundle))
    free, typed = (check_settings(UpscaleConfig(tile_batch=b), bundle) for b in (None, 4))
    assert free.fit_batch and not typed.fit_batch
    assert dataclasses.replace(free, fit_batch=False) == typed
