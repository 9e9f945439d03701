"""Reports: self-contained, escaped, complete; tables in Markdown and LaTeX; crops where pictures differ."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_evaluation import HOSTILE, LPIPS, METHODS, NAMES, PSNR, make_evaluation
from sample_photos import ADOBE_RGB

from dreamsr_cli.draws import generator
from dreamsr_cli.errors import OutputError
from dreamsr_cli.evaluation import report
from dreamsr_cli.evaluation.crops_of_interest import find_places
from dreamsr_cli.evaluation.figures_text import best_methods, figure
from dreamsr_cli.evaluation.page_pictures import ReadRows, data_uri, heat_map, preview
from dreamsr_cli.evaluation.plots import distribution
from dreamsr_cli.evaluation.report import choose_photos, write_report
from dreamsr_cli.evaluation.results import Evaluation, Summary
from dreamsr_cli.evaluation.tables import latex, markdown
from dreamsr_cli.images import open_photo


class Reader(HTMLParser):
    """Tags with attributes in order, whether they close as they open, and the text outside of style and script."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_the_report_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    path = write_report(evaluation, tmp_path / "out")
    assert path == tmp_path / "out" / "report.html" and [p.name for p in path.parent.iterdir()] == ["report.html"]
    document = path.read_text(encoding="utf-8")
    read = Reader(document)
    words = " ".join(read.words)
    # nothing from elsewhere
    for tag, attributes in read.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"https?://|url\(|@import", document)
    (policy,) = [m["content"] for m in read.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    # names are text
    assert len(read.of("script")) == 1 and HOSTILE in words and "broken <b>" in words
    # the summary, the paper's rows with their mark and reason, failures, what was not available, definitions
    mean = evaluation.summaries[METHODS[0]]["psnr-y"].mean
    assert f"{mean:.2f}" in words and "RealSR partial 4/100" in words
    assert "23.11 ≠" in words and "not comparable" in words and "4 of 100 photos" in words
    assert "damaged or cut short & more" in words and "weights are not there" in words
    assert PSNR.definition in words and str(LPIPS.weights_sha256) in words
    # a row per photo and method, a slider and crops per photo
    rows = [t for t in read.of("tr") if "data-name" in t]
    assert len(rows) == len(evaluation.rows)
    sliders = [a for a in read.of("input") if a.get("type") == "range"]
    assert len(sliders) == len(NAMES) and all(a["aria-label"] for a in sliders)
    shown = [a for a in read.of("img") if "data-picture" in a]
    assert len(shown) == len(NAMES) * (len(METHODS) + 2)
    assert len({a["src"] for a in shown}) == len(shown)
    assert all(a["alt"] for a in read.of("img"))
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in read.of("a")} <= set(ids)
    assert len(read.of("svg")) == 2  # niqe has no figures


def test_pictures_of_the_report_are_those_of_the_files(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    read = Reader(write_report(evaluation, tmp_path).read_text(encoding="utf-8"))
    first = [a for a in read.of("img") if "data-picture" in a][:5]
    name = sorted(NAMES)[0]
    rows = [row for row in evaluation.rows if row.name == name]
    files = [*(row.sr for row in rows), rows[0].hq]
    for shown, file in zip(first[1:], files, strict=True):
        assert file is not None
        assert np.abs(picture(shown["src"]) - np.asarray(Image.open(file)).astype(int)).mean() < 4
    small = Image.open(rows[0].lq).resize((96, 64), Image.Resampling.LANCZOS)
    assert np.abs(picture(first[0]["src"]) - np.asarray(small).astype(int)).mean() < 4


def test_a_single_method_without_reference(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, reference=False, methods=("mini",))
    evaluation = dataclasses.replace(evaluation, differences=(), failures=(), unavailable={}, paper=(), notes=())
    read = Reader(write_report(evaluation, tmp_path).read_text(encoding="utf-8"))
    words = " ".join(read.words)
    assert "the result differs most from the photo" in words and "reference" not in words.split("Definitions")[0]
    assert "Differences" not in words and "Not scored" not in words
    assert not [a for a in read.of("select") if "data-for" in a]  # two pictures: nothing to choose


def test_photos_with_pictures_are_limited_and_spread(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    by_psnr = {row.name: row.values["psnr-y"] or 0.0 for row in evaluation.rows if row.method == METHODS[0]}
    ranked = sorted(by_psnr, key=lambda name: by_psnr[name])
    assert choose_photos(evaluation, 2) == sorted((ranked[0], ranked[-1]))
    assert choose_photos(evaluation, 1) == [ranked[-1]] and choose_photos(evaluation, 0) == []
    assert choose_photos(evaluation, 4) == choose_photos(evaluation, 24) == sorted(NAMES)
    read = Reader(write_report(evaluation, tmp_path, limit_photos=2).read_text(encoding="utf-8"))
    assert "2 of 4 photos" in " ".join(read.words)
    assert len([a for a in read.of("div") if a.get("class") == "compare"]) == 2
    assert len([t for t in read.of("tr") if "data-name" in t]) == len(evaluation.rows)


def test_the_page_is_bounded_and_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = make_evaluation(tmp_path)
    whole = write_report(evaluation, tmp_path).stat().st_size
    monkeypatch.setattr(report, "PICTURE_BYTES", 40_000)
    path = write_report(evaluation, tmp_path)
    assert path.stat().st_size < whole
    assert "the page would be larger than" in path.read_text(encoding="utf-8")


def test_a_photo_that_is_gone_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    evaluation.rows[0].sr.unlink()
    document = write_report(evaluation, tmp_path).read_text(encoding="utf-8")
    assert "no such file" in document
    assert document.count('class="compare"') == len(NAMES) - 1


def test_an_evaluation_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    empty = dataclasses.replace(make_evaluation(tmp_path), rows=(), summaries={}, differences=(), paper=())
    read = Reader(write_report(empty, tmp_path).read_text(encoding="utf-8"))
    assert "broken <b>" in " ".join(read.words)
    assert "–" in markdown(empty) and "--" in latex(empty)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="report.html"):
        write_report(make_evaluation(tmp_path), tmp_path / "file")


def reader(levels: np.ndarray) -> ReadRows:
    return lambda top, bottom: levels[top:bottom].astype(np.float32) / 255


def test_crops_lie_where_pictures_differ_most() -> None:
    first = generator(1, "test-crops").integers(60, 180, (600, 400, 3)).astype(int)
    second, third = first.copy(), first.copy()
    second[404:444, 300:340] += 50
    third[100:140, 20:60] += 30
    third[110:130, 64:90] += 10
    third += 1
    boxes = find_places([reader(first), reader(second), reader(third)], 400, 600, 96, 3)
    (left, top, right, bottom), (left2, top2, right2, bottom2) = boxes[:2]
    assert left <= 300 and right >= 340 and top <= 404 and bottom >= 444
    assert left2 <= 20 and right2 >= 60 and top2 <= 100 and bottom2 >= 140
    assert len(boxes) == 3
    for number, a in enumerate(boxes):
        assert (a[2] - a[0], a[3] - a[1]) == (96, 96) and a[0] >= 0 and a[1] >= 0 and a[2] <= 400 and a[3] <= 600
        for b in boxes[:number]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert find_places([reader(first), reader(first)], 400, 600, 96, 3) == []
    assert len(find_places([reader(first[:40, :50]), reader(third[:40, :50])], 50, 40, 96, 3)) == 1


def test_previews_are_small_whole_and_in_srgb(tmp_path: Path) -> None:
    rows, cols = np.mgrid[0:301, 0:403]
    levels = np.stack([rows * 0.8, cols * 0.6, 200 - rows * 0.3 - cols * 0.2], axis=2)
    small = preview(reader(levels), None, 403, 301, 60)
    assert small.shape == (45, 60, 3)
    expected = Image.fromarray(np.rint(levels).astype(np.uint8)).resize((60, 45), Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(expected).astype(int)).max() <= 3
    whole = np.rint(levels)
    np.testing.assert_array_equal(preview(reader(whole), None, 403, 301, 4096), whole)
    red = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    Image.fromarray(red).save(tmp_path / "a.png", icc_profile=ADOBE_RGB)
    with open_photo(tmp_path / "a.png") as photo:
        shown = preview(photo.read_rows, photo.info.icc, 16, 16, 16)
    assert shown[0, 0, 0] == 255 and shown[0, 0, 1] == 0
    Image.fromarray(red // 2).save(tmp_path / "b.png", icc_profile=ADOBE_RGB)
    with open_photo(tmp_path / "b.png") as photo:
        assert preview(photo.read_rows, photo.info.icc, 16, 16, 16)[0, 0, 0] > 140  # as a screen shows it
    np.testing.assert_array_equal(picture(data_uri(small, 100)), small)


def test_heat_maps_grow_brighter() -> None:
    colours = heat_map(np.array([[0.0, 1.0, 2.0, 4.0, 5.0, 50.0]]), 5.0).astype(int)[0]
    assert (np.diff(colours.sum(1)[:5]) > 0).all() and (colours[4] == colours[5]).all()


def test_distributions_show_every_photo(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    svg = distribution(evaluation, LPIPS)
    assert svg is not None
    assert svg.count("<circle") == len(evaluation.rows) - 1  # one has no figure
    places = [float(x) for x in re.findall(r'c?x[12]?="(-?[\d.]+)"', svg)]
    assert min(places) >= 0 and max(places) <= 420
    assert "&lt;script&gt;" in svg and "<script" not in svg
    row = dataclasses.replace(evaluation.rows[0], values={"psnr-y": math.inf})
    same = dataclasses.replace(evaluation.rows[1], values={"psnr-y": 30.0})
    few = dataclasses.replace(evaluation, rows=(row, same))
    assert distribution(few, PSNR) is None
    assert distribution(dataclasses.replace(evaluation, rows=(same, same)), PSNR) is not None


def test_the_best_is_only_named_over_the_same_photos(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    means = {method: evaluation.summaries[method]["psnr-y"].mean for method in METHODS}
    assert best_methods(evaluation) == {"psnr-y": max(means, key=lambda method: means[method])}  # lpips: 3, 4, 4
    tie = {method: {"lpips": Summary(0.5, 0.5, 0.4, 0.6, 4)} for method in METHODS}
    assert best_methods(dataclasses.replace(evaluation, summaries=tie)) == {}
    tie["nearest"] = {"lpips": Summary(0.4, 0.5, 0.4, 0.6, 4)}
    assert best_methods(dataclasses.replace(evaluation, summaries=tie)) == {"lpips": "nearest"}


def test_markdown(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    made = markdown(evaluation)
    lines = made.splitlines()
    assert lines[0] == "| RealSR partial 4/100 | psnr-y (dB) ↑ | lpips ↓ | niqe ↓ |"
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    best = best_methods(evaluation)["psnr-y"]
    summary = evaluation.summaries[best]["psnr-y"]
    (line,) = [line for line in table if "**" in line]
    assert f"**{summary.mean:.2f}** [{summary.low:.2f}, {summary.high:.2f}]" in line
    assert r"mini \<1\>" in made and "23.11 ≠ (a)" in made and "(a) not comparable: 4 of 100 photos" in made
    assert r"broken \<b\>" in made and "<" not in made.replace("\\<", "")


def test_latex(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path)
    awkward = dataclasses.replace(evaluation, label=r"50%_of $x$ & {y} #1 ~^\ [z]")
    made = latex(awkward)
    label = r"50\%\_of \$x\$ \& \{y\} \#1 \textasciitilde{}\textasciicircum{}\textbackslash{} {[}z{]}"
    assert label in made
    body = made[made.index(r"\toprule") : made.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(rows) == 1 + len(METHODS) + 2
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {3}
    assert made.count(r"\textbf{") == 1
    assert r"23.11\,$\neq$\textsuperscript{a}" in made
    unescaped = re.sub(r"\\[a-zA-Z]+|\\[%_$&#{}\\,]|\$\\[a-z]+\$", "", made)
    assert unescaped.count("{") == unescaped.count("}") and not re.search("[%_#^~<>]", unescaped.replace("~not", ""))
    assert made.isascii()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(27.123, "27.12"), (-0.5, "−0.50"), (math.inf, "∞"), (math.nan, "–"), (None, "–")],
)
def test_figures(value: float | None, shown: str) -> None:
    assert figure(value, PSNR) == shown


def test_text_of_any_name_can_be_written(tmp_path: Path) -> None:
    evaluation: Evaluation = make_evaluation(tmp_path)
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    rows = tuple(dataclasses.replace(row, name=name) if row.name == "b9" else row for row in evaluation.rows)
    document = write_report(dataclasses.replace(evaluation, rows=rows), tmp_path).read_text(encoding="utf-8")
    assert "caf?" in document
