"""The browser of the page tests sees what it is there to see: a test of silence must be able to fail."""

import pytest
from chromium import Browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on the PATH")

PAGE = """<!DOCTYPE html><title>t</title><p id=p onclick="p.textContent = 'clicked'">text</p>
<script>
console.error("said");
alert("asked");
fetch("https://example.com/data").catch(() => {});
new Image().src = "https://example.com/picture.png";
setTimeout(() => { throw new Error("thrown"); });
</script>"""


def test_requests_errors_and_dialogs_are_seen_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    with Browser() as browser:
        page = browser.open(path)
        page.wait_for("performance.now() > 300")
        assert set(page.requests) == {"https://example.com/data", "https://example.com/picture.png"}
        assert any("said" in error for error in page.errors)
        assert any("thrown" in error for error in page.errors)
        assert any("ERR_INTERNET_DISCONNECTED" in error for error in page.errors)
        assert page.dialogs == ["asked"]
        page.click(20, 25)
        assert page.evaluate("p.textContent") == "clicked"
        with pytest.raises(RuntimeError, match="absent is not defined"):
            page.evaluate("absent")
        with pytest.raises(TimeoutError, match="false is still false"):
            page.wait_for("false", seconds=0.1)
