"""Two processes under torchrun with gloo: the losses of one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import save_photos

from dreamsr_cli.errors import UsageError
from dreamsr_cli.training.distributed import share_of

TESTS = Path(__file__).resolve().parent


def start(given: dict, processes: int) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [sys.executable, *(torchrun if processes > 1 else []), str(TESTS / "training_child.py"), json.dumps(given)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def logged(given: dict) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path(given["out"], "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["joint", "backbone"])
def test_two_processes_are_one_with_twice_the_batch(tiny_bundle, tmp_path, monkeypatch, stage) -> None:
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))
    data = save_photos(tmp_path / "photos")
    common: dict[str, Any] = {"stage": stage, "steps": 6, "batch": 4, "bundle": str(tiny_bundle), "data": str(data)}
    runs: dict[int, Any] = {
        n: {**common, "out": str(tmp_path / f"run-{n}"), "accumulate": 2 if n == 2 else 1} for n in (1, 2)
    }
    for n, given in runs.items():
        start(given, n)
    one, two = (logged(given) for given in runs.values())
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name != "norm":
                assert a[name] == pytest.approx(b[name], abs=1e-4), (name, a, b)
    if stage == "joint":
        assert any("removal_gan" in line for line in two) and any("texture_velocity" in line for line in two)
    assert json.loads(Path(runs[2]["out"], "run.json").read_text())["machine"]["processes"] == 2
    assert Path(runs[2]["out"], "bundle", "bundle.json").is_file()


@pytest.mark.parametrize(("rank", "expected"), [(0, (0, 2)), (1, (4, 2)), (3, (12, 2))])
def test_each_process_has_its_share_of_the_global_batch(rank, expected) -> None:
    assert share_of(16, rank, 4, 2) == expected


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does() -> None:
    with pytest.raises(UsageError, match="use a batch of 8"):
        share_of(10, 0, 4, 2)


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny_models import RECIPE, networks
from dreamsr_cli.training.distributed import whole
from dreamsr_cli.training.optimisers import Learner
torch.set_num_threads(1)
dist.init_process_group("gloo")
def learner(shard):
    made = networks()
    made.train_only(("lora", "controlnet"))
    if shard:
        for block in [*made.transformer.transformer_blocks, *made.controlnet.transformer_blocks]:
            fully_shard(block)
        fully_shard(made.dit), fully_shard(made.controlnet)
    return made, Learner(made.named(("lora", "controlnet")), RECIPE.optim)
def update(made, each):
    for number, live in enumerate(made.named(("lora", "controlnet")).values()):
        gradient = torch.full(live.shape, 0.01 * (number % 7 - 3))
        if hasattr(live, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor
            gradient = distribute_tensor(gradient, live.device_mesh, live.placements)
        live.grad = gradient
    norm = each.masters.take_gradients(0.5)
    each.update(0.01, 3)
    return norm
plain, sharded = learner(False), learner(True)
assert any(hasattr(m, "device_mesh") for m in sharded[1].masters.master), "nothing was sharded"
norms = [update(*plain), update(*sharded)]
assert abs(norms[0] - norms[1]) < 1e-4 * norms[0], norms
saved = sharded[1].tensors()
for name, group in plain[1].tensors().items():
    assert group.keys() == saved[name].keys()
    for key, value in group.items():
        assert torch.allclose(value, saved[name][key], atol=1e-6), (name, key)
again = learner(True)
again[1].restore(saved)
update(*again), update(*sharded)
for a, b in zip(again[1].masters.master, sharded[1].masters.master, strict=True):
    assert torch.equal(whole(a.detach()), whole(b.detach()))
dist.barrier()
dist.destroy_process_group()
# gloo's threads may still be ending: without this the interpreter's exit sometimes aborts them.
os._exit(0)
"""


@pytest.mark.slow
def test_sharded_weights_learn_and_resume_as_whole_ones(tmp_path) -> None:
    """What FSDP2 makes of the parameters (accelerate ignores its own plugin on a CPU): masters, clipping, averages and
    checkpoints are those of unsharded ones."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("gloo isn't there")
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
