"""LLaVA and LLaVA-OneVision, real classes at tiny size: batches, long and wide pictures, broken folders."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llava
import torch

from dreamsr_cli.draws import generator
from dreamsr_cli.errors import DeviceError, UsageError, WeightsError
from dreamsr_cli.models import llava
from dreamsr_cli.models.llava import check_quantize, open_llava

CPU = torch.device("cpu")
SAVE: dict[str, Callable[[Path], Path]] = {"llava": tiny_llava.save_llava, "onevision": tiny_llava.save_onevision}


@pytest.fixture(scope="module", params=list(SAVE))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def pictures(count: int) -> list[np.ndarray]:
    """Blocks of colour, of several sizes and shapes."""
    made = []
    for i in range(count):
        rng = generator(1, "picture", i)
        rows, columns = [(30, 30), (20, 50), (60, 25), (48, 48), (9, 14)][i % 5]
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        made.append(np.repeat(np.repeat(blocks, 15, 0), 13, 1)[:rows, :columns].copy())
    return made


def test_batches_of_one_and_eight_say_the_same(folder: Path) -> None:
    opened, shown = open_llava(folder, CPU), pictures(8)
    together = opened.caption(shown, "Name what is visible.", 16)
    alone = [opened.caption([picture], "Name what is visible.", 16)[0] for picture in shown]
    assert together == alone
    assert len(set(together)) >= 6, "what is said must depend on what is seen"
    assert opened.caption(shown, "Name what is visible.", 16) == together


def test_the_instruction_counts_and_the_answer_is_short(folder: Path) -> None:
    opened, shown = open_llava(folder, CPU), pictures(4)
    first = opened.caption(shown, "Name what is visible.", 20)
    assert opened.caption(shown, "Which colours are there?", 20) != first
    short = opened.caption(shown, "Name what is visible.", 1)
    assert all(long.startswith(beginning) for long, beginning in zip(first, short, strict=True))
    assert sum(map(len, short)) < sum(map(len, first))


def test_a_wide_picture_is_seen_to_its_sides(folder: Path) -> None:
    """LLaVA-1.5's processor alone would cut the sides off."""
    opened = open_llava(folder, CPU)
    wide_PQC = np.full((30, 120, 3), 90, np.uint8)
    texts = []
    for column in (0, 60, 110):
        picture_PQC = wide_PQC.copy()
        picture_PQC[:, column : column + 10] = (250, 20, 20)
        texts.append(opened.caption([picture_PQC], "Name what is visible.", 16)[0])
    assert texts[0] != opened.caption([wide_PQC], "Name what is visible.", 16)[0]
    assert len(set(texts)) > 1


def test_saved_sampling_is_not_used(folder: Path, own: Path) -> None:
    path = own / "generation_config.json"
    saved = json.loads(path.read_text()) | {"do_sample": True, "temperature": 5.0, "top_k": 50}
    path.write_text(json.dumps(saved))
    shown = pictures(4)
    expected = open_llava(folder, CPU).caption(shown, "Name what is visible.", 16)
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert open_llava(own, CPU).caption(shown, "Name what is visible.", 16) == expected


def test_an_older_folder_opens_too(folder: Path, own: Path) -> None:
    """Early releases: chat template as JSON, nothing in processor_config.json that the network's config says."""
    expected = open_llava(folder, CPU).caption(pictures(2), "What is it?", 8)
    jinja = own / "chat_template.jinja"
    (own / "chat_template.json").write_text(json.dumps({"chat_template": jinja.read_text()}))
    jinja.unlink()
    saved = json.loads((own / "processor_config.json").read_text())
    for key in ("patch_size", "num_image_tokens", "num_additional_image_tokens", "vision_feature_select_strategy"):
        saved.pop(key, None)
    if shaper := saved.pop("image_processor", None):
        (own / "preprocessor_config.json").write_text(json.dumps(shaper))
    (own / "processor_config.json").write_text(json.dumps(saved))
    assert open_llava(own, CPU).caption(pictures(2), "What is it?", 8) == expected


def test_it_is_freed_with_its_last_reference(folder: Path) -> None:
    opened = open_llava(folder, CPU)
    opened.caption(pictures(2), "What is it?", 4)
    gone = weakref.ref(opened.model)
    del opened
    gc.collect()
    assert gone() is None


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _other_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _weights_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "multi_modal_projector" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("config.json"), r"config\.json can't be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (_other_kind, "model_type in its config.json is 'qwen2'"),
        (_remove("model.safetensors"), "can't be opened"),
        (_cut, "can't be opened"),
        (_weights_missing, "lacks .* weights .*projector"),
        (_no_template, "no chat template"),
        (_remove("tokenizer.json"), "can't be opened"),
        (_pickle, "pickle"),
    ],
)
def test_a_broken_folder_is_told(own: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(own)
    with pytest.raises(WeightsError, match=message) as caught:
        open_llava(own, CPU)
    assert caught.value.hint


def test_the_models_own_marks_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="<image>"):
        open_llava(folder, CPU).caption(pictures(1), "Compare <image> with <image>.", 4)


def test_too_little_memory_is_told_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "free_memory", lambda: 1000)
    with pytest.raises(DeviceError, match="GiB of RAM"):
        open_llava(folder, CPU)


def test_quantization_is_checked() -> None:
    with pytest.raises(UsageError, match="'int3'"):
        check_quantize("int3", CPU)
    check_quantize("none", torch.device("mps"))
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'bitsandbytes' else find(n, *a)\n"
        "import torch; from dreamsr_cli.models.llava import check_quantize\n"
        "from dreamsr_cli.errors import UsageError\n"
        "try: check_quantize('nf4', torch.device('cpu'))\n"
        "except UsageError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs bitsandbytes" in result.stdout and "pip install bitsandbytes" in result.stdout


@pytest.mark.parametrize(("bits", "kind"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
def test_quantized_language_models_speak(folder: Path, bits: str, kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    if bits == "nf4" and functional.has_avx512bf16():
        pytest.skip("bitsandbytes 0.50 can't repack matrices narrower than a block of 64 on CPUs with AVX512-BF16")
    opened = open_llava(folder, CPU, bits)
    small = [name for name, part in opened.model.named_modules() if type(part).__name__ == kind]
    assert small and all("language_model" in name for name in small)
    texts = opened.caption(pictures(5), "Name what is visible.", 8)
    assert len(texts) == 5 and any(texts)


def test_quantization_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(DeviceError, match="does not run on mps"):
        check_quantize("nf4", torch.device("mps"))
