"""What `--weights RUN_OR_REPO` names: a training run's folder, or a repository on the hub that holds one.

A repository is brought once, into `hub/ORG--NAME` (with `@REVISION` where one is asked for) below the folder of
weights, and used from there afterwards without a network. Only safetensors, JSON and the model card are fetched; large
files are compared with the hub's own sha256, and what arrived is remembered in `.source.json`, so that a file altered
later is noticed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.fetching import FetchSettings, fetch
from dreamsr_cli.hub import Hub, RemoteFile
from dreamsr_cli.progress import Progress
from dreamsr_cli.weights import BUILTIN, file_sha256, weights_base
from dreamsr_cli.weights_lock import LockEntry, LockRow

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
SOURCE_FILE = ".source.json"
BUNDLE_FILE = "bundle.json"
WANTED = (".safetensors", ".json")
CARDS = ("README.md", "NOTICE", "LICENSE", "LICENSE.md")
OFFLINE = ("HF_HUB_OFFLINE", "DREAMSR_OFFLINE")
"""Environment variables that forbid the network."""


def local_run(weights: str, progress: Progress | None, hub: Hub | None = None) -> Path:
    """The folder that `weights` names, brought from the hub first where it is a repository's name.

    Without `progress` nothing is fetched. Raises `WeightsError`: no such folder or repository, no network, or what is
    there was altered.
    """
    folder = Path(weights).expanduser()
    match = REPOSITORY.fullmatch(weights)
    if folder.exists() or match is None:
        return folder
    organisation, name, revision = match.groups()
    place = (
        weights_base() / "hub" / (f"{organisation}--{name}" + (f"@{revision.replace('/', '-')}" if revision else ""))
    )
    if (place / SOURCE_FILE).is_file():
        _check(place, weights)
        return place
    if progress is None:
        raise WeightsError(
            f"--weights {weights}: not on this machine, and no folder of that name",
            "the command without --dry-run fetches it",
        )
    for variable in OFFLINE:
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise WeightsError(
                f"--weights {weights} is not on this machine, and {variable} is set", f"unset {variable}"
            )
    hub = hub or Hub(token=os.environ.get("HF_TOKEN") or None)
    _bring(
        weights, LockEntry(weights, (), repository=f"{organisation}/{name}", revision=revision), hub, place, progress
    )
    return place


def _bring(weights: str, entry: LockEntry, hub: Hub, place: Path, progress: Progress) -> None:
    repository, revision = entry.repository, entry.revision
    commit, listed = hub.list_files(entry, revision)
    files = [file for file in listed if _is_wanted(file.path)]
    if not any(file.path in (BUNDLE_FILE, f"bundle/{BUNDLE_FILE}") for file in files):
        raise WeightsError(f"{repository} holds no {BUNDLE_FILE}: no run of `dreamsr train`", "name another repository")
    entry = replace(entry, revision=commit)
    progress.note(f"{weights}: {sum(f.size for f in files) / 1e9:.2f} GB at commit {commit[:12]}")
    rows = [_row(entry, file, hub, place) for file in files]
    refuse_strange_parts(place)
    fetch(replace(entry, files=tuple(rows)), place, FetchSettings(hub), progress)
    source = {
        "repository": repository,
        "asked": revision,
        "commit": commit,
        "files": {row.path: [row.size, row.sha256] for row in rows},
    }
    part = place / (SOURCE_FILE + ".part")
    part.write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    os.replace(part, place / SOURCE_FILE)


def _row(entry: LockEntry, file: RemoteFile, hub: Hub, place: Path) -> LockRow:
    """The file with its hash: the hub's, or for a small file the one of what it sends."""
    row = LockRow(file.path, file.size, file.sha256, licence="", status="one source")
    if file.sha256 is not None:
        return row
    target = place / file.path
    hub.download(entry, row, target)
    return replace(row, sha256=file_sha256(target))


def _is_wanted(path: str) -> bool:
    pure = PurePosixPath(path)
    inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in path
    hidden = any(part.startswith(".") for part in pure.parts)
    return inside and not hidden and (pure.suffix in WANTED or pure.name in CARDS)


def refuse_strange_parts(place: Path) -> None:
    """Raise `WeightsError` where a fetched bundle.json points at files outside its folder."""
    for path in (place / BUNDLE_FILE, place / "bundle" / BUNDLE_FILE):
        if not path.is_file():
            continue
        try:
            parts: Any = json.loads(path.read_text(encoding="utf-8"))["parts"]
            named = [str(part[key]) for part in parts.values() for key in ("path", "subfolder") if part.get(key)]
            bundles = {part["bundle"] for part in parts.values() if part.get("bundle")}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{path}: not a bundle: {error!r}", "name another repository") from error
        outside = [name for name in named if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside or bundles - {BUILTIN}:
            what = (outside or sorted(bundles - {BUILTIN}))[0]
            raise WeightsError(f"{path} points at {what!r}, outside the repository", "name another repository")


def _check(place: Path, weights: str) -> None:
    try:
        listed = json.loads((place / SOURCE_FILE).read_text(encoding="utf-8"))["files"]
        wrong = [name for name, (_, sha256) in listed.items() if file_sha256(place / name) != sha256]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"--weights {weights}: {place} is damaged: {error}", f"rm -r {place}, then again") from error
    if wrong:
        raise WeightsError(f"{place / wrong[0]} was altered since it was fetched", f"rm -r {place}, then again")
