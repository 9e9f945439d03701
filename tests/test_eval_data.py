"""Test sets found by name, photos paired by name, and the paper's figures as data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamsr_cli.errors import InputError, UsageError
from dreamsr_cli.evaluation.datasets import PUBLIC_SETS, find_result, load_dataset, photos_by_stem
from dreamsr_cli.evaluation.metrics import MetricOptions, choose_metrics, signal_metric
from dreamsr_cli.evaluation.paper_tables import COLUMNS, paper_figures, paper_rows
from dreamsr_cli.evaluation.results import Failure, MetricId


def photo(path: Path, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path)


def public(root: Path, name: str, count: int) -> Path:
    """`count` photos of a public set in its usual layout."""
    known = PUBLIC_SETS[name]
    folder = root / known.folders[0]
    halves = known.halves or ("",)
    for number in range(count):
        for half, side in zip(halves, (8, 32), strict=False):
            photo(folder / half / f"{number:03d}.png", side)
    return folder


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("name", list(PUBLIC_SETS))
def test_each_public_set_is_found_below_the_data_root(name, tmp_path):
    public(tmp_path, name, 3)
    dataset = load_dataset(name.lower(), tmp_path)
    assert (dataset.name, [p.name for p in dataset.pairs]) == (name, ["000", "001", "002"])
    count = PUBLIC_SETS[name].count
    assert dataset.label == f"{name} partial 3/{count}" and any(f"3/{count}" in note for note in dataset.notes)
    assert dataset.has_references == (name in ("RealSR", "DRealSR")) == (dataset.pairs[0].hq is not None)
    with pytest.raises(InputError, match=f"3/{count}"):
        load_dataset(name, tmp_path, strict=True)


def test_the_folder_itself_and_an_inner_lq_folder_do_too(tmp_path):
    folder = public(tmp_path, "RealSR", 1)
    assert load_dataset("RealSR", folder).folder == folder
    photo(tmp_path / "RealLQ250" / "lq" / "001.jpg")
    photo(tmp_path / "RealLQ250" / "npz" / "001.png")
    assert load_dataset("RealLQ250", tmp_path).pairs[0].lq == tmp_path / "RealLQ250" / "lq" / "001.jpg"


def test_a_whole_set_is_not_partial(tmp_path):
    public(tmp_path, "DRealSR", 93)
    dataset = load_dataset("DRealSR", tmp_path, strict=True)
    assert dataset.label == "DRealSR (93 photos)" and dataset.notes == ()
    assert load_dataset("DRealSR", tmp_path, limit=5).label == "DRealSR partial 5/93"
    photo(tmp_path / "DrealSRVal_crop128/test_LR/more.png")
    photo(tmp_path / "DrealSRVal_crop128/test_HR/more.png")
    assert load_dataset("DRealSR", tmp_path).label == "DRealSR with 94 photos instead of 93"


@pytest.mark.parametrize("name", list(PUBLIC_SETS))
def test_a_missing_set_says_what_to_download_from_where_and_where_to_put_it(name, tmp_path):
    with pytest.raises(InputError) as error:
        load_dataset(name, tmp_path)
    known = PUBLIC_SETS[name]
    assert str(tmp_path) in error.value.message
    assert known.places in error.value.hint and str(tmp_path / known.folders[0]) in error.value.hint
    with pytest.raises(InputError, match="no data root") as error:
        load_dataset(name, None)
    for word in (known.places, "--data-root", "DREAMSR_DATA_ROOT", "dreamsr.toml", known.folders[0]):
        assert word in error.value.hint


def test_neither_a_set_nor_a_folder():
    with pytest.raises(UsageError, match="RealRS") as error:
        load_dataset("RealRS", None)
    assert "did you mean RealSR" in error.value.hint


# ---------------------------------------------------------------- pairs


def test_pairs_go_by_name_never_by_position(tmp_path):
    for name in ("b", "c", "a"):
        photo(tmp_path / "set/lq" / f"{name}.png")
    for name in ("c", "d", "a"):
        photo(tmp_path / "set/hq" / f"{name}.jpg")
    dataset = load_dataset(str(tmp_path / "set"), None)
    assert dataset.label == "set (2 photos)"
    assert [(p.name, p.hq and p.hq.name) for p in dataset.pairs] == [("a", "a.jpg"), ("c", "c.jpg")]
    assert dataset.failures == (
        Failure("b", "", "no reference: hq/b.png is missing"),
        Failure("d", "", "no low-quality photo: lq/d.jpg is missing"),
    )


def test_a_missing_half(tmp_path):
    photo(tmp_path / "set/lq/a.png")
    with pytest.raises(InputError, match="lq/ but no hq/"):
        load_dataset(str(tmp_path / "set"), None)
    photo(tmp_path / "RealSRVal_crop128/test_HR/a.png")
    with pytest.raises(InputError, match="test_LR/ is missing"):
        load_dataset("RealSR", tmp_path)


def test_a_folder_of_photos_has_no_references(tmp_path):
    photo(tmp_path / "mine/x.png")
    photo(tmp_path / "mine/.hidden.png")
    (tmp_path / "mine/notes.txt").write_text("no photo")
    dataset = load_dataset(str(tmp_path / "mine"), None)
    assert [p.name for p in dataset.pairs] == ["x"] and not dataset.has_references


def test_two_photos_of_one_stem_and_an_empty_folder(tmp_path):
    photo(tmp_path / "mine/x.png")
    photo(tmp_path / "mine/x.jpg")
    with pytest.raises(InputError, match="share a stem"):
        load_dataset(str(tmp_path / "mine"), None)
    (tmp_path / "outer/inner").mkdir(parents=True)
    with pytest.raises(InputError, match="no photo") as error:
        load_dataset(str(tmp_path / "outer"), None)
    assert "inner" in error.value.hint


def test_a_subset_takes_stems(tmp_path):
    public(tmp_path, "RealDeg", 6)
    (tmp_path / "list.txt").write_text("# social media\n004\n001.png\n\n")
    dataset = load_dataset("RealDeg", tmp_path, subset=tmp_path / "list.txt")
    assert [p.name for p in dataset.pairs] == ["001", "004"] and dataset.label == "RealDeg partial 2/238"
    (tmp_path / "list.txt").write_text("004\n777\n")
    with pytest.raises(InputError, match="777"):
        load_dataset("RealDeg", tmp_path, subset=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="names no photo"):
        load_dataset("RealDeg", tmp_path, subset=tmp_path / "list.txt")
    with pytest.raises(InputError, match="--subset"):
        load_dataset("RealDeg", tmp_path, subset=tmp_path / "gone.txt")


def test_somebodys_results_are_found_by_name(tmp_path):
    for name in ("a", "a_b_x4", "c-out", "d_1", "d_2"):
        photo(tmp_path / f"{name}.png")
    folder, names = photos_by_stem(tmp_path), frozenset({"a", "a_b", "c", "d", "e"})
    found = {name: path and path.name for name in "ac" for path in [find_result(folder, name, names)]}
    assert found == {"a": "a.png", "c": "c-out.png"}
    assert find_result(folder, "a_b", names) == tmp_path / "a_b_x4.png" and find_result(folder, "e", names) is None
    with pytest.raises(InputError, match=r"d_1\.png, d_2\.png"):
        find_result(folder, "d", names)
    del folder["a"]
    assert find_result(folder, "a", names) is None


# ---------------------------------------------------------------- the paper


def test_table_1_has_231_figures_and_the_others_theirs():
    figures = paper_figures()
    count = {table: sum(f.table == table for f in figures) for table in {f.table for f in figures}}
    assert count == {"Table 1": 231, "Table 2": 8, "Table 3": 9, "Table 4": 9, "Table 5": 9}
    by_set = {name: sum(f.dataset == name for f in figures if f.table == "Table 1") for name in PUBLIC_SETS}
    assert by_set == {"RealSR": 66, "DRealSR": 66, "RealLQ250": 33, "RealLR200": 33, "RealDeg": 33}
    value = {(f.table, f.dataset, f.method, f.metric): f.value for f in figures}
    assert value["Table 1", "RealSR", "OSDiff", "PSNR"] == 23.3748
    assert (
        value["Table 1", "RealDeg", "Ours", "MUSIQ"]
        == value["Table 3", "RealDeg", "text branch, global and patch prompts", "MUSIQ"]
    )
    assert (
        value["Table 4", "RealDeg", "w/o i2i deg", "MANIQA"]
        == value["Table 5", "RealDeg", "with RA LoRA, 1+16 steps", "MANIQA"]
    )
    assert value["Table 2", None, "Ours", "Time (s)"] == 86


def test_figures_agree_with_the_papers_text():
    paper = Path(__file__).resolve().parents[2] / "shared/paper/dreamsr_paper.txt"
    if not paper.is_file():
        pytest.skip(f"the paper's text is not at {paper}")
    text = paper.read_text(encoding="utf-8")
    for figure in paper_figures():
        digits = f"{figure.value:g}" if figure.metric.startswith("Time") else f"{figure.value:.4f}"
        assert digits in text, figure


def metric(name: str) -> MetricId:
    return dataclasses.replace(signal_metric("psnr", "rgb", 0).ident, id=name)


def test_a_whole_set_is_comparable_on_stated_assumptions(tmp_path):
    public(tmp_path, "DRealSR", 93)
    metrics = [m.ident for m in choose_metrics(MetricOptions(("psnr", "ssim")), True).metrics]
    rows = paper_rows(load_dataset("DRealSR", tmp_path), metrics, 0)
    assert {r.table for r in rows} == {"Table 1", "Table 2"} and len(rows) == 66 + 8
    comparable = {r.metric for r in rows if r.comparable}
    assert comparable == {"PSNR", "SSIM"} and all(r.reason for r in rows)
    assert {r.metric_id for r in rows if r.metric == "PSNR"} == {"psnr-rgb"}
    assert not any(r.comparable for r in paper_rows(load_dataset("DRealSR", tmp_path), metrics, 4))
    assert {r.metric_id for r in rows if r.metric == "MUSIQ"} == {None}


def test_a_partial_set_is_not_comparable(tmp_path):
    public(tmp_path, "RealSR", 20)
    rows = paper_rows(load_dataset("RealSR", tmp_path), [metric(c) for c in COLUMNS.values()], 0)
    assert len(rows) == 74 and not any(r.comparable for r in rows)
    assert all("partial 20/100" in r.reason for r in rows if r.table == "Table 1")


def test_realdeg_is_comparable_only_with_a_subset(tmp_path):
    public(tmp_path, "RealDeg", 238)
    metrics = [metric(c) for c in COLUMNS.values()]
    whole = load_dataset("RealDeg", tmp_path)
    assert any("not the same photos" in note for note in whole.notes)
    rows = paper_rows(whole, metrics, 0)
    assert {r.table for r in rows} == {f"Table {n}" for n in range(1, 6)} and not any(r.comparable for r in rows)
    assert all("not the same photos" in r.reason for r in rows if r.table != "Table 2")
    (tmp_path / "list.txt").write_text("\n".join(f"{n:03d}" for n in range(60)))
    some = paper_rows(load_dataset("RealDeg", tmp_path, subset=tmp_path / "list.txt"), metrics, 0)
    assert all(r.comparable and "--subset" in r.reason for r in some if r.table != "Table 2")


def test_the_paper_says_nothing_about_a_folder_of_yours(tmp_path):
    photo(tmp_path / "mine/x.png")
    assert paper_rows(load_dataset(str(tmp_path / "mine"), None), [metric("psnr-rgb")], 0) == ()
