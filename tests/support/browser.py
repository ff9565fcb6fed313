"""A headless Chromium, spoken to through its DevTools protocol: no driver and no download."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_S = 120
WAIT_S = 60
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, ""), "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""),
    "ArrowDown": (40, ""), "Tab": (9, ""),
}  # fmt: skip


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; $CHROMIUM says which."""
    return os.environ.get("CHROMIUM") or next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Page:
    """A tab."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.requested: list[str] = []  # URLs asked for
        self.errors: list[str] = []  # of scripts, and what the browser logs as errors
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_S))
            if message.get("id") == number:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, given = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            self.requested.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(given["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Go somewhere."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def leave(self) -> None:
        """Leave the page, whose service may have ended, and forget what it asked for and what went wrong there."""
        self.open("about:blank")
        self.requested.clear()
        self.errors.clear()

    def run(self, script: str) -> Any:
        """Value of an expression, awaited."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{script}: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """Value of an expression once it is true."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            with contextlib.suppress(AssertionError):  # a page that is just being left
                if value := self.run(script):
                    return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; errors of the page: {self.errors}")

    def text(self, selector: str) -> str:
        """What an element says."""
        return self.run(f"document.querySelector({selector!r}).innerText")

    def type(self, text: str) -> None:
        """Type into what has the focus, a letter at a time."""
        for letter in text:
            self.send("Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def press(self, key: str) -> None:
        """Press one of KEYS."""
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        at = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def drop(self, file: Path) -> None:
        """Drag a file over the page and let it go."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=200, y=300, data=data)

    def screen(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Size and colours of the screen."""
        scale = 2 if phone else 1
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Keep what is to be seen as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(program: str) -> Iterator[Page]:
    """A tab of a browser of its own."""
    from websockets.sync.client import connect

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
            "--remote-debugging-port=0", f"--user-data-dir={profile}",
        )  # fmt: skip
        process = subprocess.Popen([program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _port(Path(profile) / "DevToolsActivePort", process)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=WAIT_S) as answer:
                tab = next(t for t in json.load(answer) if t["type"] == "page")
            with connect(tab["webSocketDebuggerUrl"], max_size=None, open_timeout=WAIT_S) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=20)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        if process.poll() is not None:
            raise AssertionError(f"the browser ended with status {process.returncode}")
        time.sleep(0.1)
    raise AssertionError("the browser did not start")
