"""The method's two stages on a canvas of overlapping tiles: remove degradation (1 step), renoise, generate texture (N
steps).

Source: DreamSR, section 3 and eq. 3; tiles merged as in MultiDiffusion, in velocity. The unit of work is the batch
of tiles: batch b holds tiles [bB, (b+1)B) in row-major order, the last one padded by repeating its last tile. Axes:
C channels, H W latent rows and columns of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dreamsr_cli import flow
from dreamsr_cli.config import ControlConfig, SamplingConfig
from dreamsr_cli.draws import normal_rows
from dreamsr_cli.models.bundle import Restorer
from dreamsr_cli.models.conditioned_dit import Injections
from dreamsr_cli.models.text_encoder import TextEmbedding, stack
from dreamsr_cli.multidiffusion import blend_rows, finished_rows
from dreamsr_cli.progress import Progress
from dreamsr_cli.tiling import Tile, TileGrid

REMOVAL_GUIDANCE = 1.0
"""FLUX's guidance input in the removal step, as in training (method.md)."""
CONTROL_BYTES = 512 * 2**20
"""Control features are kept between steps up to this size in all; beyond it they are computed again, with the same
result."""


@dataclass(frozen=True)
class Texts:
    """Embedded prompts of one photo."""

    glob: TextEmbedding
    """Global prompt, batch 1."""
    local: Sequence[TextEmbedding]
    """Local prompt of each tile in the grid's order, batch 1 each."""

    @property
    def length(self) -> int:
        """Tokens of the longest local prompt: every batch is padded to it, so that no batch depends on its
        neighbours."""
        return max(e.tokens_BTD.shape[1] for e in self.local)


class Sampler:
    """Both stages for one canvas. Canvases are float32 numpy arrays (C, H, W); only batches of tiles go to the
    device."""

    def __init__(
        self,
        restorer: Restorer,
        grid: TileGrid,
        texts: Texts,
        sampling: SamplingConfig,
        control: ControlConfig,
        tile_batch: int,
        progress: Progress,
    ) -> None:
        self.restorer, self.grid, self.texts = restorer, grid, texts
        self.sampling, self.control, self.progress = sampling, control, progress
        self.batch = min(tile_batch, len(grid.tiles))
        parameter = next(restorer.dit.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._glob = stack([texts.glob.to(self.device, self.dtype)])
        self._has_guidance = bool(restorer.dit.transformer.config["guidance_embeds"])

    @torch.inference_mode()
    def remove(self, z_lq_CHW: np.ndarray) -> np.ndarray:
        """Stage 1: z_dr = z_lq - t_r * v, one forward pass per tile with the LoRA on; v is merged over tiles first."""
        t_r = self.sampling.t_r
        guidance = REMOVAL_GUIDANCE if self._has_guidance else None
        self.progress.phase("remove degradation", len(self.grid.tiles))

        def velocity(tiles: tuple[Tile, ...]) -> Tensor:
            z_BCHW = self._crops(z_lq_CHW, tiles)
            injections = self._control(z_BCHW, tiles, t_r, guidance)
            if self.restorer.lora is None:
                return self.restorer.dit(z_BCHW, self._time(t_r), self._glob, injections, guidance)
            with self.restorer.lora.on():
                return self.restorer.dit(z_BCHW, self._time(t_r), self._glob, injections, guidance)

        z_dr_CHW = np.empty_like(z_lq_CHW)
        for top, bottom, v_CHW in self._merged(velocity):
            z_dr_CHW[:, top:bottom] = z_lq_CHW[:, top:bottom] - np.float32(t_r) * v_CHW
        return z_dr_CHW

    @torch.inference_mode()
    def texture(
        self, z_dr_CHW: np.ndarray, t_start: float, steps: int, seed: int, guidance: float | None
    ) -> np.ndarray:
        """Stage 2: renoise z_dr to `t_start` (eq. 3), then `steps` Euler steps on the whole canvas, LoRA off."""
        z_CHW = renoise(z_dr_CHW, t_start, seed)
        guidance = guidance if self._has_guidance else None
        ts = flow.timesteps(t_start, steps)
        kept: dict[int, Injections] = {}
        self.progress.phase("texture", steps * len(self.grid.tiles))
        for step, (t, t_next) in enumerate(pairwise(ts)):
            self.progress.at(f"step {step + 1} of {steps}")
            source_CHW, z_CHW = z_CHW, np.empty_like(z_CHW)

            def velocity(tiles: tuple[Tile, ...], t: float = t, z: np.ndarray = source_CHW) -> Tensor:
                injections = kept.get(tiles[0].index)
                if injections is None:
                    injections = self._control(self._crops(z_dr_CHW, tiles), tiles, t, guidance)
                    if self.control.timestep == "clean" and (len(kept) + 1) * injections.size <= CONTROL_BYTES:
                        kept[tiles[0].index] = injections
                return self.restorer.dit(self._crops(z, tiles), self._time(t), self._glob, injections, guidance)

            for top, bottom, v_CHW in self._merged(velocity):
                z_CHW[:, top:bottom] = source_CHW[:, top:bottom] + np.float32(t_next - t) * v_CHW
        return z_CHW

    def _merged(self, velocity) -> Iterator[tuple[int, int, np.ndarray]]:  # noqa: ANN001
        """(top, bottom, v rows) of the canvas' merged velocity, each band as soon as no later tile touches it."""
        slots: dict[int, np.ndarray] = {}
        ready = 0
        for tiles in self.grid.batches(self.batch):
            padded = tiles + (tiles[-1],) * (self.batch - len(tiles))
            v_BCHW = velocity(padded)[: len(tiles)].float().cpu().numpy()
            slots.update({tile.index: v for tile, v in zip(tiles, v_BCHW, strict=True)})
            self.progress.advance(len(tiles))
            finished = finished_rows(self.grid, tiles[-1].index + 1)
            if finished > ready:
                yield ready, finished, blend_rows(self.grid, slots, ready, finished)
                ready = finished
                for tile in self.grid.tiles[: tiles[-1].index + 1]:
                    if (tile.top + tile.height) // 8 <= ready:
                        slots.pop(tile.index, None)

    def _control(self, condition_BCHW: Tensor, tiles: tuple[Tile, ...], t: float, guidance: float | None) -> Injections:
        text = stack([self.texts.local[tile.index] for tile in tiles], self.texts.length).to(self.device, self.dtype)
        seen = 0.0 if self.control.timestep == "clean" else t
        times = self._time(seen).expand(len(tiles))
        features = self.restorer.controlnet(condition_BCHW, times, text, self.restorer.dit.mask_pads, guidance)
        return self.restorer.dit.prepare(features, self.control.scale)

    def _crops(self, canvas_CHW: np.ndarray, tiles: tuple[Tile, ...]) -> Tensor:
        crops = []
        for tile in tiles:
            top, left, height, width = tile.latent_box()
            crops.append(canvas_CHW[:, top : top + height, left : left + width])
        return torch.from_numpy(np.stack(crops)).to(self.device)

    def _time(self, t: float) -> Tensor:
        return torch.full((1,), t, device=self.device)


def renoise(z_CHW: np.ndarray, t: float, seed: int) -> np.ndarray:
    """Eq. 3, z_t = (1 - t) z + t eps; eps is drawn by latent row, so any band can be drawn again alone."""
    channels, height, width = z_CHW.shape
    out = np.empty_like(z_CHW)
    for row in range(height):
        eps_WC = normal_rows(seed, "canvas-noise", row, 1, width, channels)[0]
        out[:, row] = flow.mix(z_CHW[:, row], eps_WC.T, np.float32(t))
    return out
