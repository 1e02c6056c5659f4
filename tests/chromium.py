"""A browser for tests: headless Chromium, driven through a pipe, with real keys and a real pointer.

It speaks the DevTools protocol, messages of JSON that end with a zero byte, on two pipes: no port, no package.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 60.0  # seconds that an answer may take
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9}


class Browser:
    """Chromium with an empty profile in `folder`; it ends with the block, and what it said lies in chromium.log."""

    def __init__(self, folder: Path) -> None:
        assert BINARY is not None
        (there, self._write), (self._read, back) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
                   "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
                   "--window-size=1280,1000", "--remote-debugging-pipe", "about:blank"]  # fmt: skip
        with open(folder / "chromium.log", "wb") as log:
            start = [sys.executable, "-c", _START, str(there), str(back), BINARY, *options]
            self._process = subprocess.Popen(start, pass_fds=(there, back), stdout=log, stderr=log)
        os.close(there)
        os.close(back)
        self._left, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *problem: object) -> None:
        try:
            os.write(self._write, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            self._process.wait(15)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what is reported meanwhile goes to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next(PATIENCE)
            if told is None:
                raise TimeoutError(f"no answer to {method} within {PATIENCE} s")
            if told.get("id") == self._number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def _next(self, patience: float) -> dict[str, Any] | None:
        until = time.monotonic() + patience
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 2**20) if ready else b""
            if not ready:
                return None
            if not data:
                raise RuntimeError("Chromium has ended: see chromium.log")
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> Page:
        """A page of its own, loaded."""
        return Page(self, address)


class Page:
    """A page: what it holds, what goes wrong in it, and hands on it."""

    def __init__(self, browser: Browser, address: str) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        begun = time.monotonic()
        self._call("Page.navigate", url=address)
        while not self.evaluate("document.readyState === 'complete'"):
            assert time.monotonic() < begun + PATIENCE, "the page does not load"
            time.sleep(0.02)
        self.seconds = time.monotonic() - begun

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, which must be plain."""
        told = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until JavaScript is true."""
        begun = time.monotonic()
        while not self.evaluate(expression):
            assert time.monotonic() < begun + PATIENCE / 4, f"never true: {expression}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """A key, by the browser's name of it."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = _CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
        options: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code} | ({"text": text} if text else {})
        self._call("Input.dispatchKeyEvent", type="keyDown", **options)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self._call("Input.insertText", text=text)

    def hover(self, selector: str) -> tuple[float, float]:
        """The pointer over the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str) -> None:
        """The pointer over an element, pressed."""
        x, y = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point_away(self) -> None:
        """The pointer in the corner."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)

    def scheme(self, name: str) -> None:
        """Light or dark."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def size(self, width: int, height: int) -> None:
        """Of the window."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def problems(self) -> list[str]:
        """Exceptions, and errors that the console shows."""
        self.evaluate("1")
        found: list[str] = []
        for event in self._mine():
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(told["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and told["entry"]["level"] == "error":
                found.append(told["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        self.evaluate("1")
        return [e["params"]["request"]["url"] for e in self._mine() if e["method"] == "Network.requestWillBeSent"]

    def _mine(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]
