"""`dreamsr fetch-weights`: bring, check and list the weights that weights.lock names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dreamsr_cli.cli.console import Display, explain, make_display, report
from dreamsr_cli.errors import EXIT_DONE, EXIT_FAILED, EXIT_SOME_FAILED, DreamSRError, UsageError
from dreamsr_cli.run_weights import REPOSITORY
from dreamsr_cli.weights import BUILTIN, BUILTIN_FOLDER, weights_base
from dreamsr_cli.weights_lock import LockEntry, load_lock, lock_path

if TYPE_CHECKING:
    from dreamsr_cli.fetching import FetchSettings

EPILOG = """
Examples:

dreamsr fetch-weights  →  what there is, how large, under which licence, and what is on this disk

dreamsr fetch-weights flux  →  everything that --model flux needs

dreamsr fetch-weights you/your-run  →  a training run on the hub, for --weights you/your-run

dreamsr fetch-weights llava-onevision-0.5b --dry-run

dreamsr fetch-weights flux.1-dev --dest /mnt/big --token hf_...

dreamsr fetch-weights flux.1-dev --from-folder /media/usb/FLUX.1-dev

dreamsr fetch-weights llava-1.5-7b --verify  →  hash everything again; what is damaged is brought again

An interrupted download goes on where it stopped. Proxies and mirrors: HTTPS_PROXY, HF_ENDPOINT, HF_TOKEN work as usual.
"""

GROUPS: dict[str, tuple[str, ...]] = {
    "flux": ("flux.1-dev",),
    "flux-upscaler": ("flux.1-dev", "flux-upscaler-controlnet"),
}
"""Names of bundles, and the entries of weights.lock that each needs."""


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Entries of weights.lock, or flux, flux-upscaler.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show every entry and its state; fetch nothing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched; fetch nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file again; damaged ones are fetched again.")
    ] = False,
    dest: Annotated[
        Path | None,
        typer.Option("--dest", "-o", "--out", help="Folder for weights (default: DREAMSR_WEIGHTS_DIR, or the cache)."),
    ] = None,
    mirror: Annotated[str | None, typer.Option("--mirror", help="URL of a mirror of the hub.")] = None,
    from_folder: Annotated[
        Path | None, typer.Option("--from-folder", help="Take the files from this folder, not from the network.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use no network; say what is missing.")] = False,
    token: Annotated[str | None, typer.Option("--token", help="Access token of the hub (default: HF_TOKEN).")] = None,
    accept_doubtful: Annotated[
        bool, typer.Option("--accept-doubtful", help="Accept files whose pin is in doubt, and remember their hash.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, max=16, help="Files fetched at once.")] = 4,
    lock: Annotated[
        bool, typer.Option("--lock", help="For maintainers: write the hub's present hashes into weights.lock.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per entry on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no notes on stderr.")] = False,
) -> int:
    """Bring the weights of the larger models, captioners and metrics; every file is checked against weights.lock.

    The built-in model needs none of them. Shows licence, size and free disk before it starts.
    """
    from dreamsr_cli.fetching import FetchSettings
    from dreamsr_cli.hub import Hub

    entries = load_lock()
    folder = dest or weights_base()
    if from_folder is not None and not from_folder.is_dir():
        raise UsageError(f"--from-folder {from_folder}: no such folder", "name a folder that holds the files")
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise UsageError(f"--mirror {mirror}: not a URL", "for example --mirror https://hf-mirror.com")
    settings = FetchSettings(
        Hub(mirror, token or os.environ.get("HF_TOKEN") or None), from_folder, offline, verify, accept_doubtful, workers
    )
    runs = [name for name in names or [] if REPOSITORY.fullmatch(name)]
    if runs and not (list_ or lock or verify or dry_run or from_folder or dest):
        return _fetch_runs(names or [], settings, as_json, make_display(quiet))
    chosen = [entries[name] for name in _expand(names or [], entries)]
    if list_ or not chosen:
        if lock or verify:
            raise UsageError("--lock and --verify need a name", "dreamsr fetch-weights NAME --verify")
        return _list(list(chosen or entries.values()), folder, as_json)
    display = make_display(quiet)
    if lock:
        return _repin(chosen, settings, display)
    return _fetch(chosen, folder, settings, dry_run, as_json, display)


def _expand(names: list[str], entries: dict[str, LockEntry]) -> list[str]:
    found: list[str] = []
    for name in names:
        for member in GROUPS.get(name, (name,)):
            if member not in entries:
                known = ", ".join(sorted({*entries, *GROUPS}))
                raise UsageError(f"weights.lock has no entry {member!r}", f"use one of: {known}")
            if member not in found:
                found.append(member)
    return found


def _list(entries: list[LockEntry], folder: Path, as_json: bool) -> int:
    from dreamsr_cli.fetching import free_bytes, inspect, summary

    rows = [summary(entry, inspect(entry, entry_folder(entry, folder))) for entry in entries]
    for row in rows:
        print(json.dumps(row) if as_json else _line(row), flush=True)
    if not as_json:
        print(f"in {folder}, {free_bytes(folder) / 1e9:.1f} GB free")
    return EXIT_DONE


def _line(row: dict[str, Any]) -> str:
    gate = ", gated" if row["gated"] else ""
    note = f"  {row['note']}" if row["note"] else ""
    return f"{row['name']:<26} {row['state']:<14} {row['bytes'] / 1e9:>7.2f} GB  {row['licence'] or '?'}{gate}{note}"


def _fetch(
    entries: list[LockEntry], folder: Path, settings: FetchSettings, dry_run: bool, as_json: bool, display: Display
) -> int:
    from dreamsr_cli.fetching import fetch, free_bytes, inspect, summary

    failed = 0
    for entry in entries:
        place = entry_folder(entry, folder)
        try:
            before = summary(entry, inspect(entry, place, settings.rehash and dry_run))
            gate = f"; gated, see {settings.hub.page(entry)}" if entry.gated else ""
            display.note(
                f"{entry.name}: {before['to_fetch'] / 1e9:.2f} of {before['bytes'] / 1e9:.2f} GB to fetch, "
                f"{free_bytes(folder) / 1e9:.1f} GB free, licence {entry.licence}{gate}"
            )
            if dry_run:
                after = before
            else:
                with display.photo(entry.name):
                    states = fetch(entry, place, settings, display)
                after = summary(entry, states)
            after |= {"folder": str(place), "fetched": 0 if dry_run else before["to_fetch"]}
            print(json.dumps(after) if as_json else (_line(after) if dry_run else str(place)), flush=True)
        except Exception as error:
            failed += 1
            explained = explain(error, f"fetching {entry.name}")
            report(explained)
            if as_json:
                _print_failure(entry, explained)
    if not failed:
        return EXIT_DONE
    return EXIT_SOME_FAILED if failed < len(entries) else EXIT_FAILED


def _fetch_runs(names: list[str], settings: FetchSettings, as_json: bool, display: Display) -> int:
    """Training runs on the hub, where `--weights` looks for them; other names can't be mixed in."""
    from dreamsr_cli.run_weights import local_run

    others = [name for name in names if not REPOSITORY.fullmatch(name)]
    if others:
        raise UsageError(f"{others[0]} is no repository like the others", "fetch it by a command of its own")
    for name in names:
        folder = local_run(name, None if settings.offline else display, settings.hub)
        print(json.dumps({"name": name, "folder": str(folder)}) if as_json else folder, flush=True)
    return EXIT_DONE


def _print_failure(entry: LockEntry, error: DreamSRError) -> None:
    line = {"name": entry.name, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    print(json.dumps(line), flush=True)


def _repin(entries: list[LockEntry], settings: FetchSettings, display: Display) -> int:
    from dreamsr_cli.repinning import repin

    for entry in entries:
        changes = repin(entry, settings.hub, lock_path(), display)
        print("\n".join(changes) if changes else f"{entry.name}: every pin confirmed")
    return EXIT_DONE


def entry_folder(entry: LockEntry, folder: Path) -> Path:
    """Where the files of an entry lie below `folder`; the built-in model is inside the package."""
    return BUILTIN_FOLDER if entry.name == BUILTIN else folder / entry.name
