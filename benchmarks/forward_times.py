"""Where the time of one `engine.upscale` goes: opening weights, inside the networks, and the rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreamsr_cli.config import OutputConfig, UpscaleConfig
from dreamsr_cli.engine import upscale
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.progress import SilentProgress
from dreamsr_cli.training.dead_leaves import dead_leaves

NETWORKS = ("text_encoder", "encode", "controlnet", "dit", "decode")
PHOTO_SEED = 42


@dataclass(frozen=True)
class OverheadRun:
    """One `engine.upscale`; all times in seconds."""

    wall: float
    """All of `engine.upscale`."""
    loading: float
    """Inside `Bundle.open_*`, not part of the overhead."""
    networks: dict[str, float]
    """Inside forward passes, by network."""
    calls: dict[str, int]
    """Forward passes, by network."""
    tiles: int
    tile_batch: int

    @property
    def rest(self) -> float:
        """What the engine itself took: reading, describing, resizing, blending, stepping, colour fix, encoding."""
        return self.wall - self.loading - sum(self.networks.values())

    @property
    def ratio(self) -> float:
        """rest / networks."""
        return self.rest / sum(self.networks.values())


class Stopwatch:
    """Seconds inside watched calls, by name. Watched calls must not nest; `settle` waits for the device."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self._settle, self._began = settle, 0.0

    def start(self, *_: Any) -> None:
        self._settle()
        self._began = time.perf_counter()

    def stop(self, name: str) -> None:
        self._settle()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self._began
        self.calls[name] += 1

    def watch_module(self, name: str, module: torch.nn.Module) -> None:
        """Time every forward pass of `module`."""
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(lambda *_: self.stop(name))

    def watch_method(self, name: str, owner: Any, method: str) -> None:
        """Time every call of `owner.method`, on this instance alone."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start()
            result = call(*args, **kwargs)
            self.stop(name)
            return result

        setattr(owner, method, timed)


@contextmanager
def watched(bundle: Bundle, clock: Stopwatch) -> Generator[None]:
    """Inside, everything that `bundle` opens is timed ("loading"), and so are the forward passes of what it opened."""

    def attach(part: Any) -> None:
        if hasattr(part, "controlnet"):
            clock.watch_module("dit", part.dit)
            clock.watch_module("controlnet", part.controlnet)
        elif hasattr(part, "decode"):
            clock.watch_method("encode", part, "encode")
            clock.watch_method("decode", part, "decode")
        else:
            networks = [part] if isinstance(part, torch.nn.Module) else [part.clip, part.t5]
            for network in networks:
                clock.watch_module("text_encoder", network)

    def opener(method: str) -> Callable[..., Any]:
        original = getattr(bundle, method)

        def open_part(*args: Any) -> Any:
            clock.start()
            part = original(*args)
            clock.stop("loading")
            attach(part)
            return part

        return open_part

    methods = [name for name in dir(bundle) if name.startswith("open_")]
    for method in methods:
        setattr(bundle, method, opener(method))
    try:
        yield
    finally:
        for method in methods:
            delattr(bundle, method)


def settle_on(device: torch.device) -> Callable[[], None]:
    """A function that waits until `device` has done everything it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def write_photo(path: Path, side: int) -> None:
    """A synthetic square photo: overlapping shapes with natural colours and textures, as JPEG."""
    rgb_CPQ = dead_leaves(side, np.random.default_rng(PHOTO_SEED)).numpy()
    Image.fromarray((rgb_CPQ.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(path, quality=90)


def measure_overhead(bundle: Bundle, photo: Path, config: UpscaleConfig, device: torch.device) -> OverheadRun:
    """One photo, file to file."""
    clock = Stopwatch(settle_on(device))
    with watched(bundle, clock):
        began = time.perf_counter()
        result = upscale(photo, photo.with_name("out.jpg"), bundle, config, OutputConfig(), SilentProgress())
        wall = time.perf_counter() - began
    return OverheadRun(
        wall=wall,
        loading=clock.seconds["loading"],
        networks={name: clock.seconds[name] for name in NETWORKS},
        calls={name: clock.calls[name] for name in NETWORKS},
        tiles=result.tiles,
        tile_batch=result.settings.tile_batch,
    )
