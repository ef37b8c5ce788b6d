"""Headless Chromium for tests of pages, by its own protocol over a pipe: nothing to install beside the browser."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds that an answer may take."""
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-default-apps --disable-extensions --disable-dev-shm-usage
--hide-scrollbars --force-color-profile=srgb --remote-debugging-pipe"""
# Chromium listens at file descriptor 3 and answers at 4.
START = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execv(sys.argv[1], sys.argv[1:])"


def found() -> str | None:
    """The path of Chromium or Chrome; None: there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    return None


class Page:
    """A page in the browser, and what went wrong in it."""

    def __init__(self, process: subprocess.Popen, to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._count, self._buffer, self._session = 0, b"", ""
        self.errors: list[str] = []
        """Exceptions, messages of the console that are errors or warnings, and requests to elsewhere."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a page and wait until it says that it is ready."""
        self.size(width, height)
        self.scheme(dark)
        self._call("Page.navigate", url=url)
        end = time.monotonic() + PATIENCE
        ready = "document.documentElement?.dataset.ready === 'yes' && document.readyState === 'complete'"
        while not self.value(ready):
            assert time.monotonic() < end and not self.errors, self.errors
            time.sleep(0.05)
        self.frame()

    def size(self, width: int, height: int) -> None:
        """The size of the window."""
        settings = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **settings)
        self.frame()

    def scheme(self, dark: bool) -> None:
        """What the user's system prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def frame(self) -> None:
        """Wait until what has changed is drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def key(self, name: str) -> None:
        """Press a key."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name])
        self.frame()

    def move(self, x: float, y: float) -> None:
        """Move the pointer."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.frame()

    def picture(self, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        order: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._to, json.dumps(order).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._count:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._event(message.get("method", ""), message.get("params", {}))

    def _event(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = said["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.errors.append(f"asks for {url}")

    def _message(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._back, 2**20) if ready else b""
            assert part, f"Chromium does not answer; it ended with {self._process.poll()}"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)


@contextmanager
def page() -> Iterator[Page]:
    """A page of a new browser with nothing in it."""
    path = found()
    assert path, "no Chromium"
    read_there, write_here = os.pipe()
    read_here, write_there = os.pipe()
    # Not in pytest's folders: the browser keeps files there for a moment after it has ended.
    home = tempfile.mkdtemp(prefix="chromium-")
    arguments = [path, *FLAGS.split(), f"--user-data-dir={home}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", START.format(read_there, write_there), *arguments],
        pass_fds=(read_there, write_there),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "HOME": home},
    )
    os.close(read_there)
    os.close(write_there)
    try:
        yield Page(process, write_here, read_here)
    finally:
        os.close(write_here)
        os.close(read_here)
        process.kill()
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def saved(picture: bytes, name: str) -> None:
    """Keep a picture where SOFLOW_SCREENSHOTS says, for somebody to look at."""
    if folder := os.environ.get("SOFLOW_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(picture)
