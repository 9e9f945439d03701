"""The work behind `dreamsr degrade`: photos are found, pairs planned and made, results told and counted."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamsr_cli.cli.console import Display, report, stop_if_asked
from dreamsr_cli.cli.photos import find_photos
from dreamsr_cli.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    DreamSRError,
    InputError,
    UsageError,
)
from dreamsr_cli.plain_data import from_dict

if TYPE_CHECKING:
    from dreamsr_cli.degradations.pair_making import PairPlan
    from dreamsr_cli.degradations.pair_records import ModelId, PairRecord, PairSettings, Source, SourceId
    from dreamsr_cli.degradations.pairs import PhotoResult
    from dreamsr_cli.degradations.texture_erasure import Eraser

QUICK_PIXELS = 48 * 512**2
"""Fewer are degraded sooner than processes start."""


class Degrading:
    """One run of the command: finds photos, plans pairs, has them made, tells and counts."""

    def __init__(
        self,
        inputs: list[str],
        out: Path,
        given: dict[str, Any],
        replay: Path | None,
        overwrite: bool,
        as_json: bool,
        display: Display,
    ) -> None:
        self.inputs, self.out, self.given, self.replay = inputs, out, given, replay
        self.overwrite, self.as_json, self.display = overwrite, as_json, display
        self.problems = self.skipped = 0

    def run(self) -> int:
        """Make the pairs; the exit code. Raises `DreamSRError` for what concerns every photo."""
        _check_flags(self.given, self.replay is not None)
        try:
            return self._run()
        except KeyboardInterrupt:
            print("interrupted: finished pairs are kept; the same command goes on", file=sys.stderr)
            return EXIT_INTERRUPTED

    def _run(self) -> int:
        from dreamsr_cli.degradations.pair_records import ModelId, check_crops, read_records
        from dreamsr_cli.degradations.pairs import make_pair_set, plan_replay, plan_set, shared_settings

        crops = self.given.get("crops", 1)
        check_crops(crops)
        records = read_records(self.replay) if self.replay else []
        eraser = self._eraser(records)
        model = from_dict(ModelId, eraser.settings, "eraser") if eraser else None
        settings = None if self.replay else make_settings(self.given, model)
        shared = shared_settings(settings) if settings else {"replay": _sha256(self.replay)}
        with self.display.photo(self.out.name):
            sources = self._find(settings)
            if settings:
                plan = plan_set(sources, settings, crops)
            else:
                plan, missing = plan_replay(records, sources)
                self._check_replay(records, plan, missing, model)
            if not plan:
                if self.skipped or not self.problems:
                    raise InputError("no photo gives a pair", "give larger photos, a smaller --size or --small shrink")
                return EXIT_FAILED
            result = make_pair_set(
                self.out, plan, shared, self._workers(plan), self.overwrite, eraser, self.display, self._tell
            )
        for name in result.differing:
            reason = f"{self.out}: pair {name} differs from the record"
            self._fail(name, InputError(reason, "use the versions in its record, and the same kind of processor"))
        summary = {
            "out": str(self.out),
            "params": str(result.params),
            "captions": str(result.captions) if result.captions else None,
            "made": result.made,
            "kept": result.kept,
            "failed": self.problems,
            "seconds": round(result.seconds, 2),
        }
        if result.made + result.kept == 0:
            return EXIT_FAILED
        print(json.dumps(summary) if self.as_json else result.params, flush=True)
        kept = f", {result.kept} kept" if result.kept else ""
        self.display.note(f"{result.made} pairs made{kept} in {result.seconds:.1f} s")
        return EXIT_SOME_FAILED if self.problems else EXIT_DONE

    # ---------------------------------------------------------------- photos

    def _find(self, settings: PairSettings | None) -> list[Source]:
        """Readable photos without copies; with `settings`, those that are large enough. Tells about the others."""
        from dreamsr_cli.degradations.pair_records import read_source, refusal
        from dreamsr_cli.images import is_photo_name

        found = find_photos(self.inputs, self.out, is_photo_name)
        by_content: dict[str, Source] = {}
        self.display.phase("looking at photos", len(found))
        for item in sorted(found, key=lambda item: (item.source.name, str(item.source))):
            try:
                if item.problem is not None:
                    raise item.problem
                source = read_source(item.source)
            except DreamSRError as error:
                self._fail(str(item.source), error)
                continue
            finally:
                self.display.advance()
            reason = refusal(source.id, settings) if settings else None
            if source.id.sha256 in by_content:
                reason = f"a copy of {by_content[source.id.sha256].path}"
            if reason is None:
                by_content[source.id.sha256] = source
            elif not self.replay:
                self._skip(source.path, reason)
        return list(by_content.values())

    def _check_replay(
        self,
        records: list[PairRecord],
        plan: list[PairPlan],
        missing: list[SourceId],
        model: ModelId | None,
    ) -> None:
        from dreamsr_cli.degradations.pair_records import Versions

        for source in missing:
            reason = f"{source.name} (sha256 {source.sha256[:12]}…) is not among the photos, but {self.replay} needs it"
            self._fail(source.name, InputError(reason, "name the folder that holds it; its content must be unchanged"))
        if not plan and not missing:
            raise InputError(f"{self.replay}: no pair", "give a params.jsonl that dreamsr degrade wrote")
        here = Versions()
        for name in ("dreamsr", "torch", "numpy", "pillow", "libvips"):
            others = sorted({getattr(record.versions, name) for record in records} - {getattr(here, name)})
            if others:
                note = f"made with {name} {', '.join(others)}, this is {getattr(here, name)}: bytes may differ"
                self.display.note(note)
        recorded = next((record.settings.model for record in records), None)
        if recorded is None or model is None or recorded == model:
            return
        if recorded.bundle_sha256 != model.bundle_sha256:
            raise UsageError(
                f"{self.replay}: made with bundle {recorded.bundle}, not with this one ({model.bundle})",
                "name the same bundle with --model",
            )
        for name in ("device", "threads"):
            then, now = getattr(recorded, name), getattr(model, name)
            if then != now:
                self.display.note(f"made with {name} {then}, this is {now}: bytes may differ")

    # ---------------------------------------------------------------- machine

    def _workers(self, plans: list[PairPlan]) -> int:
        from dreamsr_cli.worker_pool import usable_cores

        pixels = sum(plan.settings.size**2 or plan.source.id.width * plan.source.id.height for plan in plans)
        if "workers" not in self.given and pixels < QUICK_PIXELS:
            return 1
        return min(self.given.get("workers", usable_cores()), len(plans))

    def _eraser(self, records: list[PairRecord]) -> Eraser | None:
        """The networks of kind texture, None for kind pixel."""
        kinds = {record.settings.kind for record in records} or {self.given.get("kind", "pixel")}
        if "texture" not in kinds:
            return None
        if len({record.settings.model for record in records}) > 1:
            raise UsageError(f"{self.replay}: made by several networks", "split it into one file for each")
        from dreamsr_cli.cli.options import RunConfig
        from dreamsr_cli.cli.upscaling import open_verified_bundle, silence_libraries

        silence_libraries()
        from dreamsr_cli.degradations.texture_erasure import BATCH, open_eraser
        from dreamsr_cli.device import choose_device, choose_dtype

        bundle = open_verified_bundle(RunConfig(model=self.given.get("model")))
        device = choose_device(self.given.get("device", "auto"))
        recorded = records[0].settings.model if records else None
        precision = recorded.precision if recorded else self.given.get("precision", "auto")
        batch = recorded.batch if recorded else self.given.get("batch", BATCH)
        return open_eraser(bundle, device, choose_dtype(precision, device), batch)

    # ---------------------------------------------------------------- telling

    def _tell(self, photo: PhotoResult) -> None:
        """One photo is through; stopped here, at the latest, if somebody asked for it."""
        stop_if_asked()
        if photo.problem is not None:
            self._fail(str(photo.source.path), photo.problem)
        elif self.as_json:
            line = {
                "input": str(photo.source.path),
                "pairs": [pair.name for pair in photo.pairs],
                "made": sum(pair.new for pair in photo.pairs),
                "kept": sum(not pair.new for pair in photo.pairs),
            }
            print(json.dumps(line), flush=True)

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped += 1
        self.display.note(f"{path} left out: {reason}")
        if self.as_json:
            print(json.dumps({"input": str(path), "skipped": reason}), flush=True)

    def _fail(self, name: str, error: DreamSRError) -> None:
        self.problems += 1
        report(error)
        if self.as_json:
            failure = {"input": name, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
            print(json.dumps(failure), flush=True)


def make_settings(given: dict[str, Any], model: ModelId | None) -> PairSettings:
    """Settings of a new set from the flags that were typed."""
    from dreamsr_cli.degradations.pair_records import KINDS, PairSettings
    from dreamsr_cli.degradations.presets import PRESETS

    kind = given.get("kind", "pixel")
    if kind not in KINDS:
        raise UsageError(f"--kind {kind!r} is not known", f"use one of: {', '.join(KINDS)}")
    texture = kind == "texture"
    preset = None if texture else given.get("preset", "seesr-pairs")
    usm = given.get("usm")
    if usm not in (None, "on", "off"):
        raise UsageError(f"--usm {usm!r} is not known", "use --usm on or --usm off")
    chosen = PRESETS.get(preset) if preset else None
    return PairSettings(
        kind=kind,
        preset=preset,
        scale=1 if texture else given.get("scale", 4),
        seed=given.get("seed", 42),
        size=given.get("size", 512),
        sharpen=usm == "on" if usm else chosen is not None and chosen.sharpen,
        small=given.get("small", "skip"),
        captioner=given.get("captioner", "describe" if texture else "none"),
        model=model,
    )


def _check_flags(given: dict[str, Any], replay: bool) -> None:
    """`UsageError` for a flag that would have no meaning."""
    if replay:
        useless = [name for name in given if name not in ("workers", "model", "device")]
        if useless:
            raise UsageError(
                f"--{useless[0]} has no meaning with --replay", f"leave out --{useless[0]}: it is recorded"
            )
        return
    kind = given.get("kind", "pixel")
    useless = ("preset", "scale", "usm", "workers") if kind == "texture" else ("model", "device", "precision", "batch")
    for name in useless:
        if name in given:
            raise UsageError(f"--{name} has no meaning with --kind {kind}", f"leave out --{name}")


def _sha256(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes() if path else b"").hexdigest()
