"""The whole method as one function: figure 2 of the paper, from a photo on disk to a larger photo on disk."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dreamsr_cli import __version__
from dreamsr_cli.backoff import WorkPlan, place_weights, settle, smaller_tile
from dreamsr_cli.bundle_sizes import read_sizes
from dreamsr_cli.canvas import STRIP, DecodedCanvas, EnlargedPhoto, encode
from dreamsr_cli.colour import fix_strips
from dreamsr_cli.config import OutputConfig, UpscaleConfig, to_dict
from dreamsr_cli.device import PRECISIONS, choose_device, choose_dtype, dtype_name
from dreamsr_cli.errors import DeviceError
from dreamsr_cli.images import Photo, open_photo
from dreamsr_cli.journal import Journal, journal_folder
from dreamsr_cli.journal_files import RowFile
from dreamsr_cli.machine import describe_machine
from dreamsr_cli.models.autoencoder import STRIDE
from dreamsr_cli.models.bundle import Bundle
from dreamsr_cli.models.quantization import MemoryMode, cannot_run
from dreamsr_cli.models.restorer import Restorer
from dreamsr_cli.phase_sharing import BundleId, DecodeSetup, TileSetup
from dreamsr_cli.photo_writer import PhotoWriter, check_canvas
from dreamsr_cli.planning import plan as plan_work
from dreamsr_cli.planning import record_efficiency
from dreamsr_cli.progress import Progress
from dreamsr_cli.prompts import PromptPlan, photo_id
from dreamsr_cli.prompts_file import write_prompts
from dreamsr_cli.prompts_in_use import give_prompts, make_prompts, place_to_save
from dreamsr_cli.sampler import CONTROL_BYTES, ENCODE, PIXELS, REMOVE, Sampler, Texts, texture_name
from dreamsr_cli.settings import Settings, check_settings
from dreamsr_cli.tiling import TileGrid
from dreamsr_cli.work_sharing import Crew, Setup, SharedWork
from dreamsr_cli.workload import Limits

STRIPS_WAITING = 8
"""Decoded strips that several processes may hold or send at a time."""
CAPTIONS_FILE = "captions.jsonl"
"""In the journal: what the captioner has said so far."""


@dataclass(frozen=True)
class UpscaleResult:
    """What was made, and everything needed to make it again."""

    input: Path
    output: Path
    source_width: int
    source_height: int
    width: int
    height: int
    tiles: int
    settings: Settings
    model: str
    bundle_sha256: str
    global_prompt: str
    prompts: Path | None
    saved_prompts: Path | None
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object; sizes in pixels, `scale` the factor reached."""
        plain = to_dict(self)
        settings = plain.pop("settings")
        for name in ("long_side", "short_side", "prompt"):
            settings.pop(name)
        settings["scale"] = round(self.width / self.source_width, 4)
        plain["seconds"] = round(self.seconds, 3)
        return {**plain, **settings, "version": __version__}


def upscale(
    photo_path: Path,
    out_path: Path,
    bundle: Bundle,
    config: UpscaleConfig,
    output: OutputConfig,
    progress: Progress,
    prompts: Path | None = None,
    crew: Crew | None = None,
) -> UpscaleResult:
    """Restore `photo_path` at a larger size and write `out_path`, whole or not at all.

    The calls in order are the method. Work lies in a journal beside the output: the same call goes on where a killed
    one stopped. `prompts` is a file with this photo's prompts, which the captioner then doesn't make; `crew` are other
    processes that share in batches of tiles and strips. Raises `UsageError` for settings that make no sense with this
    bundle, `InputError`, `OutputError`, `JournalError`, `WeightsError`, `DeviceError`, `ProcessError`.
    """
    began = time.monotonic()
    settings = check_settings(config, bundle)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    settings = dataclasses.replace(settings, device=str(device), precision=dtype_name(dtype))

    with open_photo(photo_path, out_path.parent, output.max_pixels) as photo:
        info = photo.info
        work = plan_work(
            photo_path,
            info,
            out_path,
            settings,
            output,
            read_sizes(bundle.config, bundle.part_folder),
            describe_machine(device, settings.precision, measure=False),
            Limits(STRIP, CONTROL_BYTES),
        )
        width, height, grid, format = work.width, work.height, work.grid, work.format
        check_canvas(photo_path, width, height, max_pixels=output.max_pixels, format=format)
        identity = photo_id(photo_path, photo.sha256, info)
        given = give_prompts(prompts, photo_path, identity, grid, width, height, settings)
        saved = place_to_save(photo_path, out_path, output)
        notes = [*photo.notes, *given.notes]
        for note in given.notes:
            progress.note(f"{photo_path.name}: {note}")
        make_writer = partial(
            PhotoWriter,
            out_path,
            info,
            width,
            height,
            format,
            output.quality,
            bit_depth=output.bit_depth,
            strip_metadata=output.strip_metadata,
        )
        enlarged = EnlargedPhoto(photo, width, height)
        shape = (bundle.config.latent.channels, grid.canvas_height // STRIDE, grid.canvas_width // STRIDE)
        with Journal(
            journal_folder(out_path),
            {**_fingerprint(photo, settings, bundle, output, format, device), "prompts": given.sha256},
            work.disk["total"],
            restart=output.restart,
            keep=output.resume,
        ) as journal:
            if journal.resumed:
                progress.note(f"{out_path.name}: going on where the last run stopped")
            progress.phase("describe", 1)
            make = partial(make_prompts, photo, grid, width, height, given, settings, device, crew=crew)
            plan = _prompts(journal, make, progress)
            try:
                z_0 = _restore(
                    enlarged, plan, grid, shape, settings, bundle, journal, output.backoff, progress, notes, crew
                )
            except torch.OutOfMemoryError as error:
                hint = f"use --tile-batch 1, or --tile {smaller_tile(grid.tile_width)} with --restart"
                raise DeviceError(f"{photo_path}: out of memory on {device}", hint) from error
            settings = dataclasses.replace(settings, tile_batch=journal.tile_batch(settings.tile_batch))
            _release(device)
            decoders = DecodeSetup(BundleId.of(bundle), settings.device, settings.precision, width)
            with _shared(crew, decoders, progress, STRIPS_WAITING) as shared:
                decoded = DecodedCanvas(z_0, width, bundle.open_autoencoder(device, dtype), device, progress, shared)
                rows_done, made_by = journal.progress(PIXELS), _made_by(settings, bundle, plan)
                with make_writer(raw=journal.pixels, rows_done=rows_done, made_by=made_by) as writer:
                    _write(enlarged, decoded, writer, settings.color_fix, journal)
            if saved is not None:
                write_prompts(saved, plan)
        notes += writer.notes
    for note in (*photo.notes, *writer.notes):
        progress.note(f"{photo_path.name}: {note}")
    seconds = time.monotonic() - began
    if not journal.resumed:
        record_efficiency(work, seconds)
    return UpscaleResult(
        input=photo_path,
        output=out_path,
        source_width=info.width,
        source_height=info.height,
        width=width,
        height=height,
        tiles=len(grid.tiles),
        settings=settings,
        model=bundle.config.name,
        bundle_sha256=bundle.sha256,
        global_prompt=plan.global_text,
        prompts=prompts,
        saved_prompts=saved,
        notes=tuple(notes),
        seconds=seconds,
    )


def _prompts(journal: Journal, make: Callable[[Path, Progress], PromptPlan], progress: Progress) -> PromptPlan:
    """The photo's texts: the journal's, or those that `make` makes. Captions made before an error are worth keeping."""
    captions = journal.folder / CAPTIONS_FILE
    try:
        return PromptPlan.from_json(journal.text(lambda: make(captions, progress).to_json()))
    finally:
        if captions.exists():
            journal.worked()


def _restore(
    enlarged: EnlargedPhoto,
    plan: PromptPlan,
    grid: TileGrid,
    shape: tuple[int, int, int],
    settings: Settings,
    bundle: Bundle,
    journal: Journal,
    backoff: bool,
    progress: Progress,
    notes: list[str],
    crew: Crew | None,
) -> RowFile:
    """z_0 of the canvas: encode, remove, renoise, texture. Each network is opened, used and freed in its turn."""
    device, dtype = torch.device(settings.device), PRECISIONS[settings.precision]
    last = texture_name(settings.steps) if settings.strength > 0 else "z_dr"
    if journal.has(last):
        return journal.piece(last, settings.steps, shape).file
    local_to_both = settings.prompt_mode == "local"
    mode = MemoryMode(settings.quantize, settings.offload)
    texts, mask_pads = _embed(plan, local_to_both, bundle, device, dtype, mode, progress, notes)

    sampling, control = bundle.config.sampling, bundle.config.control
    setup = TileSetup(
        BundleId.of(bundle), settings.device, settings.precision, mode, mask_pads, grid, texts, sampling, control
    )
    # Other processes load their networks while this one encodes.
    with _shared(None if settings.strength == 0 and not settings.removal else crew, setup, progress) as shared:
        if not journal.has("z_dr"):
            encoded = "z_lq" if settings.removal else "z_dr"
            autoencoder = bundle.open_autoencoder(device, dtype)
            encode(enlarged, grid, autoencoder, journal.piece(encoded, ENCODE, shape), device, progress)
            del autoencoder
            _release(device)
        if journal.has(last):
            return journal.piece(last, ENCODE, shape).file
        restorer = bundle.open_restorer(device, dtype, mask_pads, mode, False)
        return _sample(restorer, setup, shape, settings, journal, backoff, progress, shared)


def _sample(
    restorer: Restorer,
    setup: TileSetup,
    shape: tuple[int, int, int],
    settings: Settings,
    journal: Journal,
    backoff: bool,
    progress: Progress,
    shared: SharedWork | None,
) -> RowFile:
    """z_0 from z_lq: both stages, with the plan in force, or with one that every process has the memory for."""
    device, grid = restorer.device, setup.grid

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
            shared,
        )

    def settled() -> dict[str, Any]:
        start = WorkPlan(settings.tile_batch, CONTROL_BYTES, settings.offload)
        if device.type == "cpu":
            return start.to_json()
        movable = not cannot_run(MemoryMode(settings.quantize, "block"), device.type)
        start = place_weights(restorer, start, movable and backoff, progress)

        def attempt(work: WorkPlan) -> None:
            make_sampler(work).probe()
            if shared is not None:
                shared.everyone(work)

        return settle(start, attempt, device, grid.tile_width, backoff, progress, movable).to_json()

    work = WorkPlan(**journal.work_plan(settled))
    if shared is not None:
        shared.everyone(work)
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


def _write(
    enlarged: EnlargedPhoto, decoded: DecodedCanvas, writer: PhotoWriter, color_fix: str, journal: Journal
) -> None:
    """Decode, fix colours and hand to the writer, strip by strip, from the first strip that isn't in the journal."""
    top = journal.progress(PIXELS)
    for strip in fix_strips(
        color_fix, enlarged.height, enlarged.width, decoded.read_rows, enlarged.read_rows, STRIP, top
    ):
        writer.write_strip(strip, enlarged.read_alpha(top, top + len(strip)))
        top += len(strip)
        journal.set_progress(PIXELS, top)
        journal.sync_sometimes(writer)


def _fingerprint(
    photo: Photo, settings: Settings, bundle: Bundle, output: OutputConfig, format: str, device: torch.device
) -> dict[str, Any]:
    """What decides the result's bytes, one by one (docs/decisions.md, Sameness)."""
    return {
        "input_sha256": photo.sha256,
        **{name: value for name, value in to_dict(settings).items() if name != "memory"},
        "device": device.type,
        "threads": torch.get_num_threads(),
        "bundle_sha256": bundle.sha256,
        "format": format,
        "quality": output.quality,
        "bit_depth": output.bit_depth,
        "strip_metadata": output.strip_metadata,
        "torch": torch.__version__,
        "dreamsr": __version__,
    }


def _made_by(settings: Settings, bundle: Bundle, plan: PromptPlan) -> dict[str, Any]:
    """What is recorded in the result: settings, model and version, and no path of the user's."""
    chosen = {k: v for k, v in to_dict(settings).items() if v not in (None, [])}
    chosen["captioner"] = Path(settings.captioner).name  # it may be a folder
    return {
        "dreamsr": __version__,
        "model": bundle.config.name,
        "bundle_sha256": bundle.sha256,
        "global_prompt": plan.global_text,
        **chosen,
    }


def _embed(
    plan: PromptPlan,
    local_to_both: bool,
    bundle: Bundle,
    device: torch.device,
    dtype: torch.dtype,
    mode: MemoryMode,
    progress: Progress,
    notes: list[str],
) -> tuple[Texts, bool]:
    """Embeddings of the global and of every local prompt, and whether padding is masked. The encoder is freed; what
    was cut is added to `notes`."""
    encoder = bundle.open_text_encoder(device, dtype, mode)
    local = [tile.text for tile in plan.tiles]
    most = bundle.config.defaults.max_text_tokens
    embeddings, cut = encoder.encode([plan.global_text, *local], most)
    for index in cut:
        which = f"the prompt of tile {index - 1}, {list(plan.tiles[index - 1].box)}," if index else "the global prompt"
        notes.append(f"{which} is longer than {most} tokens and was cut")
        progress.note(notes[-1])
    progress.advance()
    return Texts(embeddings[0], embeddings[1:], local_to_both, most), not encoder.pads_are_seen


def _shared(
    crew: Crew | None, setup: Setup, progress: Progress, window: int | None = None
) -> AbstractContextManager[SharedWork | None]:
    """Inside, the other processes hold what `setup` opens; None where there are none."""
    return nullcontext() if crew is None else crew.share(setup, progress, window)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
