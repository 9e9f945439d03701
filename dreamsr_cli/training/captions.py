"""Words that a training set brings along: a prompts file beside a photo, a line of captions.jsonl, a shard's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dreamsr_cli.errors import ConfigError, InputError
from dreamsr_cli.images import Photo
from dreamsr_cli.prompts import PromptPlan, photo_id
from dreamsr_cli.prompts_file import check_photo, find_prompts, read_prompts
from dreamsr_cli.training.sources import ItemTexts


def beside(photo: Photo) -> ItemTexts | None:
    """The texts of the prompts file or caption file beside a photo (names: `prompts_file.find_prompts`); None if there
    is none. `InputError` where it can't be used, or belongs to another photo."""
    path = find_prompts(photo.path.parent, photo.path)
    if path is None:
        return None
    file = read_prompts(path)
    check_photo(file, photo_id(photo.path, photo.sha256, photo.info), photo.path)
    return of_plan(file.plan) if file.plan is not None else ItemTexts(file.caption)


def of_plan(plan: PromptPlan) -> ItemTexts:
    """The texts of a prompts object, its boxes as shares of the canvas."""
    width, height = (max(1, n) for n in plan.canvas)
    tiles = tuple(
        ((t.box[0] / width, t.box[1] / height, t.box[2] / width, t.box[3] / height), t.text) for t in plan.tiles
    )
    return ItemTexts(plan.global_text, tiles)


def of_data(data: Any, where: str) -> ItemTexts | None:
    """Texts in a JSON object: a prompts object, or one with `caption`; None where it is about something else."""
    if isinstance(data, dict) and "global" in data and "tiles" in data:
        try:
            return of_plan(PromptPlan.from_json(data, where))
        except ConfigError as error:
            raise InputError(error.message, error.hint) from error
    if isinstance(data, dict) and isinstance(data.get("caption"), str):
        return ItemTexts(" ".join(data["caption"].split()))
    return None


def read_captions(path: Path) -> dict[str, ItemTexts]:
    """Texts of captions.jsonl by the stem of each pair's file; {} where there is no such file. `InputError` names the
    line that can't be used."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read", "give the file that dreamsr degrade wrote") from error
    found: dict[str, ItemTexts] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            plan = PromptPlan.from_json(json.loads(line), where)
        except (ValueError, ConfigError) as error:
            message = error.message if isinstance(error, ConfigError) else f"{where}: not JSON ({error})"
            raise InputError(message, "give the file that dreamsr degrade wrote") from error
        found[Path(plan.photo.name).stem] = of_plan(plan)
    return found
