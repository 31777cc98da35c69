"""The report in a real browser: it renders, its controls work, nothing is fetched and nothing complains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

from pcd.stages.report import Report, report
from tests.browser import Pages, browsing
from tests.runs_support import toy_runs


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("page")
    return report(toy_runs(root), root / "report", samples=1, device="cpu")


@pytest.fixture(scope="module")
def page_file(built: Report) -> Path:
    return built.page


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    with browsing() as found:
        yield found


def visible(page: Page, selector: str) -> int:
    return page.locator(f"{selector} >> visible=true").count()


def contrast(page: Page, selector: str) -> float:
    """Contrast of an element's text with the page's background (WCAG 2)."""
    text = page.evaluate("selector => getComputedStyle(document.querySelector(selector)).color", selector)
    luminance = []
    for colour in (text, page.evaluate("getComputedStyle(document.body).backgroundColor")):
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(luminance)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_renders_without_a_complaint(pages: Pages, page_file: Path, width: int, dark: bool) -> None:
    with pages(width, 900, dark) as watched:
        page = watched.open(page_file)
        assert "depth report" in page.title()
        assert page.evaluate("document.documentElement.scrollWidth") == width  # wide tables scroll by themselves
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        for box in page.locator("figure svg").all():
            size = box.bounding_box()
            assert size is not None
            assert size["width"] > 300
            assert size["height"] > 50
        for selector in ("h1", "p", ".soft", "td", ".banner", "figcaption", "figure svg text"):
            assert contrast(page, selector) > 4.5
        assert visible(page, ".banner") == 2
    assert watched.complaints == []


def test_it_is_whole_without_its_folder(pages: Pages, page_file: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.html"
    alone.write_bytes(page_file.read_bytes())
    with pages() as watched:
        page = watched.open(alone)
        assert page.locator("figure svg").count() == 7
        assert visible(page, "#gallery .sample img") > 0
    assert watched.complaints == []


def test_light_and_dark_by_button(pages: Pages, page_file: Path) -> None:
    with pages() as watched:
        page = watched.open(page_file)
        background = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(background)
        page.click("#theme")
        assert page.inner_text("#theme") == "Light"
        assert page.evaluate(background) != light
        page.click("#theme")
        assert page.evaluate(background) == light


def test_protocol_and_run_choose_their_tables(pages: Pages, page_file: Path) -> None:
    with pages() as watched:
        page = watched.open(page_file)
        shown = '[data-part="scores"] >> visible=true'
        assert page.locator(shown).get_attribute("data-value") == "pureclip"
        page.select_option("#scores-protocol", "eigen")
        assert page.locator(shown).count() == 1
        assert page.locator(shown).get_attribute("data-value") == "eigen"
        assert "all of the stored frame" in page.locator(shown).inner_text()
        page.select_option("#protocols-run", "second")
        assert page.locator('[data-part="protocols"] >> visible=true').get_attribute("data-value") == "second"
    assert watched.complaints == []


def test_samples_are_filtered_and_layered(pages: Pages, page_file: Path) -> None:
    with pages() as watched:
        page = watched.open(page_file)
        assert visible(page, ".sample") == 3
        page.click('[data-choose="rule"] button[value="worst"]')
        assert visible(page, ".sample") == 1
        sample = page.locator(".sample >> visible=true")
        over = sample.locator("img.over >> visible=true")
        seen = {}
        for layer in ("prediction", "truth", "error", "std"):
            page.click(f'[data-choose="layer"] button[value="{layer}"]')
            assert over.count() == 1
            assert over.get_attribute("data-layer") == layer
            assert page.locator('[data-choose="layer"] button[aria-pressed="true"]').get_attribute("value") == layer
            assert visible(page, ".scale") == 1
            seen[layer] = over.get_attribute("src")
        assert len(set(seen.values())) == 4
        page.select_option("#gallery-run", "second")
        assert over.get_attribute("data-run") == "second"
        assert over.get_attribute("src") != seen["std"]
        assert sample.locator("[data-scores] >> visible=true").get_attribute("data-scores") == "second"
    assert watched.complaints == []


def test_pointing_at_a_picture_tells_the_depths(pages: Pages, built: Report) -> None:
    sample = built.contents.samples[0]
    truth, predicted = sample.truth, sample.predicted["second"].depth
    height, width = truth.shape
    with pages() as watched:
        page = watched.open(built.page)
        page.select_option("#gallery-run", "second")
        card = page.locator(".sample").first
        card.scroll_into_view_if_needed()
        box = card.locator(".pictures").bounding_box()
        assert box is not None
        for row, column in ((2, 3), (20, 35), *np.argwhere(np.isnan(truth))[:1].tolist()):
            page.mouse.move(box["x"] + (column + 0.5) / width * box["width"], box["y"] + (row + 0.5) / height * box["height"])
            text = card.locator("[data-reading]").inner_text()
            told = [float(part) for part in re.findall(r"[-+]?[0-9.]+(?= m)", text.replace("−", "-"))]
            error = predicted[row, column] - truth[row, column]
            known = [truth[row, column], error] if np.isfinite(error) else []
            assert told == pytest.approx([predicted[row, column], *known], abs=0.0061)  # 2 digits of whole millimetres
            assert ("no ground truth" in text) == (not known)
    assert watched.complaints == []


def test_the_slider_uncovers_the_image_by_mouse_and_by_key(pages: Pages, page_file: Path) -> None:
    with pages() as watched:
        page = watched.open(page_file)
        sample = page.locator(".sample").first
        over, slider = sample.locator("img.over >> visible=true"), sample.locator("input[type=range]")
        clip = "element => getComputedStyle(element).clipPath"
        assert over.evaluate(clip) == "inset(0px 0px 0px 35%)"
        slider.focus()
        page.keyboard.press("ArrowRight")
        assert over.evaluate(clip) == "inset(0px 0px 0px 36%)"
        box = sample.locator(".pictures").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 20, steps=3)
        page.mouse.up()
        assert float(slider.input_value()) == pytest.approx(75, abs=1)
        assert "75%" in over.evaluate(clip)
    assert watched.complaints == []
