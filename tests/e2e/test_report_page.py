"""The report of an evaluation in a browser: opened from a file, without any network.

A real Chromium sorts the pairs and moves a slider, as a person does.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_root
from PIL import Image
from random_weights import random_alexnet

from data_prep.core.storage.local import LocalStore
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.path.exists(CHROMIUM), reason="no chromium: install Debian's package of that name"
    ),
]
SIZES = {"wide": (1200, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate an untrained model with random weights for LPIPS, and copy its page elsewhere."""
    folder = tmp_path_factory.mktemp("report")
    store = LocalStore(folder / "root")
    images, masks = small_root.real_data(store)
    run = small_root.trained(store, images=images, masks=masks)
    weights = random_alexnet(folder / "alexnet.safetensors")
    ref = evaluate(EvaluateSettings(lpips_weights=str(weights)), images, masks, run, store)
    page = folder / "elsewhere" / "report.html"
    page.parent.mkdir()
    shutil.copy(store.path(f"{ref.folder}/report.html"), page)
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """Open the report. The test fails if the page reports an error or sends a request."""
    size, scheme = request.param
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    made = context.new_page()
    problems: list[Any] = []
    made.on("console", lambda message: problems.append(message.text))
    made.on("pageerror", lambda error: problems.append(str(error)))
    address = report.as_uri()
    made.on("request", lambda asked: problems.append(asked.url[:80]) if asked.url != address
            and not asked.url.startswith("data:") else None)  # fmt: skip
    made.goto(address)
    yield made
    assert problems == []
    context.close()


def values(page: Page, name: str) -> list[float]:
    """Return the values of the cards in the order in which the page shows them."""
    return [
        float(card.get_attribute(f"data-{name}") or "nan") for card in page.locator(".pair").all()
    ]


def test_the_pairs_are_sorted_by_the_chosen_metric(page: Page) -> None:
    first = values(page, "order")
    assert first == sorted(first)
    assert len(first) == 12
    for metric in ("hole_psnr", "ssim", "lpips", "gain"):
        page.get_by_label("Sort by").select_option(metric)
        page.get_by_label("first").select_option("low")
        assert values(page, metric) == sorted(values(page, metric))
        assert values(page, "order") != first
        page.get_by_label("first").select_option("high")
        assert values(page, metric) == sorted(values(page, metric), reverse=True)
    page.get_by_label("Sort by").select_option("order")
    page.get_by_label("first").select_option("low")
    assert values(page, "order") == first


def test_the_slider_shows_more_of_the_input_or_of_the_result(page: Page) -> None:
    slider = page.locator(".slider").first
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None

    def at() -> float:
        value = slider.evaluate("(element) => getComputedStyle(element).getPropertyValue('--at')")
        return float(value.removesuffix("%"))

    def white() -> float:
        """Return the share of white pixels, which only the hole of the input has."""
        shown = np.asarray(Image.open(io.BytesIO(slider.screenshot())).convert("RGB"))
        return float((shown > 250).all(axis=2).mean())

    assert at() == 50
    for share in (0.2, 0.9):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        assert at() == pytest.approx(100 * share, abs=6)
    slider.locator("input").focus()
    page.keyboard.press("Home")
    assert at() == 0
    result = white()
    page.keyboard.press("End")
    assert at() == 100
    hole = float(page.locator(".pair").first.get_attribute("data-hole") or "nan")
    assert white() - result > 0.6 * hole  # its edge is blurred, because the images are small


def test_nothing_is_wider_than_the_screen_and_the_text_has_contrast(page: Page) -> None:
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width == page.viewport_size["width"]  # type: ignore[index]
    expect(page.get_by_role("heading", name="DPNet against each method")).to_be_visible()
    ink, paper = page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        ".map((c) => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3); })()"
    )
    assert abs(ink - paper) > 150
