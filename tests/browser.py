"""Drives Chromium by its DevTools protocol: real events of mouse and keyboard, and screenshots."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

KEYS = {"Enter": 13, "Tab": 9, " ": 32}


def chromium() -> str | None:
    """The browser, or None where this machine has none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """A page that is open in the browser.

    Attributes:
        log: what the page has written to its console, errors included, and addresses that it asked
            for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.log: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        method, values = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        elif method == "Log.entryAdded":
            entry = values["entry"]
            # An answer with an error is a matter of the page, which shows it.
            if "Failed to load resource" not in entry["text"]:
                self.log.append(f"{entry['text']} {entry.get('url')}")
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.log.append(json.dumps(values))

    def js(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        given = dict(expression=expression, awaitPromise=True, returnByValue=True)
        result = self.call("Runtime.evaluate", **given)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression}; the page: {self.js('document.body.innerText')}")
            time.sleep(0.05)
        return value

    def go(self, address: str) -> None:
        """Opens an address, and waits until it is loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drops files on an element, as from a folder's window."""
        x, y = self._middle(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, files: Sequence[Path]) -> None:
        """Gives files to a file input, as its dialog does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def click(self, selector: str) -> None:
        """Clicks on the middle of an element."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Presses a key of `KEYS`."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        given = dict(key=key, code=key, windowsVirtualKeyCode=KEYS[key])
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def write(self, text: str) -> None:
        """Writes text where the focus is."""
        self.call("Input.insertText", text=text)

    def look(self, width: int, height: int, dark: bool = False, path: Path | None = None) -> None:
        """Sets the size of the window and its colours, and takes a picture of the whole page."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        if path is not None:
            shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
            path.write_bytes(base64.b64decode(shot["data"]))

    def _middle(self, selector: str) -> tuple[float, float]:
        found = self.js(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return found[0], found[1]


@contextmanager
def opened(browser: str, profile: Path) -> Iterator[Page]:
    """A page in a browser of its own, which ends with the context."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [browser, *options, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        place, end = profile / "DevToolsActivePort", time.monotonic() + 30
        while not (place.is_file() and place.read_text().count("\n")):
            if time.monotonic() > end:
                raise TimeoutError("the browser has not started")
            time.sleep(0.05)
        port = place.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
            pages = [one for one in json.load(answer) if one["type"] == "page"]
        address = pages[0]["webSocketDebuggerUrl"]
        with connect(address, max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(10)
