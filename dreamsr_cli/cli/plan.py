"""`dreamsr upscale --dry-run`: what a run would take, photo by photo, with nothing loaded and nothing written."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.console import one_line
from dreamsr_cli.cli.photos import Job
from dreamsr_cli.config import OutputConfig, UpscaleConfig

if TYPE_CHECKING:
    from dreamsr_cli.models.bundle import Bundle
    from dreamsr_cli.settings import Settings
    from dreamsr_cli.tile_choice import TileChoice

_PHASES = {
    "text": "text",
    "clean": "cleaning",
    "enlarge": "enlarging",
    "encode": "encoding",
    "trial": "trial",
    "remove": "removal",
    "texture": "texture",
    "decode": "decoding",
}


class Planner:
    """Plans photos for one bundle and one set of settings; the machine's speed is measured once."""

    def __init__(self, bundle: Bundle, config: UpscaleConfig, output: OutputConfig, photos: int = 1) -> None:
        """`photos`: how many the run would have; that decides which networks stay open between them ("kept").

        Raises `UsageError` for settings that make no sense with this bundle, `WeightsError` where its config files
        can't be read, `DeviceError`.
        """
        from dreamsr_cli.bundle_sizes import read_sizes
        from dreamsr_cli.bundle_state import lacking
        from dreamsr_cli.canvas import STRIP
        from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
        from dreamsr_cli.engine import check_settings
        from dreamsr_cli.machine import describe_machine
        from dreamsr_cli.memory_choice import fitting
        from dreamsr_cli.memory_plan import CARDS
        from dreamsr_cli.models.quantization import MemoryMode
        from dreamsr_cli.residency import decide_residency
        from dreamsr_cli.settings import for_unseen
        from dreamsr_cli.workload import Limits

        self._settings, self._output, self._memory = for_unseen(check_settings(config, bundle)), output, config.memory
        self._sizes = read_sizes(bundle.config, bundle.part_folder)
        device = choose_device(config.device)
        precision = dtype_name(choose_dtype(config.precision, device))
        self._machine = describe_machine(device, precision)
        self._limits = Limits(strip_rows=STRIP)
        settings = self._settings
        mode = MemoryMode(settings.quantize, settings.offload)
        about = (self._machine, settings.largest_tile, settings.tile_batch, self._limits, photos, config.memory)
        self._kept = decide_residency(self._sizes, mode, *about).keep
        self._lacks = tuple(str(lack) for lack in lacking(bundle.config))
        tile = self._settings.tile or bundle.config.defaults.tile
        itemsize = 4 if config.precision == "fp32" else 2  # cards compute in 16 bits unless asked not to
        self._cards = {gigabytes: fitting(self._sizes, itemsize, tile, gigabytes) for gigabytes in CARDS}

    def settle(self, job: Job) -> tuple[Settings, TileChoice | None]:
        """The settings for one photo, with the tile that `--tile auto` chooses."""
        from dreamsr_cli.images import read_info
        from dreamsr_cli.tile_choice import settle_tile

        about = (job.source, read_info(job.source), job.target, self._output)
        return settle_tile(self._settings, self._memory, *about, self._sizes, self._machine, self._limits)

    def plan(self, job: Job) -> dict[str, Any]:
        """The plan of one photo as JSON-able data. Raises `InputError` for what is no photo, or doesn't suit."""
        from dreamsr_cli.images import read_info
        from dreamsr_cli.planning import plan

        settings, choice = self.settle(job)
        made = plan(
            job.source,
            read_info(job.source),
            job.target,
            settings,
            self._output,
            self._sizes,
            self._machine,
            self._limits,
        )
        if os.path.lexists(job.target) and not self._output.overwrite:
            kept = " and is kept" if self._output.skip_existing else ""
            made = replace(made, stops_because=(*made.stops_because, f"{job.target} exists already{kept}"))
        made = replace(made, stops_because=(*made.stops_because, *self._lacks))
        cards = {str(size): None if found is None else found.to_json() for size, found in self._cards.items()}
        chosen = None if choice is None else choice.to_json()
        more = {"tile_choice": chosen, "memory_mode": self._settings.memory, "kept": sorted(self._kept)}
        return {**made.to_json(), **more, "cards": cards}


def plan_table(plan: dict[str, Any]) -> str:
    """A plan for people, a few lines."""
    columns, rows, tiles = plan["columns"], plan["rows"], plan["tiles"]
    calls, flops, step = plan["calls"], plan["flops"], plan["tile_step"]
    control = calls["remove_control"] + calls["texture_control"]
    size = f"{plan['source_width']:,} x {plan['source_height']:,} to {plan['width']:,} x {plan['height']:,} pixels"
    lines = {
        "size": f"{size}, {plan['format']}, {plan['bit_depth']} bit",
        "tiles": f"{tiles:,} ({rows} rows x {columns} columns) of {plan['tile'][0]} x {plan['tile'][1]} pixels, "
        f"overlap {plan['overlap']}, in {plan['batches']:,} batches of {plan['tile_batch']}" + _tiling(plan),
        "calls": f"ControlNet {control:,}, transformer {calls['remove'] + calls['texture']:,}, "
        f"prompts up to {calls['text']:,}, decoded strips {calls['decode']:,}",
        "work": f"{_short(flops['total'])} operations ({_shares(flops)}); a tile and step {_short(step['flops'])} "
        f"operations, {_bytes(step['bytes'])} read and written",
        "floor": _floor(plan["floor"]),
        "memory": _memory(plan),
        "phases": _phases(plan),
        "control": _control(plan),
        "disk": f"{_bytes(plan['disk']['total'])} while in work, {_bytes(plan['free_disk'])} free",
        "time": _time(plan),
    }
    head = one_line(f"{plan['input']} -> {plan['output']}")
    told = [f"  {name:<7} {one_line(text)}" for name, text in lines.items()] + _choice(plan) + _cards(plan)
    return "\n".join([head, *told, *(f"  STOPS   {one_line(reason)}" for reason in plan["stops_because"])])


def _tiling(plan: dict[str, Any]) -> str:
    return "" if plan["tiling"] == "overlap" else f"; {plan['texture_tiles']:,} {plan['tiling']} ones in texture steps"


def _floor(floor: dict[str, Any] | None) -> str:
    """The least time, and by which peak."""
    if floor is None:
        return "not known, the speed was not measured"
    peak = f"{_short(floor['flops_per_second'])}FLOP/s, {_short(floor['bytes_per_second'])}B/s, {floor['source']}"
    return f"{_duration(floor['seconds'])} at the device's peak ({peak})"


CHOICES_SHOWN = 4
"""Sides of `--tile auto` that people are shown; JSON has all."""


def _choice(plan: dict[str, Any]) -> list[str]:
    """What `--tile auto` weighed: the chosen one, then the best of the others."""
    choice = plan["tile_choice"]
    if choice is None:
        return []
    if not choice["options"]:
        return [f"  auto    tile {choice['chosen']}, that of the unfinished run"]
    first = next(option for option in choice["options"] if option["tile"] == choice["chosen"])
    others = [option for option in choice["options"] if option is not first]
    return [f"  auto    {_option(option)}" for option in [first, *others[: CHOICES_SHOWN - 1]]]


def _option(option: dict[str, Any]) -> str:
    text = f"tile {option['tile']}: {option['tiles']:,} tiles, {_short(option['flops'])} operations"
    return f"{text}, {_bytes(option['memory'])}{'' if option['fits'] else ', does NOT fit'}"


def _memory(plan: dict[str, Any]) -> str:
    memory, machine = plan["memory"], plan["machine"]
    text = f"about {_bytes(memory['host'])} of RAM"
    if machine["memory"] is not None:
        text += f", {_bytes(machine['memory'])} free"
    if machine["device_memory"] is not None:
        text += f"; about {_bytes(memory['device'])} on the card, {_bytes(machine['device_memory'])} free"
    return text + {True: ": fits", False: ": does NOT fit", None: ""}[plan["fits_memory"]]


def _phases(plan: dict[str, Any]) -> str:
    told = [
        f"{name} {_short(phase['parameters'])} parameters, {_bytes(phase['resident'])} + {_bytes(phase['working'])}"
        for name, phase in plan["phases"].items()
    ]
    return f"{'; '.join(told)} (--quantize {plan['quantize']}, --offload {plan['offload']})"


def _control(plan: dict[str, Any]) -> str:
    """Where control features wait between steps."""
    control, batches = plan["control"], plan["control"]["batches"]
    if not control["device"] and not control["host"]:
        return "features are computed in every step"
    places = f"{_bytes(control['device'])} on the device" if plan["machine"]["device"] != "cpu" else ""
    places = places or f"{_bytes(control['device'])} of RAM"
    places += f", {_bytes(control['host'])} of RAM" if control["host"] else ""
    rest = "" if control["kept"] >= batches else "; the others' are computed in every step"
    return f"features of {control['kept']:,} of {batches:,} batches are kept ({places}){rest}"


def _cards(plan: dict[str, Any]) -> list[str]:
    """What fits which card, for models that don't fit the smallest as they are."""
    cards: dict[str, Any] = plan["cards"]
    smallest = cards[min(cards, key=int)]
    if smallest is not None and smallest["quantize"] == smallest["offload"] == "none":
        return []
    return [f"  {size + ' GB':<7} {_card(card)}" for size, card in cards.items()]


def _card(card: dict[str, Any] | None) -> str:
    if card is None:
        return "doesn't fit"
    flags = f"--quantize {card['quantize']} --offload {card['offload']} --tile-batch {card['tile_batch']}"
    return f"{flags}: {_bytes(card['device'])} on the card, {_bytes(card['host'])} of weights"


def _time(plan: dict[str, Any]) -> str:
    machine = plan["machine"]
    where = f"{machine['name']}, {machine['precision']}"
    if machine["device"] == "cpu":
        where += f", {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    if plan["seconds"] is None:
        return f"not estimated, the speed was not measured ({where})"
    low, high = plan["seconds"]
    runs = plan["earlier_runs"]
    basis = f"from {runs} earlier run{'s' if runs > 1 else ''}" if runs else "a first guess"
    return f"{_duration(low)} to {_duration(high)} ({basis}; {where})"


def _shares(flops: dict[str, int]) -> str:
    merged = {
        label: flops[phase] + flops.get(f"{phase}_control", 0) for phase, label in _PHASES.items() if flops.get(phase)
    }
    shares = {label: 100 * count / flops["total"] for label, count in merged.items()}
    return ", ".join(f"{label} {share:.0f} %" for label, share in shares.items() if share >= 0.5)


def _short(count: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
