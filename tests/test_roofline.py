"""The floor of counted work: which peak a device has, and what binds a phase."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dreamsr_cli import machine
from dreamsr_cli.machine import Machine, describe_machine, probe_copy
from dreamsr_cli.roofline import CARDS, Peak, card_peak, floor, peak

H200 = Machine("cuda", "NVIDIA H200", "bf16", 8, None, 10**11, 5e14, 3e12)


@pytest.mark.parametrize(
    ("name", "precision", "tera", "gigabytes"),
    [
        ("NVIDIA H200", "bf16", 989.4, 4800),
        ("NVIDIA H200", "fp8", 1978.9, 4800),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4, 3350),
        ("NVIDIA H100 PCIe", "fp16", 756, 2000),
        ("NVIDIA H20", "bf16", 148, 4000),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312, 2039),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5, 1555),
        ("NVIDIA L40S", "bf16", 362, 864),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2, 1008),
        ("NVIDIA GeForce RTX 3090", "bf16", 71, 936),
    ],
)
def test_known_cards_have_their_data_sheets_peak(name, precision, tera, gigabytes):
    assert card_peak(name, precision) == Peak(tera * 1e12, gigabytes * 1e9, "data sheet")


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H2000", "Tesla T4", "Intel(R) Xeon(R)"])
def test_other_devices_are_not_taken_for_them(name):
    assert card_peak(name, "bf16") is None


def test_a_card_without_float8_has_no_peak_of_it():
    assert card_peak("NVIDIA GeForce RTX 3090", "fp8") is None


def test_eight_bits_are_faster_than_sixteen_and_those_than_thirty_two():
    for card in CARDS:
        assert card.fp32 < card.bf16 and (card.fp8 is None or 1.9 < card.fp8 / card.bf16 < 2.1)


def test_a_cpu_and_unknown_cards_are_measured():
    assert peak(H200) == Peak(989.4e12, 4.8e12, "data sheet")
    assert peak(replace(H200, name="Some card")) == Peak(5e14, 3e12, "measured")
    assert peak(replace(H200, device="cpu")) == Peak(5e14, 3e12, "measured")
    assert peak(replace(H200, name="Some card", flops_per_second=None)) is None
    assert peak(replace(H200, name="Some card", bytes_per_second=None)) is None


def test_each_phase_takes_the_longer_of_its_two_times():
    found = floor({"many": 100, "heavy": 10}, {"many": 20, "heavy": 500}, Peak(10.0, 100.0, "measured"))
    assert found.seconds == {"many": 10.0, "heavy": 5.0} and found.total == 15.0
    assert found.to_json()["seconds"] == 15.0 and found.to_json()["source"] == "measured"


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.delenv("DREAMSR_NO_PROBE", raising=False)
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(machine, "COPIED", 2**20)
    assert 1e8 < probe_copy(torch.device("cpu")) < 1e13
    here = describe_machine(torch.device("cpu"), "fp32")
    assert here.bytes_per_second and here.total_memory and here.memory
    assert here.total_memory >= here.memory * 0.9
    monkeypatch.setenv("DREAMSR_NO_PROBE", "1")
    assert describe_machine(torch.device("cpu"), "fp32").bytes_per_second is None
