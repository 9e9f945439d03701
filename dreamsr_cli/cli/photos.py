"""Which photos a command line means, and where each result goes; decided in full before any work starts."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dreamsr_cli.errors import DreamSRError, InputError, OutputError, UsageError

EXTENSIONS = {
    "png": (".png",),
    "jpg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "tiff": (".tif", ".tiff"),
    "avif": (".avif",),
}
"""Extensions that results may have, by format; the first one is given to results that need a new one."""

_WRITABLE = {extension: name for name, extensions in EXTENSIONS.items() for extension in extensions}

_LONGEST_NAME = 255

_OTHER_JPEG = {".jpe": ".jpg", ".jfif": ".jpg"}


def format_of(path: Path) -> str | None:
    """The format that a result of this name has, None if it can't be written."""
    return _WRITABLE.get(path.suffix.lower())


@dataclass(frozen=True)
class Found:
    """A photo that an INPUT means, or the reason why an INPUT means none."""

    source: Path
    """The photo, or the INPUT itself if there is a problem."""
    tree: Path = Path()
    """Folders to keep below the output folder."""
    typed: bool = True
    """The user named this very file; False: a folder or pattern brought it up."""
    problem: DreamSRError | None = None
    """Why this can't be upscaled."""


@dataclass(frozen=True)
class Job:
    """One photo and the file its result goes to."""

    source: Path
    target: Path
    tree: Path = field(default=Path(), compare=False)
    """Folders of the source below the input that brought it up."""


# ---------------------------------------------------------------- inputs


def find_photos(inputs: list[str], out: Path | None, is_photo_name: Callable[[Path], bool]) -> list[Found]:
    """Every photo of files, folders (recursive) and glob patterns, in the order typed, folders sorted by name.

    In folders and patterns, hidden files, files that aren't photos by name, journals and everything below `out` are
    passed over without a word, and a symlink loop is walked once. Inputs without a photo come back as problems.
    """
    found: dict[str, Found] = {}
    for text in inputs:
        for item in _expand(text, out, is_photo_name):
            found.setdefault(os.path.abspath(item.source), item)
    return list(found.values())


def _expand(text: str, out: Path | None, is_photo_name: Callable[[Path], bool]) -> Iterator[Found]:
    path = Path(text)
    # pathlib raises for names that are too long
    if os.path.isdir(text):
        yield from _walk(path, Path(), out, is_photo_name)
    elif os.path.isfile(text):
        yield Found(path)
    elif glob.has_magic(text) and not os.path.lexists(path):
        yield from _match(path, text, out, is_photo_name)
    else:
        what = "is not a regular file" if os.path.lexists(path) else "doesn't exist"
        yield Found(
            path, problem=InputError(f"{text} {what}", "check the path; a folder or a 'pattern*.jpg' works too")
        )


def _match(pattern: Path, text: str, out: Path | None, is_photo_name: Callable[[Path], bool]) -> Iterator[Found]:
    fixed = Path(*_before_magic(pattern))
    items: list[Found] = []
    if "**" in pattern.parts:
        # glob's own ** follows links round and round; the walk doesn't.
        wanted = pattern.relative_to(fixed).parts
        for item in _walk(fixed, Path(), out, is_photo_name):
            parts = item.source.relative_to(fixed).parts
            if item.problem is None and any(_fits(parts[:end], wanted) for end in range(1, len(parts) + 1)):
                items.append(item)
    else:
        for path in sorted(map(Path, glob.glob(str(pattern)))):
            if path.is_dir():
                walked = _walk(path, path.relative_to(fixed), out, is_photo_name)
                items += [item for item in walked if item.problem is None]
            elif path.is_file() and is_photo_name(path):
                items.append(Found(path, path.relative_to(fixed).parent, typed=False))
    if not items:
        yield Found(pattern, problem=InputError(f"no photo matches {text}", "check the pattern, and quote it"))
    yield from items


def _before_magic(pattern: Path) -> Iterator[str]:
    for part in pattern.parts:
        if glob.has_magic(part):
            return
        yield part


def _fits(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether path components fit pattern components, ** standing for any number of folders."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return _fits(parts, wanted[1:]) or (bool(parts) and _fits(parts[1:], wanted))
    return bool(parts) and fnmatch.fnmatch(parts[0], wanted[0]) and _fits(parts[1:], wanted[1:])


def _walk(folder: Path, tree: Path, out: Path | None, is_photo_name: Callable[[Path], bool]) -> Iterator[Found]:
    stop = os.path.realpath(out) if out is not None else None
    seen = {os.path.realpath(folder)}
    errors: list[OSError] = []
    empty = True
    for here, folders, files in os.walk(folder, followlinks=True, onerror=errors.append):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(here, name))
            if not name.startswith(".") and not name.endswith(".dreamsr") and real not in seen and real != stop:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            path = Path(here, name)
            if not name.startswith(".") and is_photo_name(path) and path.is_file():
                empty = False
                yield Found(path, tree / path.relative_to(folder).parent, typed=False)
    for error in errors:
        problem = InputError(f"{error.filename}: {error.strerror}", "check the folder's permissions")
        yield Found(Path(error.filename), problem=problem)
    if empty and not errors:
        yield Found(folder, problem=InputError(f"{folder} holds no photo", "name a folder or file with photos"))


# ---------------------------------------------------------------- outputs


@dataclass(frozen=True)
class Naming:
    """How results are named."""

    out: Path | None
    """Folder or, with `is_file`, the file; None: beside each photo."""
    is_file: bool
    """`out` is the one result's own name."""
    format: str
    """OutputConfig.format."""
    suffix: str
    """OutputConfig.suffix."""
    factor: Callable[[Path], float]
    """The scale factor of a photo, for {scale}; raises `InputError` if it needs a size that can't be read."""

    def target(self, item: Found) -> Path:
        """The result's path. Raises `InputError` if the factor can't be told."""
        if self.out is not None and self.is_file:
            return self.out
        suffix = self.suffix
        if "{scale}" in suffix:
            suffix = suffix.replace("{scale}", f"{self.factor(item.source):.4g}")
        name = item.source.stem + suffix + self._extension(item.source)
        return item.source.with_name(name) if self.out is None else self.out / item.tree / name

    def _extension(self, source: Path) -> str:
        known = format_of(source)
        if self.format == "auto":
            return source.suffix if known else _OTHER_JPEG.get(source.suffix.lower(), ".png")
        return source.suffix if known == self.format else EXTENSIONS[self.format][0]


def out_is_file(out: str | None, found: list[Found], is_photo_name: Callable[[Path], bool]) -> bool:
    """Whether `-o` names the one result itself. Raises `UsageError` if it does, but can't."""
    if out is None or out.endswith(("/", os.sep)) or Path(out).is_dir():
        return False
    if format_of(Path(out)) is None and not is_photo_name(Path(out)):
        if os.path.lexists(out):
            raise UsageError(
                f"-o {out} is a file, not a folder", "name a folder, or end it in .png, .jpg, .webp, .tif or .avif"
            )
        return False
    if format_of(Path(out)) is None:
        raise UsageError(f"-o {out}: {Path(out).suffix} can't be written", "end it in .png, .jpg, .webp, .tif or .avif")
    if len(found) != 1 or not found[0].typed:
        raise UsageError(f"-o {out} names one file, but the input may be several photos", "name a folder after -o")
    return True


def plan_jobs(found: list[Found], naming: Naming) -> list[Job | Found]:
    """A job for each photo, in order; what can't be done stays a `Found` with its problem.

    Photos of a folder that are themselves results of others of this plan are left out, so that the same command twice
    doesn't upscale its own results. Raises `UsageError` where two photos would share one result, or a result would
    replace a photo of this plan.
    """
    plan: list[Job | Found] = []
    typed: dict[Job, bool] = {}
    for item in found:
        if item.problem is None:
            try:
                job = Job(item.source, naming.target(item), item.tree)
            except InputError as error:
                plan.append(Found(item.source, problem=error))
            else:
                typed[job] = item.typed
                plan.append(job)
        else:
            plan.append(item)
    results = {os.path.realpath(job.target) for job in typed if job.source.name != job.target.name}
    earlier = {job for job, named in typed.items() if not named and os.path.realpath(job.source) in results}
    plan = [entry for entry in plan if entry not in earlier]
    _refuse_clashes([entry for entry in plan if isinstance(entry, Job)])
    return plan


def _refuse_clashes(jobs: list[Job]) -> None:
    sources = {os.path.realpath(job.source) for job in jobs}
    owners: dict[str, Path] = {}
    for job in jobs:
        real = os.path.realpath(job.target)
        if real in sources:
            raise UsageError(f"{job.target} is an input and would be replaced", "name a folder after -o, or a --suffix")
        if real in owners:
            clash = f"{owners[real]} and {job.source} would both be written to {job.target}"
            raise UsageError(clash, "name their folder instead of the files, or run once for each with its own -o")
        owners[real] = job.source


def refuse_depth(plan: list[Job | Found], bit_depth: str) -> None:
    """Raise `UsageError` if `--bit-depth 16` meets a result whose format is written with 8 bits."""
    for entry in plan:
        if bit_depth == "16" and isinstance(entry, Job) and format_of(entry.target) not in ("png", "tiff"):
            raise UsageError(
                f"--bit-depth 16: {entry.target.name} is written with 8 bits per channel",
                "add --format png or --format tiff, or leave out --bit-depth",
            )


def prepare_target(job: Job, overwrite: bool, skip_existing: bool) -> bool:
    """Make the result's folder; False if the result exists and is to be kept.

    Raises `OutputError` if it exists and neither flag was given, or its folder can't be made.
    """
    if len(os.fsencode(job.target.name)) > _LONGEST_NAME:
        reason = f"{job.target}: the name would be too long ({_LONGEST_NAME} bytes at most)"
        raise OutputError(reason, "name the result with -o, or give a shorter --suffix")
    if job.target.is_dir():
        raise OutputError(f"{job.target} is a folder", "remove it, or choose another -o or --suffix")
    if os.path.lexists(job.target) and not overwrite:
        if skip_existing:
            return False
        raise OutputError(f"{job.target} exists already", "add --overwrite to replace it or --skip-existing to keep it")
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"can't make the folder {job.target.parent}: {error.strerror}"
        raise OutputError(reason, "choose another -o, or check the permissions") from error
    return True
