"""Where the public test sets lie, and which photos of a folder belong together: by name, never by sorted position."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.evaluation.results import Failure
from dreamsr_cli.images import is_photo_name

SCALE = 4
"""Factor of every public set."""
_HALVES = (("test_LR", "test_HR"), ("lq", "hq"), ("LQ", "HQ"), ("lr", "hr"), ("LR", "HR"), ("lq", "gt"), ("lr", "gt"))
"""Names that the two halves of a folder of pairs may have."""


@dataclass(frozen=True)
class PublicSet:
    """A set that the paper scores."""

    name: str
    """As it is typed."""
    count: int
    """Photos of the whole set."""
    folders: tuple[str, ...]
    """Names its folder goes by, below the data root."""
    halves: tuple[str, str] | None
    """Folders of the low-quality photos and of the references; None: no references exist."""
    places: str
    """Where to get it, by name."""


PUBLIC_SETS = {
    "RealSR": PublicSet(
        "RealSR",
        100,
        ("RealSRVal_crop128", "RealSR", "benchmark_realsr"),
        ("test_LR", "test_HR"),
        "the Hugging Face dataset Iceclear/StableSR-TestSets (folder RealSRVal_crop128), or "
        "preset/datasets/benchmark_realsr of the GitHub repository cswry/OSEDiff",
    ),
    "DRealSR": PublicSet(
        "DRealSR",
        93,
        ("DrealSRVal_crop128", "DRealSRVal_crop128", "DRealSR", "benchmark_drealsr"),
        ("test_LR", "test_HR"),
        "the Hugging Face dataset Iceclear/StableSR-TestSets (folder DrealSRVal_crop128), or "
        "preset/datasets/benchmark_drealsr of the GitHub repository cswry/OSEDiff",
    ),
    "RealLQ250": PublicSet(
        "RealLQ250",
        250,
        ("RealLQ250",),
        None,
        "the Google Drive file that the README of the GitHub repository shallowdream204/DreamClear links",
    ),
    "RealLR200": PublicSet(
        "RealLR200",
        200,
        ("RealLR200",),
        None,
        "the Google Drive or OneDrive folder that the README of the GitHub repository cswry/SeeSR links",
    ),
    "RealDeg": PublicSet(
        "RealDeg",
        238,
        ("RealDeg",),
        None,
        "the Google Drive file that the README of the GitHub repository JyChen9811/FaithDiff links",
    ),
}


@dataclass(frozen=True)
class Pair:
    """One photo of a set."""

    name: str
    """Stem of the low-quality photo."""
    lq: Path
    hq: Path | None


@dataclass(frozen=True)
class Dataset:
    """The photos to score, in the order of their names."""

    name: str
    """"RealSR", or the folder's name."""
    public: PublicSet | None
    folder: Path
    pairs: tuple[Pair, ...]
    failures: tuple[Failure, ...]
    """Photos that lack their other half, for every method alike."""
    notes: tuple[str, ...]
    subset: str | None = None
    """File that `--subset` named."""

    @property
    def has_references(self) -> bool:
        """Whether the set has references."""
        return self.public.halves is not None if self.public else any(p.hq is not None for p in self.pairs)

    @property
    def complete(self) -> bool:
        """Whether these are all photos of the public set; True for folders of the user's."""
        return self.public is None or len(self.pairs) == self.public.count

    @property
    def label(self) -> str:
        """What heads every table: "RealSR (100 photos)", "RealSR partial 20/100"."""
        if self.public is None or self.complete:
            return f"{self.name} ({len(self.pairs)} photo{'s' * (len(self.pairs) != 1)})"
        if len(self.pairs) > self.public.count:
            return f"{self.name} with {len(self.pairs)} photos instead of {self.public.count}"
        return f"{self.name} partial {len(self.pairs)}/{self.public.count}"


def load_dataset(
    name: str, data_root: Path | None, *, limit: int | None = None, subset: Path | None = None, strict: bool = False
) -> Dataset:
    """The photos of a public set below `data_root`, or of a folder.

    `name`: a key of `PUBLIC_SETS` (in any case) or a folder: of pairs (test_LR/ and test_HR/, lq/ and hq/, ...), or of
    photos without references. `limit`: the first photos by name; `subset`: a file of stems, one a line. `strict`:
    another count than the public set's is an `InputError`. Raises `InputError` that says what to download, from where
    and where to put it, `UsageError` for a name that is neither.
    """
    public = next((p for key, p in PUBLIC_SETS.items() if key.lower() == name.lower()), None)
    if public is not None:
        folder = _find_public(public, data_root)
        halves, label = public.halves, public.name
    else:
        folder = _find_folder(name)
        halves, label = _halves_of(folder), folder.resolve().name
    pairs, failures = _pairs(folder, halves)
    notes: list[str] = []
    if subset is not None:
        pairs, failures = _take_subset(pairs, failures, subset, label)
    if limit is not None:
        pairs = pairs[:limit]
        failures = [f for f in failures if pairs and f.name <= pairs[-1].name]
    if not pairs:
        first = f": {failures[0].reason}" if failures else ""
        raise InputError(f"{folder}: no photo to score{first}", "check the folder against docs/evaluation.md")
    dataset = Dataset(label, public, folder, tuple(pairs), tuple(failures), (), str(subset) if subset else None)
    if public is not None and not dataset.complete:
        text = f"{dataset.label}: the whole set has {public.count} photos"
        if public.name != "RealDeg":
            text += ", so the paper's figures are not comparable"
        if strict:
            raise InputError(text, "complete the set, or leave out --strict-dataset, --limit and --subset")
        notes.append(text)
    if public is not None and public.name == "RealDeg" and subset is None:
        notes.append(
            "RealDeg: not the same photos as in the paper, which scores a subset from social media (--subset FILE)"
        )
    return Dataset(label, public, folder, dataset.pairs, dataset.failures, tuple(notes), dataset.subset)


def _find_public(public: PublicSet, root: Path | None) -> Path:
    inside = " and ".join(f"{half}/" for half in public.halves) if public.halves else "its photos"
    get = f"download it from {public.places}"
    if root is None:
        raise InputError(
            f"{public.name}: no data root is set",
            f"{get}; put {public.folders[0]}/ with {inside} into a folder DIR, then add --data-root DIR "
            "(or set DREAMSR_DATA_ROOT=DIR, or data_root = 'DIR' in table [eval] of dreamsr.toml)",
        )
    names = {wanted.lower() for wanted in public.folders}
    candidates = [root] if root.resolve().name.lower() in names else []
    if root.is_dir():
        candidates += sorted(p for p in root.iterdir() if p.name.lower() in names and p.is_dir())
    for folder in candidates:
        if public.halves is None:
            inner = folder / "lq"
            return inner if inner.is_dir() else folder
        if any((folder / half).is_dir() for half in public.halves):
            return folder
    hint = f"{get}; put it at {root / public.folders[0]}, with {inside} inside"
    raise InputError(f"{public.name} is not below the data root {root}", hint)


def _find_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    near = difflib.get_close_matches(name, PUBLIC_SETS, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(PUBLIC_SETS)
    raise UsageError(f"--dataset {name}: neither a known set nor a folder", f"{guess}use {known}, or a folder")


def _halves_of(folder: Path) -> tuple[str, str] | None:
    for halves in _HALVES:
        there = [(folder / half).is_dir() for half in halves]
        if all(there):
            return halves
    for low, high in _HALVES:
        for half, other in ((low, high), (high, low)):
            if (folder / half).is_dir():
                raise InputError(
                    f"{folder} has {half}/ but no {other}/",
                    f"add {other}/ with photos of the same names, or give the folder of photos itself",
                )
    return None


def _pairs(folder: Path, halves: tuple[str, str] | None) -> tuple[list[Pair], list[Failure]]:
    if halves is None:
        return [Pair(stem, path, None) for stem, path in sorted(photos_by_stem(folder).items())], []
    for half, other in (halves, halves[::-1]):
        if not (folder / half).is_dir():
            raise InputError(
                f"{folder}: {half}/ is missing, {other}/ is there", f"put the other half at {folder / half}"
            )
    low, high = (photos_by_stem(folder / half) for half in halves)
    failures = [Failure(n, "", f"no reference: {halves[1]}/{low[n].name} is missing") for n in low.keys() - high.keys()]
    failures += [
        Failure(n, "", f"no low-quality photo: {halves[0]}/{high[n].name} is missing") for n in high.keys() - low.keys()
    ]
    pairs = [Pair(name, low[name], high[name]) for name in sorted(low.keys() & high.keys())]
    return pairs, sorted(failures, key=lambda f: f.name)


def photos_by_stem(folder: Path) -> dict[str, Path]:
    """Photos of a folder (not below it) by stem. `InputError` if there is none, or two share a stem."""
    found: dict[str, Path] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}", "check the path and its permissions") from error
    for path in paths:
        if path.name.startswith(".") or not is_photo_name(path) or not path.is_file():
            continue
        if path.stem in found:
            raise InputError(
                f"{folder}: {found[path.stem].name} and {path.name} share a stem: they can't be paired by name",
                "remove or rename one of them",
            )
        found[path.stem] = path
    if not found:
        inner = [p.name for p in paths if p.is_dir() and not p.name.startswith(".")]
        hint = f"name the folder that holds the photos: {', '.join(inner[:4])}?" if inner else "check the path"
        raise InputError(f"{folder} holds no photo", hint)
    return found


def _take_subset(
    pairs: list[Pair], failures: list[Failure], file: Path, label: str
) -> tuple[list[Pair], list[Failure]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--subset {file}: {error}", "give a text file with one stem a line") from error
    stems = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    wanted = {Path(stem).stem if is_photo_name(Path(stem)) else stem for stem in stems}
    if not wanted:
        raise InputError(f"--subset {file} names no photo", "write one stem a line")
    missing = sorted(wanted - {p.name for p in pairs} - {f.name for f in failures})
    if missing:
        raise InputError(
            f"--subset {file}: {label} has no photo called {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            "write stems as the files are called, without folder and ending",
        )
    return [p for p in pairs if p.name in wanted], [f for f in failures if f.name in wanted]


def find_result(folder: dict[str, Path], name: str, names: frozenset[str]) -> Path | None:
    """The result for the photo `name` among somebody's outputs: of the same stem, or else the one file whose stem
    goes on with "_" or "-" ("NAME_x4"). None if there is none. `InputError` if there are several.

    `names` are the stems of all photos of the set: a file that belongs to another of them is not taken.
    """
    if name in folder:
        return folder[name]

    def owner(stem: str) -> str | None:
        fitting = [n for n in names if stem == n or stem.startswith((f"{n}_", f"{n}-"))]
        return max(fitting, key=len, default=None)

    found = [path for stem, path in folder.items() if stem.startswith((f"{name}_", f"{name}-")) and owner(stem) == name]
    if len(found) > 1:
        raise InputError(
            f"several results for {name}: {', '.join(sorted(p.name for p in found)[:3])}", "keep one of them"
        )
    return found[0] if found else None
