"""What stays open from photo to photo follows from the memory plan alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreamsr_cli.bundle_sizes import BundleSizes, read_sizes
from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import check_settings
from dreamsr_cli.images import read_info
from dreamsr_cli.machine import Machine
from dreamsr_cli.models.bundle import open_bundle
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.planning import Plan, plan
from dreamsr_cli.residency import decide_residency, fits_beside, may_write_behind
from dreamsr_cli.workload import Limits

GB = 10**9
ALL = {"text_encoder", "restorer", "autoencoder"}
LIMITS = Limits(256, 2**29)
CARD = Machine("cuda", "a card", "bf16", 1, 200 * GB, 80 * GB, None)


@pytest.fixture(scope="module")
def flux() -> BundleSizes:
    bundle = open_bundle("flux")
    return read_sizes(bundle.config, bundle.part_folder)


def kept(sizes: BundleSizes, machine: Machine, mode: MemoryMode | None = None, photos: int = 9, **more) -> set[str]:
    found = decide_residency(sizes, mode or MemoryMode(), machine, 512, 1, LIMITS, photos, **more)
    assert (found.sentence is None) == (photos == 1 or set(found.keep) == ALL)
    return set(found.keep)


def test_the_larger_the_card_the_more_stays_open(flux) -> None:
    found = {size: kept(flux, replace(CARD, device_memory=size * GB)) for size in (2, 8, 24, 48, 80)}
    assert found[80] == ALL
    assert found[48] == {"restorer", "autoencoder"}, "T5 doesn't fit beside the transformer"
    assert found[24] <= {"autoencoder"} and found[2] == set()
    sizes = [len(names) for names in found.values()]
    assert sizes == sorted(sizes)


def test_weights_that_wait_in_ram_need_it(flux) -> None:
    offloaded = MemoryMode("none", "block")
    assert kept(flux, replace(CARD, device_memory=24 * GB), offloaded) == ALL
    assert kept(flux, replace(CARD, device_memory=24 * GB, memory=8 * GB), offloaded) <= {"autoencoder"}


def test_what_a_person_allows_counts_too(flux) -> None:
    assert kept(flux, CARD, memory="48GB") == {"restorer", "autoencoder"}
    on_cpu = replace(CARD, device="cpu", device_memory=None, precision="fp32")
    assert kept(flux, on_cpu) == ALL
    assert kept(flux, on_cpu, memory="90GB") != ALL
    assert kept(flux, replace(on_cpu, memory=None)) == set(), "nobody knows what is free"


def test_one_photo_keeps_only_what_it_uses_twice(flux) -> None:
    assert kept(flux, CARD, photos=1) == {"autoencoder"}


def planned(tmp_path: Path, width: int, height: int, name: str = "a.png", **changes) -> Plan:
    """Of a photo at x2; its header alone is looked at."""
    source = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(source)
    info = replace(read_info(source), width=width, height=height)
    bundle = open_bundle("mini")
    settings = check_settings(UpscaleConfig(scale=2.0), bundle)
    sizes = read_sizes(bundle.config, bundle.part_folder)
    machine = Machine("cpu", "x", "fp32", 1, 8 * GB, None, None)
    made = plan(source, info, tmp_path / "out" / name, settings, OutputConfig(), sizes, machine, LIMITS)
    return replace(made, **changes)


def test_the_next_photo_is_read_early_only_where_there_is_room(tmp_path) -> None:
    small = planned(tmp_path, 400, 300)
    huge = planned(tmp_path, 10_000, 8_000)

    def beside(present: Plan, coming: Plan, free: int | None = 8 * GB) -> bool:
        return fits_beside(present, coming, coming.info, free)

    assert beside(small, small)
    assert not beside(small, huge) and not beside(huge, small), "huge photos are alone"
    assert not beside(small, small, small.memory["host"]), "no memory"
    assert not beside(small, small, None)
    assert not beside(small, replace(small, free_disk=small.disk["total"] * 3 // 2)), "no disk"


def test_encoders_that_hold_everything_run_alone_for_large_results(tmp_path) -> None:
    assert may_write_behind(planned(tmp_path, 400, 300, "a.avif"))
    large = planned(tmp_path, 6000, 4000)
    assert may_write_behind(large)
    assert not may_write_behind(replace(large, format="avif"))
    assert not may_write_behind(replace(large, info=replace(large.info, palette=True)))
