"""Settings of `dreamsr train` from flags, environment, the run that is resumed, and ./dreamsr.toml.

Precedence: flag > `DREAMSR_*` environment > with `--resume` the run's own run.json > the `[train]` table of
./dreamsr.toml > without `--data` and `--out` the last run below the current folder.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dreamsr_cli.cli.options import toml_table
from dreamsr_cli.errors import ConfigError, UsageError
from dreamsr_cli.plain_data import from_dict

RUN_FILE = "run.json"
FROM_RUN = ("stage", "data", "model", "init_from", "perceptual_weights")


@dataclass(frozen=True)
class TrainOptions:
    """Everything `dreamsr train` was asked for; None: nobody said so."""

    stage: str | None = None
    """One of `training.stages.STAGES`."""
    data: str | None = None
    """Folder of photos, of pairs or of shards."""
    out: str | None = None
    """Run folder."""
    config: str | None = None
    """Name of a recipe, or a TOML file; None: that of the run, or mini."""
    model: str | None = None
    """Bundle that the paper's stages train on."""
    init_from: str | None = None
    """Bundle whose weights the run starts from."""
    perceptual: str | None = None
    """Perceptual distance, laid over the recipe's."""
    perceptual_weights: str | None = None
    """Folder with its weights."""
    resume: bool = False
    """Go on from the run's last checkpoint."""
    max_steps: int | None = None
    """Stop after this many more steps."""
    keep: int | None = None
    """Checkpoints kept."""
    track: tuple[str, ...] = ()
    """Trackers."""
    set: tuple[str, ...] = ()
    """key=value, laid over the recipe."""
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    compile: bool = False


@dataclass(frozen=True)
class Found:
    """The options made whole."""

    options: TrainOptions
    recipe: dict[str, Any] | None
    """The recipe of the run that is resumed, or followed; None: that of `config`."""
    recipe_name: str
    note: str | None = None
    """What was taken from where, for people."""


def train_options(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    folder: Path,
    stages: tuple[str, ...],
    plan_only: bool = False,
) -> Found:
    """Merge the layers. `flags` holds None for what wasn't typed; `folder` is where dreamsr.toml and runs are looked
    for; with `plan_only` neither data nor a run folder are needed. Raises `UsageError` that says what is missing and
    what to type."""
    typed = {k: v for k, v in flags.items() if v is not None}
    said = {**_from_environ(environ), **typed}
    table = _from_toml(folder / "dreamsr.toml")
    stage = said.get("stage", table.get("stage"))
    if stage is not None and stage not in stages:
        raise UsageError(f"--stage {stage}: no such stage", f"use {', '.join(stages[:-1])} or {stages[-1]}")
    if said.get("resume"):
        return _resumed({**table, **said}, said, folder)
    options = TrainOptions(**{**table, **said})
    if options.stage is None:
        raise UsageError("no --stage", f"add --stage {', '.join(stages[:-1])} or {stages[-1]}")
    if plan_only:
        return Found(options, None, _name(options.config or "mini"))
    if options.data is None and options.out is None:
        return _after_last_run(options, said, folder)
    if options.data is None or options.out is None:
        raise _missing(options, folder)
    return Found(options, None, _name(options.config or "mini"))


def _resumed(values: dict[str, Any], said: dict[str, Any], folder: Path) -> Found:
    out = values.get("out")
    if out is None:
        last = last_run(folder, said.get("stage"))
        if last is None:
            raise UsageError("--resume: no run below this folder", "name it: dreamsr train --resume -o RUN")
        out = str(last)
    run = _read_run(Path(out))
    own = {key: run[key] for key in FROM_RUN if run.get(key) is not None}
    # A recipe that was typed is compared with the run's; the table of dreamsr.toml may be about the next run.
    values = {k: v for k, v in values.items() if k in said or k not in ("config", "set", "perceptual", *FROM_RUN)}
    merged: dict[str, Any] = {**own, **values, "out": out}
    options = TrainOptions(**merged)
    named = run.get("recipe_name") or "mini.toml"
    if options.config is not None or not isinstance(run.get("recipe"), dict):
        return Found(options, None, _name(options.config or named))
    if options.init_from is None and run.get("start") is not None:
        raise UsageError(f"{out} doesn't say which bundle it started from", "repeat its --init-from")
    return Found(options, run["recipe"], named)


def _after_last_run(options: TrainOptions, said: dict[str, Any], folder: Path) -> Found:
    """`dreamsr train --stage X` alone: go on with the last run if it is of this stage, else start from its bundle."""
    last = last_run(folder, None)
    if last is None:
        raise _missing(options, folder)
    run = _read_run(last)
    if run.get("stage") != options.stage and (last.parent / str(options.stage) / RUN_FILE).is_file():
        last = last.parent / str(options.stage)
        run = _read_run(last)
    if run.get("stage") == options.stage:
        found = _resumed({**said, "out": str(last)}, {**said, "out": str(last)}, folder)
        return replace(found, options=replace(found.options, resume=True), note=f"going on with the run {last}")
    if not (last / "bundle" / "bundle.json").is_file():
        raise UsageError(
            f"the last run, {last}, has no bundle yet to start from",
            f"finish it first: dreamsr train --resume -o {last}",
        )
    own = {key: run[key] for key in ("data", "model", "perceptual_weights") if run.get(key) is not None}
    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    merged: dict[str, Any] = {
        "init_from": str(last / "bundle"),
        **own,
        **given,
        "out": str(last.parent / str(options.stage)),
    }
    whole = TrainOptions(**merged)
    note = f"data, recipe and weights are those of the last run, {last}; the new run is {whole.out}"
    recipe = None if whole.config is not None else run.get("recipe")
    return Found(whole, recipe, _name(whole.config) if whole.config else run.get("recipe_name") or "mini.toml", note)


def last_run(folder: Path, stage: str | None) -> Path | None:
    """The run worked on last, of this stage if one is named, in `folder` or up to two folders below it."""
    found = []
    for pattern in (RUN_FILE, f"*/{RUN_FILE}", f"*/*/{RUN_FILE}"):
        for path in folder.glob(pattern):
            marks = [path, path.parent / "log.jsonl", path.parent / "latest"]
            if stage is None or _read_run(path.parent).get("stage") == stage:
                found.append((max(m.stat().st_mtime_ns for m in marks if m.is_file()), str(path.parent)))
    return Path(max(found)[1]) if found else None


def _missing(options: TrainOptions, folder: Path) -> UsageError:
    lacking = [f"--{name}" for name in ("data", "out") if getattr(options, name) is None]
    data, out = options.data or "PHOTOS", options.out or f"runs/{options.stage}"
    where = ""
    if len(lacking) == 2:
        where = f": {folder / 'dreamsr.toml'} has no [train] table, and there is no run below this folder to go on from"
    return UsageError(
        f"missing {' and '.join(lacking)}{where}", f"dreamsr train --stage {options.stage} --data {data} -o {out}"
    )


def _read_run(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{run} holds no run", "correct -o, or leave out --resume to start one") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{run / RUN_FILE} can't be read: {error}", "warm-start a new run with --init-from") from error
    return found if isinstance(found, dict) else {}


def _from_toml(path: Path) -> dict[str, Any]:
    table = toml_table(path, "train")
    known = {f.name for f in fields(TrainOptions)} - {"resume"}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: [train] has an unknown key {key!r}", hint)
    checked = from_dict(TrainOptions, table, f"{path}: [train]")
    return {key: getattr(checked, key) for key in table}


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(TrainOptions).items():
        text = environ.get(f"DREAMSR_{name.upper()}", "").strip()
        if not text or name in ("resume", "set", "track", "out"):
            continue
        kinds = [k for k in (typing.get_args(kind) or (kind,)) if k is not type(None)]
        if kinds == [bool]:
            values[name] = text.lower() in ("1", "true", "yes", "on")
        elif kinds == [int]:
            if not text.isdecimal():
                raise UsageError(
                    f"DREAMSR_{name.upper()}: {text!r} is not a whole number", "set it to one, or unset it"
                )
            values[name] = int(text)
        else:
            values[name] = text
    return values


def _name(config: str) -> str:
    return Path(config).with_suffix(".toml").name
