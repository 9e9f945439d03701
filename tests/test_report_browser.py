"""Reports in a real browser: they open without a complaint, the slider moves, tables sort, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import HOME, RIGHT, Browser
from sample_evaluation import METHODS, NAMES, make_evaluation
from test_fidelity_scores import damaged_report

from dreamsr_cli.evaluation.fidelity_page import write_fidelity_page
from dreamsr_cli.evaluation.report import write_report

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=browser.missing() or "")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    fidelity = write_fidelity_page(damaged_report(folder), folder / "fidelity.html")
    return {"report": write_report(make_evaluation(folder), folder), "fidelity": fidelity}


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", ["report", "fidelity"])
def test_a_page_opens_without_a_complaint_or_a_request(window: Browser, pages: dict[str, Path], name: str) -> None:
    window.console(), window.requests()
    window.open(pages[name])
    window.run("for (const picture of document.images) picture.loading = 'eager'")
    decoded = window.run("return Promise.all([...document.images].map((i) => i.decode())).then((all) => all.length)")
    assert decoded >= 4  # each of them, or the promise fails
    assert window.console() == []
    assert window.requests() == [pages[name].as_uri()]
    # the check itself can see both
    window.run("console.error('seen'); fetch('https://example.invalid/x').catch(() => 0)")
    assert any("seen" in line for line in window.console())


def clip(window: Browser, box: str) -> tuple[float, float]:
    """Where the left picture is cut and where the bar is, as shares of the box."""
    cut, bar = window.run(
        "const box = document.querySelector(arguments[0]), width = box.getBoundingClientRect().width;"
        "const inset = getComputedStyle(box.querySelector('img.left')).clipPath;"
        "const share = inset.match(/calc\\(100% - ([\\d.]+)%\\)|inset\\(0px ([\\d.]+)%/);"
        "return [share[1] !== undefined ? +share[1] / 100 : 1 - share[2] / 100,"
        "(box.querySelector('.bar').getBoundingClientRect().left - box.getBoundingClientRect().left) / width]",
        box,
    )
    return cut, bar


@pytest.mark.parametrize(("name", "box"), [("report", "#photo-0-slider"), ("fidelity", "#before-after")])
def test_the_slider_moves_by_drag_and_by_keys(window: Browser, pages: dict[str, Path], name: str, box: str) -> None:
    window.open(pages[name])
    assert clip(window, box) == pytest.approx((0.5, 0.5), abs=0.01)
    window.drag(f"{box} input", 0.5, 0.8)
    dragged = clip(window, box)
    assert dragged == pytest.approx((0.8, 0.8), abs=0.05)
    window.keys(f"{box} input", HOME)
    assert clip(window, box) == pytest.approx((0, 0), abs=0.01)
    window.keys(f"{box} input", RIGHT * 20)
    assert clip(window, box) == pytest.approx((0.1, 0.1), abs=0.01)
    assert "10 %" in window.run("return document.querySelector(arguments[0]).ariaValueText", f"{box} input")


def test_the_two_pictures_can_be_chosen(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["report"])

    def shown() -> list[Any]:
        return window.run(
            "const box = document.querySelector('#photo-1-slider');"
            "return [...box.querySelectorAll('img')].filter((i) => getComputedStyle(i).display !== 'none')"
            ".map((i) => [i.className, i.alt]).concat([[...box.querySelectorAll('.name')].map((n) => n.textContent)])"
        )

    assert shown() == [["left", "photo, enlarged"], ["right", METHODS[0]], ["photo, enlarged", METHODS[0]]]
    window.keys('select[data-for="photo-1-slider"][data-side="left"]', "bicubic")
    window.keys('select[data-for="photo-1-slider"][data-side="right"]', "reference")
    assert shown() == [["left", "bicubic"], ["right", "reference"], ["bicubic", "reference"]]


def column(window: Browser, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('#photos-table tbody tr')].filter((r) => !r.hidden)"
        ".map((r) => r.children[arguments[0]].dataset.value)"
    )
    return window.run(script, number)


def test_a_click_sorts_and_another_turns_it_around(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["report"])
    head = "#photos-table th:nth-child({}) button"
    before = column(window, 2)
    window.click(head.format(3))
    upward = column(window, 2)
    assert upward != before and [float(v) for v in upward] == sorted(float(v) for v in before)
    sort = "return [...document.querySelectorAll('#photos-table th')].map((h) => h.getAttribute('aria-sort'))"
    assert window.run(sort)[:4] == ["none", "none", "ascending", "none"]
    window.click(head.format(3))
    assert column(window, 2) == upward[::-1] and window.run(sort)[2] == "descending"
    # cells without a figure stay below, both ways; by keyboard
    for way in ("ascending", "descending"):
        window.keys(head.format(4), browser.ENTER)
        values = column(window, 3)
        assert values[-1] == "" and "" not in values[:-1] and window.run(sort)[3] == way
    # names: b9 before b10
    window.click(head.format(1))
    assert column(window, 0)[::3] == ["a_%$#1", "b9", "b10", NAMES[2]]


def test_rows_can_be_filtered(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["report"])
    window.keys("#only-method", "bicubic")
    assert set(column(window, 1)) == {"bicubic"} and len(column(window, 1)) == len(NAMES)
    window.keys("#only-name", "B1")
    assert column(window, 0) == ["b10"]
    assert window.run("return document.getElementById('shown').textContent") == "1 row"


def test_tiles_are_sorted_in_the_fidelity_page(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["fidelity"])
    script = "return [...document.querySelectorAll('#tiles tbody tr')].map((r) => +r.children[0].textContent)"
    before = window.run(script)
    assert before[0] == 1 and before != sorted(before)
    window.click("#tiles th:nth-child(1) button")
    assert window.run(script) == sorted(before)
    assert window.run("return document.querySelectorAll('#map rect.bad').length") >= 1


def test_dark_and_light(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["report"])
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = window.run(ground)
    window.click("#theme")
    dark = window.run(ground)
    assert light != dark
    window.click("#theme")
    assert window.run(ground) == light
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    window.open(pages["report"])
    window.devtools("Emulation.setEmulatedMedia", features=[scheme])
    assert window.run(ground) == dark
    window.devtools("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("name", ["report", "fidelity"])
def test_nothing_is_wider_than_a_phone(window: Browser, pages: dict[str, Path], name: str) -> None:
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    window.devtools("Emulation.setDeviceMetricsOverride", **screen)
    try:
        window.open(pages[name])
        assert window.run("return document.documentElement.scrollWidth") <= 360
    finally:
        screen = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        window.devtools("Emulation.setDeviceMetricsOverride", **screen)
