"""A browser for the tests of pages; every page opened through it must stay silent and offline."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, Page, find_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium or Chrome on the PATH: install the distribution's package (chromium)")
    with Browser(executable) as running:
        yield running


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(path)`; at the end no page may have asked for anything, failed, or run what it was given."""
    pages: list[Page] = []

    def open_one(path: Path, ready: str = "true", **options: Any) -> Page:
        page = browser.open(path, **options)
        pages.append(page)
        page.wait_for(ready)
        return page

    yield open_one
    for page in pages:
        assert page.evaluate("window.harmed") is None, "a text of the trace ran as script"
        assert (page.requests, page.errors, page.dialogs) == ([], [], [])
        page.close()
