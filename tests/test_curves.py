"""What one sees of a run: curves, sheets of samples, trackers."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamsr_cli.errors import InputError, OutputError, TrainingError, UsageError
from dreamsr_cli.training import curves, samples, trackers


def write_log(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_log_is_read_whole_and_later_lines_count(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.jsonl",
        {"step": 0, "variance_kept": 0.9, "psnr_db": 30.0},
        {"step": 10, "loss": 2.0, "seconds": 1.0},
        {"step": 20, "loss": 5.0},
        {"step": 20, "loss": 1.0},
        {"step": 30, "loss": float("nan")},
        {"step": 20, "validation": {"psnr": 28.0}},
        '{"step": 40, "lo',
    )
    training, validation = curves.read_log(log)
    assert training == {"psnr_db": [(0, 30.0)], "loss": [(10, 2.0), (20, 1.0)]}
    assert validation == {"psnr": [(20, 28.0)]}
    with pytest.raises(InputError, match="log.jsonl"):
        curves.read_log(tmp_path / "nowhere" / "log.jsonl")


def test_curve_falls_where_the_loss_falls(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 3 - s / 100} for s in range(0, 200, 2)]
    assert curves.draw(write_log(tmp_path / "log.jsonl", *rows), tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    blue = (np.abs(image - curves._DARK).sum(2) < 60).nonzero()
    left, right = (blue[0][abs(blue[1] - x) < 6].mean() for x in (blue[1].min() + 8, blue[1].max() - 8))
    assert right - left > 100, "the line goes down by most of the panel"
    assert not list(tmp_path.glob("*.part"))


def test_nothing_to_draw_and_nowhere_to_write(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", {"step": 1, "loss": 1.0})
    assert not curves.draw(log, tmp_path / "curves.png") and not (tmp_path / "curves.png").exists()
    write_log(log, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0})
    with pytest.raises(OutputError, match="curves.png"):
        curves.draw(log, tmp_path / "nowhere" / "curves.png")
    assert curves.draw(log, tmp_path / "flat.png")


def test_ticks_are_round_and_means_are_means() -> None:
    assert curves.ticks(0.03, 1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert curves.ticks(190, 1210) == pytest.approx([500, 1000])
    assert [round(10**t, 3) for t in curves.log_ticks(math.log10(0.09), math.log10(4.2))] == [0.1, 0.2, 0.5, 1, 2]
    assert [round(10**t, 3) for t in curves.log_ticks(-2.1, 1.1)] == [0.01, 0.1, 1, 10]
    assert curves.running_mean([2.0] * 5, 3) == pytest.approx([2.0] * 5)
    assert curves.running_mean([0.0, 1.0], 2) == pytest.approx([0.0, 1 / 1.5])


def test_sheet_shows_every_picture_in_its_column(tmp_path: Path) -> None:
    colours = {"HQ": (1.0, 0, 0), "LQ": (0, 1.0, 0), "textured": (0, 0, 1.0), "removed": (1.0, 1.0, 0)}
    pictures = {k: torch.tensor(c).reshape(3, 1, 1).expand(3, 64, 64) for k, c in colours.items()}
    pictures["LQ"] = pictures["LQ"][:, :16, :16]
    path = samples.write(tmp_path, 200, [("a photo with quite a long name " * 9, pictures), ("b", pictures)])
    assert path == tmp_path / "samples" / "step-000200.png"
    image = np.asarray(Image.open(path).convert("RGB"))
    order = sorted(colours, key=lambda k: (image == np.array(colours[k]) * 255).all(2).nonzero()[1].min())
    assert order == ["LQ", "removed", "textured", "HQ"]
    for colour in colours.values():
        assert (image == np.array(colour) * 255).all(2).sum() == 2 * 64 * 64
    large = {"HQ": torch.rand(3, 700, 600), "LQ": torch.full((3, 700, 600), float("nan"))}
    assert Image.open(samples.write(tmp_path, 1, [("x", large)])).width < 2 * 512 + 50
    with pytest.raises(ValueError, match="row"):
        samples.write(tmp_path, 2, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        samples.write(tmp_path / "file", 3, [("x", pictures)])


def test_trackers_are_named_and_missing_ones_say_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'mystery'"):
        trackers.open_trackers(["mystery"], tmp_path, {})
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as found:
        trackers.open_trackers(["tensorboard"], tmp_path, {})
    assert "dreamsr[train]" in found.value.hint
    silent = trackers.open_trackers([], tmp_path, {})
    silent.log(1, {"loss": 1.0})
    silent.close()
    assert not (tmp_path / trackers.FOLDER).exists()
    assert trackers.flatten({"a": {"b": 1, "c": None}, "d": Path("x"), "e": True}) == {
        "a.b": 1,
        "a.c": "None",
        "d": "x",
        "e": True,
    }


def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra dreamsr[train] is not installed")
    opened = trackers.open_trackers(["tensorboard"], tmp_path, {"optim": {"lr": 1e-4}})
    for step in (1, 2):
        opened.log(step, {"loss": 3.0 - step})
    opened.close()
    (events,) = [p.parent for p in (tmp_path / trackers.FOLDER).rglob("*tfevents*") if "loss" in _tags(p.parent)]
    reader = _reader(events)
    assert [(e.step, e.value) for e in reader.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def _reader(folder: Path) -> Any:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = module.EventAccumulator(str(folder))
    reader.Reload()
    return reader


def _tags(folder: Path) -> list[str]:
    return _reader(folder).Tags()["scalars"]


def test_a_tracker_that_fails_is_a_plain_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    class Broken:
        requires_logging_directory = True

        def __init__(self, name: str, logging_dir: Path) -> None:
            raise RuntimeError("no account")

    monkeypatch.setitem(trackers.INSTALL, "wandb", ("pip install wandb", ("json",)))
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Broken)
    with pytest.raises(TrainingError, match="no account"):
        trackers.open_trackers(["wandb"], tmp_path, {})
    assert trackers.open_trackers(["wandb"], tmp_path, {}, main=False)._trackers == []
