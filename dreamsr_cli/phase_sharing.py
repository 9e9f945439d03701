"""What other processes open for each phase of one photo: the restorer for batches of tiles, the autoencoder for
strips. They hold one of the two at a time, as process 0 does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dreamsr_cli.backoff import WorkPlan
from dreamsr_cli.canvas import StripLatent, decode_strip
from dreamsr_cli.config import ControlConfig, SamplingConfig
from dreamsr_cli.device import PRECISIONS, choose_device
from dreamsr_cli.errors import WeightsError
from dreamsr_cli.models.bundle import Bundle, open_bundle
from dreamsr_cli.models.compiling import compile_blocks
from dreamsr_cli.models.quantization import MemoryMode
from dreamsr_cli.models.text_encoder import TextEmbedding
from dreamsr_cli.progress import Progress
from dreamsr_cli.sampler import Sampler
from dreamsr_cli.tile_work import Texts, TileBatch
from dreamsr_cli.tiling import TileGrid
from dreamsr_cli.work_sharing import Service


@dataclass(frozen=True)
class BundleId:
    """A bundle to be opened in another process, which may be another machine."""

    model: str | None
    weights: str | None
    sha256: str

    @classmethod
    def of(cls, bundle: Bundle) -> BundleId:
        """What names this bundle."""
        return cls(*bundle.opened_as, bundle.sha256)

    def open(self) -> Bundle:
        """The bundle; `WeightsError` where it is not there, or not the same."""
        bundle = open_bundle(self.model, self.weights)
        if bundle.sha256 != self.sha256:
            raise WeightsError(f"its model {bundle.config.name} is not that of process 0", "copy it to every machine")
        return bundle


@dataclass(frozen=True)
class TileSetup:
    """The restorer and the texts of one photo. The first payload is a `WorkPlan`, the others are `TileBatch`es."""

    bundle: BundleId
    device: str
    precision: str
    mode: MemoryMode
    mask_pads: bool
    grid: TileGrid
    texts: Texts
    sampling: SamplingConfig
    control: ControlConfig
    tiling: str
    compiled: bool

    def __getstate__(self) -> dict[str, Any]:
        # A tensor would come back on the card of the same number.
        return {**vars(self), "texts": _on_cpu(self.texts)}

    def open(self, progress: Progress) -> Service:
        """Load the networks; the work plan says where they go. Raises `WeightsError`, `DeviceError`."""
        return _TileService(self, progress)


class _TileService:
    def __init__(self, setup: TileSetup, progress: Progress) -> None:
        self._setup, self._progress = setup, progress
        device = choose_device(setup.device)
        bundle = setup.bundle.open()
        self._restorer = bundle.open_restorer(device, PRECISIONS[setup.precision], setup.mask_pads, setup.mode, False)
        if setup.compiled:
            compile_blocks(self._restorer)
        self._sampler: Sampler | None = None

    def __call__(self, payload: WorkPlan | TileBatch) -> np.ndarray | None:
        if isinstance(payload, WorkPlan):
            self._plan(payload)
            return None
        assert self._sampler is not None, "a plan comes before the batches"
        grid = self._sampler.layout_of(payload.work.step).grid
        tiles = tuple(grid.tiles[index] for index in payload.tiles)
        boxes = {tile.index: tile.latent_box() for tile in tiles}
        canvases = [SentCrops({boxes[index]: crop for index, crop in sent.items()}) for sent in payload.crops]
        return self._sampler.velocity(payload.work, canvases, tiles)[: len(set(payload.tiles))]

    def _plan(self, work: WorkPlan) -> None:
        setup = self._setup
        self._restorer.place(work.offload)
        self._sampler = Sampler(
            self._restorer,
            setup.grid,
            setup.texts,
            setup.sampling,
            setup.control,
            work.tile_batch,
            None,
            self._progress,
            work.control_bytes,
            work.control_host,
            setup.tiling,
        )
        if self._restorer.device.type != "cpu":
            self._sampler.probe()


class SentCrops:
    """What process 0 sent of a canvas: the rectangles of one batch."""

    def __init__(self, crops: Mapping[tuple[int, int, int, int], np.ndarray]) -> None:
        self._crops = crops

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """One of the rectangles; `KeyError` for any other."""
        return self._crops[top, left, height, width]


def _on_cpu(texts: Texts) -> Texts:
    """The texts in RAM; tiles that share an embedding go on sharing it."""
    moved: dict[int, TextEmbedding] = {}
    for text in (texts.glob, *texts.local):
        if id(text) not in moved:
            moved[id(text)] = text.to("cpu", text.tokens_BTD.dtype)
    return replace(texts, glob=moved[id(texts.glob)], local=[moved[id(text)] for text in texts.local])


@dataclass(frozen=True)
class DecodeSetup:
    """The autoencoder. A payload is a strip's z, float32 (C, H, W); the result its pixels, float32 (rows, width, 3)."""

    bundle: BundleId
    device: str
    precision: str
    width: int
    restored: bool
    """Whether the latent is stage 1's result."""

    def open(self, progress: Progress) -> Service:
        """Load the decoder."""
        device = choose_device(self.device)
        autoencoder = self.bundle.open().open_autoencoder(device, PRECISIONS[self.precision])

        def decode(strip: StripLatent) -> np.ndarray:
            return decode_strip(autoencoder, strip, self.width, torch.device(device), self.restored)

        return decode
