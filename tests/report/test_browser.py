"""Pages in a real browser, without a head: nothing is asked of the network, nothing runs, nothing overflows, and a keyboard opens what is folded.

Debian's ``chromium`` is driven by the package ``playwright`` (an extra of the tests; its own browsers are not needed). Where either is missing, these tests are skipped and say which.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlong.report import comparison_page, gather, report_page

from .conftest import write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="no browser test: the package playwright is not installed (pip install playwright)",
    )
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser test: none of {', '.join(BROWSERS)} is on the PATH (apt-get install chromium)")
    with api.sync_playwright() as play:
        # Root may not use Chromium's sandbox; the pages are our own.
        started = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    one, other = gather(write_run(root / "one")), gather(write_run(root / "other", finished=False))
    (root / "one.html").write_text(report_page(one))
    (root / "other.html").write_text(report_page(other))
    (root / "both.html").write_text(comparison_page([one, other]))
    return {name: root / f"{name}.html" for name in ("one", "other", "both")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_a_page_as_a_browser_shows_it(browser: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    for name, path in pages.items():
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
        page.on("pageerror", lambda error, complaints=complaints: complaints.append(str(error)))
        page.on("dialog", lambda dialog, complaints=complaints: (complaints.append("a script ran"), dialog.dismiss()))
        page.goto(path.as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert complaints == []
        # The page does not scroll to the side; wide tables scroll in boxes of their own.
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 23, 29)")
        for chart in page.query_selector_all("figure svg[role=img]"):
            box = chart.bounding_box()
            assert box["width"] > 200
            assert box["height"] > 100
        page.close()


def test_pictures_and_sounds_load(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["one"].as_uri())
    assert page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])") == [[True, 8]]
    page.wait_for_function("document.querySelector('audio').readyState >= 1", timeout=10_000)
    assert page.evaluate("document.querySelector('audio').duration") == pytest.approx(0.01)
    page.close()


def test_the_keyboard_opens_what_is_folded(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["one"].as_uri())
    config = page.locator("details", has_text="The whole configuration")
    assert not page.get_by_label("config.yaml").is_visible()
    config.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_label("config.yaml").is_visible()
    page.keyboard.press("Space")
    assert not page.get_by_label("config.yaml").is_visible()
    # The first stop of the Tab key leads past the contents.
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.close()


def test_what_a_screen_reader_is_told(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages["one"].as_uri())
    for role, name in (
        ("heading", "What it was"), ("table", "Test"), ("img", "Loss"), ("img", "test sample 3: is cat: right: said cat, 90% sure"), ("navigation", "Contents"),
        ("region", "config.yaml"), ("columnheader", "metric"),
    ):  # fmt: skip
        if role == "region":
            page.locator("summary", has_text="The whole configuration").click()
        assert page.get_by_role(role, name=name, exact=True).count() >= 1, (role, name)
    page.close()
