"""The report as a person meets it: opened from disk in Chromium, scrolled, clicked, typed at."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petite_fast.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root with one
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=sandbox)
        yield started
        started.close()


@pytest.fixture
def report(make_run, request) -> Path:
    return write_report(make_run(3, getattr(request, "param", None)))


@pytest.fixture
def open_page(browser, report) -> Iterator[Any]:
    """Open the report at a width; in the end no error was logged or thrown, nothing fetched."""
    troubles: list[str] = []
    pages = []

    def open_at(width: int) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        page.on("console", lambda m: troubles.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("data:", report.as_uri()))
                else troubles.append(request.url)
            ),
        )
        page.goto(report.as_uri())
        page.wait_for_function("document.querySelector('#planes output').textContent")
        return page

    yield open_at
    for page in pages:
        page.close()
    assert troubles == []


def slice_of(page: Any, plane: str) -> int:
    return int(page.locator(f"#{plane}").input_value())


def pixels(page: Any, plane: int, panel: str) -> np.ndarray:
    """[rows, columns, 3] of a canvas, after the frame that is due."""
    values = page.evaluate(
        """async ([plane, panel]) => {
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          const box = document.querySelectorAll(".plane")[plane];
          const canvas = box.querySelector(`canvas[data-panel=${panel}]`);
          const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return [canvas.height, canvas.width, [...image.data]];
        }""",
        [plane, panel],
    )
    return np.array(values[2]).reshape(values[0], values[1], 4)[..., :3]


def target_of(page: Any) -> tuple[np.ndarray, int]:
    """Target voxels of the first subject as the page holds them, and the value of zero."""
    data = page.evaluate("JSON.parse(document.getElementById('volumes').textContent)")
    subject = data["subjects"][0]
    voxels = np.frombuffer(base64.b64decode(subject["volumes"]["target"]), np.uint8)
    return voxels.reshape(subject["shape"]).astype(float), data["zero"]


@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_its_width(open_page, width) -> None:
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((e) => {
          const r = e.getBoundingClientRect();
          return r.width && r.left > -100 && r.right > innerWidth + 0.5;
        }).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert beyond == []
    panes = page.locator(".pane").all()
    assert len(panes) == 12
    assert all(p.bounding_box()["width"] > 150 for p in panes)
    # in mm: 13 x 3 across, 16 x 2 down
    box = page.locator(".frame").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(39 / 32, rel=0.02)


def test_slices_are_the_volume_as_radiologists_look_at_it(open_page) -> None:
    page = open_page(1280)
    voxels, zero = target_of(page)
    grey = np.rint(255 * (1 - np.clip((voxels - zero) / (255 - zero), 0, 1)))
    x, y, z = (slice_of(page, plane) for plane in ("sagittal", "coronal", "axial"))
    expected = (grey[::-1, ::-1, z].T, grey[::-1, y, ::-1].T, grey[x, ::-1, ::-1].T)
    for plane, image in enumerate(expected):
        shown = pixels(page, plane, "target")
        np.testing.assert_allclose(shown[..., 0], image, atol=1)
        assert (shown[..., 0] == shown[..., 2]).all()


def test_wheel_scrolls_the_slices_and_not_the_page(open_page) -> None:
    page = open_page(1280)
    pane = page.locator(".pane").first
    pane.scroll_into_view_if_needed()
    pane.hover()
    at, top = slice_of(page, "axial"), page.evaluate("scrollY")
    before = pixels(page, 0, "target")
    page.mouse.wheel(0, 100)
    page.wait_for_function(f"document.getElementById('axial').value != {at}")
    assert slice_of(page, "axial") == at - 2  # down: to inferior
    assert page.evaluate("scrollY") == top
    assert (pixels(page, 0, "target") != before).any()
    for _ in range(10):
        page.mouse.wheel(0, 500)
    page.wait_for_function("document.getElementById('axial').value == 0")


def test_keys_and_clicks_move_the_slices(open_page) -> None:
    page = open_page(1280)
    page.locator("#coronal").focus()
    at = slice_of(page, "coronal")
    page.keyboard.press("ArrowRight")
    assert slice_of(page, "coronal") == at + 1
    page.keyboard.press("Home")
    assert slice_of(page, "coronal") == 0
    said = page.locator("#coronal").get_attribute("aria-valuetext")
    pixels(page, 1, "target")
    assert page.locator("#coronal").get_attribute("aria-valuetext") != said or "1 of 16" in said
    page.locator(".pane").first.click(position={"x": 3, "y": 3})  # axial, top left
    pixels(page, 0, "target")
    assert (slice_of(page, "sagittal"), slice_of(page, "coronal")) == (12, 15)
    page.keyboard.press("ArrowLeft")  # the click gave the axial slider the focus
    assert page.evaluate("document.activeElement.id") == "axial"


def test_window_output_and_subject_can_be_changed(open_page) -> None:
    page = open_page(1280)
    before = pixels(page, 0, "target")
    page.locator("#width").fill("20")
    narrow = pixels(page, 0, "target")
    assert len(np.unique(narrow)) < len(np.unique(before))
    assert "1,000" in page.locator("#width-value").text_content()
    page.locator("#reset").click()
    np.testing.assert_array_equal(pixels(page, 0, "target"), before)

    first = pixels(page, 0, "output")
    page.locator("#method").select_option("none")
    assert (pixels(page, 0, "output") != first).any()
    assert page.locator("figcaption").nth(1).text_content() == "no tuning"
    np.testing.assert_array_equal(pixels(page, 0, "target"), before)

    page.locator("#subject").select_option("1")
    assert (pixels(page, 0, "output") != first).any()
    page.locator("#cross").uncheck()
    assert not page.locator(".hair").first.is_visible()


def test_difference_is_red_where_the_output_is_too_high(open_page) -> None:
    page = open_page(1280)
    page.locator("#method").select_option("none")
    output, target = pixels(page, 0, "output")[..., 0], pixels(page, 0, "target")[..., 0]
    difference = pixels(page, 0, "difference")
    higher, lower = output < target - 6, output > target + 6  # dark is much
    assert higher.any() and lower.any()
    assert (difference[higher][:, 0] > difference[higher][:, 2]).all()
    assert (difference[lower][:, 2] > difference[lower][:, 0]).all()


@pytest.mark.parametrize("report", [{"output": 100.0}], indirect=True)
def test_an_evaluation_without_the_input_has_three_panels(open_page) -> None:
    page = open_page(1280)
    captions = page.locator(".plane").first.locator("figcaption").all_text_contents()
    assert captions == ["output", "target", "output − target"]
    assert page.locator(".pane").count() == 9
