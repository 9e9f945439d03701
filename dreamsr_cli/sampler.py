"""The method's two stages on a canvas of overlapping tiles: remove degradation (1 step), renoise, generate texture (N
steps).

Source: DreamSR, section 3 and eq. 3; tiles merged as in MultiDiffusion, in velocity. The unit of work is the batch
of tiles: batch b holds tiles [bB, (b+1)B) in row-major order, the last one padded by repeating its last tile. Axes:
C channels, H W latent rows and columns of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dreamsr_cli import flow
from dreamsr_cli.config import CONTROL_BYTES, ControlConfig, SamplingConfig
from dreamsr_cli.draws import normal_rows
from dreamsr_cli.journal import Journal, Piece
from dreamsr_cli.journal_files import RowFile, Slots
from dreamsr_cli.kept_control import KeptControl
from dreamsr_cli.models.attention import attention_kernels
from dreamsr_cli.models.autoencoder import STRIDE
from dreamsr_cli.models.bundle import Restorer
from dreamsr_cli.models.conditioned_dit import Injections
from dreamsr_cli.models.flux_control import FluxControl
from dreamsr_cli.models.text_encoder import TextEmbedding, stack
from dreamsr_cli.multidiffusion import finished_rows, slots_needed
from dreamsr_cli.progress import Progress
from dreamsr_cli.shifted_tiling import Layout, overlapping, texture_layouts
from dreamsr_cli.tile_work import Crops, Pass, Texts, TileBatch
from dreamsr_cli.tiling import Tile, TileGrid
from dreamsr_cli.transfers import LookAhead, Reading, lead, to_device
from dreamsr_cli.work_sharing import Job, SharedWork

REMOVAL_GUIDANCE = 1.0
"""FLUX's guidance input in the removal step, as in training (method.md)."""
ENCODE, REMOVE, RENOISE, PIXELS = -1, -2, -3, -4
"""Numbers of a job's pieces in the journal; texture steps are 1, 2, ..."""
RENOISE_ROWS = 64
"""Latent rows renoised at a time."""


class Sampler:
    """Both stages for one canvas. Canvases lie in the journal; only batches of tiles go to the device. `tiling` is
    where the tiles of texture steps lie (`shifted_tiling`); `layout` holds the tiles in force.

    Without gradients, but not in inference mode: quantized weights can't be moved in that. With `shared`, other
    processes compute batches as well; theirs is a sampler without a journal, of which `velocity` is called.
    """

    def __init__(
        self,
        restorer: Restorer,
        grid: TileGrid,
        texts: Texts,
        sampling: SamplingConfig,
        control: ControlConfig,
        tile_batch: int,
        journal: Journal | None,
        progress: Progress,
        control_bytes: int = CONTROL_BYTES,
        control_host: int = 0,
        tiling: str = "overlap",
        shared: SharedWork | None = None,
    ) -> None:
        self.restorer, self.grid, self.texts = restorer, grid, texts
        self._whole, self._layouts = overlapping(grid), texture_layouts(grid, tiling)
        self.layout = self._whole
        self.sampling, self.control = sampling, control
        self._journal, self.progress, self.shared = journal, progress, shared
        self._kept = KeptControl(restorer.device, control_bytes, control_host)
        self.batch = min(tile_batch, len(grid.tiles))
        self.device, self.dtype = restorer.device, next(restorer.dit.parameters()).dtype
        self._glob = stack([texts.glob.to(self.device, self.dtype)])
        # Asked here and not in the steps: the answer has to come from the device.
        self._fills = {id(e): e.fills(texts.length) for e in texts.local}
        self._has_guidance = bool(restorer.dit.transformer.config["guidance_embeds"])
        channels = restorer.dit.transformer.config["in_channels"] // 4
        self.shape = (channels, grid.canvas_height // STRIDE, grid.canvas_width // STRIDE)
        self._slots: Slots | None = None

    @property
    def journal(self) -> Journal:
        """Where canvases and velocities lie."""
        assert self._journal is not None, "another process has the journal"
        return self._journal

    def layout_of(self, step: int) -> Layout:
        """The tiles of the removal step (`REMOVE`) or of a texture step."""
        return self._whole if step == REMOVE else self._layouts[(step - 1) % len(self._layouts)]

    def _open_slots(self, *layouts: Layout) -> Slots:
        """Slots for tiles of any of these layouts, whose tiles have one size."""
        _, _, height, width = layouts[0].grid.tiles[0].latent_box()
        count = max(slots_needed(layout.grid, self.batch) for layout in layouts)
        return self.journal.slots(count, (self.shape[0], height, width))

    @torch.no_grad()
    def probe(self) -> None:
        """One full batch through both networks, on zeros: what doesn't fit the device's memory fails here."""
        tiles = (self.grid.tiles[0],) * self.batch
        _, _, height, width = tiles[0].latent_box()
        z_BCHW = torch.zeros(self.batch, self.shape[0], height, width, device=self.device)
        guidance = REMOVAL_GUIDANCE if self._has_guidance else None
        with attention_kernels(self.device):
            self._removal_velocity(z_BCHW, tiles, guidance)

    @torch.no_grad()
    def remove(self, z_lq: RowFile) -> RowFile:
        """Stage 1: z_dr = z_lq - t_r * v, one forward pass per tile with the LoRA on; v is merged over tiles first."""
        t_r = np.float32(self.sampling.t_r)
        guidance = REMOVAL_GUIDANCE if self._has_guidance else None
        self.progress.phase("remove degradation", len(self.grid.tiles))
        piece = self.journal.piece("z_dr", REMOVE, self.shape)
        self._slots = self._open_slots(self._whole)
        for top, bottom, v_CHW in self._merged(Pass(REMOVE, self.sampling.t_r, guidance), (z_lq,), piece.rows_done):
            piece.append(z_lq.rows(top, bottom) - t_r * v_CHW)
        return piece.finish()

    @torch.no_grad()
    def texture(self, z_dr: RowFile, t_start: float, steps: int, seed: int, guidance: float | None) -> RowFile:
        """Stage 2: renoise z_dr to `t_start` (eq. 3), then `steps` Euler steps on the whole canvas, LoRA off."""
        guidance = guidance if self._has_guidance else None
        ts = flow.timesteps(t_start, steps)
        layouts = self._layouts
        self._slots = self._open_slots(*layouts)
        self.progress.phase("texture", steps * len(layouts[0].grid.tiles))
        finished = next((k for k in range(steps, -1, -1) if self.journal.has(texture_name(k))), 0)
        source = self.journal.piece(texture_name(finished), finished or RENOISE, self.shape)
        if not source.done:
            self._renoise(z_dr, source, t_start, seed)
        self.progress.advance(finished * len(layouts[0].grid.tiles))
        self.journal.drop(texture_name(k) for k in range(finished))
        self._kept.forget()
        for step, (t, t_next) in enumerate(pairwise(ts), start=1):
            if step <= finished:
                continue
            self.progress.at(f"step {step} of {steps}")
            piece = self.journal.piece(texture_name(step), step, self.shape)
            work, following = Pass(step, t, guidance), Pass(step + 1, t_next, guidance) if step < steps else None
            canvases = source.file, z_dr
            for top, bottom, v_CHW in self._merged(work, canvases, piece.rows_done, following, piece):
                piece.append(source.file.rows(top, bottom) + np.float32(t_next - t) * v_CHW)
            piece.finish()
            source.drop()
            source = piece
        return source.file

    def velocity(self, work: Pass, canvases: Sequence[Crops], tiles: tuple[Tile, ...]) -> np.ndarray:
        """v of a full batch of tiles, float32 (B, C, H, W). `canvases`: (z_lq,) to remove, (z_t, z_dr) for texture."""
        return Reading(self._velocity(work, canvases, tiles)).array()

    @torch.no_grad()
    def _velocity(self, work: Pass, canvases: Sequence[Crops], tiles: tuple[Tile, ...]) -> Tensor:
        self.layout = self.layout_of(work.step)
        with attention_kernels(self.device):
            if work.step == REMOVE:
                return self._removal_velocity(self._crops(canvases[0], tiles), tiles, work.guidance)
            z, z_dr = canvases
            try:
                return self._texture_velocity(z, z_dr, tiles, work.t, work.guidance)
            except torch.OutOfMemoryError:
                if not self._kept.leave_device():
                    raise
            self.progress.note(f"out of memory on {self.device}: control features are computed again, not kept")
            return self._texture_velocity(z, z_dr, tiles, work.t, work.guidance)

    def _renoise(self, z_dr: RowFile, piece: Piece, t: float, seed: int) -> None:
        for top in range(piece.rows_done, piece.rows, RENOISE_ROWS):
            piece.append(renoise(z_dr.rows(top, min(top + RENOISE_ROWS, piece.rows)), t, seed, top))
        piece.finish()

    def _removal_velocity(self, z_BCHW: Tensor, tiles: tuple[Tile, ...], guidance: float | None) -> Tensor:
        t_r = self.sampling.t_r
        injections = self._control(z_BCHW, tiles, t_r, guidance)
        with nullcontext() if self.restorer.lora is None else self.restorer.lora.folded():
            made_BCHW = self.restorer.dit(z_BCHW, self._time(t_r), self._dit_text(tiles), injections, guidance)
        # The condition is z_lq itself here, so a correction is t_r times the velocity.
        return made_BCHW if self.sampling.prediction == "velocity" else made_BCHW / t_r

    def _texture_velocity(
        self,
        z: Crops,
        z_dr: Crops,
        tiles: tuple[Tile, ...],
        t: float,
        guidance: float | None,
    ) -> Tensor:
        z_BCHW = self._crops(z, tiles)
        injections = self._texture_control(z_BCHW, z_dr, tiles, t, guidance)
        made_BCHW = self.restorer.dit(z_BCHW, self._time(t), self._dit_text(tiles), injections, guidance)
        if self.sampling.prediction == "velocity":
            return made_BCHW
        return flow.velocity_of_correction(z_BCHW, self._crops(z_dr, tiles), made_BCHW, t)

    def _merged(
        self,
        work: Pass,
        canvases: Sequence[Crops],
        ready: int,
        following: Pass | None = None,
        piece: Piece | None = None,
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(top, bottom, v rows) of the canvas' merged velocity, each band as soon as no later tile touches it.

        Goes on at latent row `ready`; batches whose slots are whole are not computed again. Other processes may begin
        the pass `following` on finished rows of `piece`, which this one makes.
        """
        assert self._slots is not None, "each stage opens its slots"
        layout, slots = self.layout_of(work.step), self._slots
        slots.begin(work.step)

        def is_there(tiles: tuple[Tile, ...]) -> bool:
            blended = all((tile.top + tile.height) // STRIDE <= ready for tile in tiles)
            return blended or all(slots.holds(tile.index) for tile in tiles)

        def compute(tiles: tuple[Tile, ...]) -> Tensor:
            return self._velocity(work, canvases, self._padded(tiles))

        batches = list(layout.grid.batches(self.batch))
        missing = [tiles for tiles in batches if not is_there(tiles)]
        computed = LookAhead(compute, missing, lead(self.device))
        if self.shared is not None:
            self.shared.announce(self._job(work, canvases, tiles) for tiles in missing)
            if following is not None and piece is not None:
                after = (piece.file, *canvases[1:])
                coming = self.layout_of(following.step).grid.batches(self.batch)
                self.shared.announce(self._job(following, after, tiles, piece) for tiles in coming)
        to_do = {tiles[0].index for tiles in missing}
        for tiles in batches:
            v_BCHW = None
            if tiles[0].index in to_do:
                key = (work.step, tiles[0].index)
                v_BCHW = computed.read(tiles) if self.shared is None else self.shared.take(key)
            elif not is_there(tiles):  # its slots were taken meanwhile by tiles computed again
                v_BCHW = Reading(compute(tiles)).array()
            if v_BCHW is not None:
                for tile, v_CHW in zip(tiles, v_BCHW[: len(tiles)], strict=True):
                    slots.put(tile.index, v_CHW)
                self.journal.worked()
            self.progress.advance(len(tiles))
            finished = finished_rows(layout.grid, tiles[-1].index + 1)
            if finished > ready:
                yield ready, finished, layout.blend_rows(slots, ready, finished)
                ready = finished

    def _job(self, work: Pass, canvases: Sequence[Crops], tiles: tuple[Tile, ...], making: Piece | None = None) -> Job:
        """A batch as a job for whoever is free; it can begin once the rows it reads of the canvas in `making` are
        there."""
        padded = self._padded(tiles)
        bottom = max(tile.top + tile.height for tile in tiles) // STRIDE

        def pack() -> TileBatch:
            crops = ({tile.index: canvas.crop(*tile.latent_box()) for tile in tiles} for canvas in canvases)
            return TileBatch(work, tuple(tile.index for tile in padded), tuple(crops))

        kept_place = self.layout_of(work.step).number, tiles[0].index
        return Job(
            key=(work.step, tiles[0].index),
            pack=pack,
            here=partial(self.velocity, work, canvases, padded),
            place=kept_place if work.step != REMOVE and self.control.timestep == "clean" else None,
            ready=lambda: making is None or bottom <= making.rows_done,
        )

    def _padded(self, tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
        """A batch that may be short, at full size."""
        return tiles + (tiles[-1],) * (self.batch - len(tiles))

    def _texture_control(
        self,
        z_BCHW: Tensor,
        z_dr: Crops,
        tiles: tuple[Tile, ...],
        t: float,
        guidance: float | None,
    ) -> Injections:
        """Control features of stage 2, from memory where they don't depend on the step and there is room."""
        place = self.layout.number, tiles[0].index
        found = self._kept.find(place)
        if found is not None:
            return found
        made = self._control(self._crops(z_dr, tiles), tiles, t, guidance, z_BCHW)
        if self.control.timestep == "clean":
            self._kept.keep(place, made)
        return made

    def _control(
        self,
        condition_BCHW: Tensor,
        tiles: tuple[Tile, ...],
        t: float,
        guidance: float | None,
        noisy_BCHW: Tensor | None = None,
    ) -> Injections:
        text = self._local_text(tiles)
        seen = 0.0 if self.control.timestep == "clean" else t
        times = self._time(seen).expand(len(tiles))
        controlnet, mask_pads = self.restorer.controlnet, self.restorer.dit.mask_pads
        if isinstance(controlnet, FluxControl):
            features = controlnet(condition_BCHW, times, text, mask_pads, guidance, noisy_BCHW)
        else:
            features = controlnet(condition_BCHW, times, text, mask_pads, guidance)
        return self.restorer.dit.prepare(features, self.control.scale)

    def _dit_text(self, tiles: tuple[Tile, ...]) -> TextEmbedding:
        """The transformer's text: one for all tiles, or one for each."""
        return self._local_text(tiles) if self.texts.local_to_both else self._glob

    def _local_text(self, tiles: tuple[Tile, ...]) -> TextEmbedding:
        embeddings = [self._local(tile) for tile in tiles]
        whole = all(self._fills[id(embedding)] for embedding in embeddings)
        return stack(embeddings, self.texts.length, whole).to(self.device, self.dtype)

    def _local(self, tile: Tile) -> TextEmbedding:
        return self.texts.local[self.layout.texts[tile.index]]

    def _crops(self, canvas: Crops, tiles: tuple[Tile, ...]) -> Tensor:
        return to_device(np.stack([canvas.crop(*tile.latent_box()) for tile in tiles]), self.device)

    def _time(self, t: float) -> Tensor:
        return torch.full((1,), t, device=self.device)


def texture_name(step: int) -> str:
    """Name of the canvas after `step` texture steps; 0 is the renoised one."""
    return f"z_t.{step}"


def renoise(z_CHW: np.ndarray, t: float, seed: int, first_row: int = 0) -> np.ndarray:
    """Eq. 3, z_t = (1 - t) z + t eps, of the latent rows from `first_row` on; eps is drawn by latent row, so any band
    can be drawn again alone."""
    channels, rows, width = z_CHW.shape
    eps_HWC = normal_rows(seed, "canvas-noise", first_row, rows, width, channels)
    return flow.mix(z_CHW, eps_HWC.transpose(2, 0, 1), np.float32(t))
