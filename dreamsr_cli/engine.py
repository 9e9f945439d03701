"""The whole method as one function: figure 2 of the paper, from a photo on disk to a larger photo on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dreamsr_cli.backoff import WorkPlan, place_weights, settle, smaller_tile
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.canvas import STRIP, DecodedCanvas, EnlargedPhoto, encode
from dreamsr_cli.captioning import WEIGHTLESS, Captioner
from dreamsr_cli.colour import fix_strips, reads
from dreamsr_cli.config import CaptionConfig, OutputConfig, UpscaleConfig
from dreamsr_cli.device import choose_device, choose_dtype, dtype_name
from dreamsr_cli.errors import DeviceError
from dreamsr_cli.images import PhotoInfo, read_info
from dreamsr_cli.journal import Journal
from dreamsr_cli.journal_files import RowFile
from dreamsr_cli.machine import describe_machine
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.compiling import compile_blocks, compile_errors, compiled_code
from dreamsr_cli.models.open_parts import RESTORER, TEXT_ENCODER, OpenParts
from dreamsr_cli.models.quantization import MemoryMode, cannot_run
from dreamsr_cli.overlap import beside
from dreamsr_cli.photo_job import Order, PhotoJob, UpscaleResult, read_photo
from dreamsr_cli.photo_writer import PhotoWriter
from dreamsr_cli.planning import Plan
from dreamsr_cli.planning import plan as plan_work
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.residency import decide_residency, fits_beside
from dreamsr_cli.sampler import ENCODE, PIXELS, REMOVE, Sampler, Texts, texture_name
from dreamsr_cli.settings import Settings, check_settings
from dreamsr_cli.text_buckets import BYTE_BUCKETS, T5_BUCKETS, asked_bucket
from dreamsr_cli.texts_ahead import TEXT_BYTES, TextsAhead, texts_of
from dreamsr_cli.tile_choice import settle_tile
from dreamsr_cli.workload import Limits

__all__ = ["Engine", "Order", "Settings", "UpscaleResult", "check_settings", "upscale"]


def upscale(
    photo_path: Path,
    out_path: Path,
    bundle: Bundle,
    config: UpscaleConfig,
    output: OutputConfig,
    progress: Progress,
    prompts: Path | None = None,
) -> UpscaleResult:
    """Restore `photo_path` at a larger size and write `out_path`, whole or not at all.

    Work lies in a journal beside the output: the same call goes on where a killed one stopped. `prompts` is a file with
    this photo's prompts, which the captioner then doesn't make. Raises `UsageError` for settings that make no sense
    with this bundle, `InputError`, `OutputError`, `JournalError`, `WeightsError`, `DeviceError`.
    """
    order = Order(photo_path, out_path, prompts)
    with Engine(bundle, config, output) as engine, engine.read(order, progress) as job:
        engine.compute(job, progress)
        return job.write()


class Engine:
    """One bundle and one set of settings for one photo after another; a context manager.

    Networks stay open between photos where memory allows (`residency`); that changes no byte of a result.
    """

    def __init__(
        self, bundle: Bundle, config: UpscaleConfig, output: OutputConfig, photos: int = 1, memory: str | None = None
    ) -> None:
        """`photos`: about how many will come; `memory`: bytes to stay within ("24GB") where the settings name none.

        Raises `UsageError` for settings that make no sense with this bundle, `DeviceError`, `WeightsError`.
        """
        settings = check_settings(config, bundle)
        self.device = choose_device(settings.device)
        dtype = choose_dtype(settings.precision, self.device)
        self.settings = dataclasses.replace(settings, device=str(self.device), precision=dtype_name(dtype))
        self.bundle, self.output = bundle, output
        self._sizes = read_sizes(bundle.config, bundle.part_folder)
        self._threads = torch.get_num_threads()
        self._limits = Limits(STRIP)
        machine = describe_machine(self.device, self.settings.precision, measure=False)
        self._free_before, self._memory = machine.memory, config.memory
        mode = MemoryMode(settings.quantize, settings.offload)
        self.residency = decide_residency(
            self._sizes,
            mode,
            machine,
            settings.tile_auto[1] if settings.tile_auto else settings.tile,
            settings.tile_batch,
            self._limits,
            photos,
            config.memory or memory,
        )
        self.parts = OpenParts(bundle, self.device, dtype, mode, self.residency.keep)
        self.ahead = TextsAhead()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.parts.close()

    # ---------------------------------------------------------------- one photo in three turns

    def read(self, order: Order, progress: Progress) -> PhotoJob:
        """Decode, plan and describe a photo; the job is the caller's to compute and write, or to leave.

        Raises `InputError`, `OutputError`, `JournalError`, `UsageError`; for captioners `WeightsError`, `DeviceError`.
        """
        ready = self.ahead.plans.get(order.out)
        if ready is None and self._captions:
            self.parts.close()  # the captioner needs their room
        job = self._open(order, progress)
        with ExitStack() as guard:
            guard.push(job)
            progress.phase("describe", 1)
            job.describe(self.device, progress, None, ready)
            progress.advance()
            guard.pop_all()
        return job

    def read_ahead(self, order: Order, present: Plan, progress: Progress) -> PhotoJob | None:
        """`read` while another photo, planned as `present`, is computed; None where this one has to wait for its
        turn. For another thread."""
        if self._captions and order.out not in self.ahead.plans:
            return None
        info = read_info(order.photo)
        if not fits_beside(present, self._plan(order, info)[0], info, self._free_before):
            return None
        return self.read(order, progress)

    def compute(self, job: PhotoJob, progress: Progress) -> None:
        """All work of the networks, up to the last row of the result. Raises `WeightsError`, `DeviceError`,
        `OutputError`."""
        with job.timed():
            try:
                self._compute(job, progress)
            except torch.OutOfMemoryError as error:
                if not self.parts.make_room():
                    raise self._too_small(job) from error
            else:
                return
            progress.note(f"out of memory on {self.device}: from now on networks are opened one after the other")
            try:
                self._compute(job, progress)
            except torch.OutOfMemoryError as error:
                raise self._too_small(job) from error

    def _compute(self, job: PhotoJob, progress: Progress) -> None:
        with compile_errors():
            z_0 = _restore(job, self.parts, self._texts, progress)
        self.parts.release()
        decoded = DecodedCanvas(z_0, job.work.width, self.parts.autoencoder(), self.device, progress)
        _write(job.enlarged, decoded, job.open_writer(), self.settings.color_fix, job.journal)
        del decoded
        self.parts.release()
        job.photo.close()
        for note in job.late_notes:
            progress.note(f"{job.order.photo.name}: {note}")

    # ---------------------------------------------------------------- texts of many photos

    @property
    def wants_preparing(self) -> bool:
        """Whether the texts of several photos should be made together, before the first of them is computed."""
        return self._captions or TEXT_ENCODER not in self.residency.keep

    def prepare(self, orders: Sequence[Order], progress: Progress) -> int:
        """Describe and embed the texts of the next photos, until `TEXT_BYTES`; how many orders were looked at.

        What is wrong with a photo is left to its own turn. Captions are kept in the photos' journals.
        """
        self.parts.close()
        self.ahead.clear()
        looked_at, most = 0, self._lengths[0]
        progress.phase("describe", len(orders))
        with Captioner(self.settings.captioner, CaptionConfig(), self.device) as captioner:
            for order in orders:
                looked_at += 1
                with suppress(Exception), self._open(order, SilentProgress()) as job:
                    job.describe(self.device, progress, captioner, None)
                    self.ahead.plans[order.out] = job.plan
                progress.advance()
                width, itemsize = self._sizes.text.width, self.parts.dtype.itemsize
                if self.ahead.waiting() * most * width * itemsize > TEXT_BYTES:
                    break
        if self.ahead.plans and TEXT_ENCODER not in self.residency.keep:
            self.ahead.embed(self.parts.text_encoder(), *self._lengths)
            self.parts.release()
        return looked_at

    def _texts(self, job: PhotoJob, progress: Progress) -> tuple[Texts, bool]:
        """Embeddings of the global and of every local prompt, and whether padding is masked. What was cut is noted."""
        plan, (most, buckets) = job.plan, self._lengths
        found, mask_pads = self.ahead.find(texts_of(plan)), self.ahead.masks_pads
        if found is None:
            if TEXT_ENCODER not in self.parts.keep:
                self.parts.close()
            encoder = self.parts.text_encoder()
            found, mask_pads = encoder.encode(texts_of(plan), most, buckets), not encoder.pads_are_seen
            del encoder
            self.parts.release()
        embeddings, cut = found
        for index in cut:
            box = list(plan.tiles[index - 1].box) if index else None
            which = f"the prompt of tile {index - 1}, {box}," if index else "the global prompt"
            job.notes.append(f"{which} is longer than {most} tokens and was cut")
            progress.note(job.notes[-1])
        local_to_both = self.settings.prompt_mode == "local"
        return Texts(embeddings[0], embeddings[1:], local_to_both, most, buckets), mask_pads

    @property
    def _lengths(self) -> tuple[int, tuple[int, ...]]:
        """Tokens at which prompts are cut, and lengths they may be padded to."""
        buckets = T5_BUCKETS if self._sizes.text.bytes_per_token is None else BYTE_BUCKETS
        return asked_bucket(self.settings.text_bucket, self._sizes.max_text_tokens, buckets)

    @property
    def _captions(self) -> bool:
        """Whether a network writes the captions."""
        return self.settings.captioner not in WEIGHTLESS

    def _open(self, order: Order, progress: Progress) -> PhotoJob:
        return read_photo(
            order,
            lambda photo: self._plan(order, photo.info),
            self.bundle,
            self.output,
            self._threads,
            progress,
        )

    def _plan(self, order: Order, info: PhotoInfo) -> tuple[Plan, Settings]:
        """The photo's plan, and the settings with what only a photo decides."""
        machine = describe_machine(self.device, self.settings.precision, measure=False)
        about = (order.photo, info, order.out)
        known = (self._sizes, machine, self._limits)
        settings, _ = settle_tile(self.settings, self._memory, *about, self.output, *known)
        work = plan_work(*about, settings, self.output, *known)
        return work, dataclasses.replace(settings, tile_batch=work.tile_batch) if settings.fit_batch else settings

    def _too_small(self, job: PhotoJob) -> DeviceError:
        hint = f"use --tile-batch 1, or --tile {smaller_tile(job.grid.tile_width)} with --restart"
        return DeviceError(f"{job.order.photo}: out of memory on {self.device}", hint)


def _restore(
    job: PhotoJob,
    parts: OpenParts,
    embed: Callable[[PhotoJob, Progress], tuple[Texts, bool]],
    progress: Progress,
) -> RowFile:
    """z_0 of the canvas: encode, remove, renoise, texture. Each network is opened for its turn, and freed after it
    unless all fit."""
    settings, journal, grid, shape = job.settings, job.journal, job.grid, job.shape
    device, backoff = parts.device, job.output.backoff
    last = texture_name(settings.steps) if settings.strength > 0 else "z_dr"
    if journal.has(last):
        return journal.piece(last, settings.steps, shape).file
    texts, mask_pads = embed(job, progress)

    encoded = "z_lq" if settings.removal else "z_dr"
    if not journal.has("z_dr"):
        encode(job.enlarged, grid, parts.autoencoder(), journal.piece(encoded, ENCODE, shape), device, progress)
        parts.release()
    if journal.has(last):
        return journal.piece(last, ENCODE, shape).file

    restorer = parts.restorer(mask_pads)
    sampling, control = job.bundle.config.sampling, job.bundle.config.control
    if settings.compile and compile_blocks(restorer):
        progress.note(f"--compile: the first tiles take longer; what is translated is kept in {compiled_code()}")

    def make_sampler(work: WorkPlan) -> Sampler:
        restorer.place(work.offload)
        about = (work.tile_batch, journal, progress, work.control_bytes, work.control_host, settings.tiling)
        return Sampler(restorer, grid, texts, sampling, control, *about)

    def settled() -> dict[str, Any]:
        room = job.work.control
        start = WorkPlan(settings.tile_batch, room["device"], settings.offload, room["host"])
        if device.type == "cpu":
            return start.to_json()
        movable = not settings.compile and not cannot_run(MemoryMode(settings.quantize, "block"), device.type)
        # What is open from other phases must not decide the batch, and so the bytes.
        with suppress(torch.OutOfMemoryError):
            make_sampler(start).probe()
            return start.to_json()
        parts.make_room(but=RESTORER)
        start = place_weights(restorer, start, movable and backoff, progress)

        def attempt(work: WorkPlan) -> None:
            make_sampler(work).probe()

        return settle(start, attempt, device, grid.tile_width, backoff, progress, movable).to_json()

    work = journal.work_plan(settled)
    sampler = make_sampler(WorkPlan(**work))
    if journal.has("z_dr"):
        z_dr = journal.piece("z_dr", REMOVE, shape).file
    else:
        z_lq = journal.piece("z_lq", ENCODE, shape)
        z_dr = sampler.remove(z_lq.file)
        z_lq.drop()
    if settings.strength == 0:
        return z_dr
    return sampler.texture(z_dr, settings.strength, settings.steps, settings.seed, settings.guidance)


def _write(
    enlarged: EnlargedPhoto, decoded: DecodedCanvas, writer: PhotoWriter, color_fix: str, journal: Journal
) -> None:
    """Decode, fix colours and hand to the writer, strip by strip, from the first strip that isn't in the journal. One
    strip is fixed and written while the next is decoded."""
    start, height, width = journal.progress(PIXELS), enlarged.height, enlarged.width

    def fix(take: Callable[[tuple[int, int]], np.ndarray]) -> None:
        top = start
        for strip in fix_strips(
            color_fix, height, width, lambda first, last: take((first, last)), enlarged.read_rows, STRIP, start
        ):
            writer.write_strip(strip, enlarged.read_alpha(top, top + len(strip)))
            top += len(strip)
            journal.set_progress(PIXELS, top)
            journal.sync_sometimes(writer)

    beside(((rows, decoded.read_rows(*rows)) for rows in reads(color_fix, height, STRIP, start)), fix)
