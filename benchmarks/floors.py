"""The plan of a run, for its operations and for the least time that this machine needs for them."""

from __future__ import annotations

from pathlib import Path

from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.canvas import STRIP
from dreamsr_cli.config import CONTROL_BYTES, OutputConfig, UpscaleConfig
from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
from dreamsr_cli.engine import check_settings
from dreamsr_cli.images import read_info
from dreamsr_cli.machine import Machine, describe_machine
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.planning import Plan, plan
from dreamsr_cli.workload import Limits


def this_machine(config: UpscaleConfig) -> Machine:
    """The device that `config` names, measured."""
    device = choose_device(config.device)
    return describe_machine(device, dtype_name(choose_dtype(config.precision, device)))


def planned(bundle: Bundle, photo: Path, config: UpscaleConfig, machine: Machine) -> Plan:
    """The plan of `photo`'s upscale with these settings."""
    sizes, limits = read_sizes(bundle.config, bundle.part_folder), Limits(STRIP, CONTROL_BYTES)
    target, settings = photo.with_suffix(".planned.png"), check_settings(config, bundle)
    return plan(photo, read_info(photo), target, settings, OutputConfig(), sizes, machine, limits)
