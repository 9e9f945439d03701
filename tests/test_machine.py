"""The measured speed, and the memory of what earlier runs reached."""

from __future__ import annotations

import json

import pytest
import torch

from dreamsr_cli import machine
from dreamsr_cli.machine import Machine, describe_machine, estimate, remember_efficiency

TESTER = Machine("cpu", "tester", "fp32", 1, 8 * 2**30, None, 1e9)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("text", ["", "[]", '{"tester|fp32|1|mini": [[0, 1], ["x", 2], [3]]}', "{"])
def test_a_spoilt_history_is_no_history(text):
    store = machine.cache_folder() / "efficiency.json"
    store.parent.mkdir(parents=True)
    store.write_text(text)
    before = estimate(10**9, TESTER, "mini")
    assert before is not None and (before.runs, before.efficiency) == (0, 0.5)
    remember_efficiency(10**9, 4.0, TESTER, "mini")
    after = estimate(10**9, TESTER, "mini")
    assert after is not None and (after.runs, after.efficiency) == (1, 0.25)


def test_only_the_latest_runs_count_and_other_models_stay():
    remember_efficiency(10**9, 4.0, TESTER, "other")
    for seconds in [100.0] * 5 + [2.0] * 8:
        remember_efficiency(10**9, seconds, TESTER, "mini")
    latest = estimate(10**9, TESTER, "mini")
    assert latest is not None and (latest.runs, latest.efficiency) == (8, 0.5)
    assert len(json.loads((machine.cache_folder() / "efficiency.json").read_text())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DREAMSR_CACHE", str(tmp_path / "file" / "cache"))
    remember_efficiency(10**9, 4.0, TESTER, "mini")
    guess = estimate(10**9, TESTER, "mini")
    assert guess is not None and guess.runs == 0


def test_runs_that_differ_widen_the_range_but_not_beyond_a_first_guess():
    for seconds in (1.0, 2.0, 8.0):
        remember_efficiency(10**9, seconds, TESTER, "mini")
    wide = estimate(10**9, TESTER, "mini")
    assert wide is not None and wide.high / wide.low == pytest.approx(1.5**2)


def test_the_probe_measures_this_machine(monkeypatch):
    monkeypatch.delenv("DREAMSR_NO_PROBE", raising=False)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.01)
    here = describe_machine(torch.device("cpu"), "fp32")
    assert here.flops_per_second is not None and 1e8 < here.flops_per_second < 1e14
    assert here.memory is not None and here.memory > 2**20 and here.name and here.device_memory is None
    assert describe_machine(torch.device("cpu"), "fp32", measure=False).flops_per_second is None
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    assert describe_machine(torch.device("cpu"), "fp32").flops_per_second is None
