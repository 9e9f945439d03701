"""What the networks do for one photo: from the enlarged photo to z_0, and from z_0 to the rows of the result.

With other processes (`crew`) batches of tiles and strips are shared out; the bytes are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch

from dreamsr_cli.backoff import WorkPlan, place_weights, settle
from dreamsr_cli.blended import BlendedRows
from dreamsr_cli.canvas import STRIP, DecodedCanvas, EnlargedPhoto, FourfoldPhoto, encode
from dreamsr_cli.colour import fix_strips, reads
from dreamsr_cli.consistency import ConsistentRows
from dreamsr_cli.counting_pixels import kept_cleaned
from dreamsr_cli.grained import GrainedRows
from dreamsr_cli.journal_files import RowFile
from dreamsr_cli.models.cleaner import FAITHFUL, PLEASING, CleanedRows
from dreamsr_cli.models.compiling import compile_blocks, compile_errors, compiled_code
from dreamsr_cli.models.enlarger import EnlargedRows
from dreamsr_cli.models.fourfold import FACTOR, FourfoldRows
from dreamsr_cli.models.open_parts import RESTORER, OpenParts
from dreamsr_cli.models.quantization import MemoryMode, cannot_run
from dreamsr_cli.overlap import beside
from dreamsr_cli.phase_sharing import BundleId, DecodeSetup, TileSetup
from dreamsr_cli.photo_job import PhotoJob
from dreamsr_cli.progress import Progress, SilentProgress
from dreamsr_cli.resample import ReadRows
from dreamsr_cli.sampler import ENCODE, PIXELS, REMOVE, Sampler, texture_name
from dreamsr_cli.tile_work import Texts
from dreamsr_cli.work_sharing import Crew, Setup, SharedWork

STRIPS_WAITING = 8
"""Decoded strips that wait in RAM for their turn, at most."""


def restore(
    job: PhotoJob,
    parts: OpenParts,
    embed: Callable[[PhotoJob, Progress], tuple[Texts, bool]],
    progress: Progress,
    crew: Crew | None = None,
) -> RowFile | None:
    """z_0 of the canvas: encode, remove, renoise, texture. Each network is opened for its turn, and freed after it
    unless all fit. `embed` gives the photo's texts, and whether their padding is masked. None where cleaner or
    enlarger alone make the result (`PhotoJob.is_enlarged_only`)."""
    if job.is_enlarged_only:
        return None
    settings, journal, shape = job.settings, job.journal, job.shape
    last = texture_name(settings.steps) if settings.strength > 0 else "z_dr"
    if journal.has(last):
        return journal.piece(last, settings.steps, shape).file
    texts, mask_pads = embed(job, progress)
    config = job.bundle.config
    setup = TileSetup(
        BundleId.of(job.bundle),
        settings.device,
        settings.precision,
        parts.mode,
        mask_pads,
        job.grid,
        texts,
        config.sampling,
        config.control,
        settings.tiling,
        settings.compile,
    )
    # Other processes load their networks while this one encodes.
    with _shared(None if settings.strength == 0 and not settings.removal else crew, setup, progress) as shared:
        if not journal.has("z_dr"):
            encoded = journal.piece("z_lq" if settings.removal else "z_dr", ENCODE, shape)
            source = _fourfold_photo(job, parts) if settings.enlarger or settings.cleaner else job.enlarged
            encode(source, job.grid, parts.autoencoder(), encoded, parts.device, progress)
            parts.release()
        if journal.has(last):
            return journal.piece(last, ENCODE, shape).file
        with compile_errors():
            return _sample(job, parts, setup, progress, shared)


def _sample(
    job: PhotoJob, parts: OpenParts, setup: TileSetup, progress: Progress, shared: SharedWork | None
) -> RowFile:
    """z_0 from z_lq: both stages, with the plan in force, or with one that every process has the memory for."""
    settings, journal, grid, shape = job.settings, job.journal, job.grid, job.shape
    device, backoff = parts.device, job.output.backoff
    restorer = parts.restorer(setup.mask_pads)
    if settings.compile and compile_blocks(restorer):
        progress.note(f"--compile: the first tiles take longer; what is translated is kept in {compiled_code()}")

    def make_sampler(work: WorkPlan) -> Sampler:
        restorer.place(work.offload)
        return Sampler(
            restorer,
            grid,
            setup.texts,
            setup.sampling,
            setup.control,
            work.tile_batch,
            journal,
            progress,
            work.control_bytes,
            work.control_host,
            settings.tiling,
            shared,
        )

    def attempt(work: WorkPlan) -> None:
        make_sampler(work).probe()
        if shared is not None:
            shared.everyone(work)

    def settled() -> dict[str, Any]:
        room = job.work.control
        start = WorkPlan(settings.tile_batch, room["device"], settings.offload, room["host"])
        if device.type == "cpu":
            return start.to_json()
        movable = not settings.compile and not cannot_run(MemoryMode(settings.quantize, "block"), device.type)
        # What is open from other phases must not decide the batch, and so the bytes.
        with suppress(torch.OutOfMemoryError):
            attempt(start)
            return start.to_json()
        parts.make_room(but=RESTORER)
        start = place_weights(restorer, start, movable and backoff, progress)
        return settle(start, attempt, device, grid.tile_width, backoff, progress, movable).to_json()

    work = WorkPlan(**journal.work_plan(settled))
    if shared is not None:
        # Cards may have too little memory; else the others need not be ready yet.
        shared.everyone(work, wait=device.type != "cpu")
    sampler = make_sampler(work)
    if journal.has("z_dr"):
        z_dr = journal.piece("z_dr", REMOVE, shape).file
    else:
        z_lq = journal.piece("z_lq", ENCODE, shape)
        z_dr = sampler.remove(z_lq.file)
        z_lq.drop()
    if settings.strength == 0:
        return z_dr
    return sampler.texture(z_dr, settings.strength, settings.steps, settings.seed, settings.guidance)


def write_pixels(
    job: PhotoJob, parts: OpenParts, z_0: RowFile | None, progress: Progress, crew: Crew | None = None
) -> None:
    """Decode (or enlarge, where z_0 is None), fix colours and hand to the writer, strip by strip, from the first strip
    that isn't in the journal. One strip is fixed and written while the next is decoded."""
    settings, journal, enlarged, writer = job.settings, job.journal, job.enlarged, job.open_writer()
    begun: FourfoldPhoto | None = None
    if z_0 is None:
        begun = _fourfold_photo(job, parts, progress)
    elif settings.cleaner or settings.texture < 1 or job.keeps_to_enlarger:
        begun = _fourfold_photo(job, parts)
    # The cleaner's photo has the photo's colours without its noise.
    coloured: EnlargedPhoto = begun if begun is not None and settings.cleaner else enlarged
    start, height, width = journal.progress(PIXELS), enlarged.height, enlarged.width

    def fix(take: Callable[[tuple[int, int]], np.ndarray]) -> None:
        top = start
        for strip in fix_strips(
            settings.color_fix,
            height,
            width,
            lambda first, last: take((first, last)),
            coloured.read_rows,
            STRIP,
            start,
        ):
            writer.write_strip(strip, enlarged.read_alpha(top, top + len(strip)))
            top += len(strip)
            journal.set_progress(PIXELS, top)
            journal.sync_sometimes(writer)

    def write(read_result: ReadRows) -> None:
        like = begun if job.keeps_to_enlarger else None
        consistent = ConsistentRows(read_result, enlarged, settings.consistency or 0.0, like)
        network = parts.grain() if settings.grain else None
        rows = GrainedRows(consistent.read_rows, enlarged, network, settings.grain, settings.seed, parts.device)
        wanted = reads(settings.color_fix, height, STRIP, start)
        beside(((asked, rows.read_rows(*asked)) for asked in wanted), fix)

    if z_0 is None:
        assert begun is not None
        write(begun.read_rows)
        return
    restored = settings.strength == 0
    decoders = DecodeSetup(BundleId.of(job.bundle), settings.device, settings.precision, width, restored)
    with _shared(crew, decoders, progress, STRIPS_WAITING) as shared:
        decoded = DecodedCanvas(z_0, width, parts.autoencoder(), parts.device, progress, shared, restored)
        write(decoded.read_rows if begun is None else BlendedRows(begun, decoded.read_rows, settings.texture).read_rows)


def _fourfold_photo(job: PhotoJob, parts: OpenParts, progress: Progress | None = None) -> FourfoldPhoto:
    """What cleaner or enlarger make of the photo; to be asked for again after `parts.release`. `progress`: where this
    is a phase of its own."""
    settings, photo, work = job.settings, job.photo, job.work
    told = SilentProgress() if progress is None else progress
    sizes = (photo.info.height, photo.info.width, work.height, work.width)
    rows: FourfoldRows[Any]
    if settings.cleaner:
        manner = FAITHFUL if settings.strength == 0 else PLEASING
        # What a plan counts on is the canvas; below x4 what is cleaned is larger.
        canvas, fourfold = (job.grid.canvas_height, job.grid.canvas_width), (FACTOR * sizes[0], FACTOR * sizes[1])
        fits = kept_cleaned(*canvas) and kept_cleaned(*fourfold)
        if fits and job.cleaned is None and not job.is_enlarged_only:
            job.cleaned = CleanedRows.keeping(-(-photo.info.height // CleanedRows.STRIP))
        rows = CleanedRows(parts.cleaner(), manner, photo.read_rows, *sizes, parts.device, told.advance, job.cleaned)
    else:
        network = parts.enlarging_refiner(settings.looks)
        rows = EnlargedRows(network, photo.read_rows, *sizes, parts.device, told.advance)
    told.phase("clean" if settings.cleaner else "enlarge", rows.strips)
    return FourfoldPhoto(photo, work.width, work.height, rows)


def _shared(
    crew: Crew | None, setup: Setup, progress: Progress, window: int | None = None
) -> AbstractContextManager[SharedWork | None]:
    """Inside, the other processes hold what `setup` opens; None where there are none."""
    return nullcontext() if crew is None else crew.share(setup, progress, window)
