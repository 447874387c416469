"""A headless Chromium on a pipe: opens a page from disk, reports what it asked for and what went wrong.

Speaks the DevTools protocol over two pipes (`--remote-debugging-pipe`): no port, no driver, no package, and
no browser to download. The network is cut twice: names do not resolve, and each page is set offline.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers run as root; only pages of this test suite are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
_PATIENCE = 60.0
# The browser reads descriptor 3 and writes descriptor 4. The pipes are moved out of the way first, as they
# may have those numbers the other way round.
_LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {
    "ArrowUp": 38,
    "ArrowDown": 40,
    "ArrowLeft": 37,
    "ArrowRight": 39,
    "Enter": 13,
    "Tab": 9,
    "Home": 36,
    "End": 35,
    " ": 32,
}


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome, or `None`."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """One Chromium process; `with Browser() as browser: page = browser.open(path)`."""

    def __init__(self, executable: str | None = None) -> None:
        executable = executable or find_chromium()
        if executable is None:
            raise FileNotFoundError("no Chromium or Chrome on the PATH")
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        call = [executable, *_FLAGS, f"--user-data-dir={self._profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(to_browser), str(from_browser), *call, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._next_id = 0
        self._pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._process.kill()
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """Open a file in a tab of its own and wait for its `load` event."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        page.resize(width, height)
        page.set_dark(dark)
        page.url = path.resolve().as_uri()
        page.call("Page.navigate", url=page.url)
        self.pump_until(lambda: page.is_loaded)
        return page

    def forget(self, session: str) -> None:
        self._pages.pop(session, None)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that arrive meanwhile go to their pages."""
        self._next_id += 1
        sent = {"id": self._next_id, "method": method, "params": parameters}
        message = json.dumps(sent if session is None else {**sent, "sessionId": session})
        data = message.encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        answers: list[dict] = []
        number = self._next_id
        self.pump_until(lambda: bool(answers), lambda got: answers.append(got), number)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']['message']}")
        return answers[0]["result"]

    def pump_until(
        self,
        is_done: Callable[[], bool],
        take: Callable[[dict], None] | None = None,
        number: int | None = None,
    ) -> None:
        """Deal with messages until `is_done`, at most a minute."""
        deadline = time.monotonic() + _PATIENCE
        while not is_done():
            while b"\0" in self._buffer and not is_done():
                line, self._buffer = self._buffer.split(b"\0", 1)
                message = json.loads(line)
                if "id" in message:
                    if take is not None and message["id"] == number:
                        take(message)
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].note(message["method"], message["params"])
            if is_done():
                return
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium was silent for {_PATIENCE:.0f} s")
            received = os.read(self._read, 1 << 20)
            if not received:
                raise RuntimeError(f"Chromium ended with code {self._process.wait()}")
            self._buffer += received


class Page:
    """One tab.

    Attributes:
        errors: Uncaught exceptions, console errors and warnings, and log entries of those levels.
        requests: Every URL asked for besides the page itself; `data:` and `blob:` included.
        dialogs: Messages of alert, confirm and prompt: a script that should not run would show up here.
    """

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.url = ""
        self.is_loaded = False
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []

    def note(self, event: str, data: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.is_loaded = True
        elif event == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in data["args"]))
        elif event == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{data['entry']['text']} {data['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent" and data["request"]["url"] != self.url:
            self.requests.append(data["request"]["url"])
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(data["message"])
            # Answered without waiting: this runs inside the loop that would read the answer.
            os.write(
                self._browser._write,
                json.dumps(
                    {
                        "id": -1,
                        "method": "Page.handleJavaScriptDialog",
                        "params": {"accept": False},
                        "sessionId": self._session,
                    }
                ).encode()
                + b"\0",
            )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited, an exception raised."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 30.0) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: With the page's errors, if it does not become true.
        """
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} is still false after {seconds:.0f} s; errors: {self.errors}")
            time.sleep(0.02)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def set_dark(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def hover(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        self.hover(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False) -> None:
        code = _KEYS[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0,
            )

    def screenshot(self, path: Path, *, whole: bool = True) -> Path:
        """The page as a PNG; `whole` takes what lies below the window too."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
        self._browser.forget(self._session)
