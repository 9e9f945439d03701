"""A headless Chromium for tests, driven through chromedriver by the W3C WebDriver protocol over HTTP.

Nothing but the two programs of Debian's packages `chromium` and `chromium-driver` is needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver, section 11: the key of an element's reference
RIGHT, HOME, ENTER = "\ue014", "\ue011", "\ue007"
"""Keys, as WebDriver writes them."""


def missing() -> str | None:
    """What is not installed, or None if the tests can run."""
    if shutil.which("chromedriver") is None:
        return "chromedriver is not installed (Debian: apt-get install chromium chromium-driver)"
    if _chromium() is None:
        return "Chromium is not installed (Debian: apt-get install chromium chromium-driver)"
    return None


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One browser window. A context manager; the driver and its browser end with it."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        driver = shutil.which("chromedriver")
        assert driver is not None
        self._driver = subprocess.Popen(
            [driver, f"--port={self._port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
        )
        self._session = ""
        try:
            self._wait_until_ready()
            options = {
                "binary": _chromium(),
                "args": [
                    "--headless=new",
                    "--no-sandbox",  # containers run as root
                    "--disable-dev-shm-usage",
                    "--disable-gpu",
                    f"--user-data-dir={profile}",
                    f"--window-size={width},{height}",
                ],
            }
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            # the window's own size has a lower limit, a phone's is below it
            screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.devtools("Emulation.setDeviceMetricsOverride", **screen)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        except BaseException:
            self.close()
            raise

    def open(self, path: Path) -> None:
        """Load a local page and wait until all of it is there."""
        self._do("POST", "/url", {"url": path.absolute().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns in the page."""
        return self._do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> dict[str, str]:
        """The first element, as an argument for `run`, `click` and `keys`."""
        found = self._do("POST", "/element", {"using": "css selector", "value": selector})
        return {_ELEMENT: found[_ELEMENT]}

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        self._do("POST", f"/element/{self.find(selector)[_ELEMENT]}/click", {})

    def keys(self, selector: str, text: str) -> None:
        """Type into an element."""
        self._do("POST", f"/element/{self.find(selector)[_ELEMENT]}/value", {"text": text})

    def drag(self, selector: str, start: float, end: float) -> None:
        """Press at share `start` of an element's width, move to share `end`, release."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        width = self.run("return arguments[0].getBoundingClientRect().width", element)

        def at(share: float) -> dict[str, Any]:
            return {"type": "pointerMove", "duration": 50, "origin": element, "x": int(width * (share - 0.5)), "y": 0}

        moves = [at(start), {"type": "pointerDown", "button": 0}, at((start + end) / 2), at(end)]
        moves.append({"type": "pointerUp", "button": 0})
        self._do("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def console(self) -> list[str]:
        """Messages of the page since the last call, errors of its policy and of loading among them."""
        return [entry["message"] for entry in self._do("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, but for data: URIs and the browser's own first page."""
        entries = self._do("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome"))]

    def screenshot(self, path: Path) -> Path:
        """The visible part as PNG."""
        path.write_bytes(base64.b64decode(self._do("GET", "/screenshot", None)))
        return path

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        """End the session and the driver."""
        try:
            if self._session:
                self._do("DELETE", "", None)
        finally:
            self._driver.terminate()
            self._driver.wait(20)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        for _ in range(200):
            try:
                if self._call("GET", "/status", None)["ready"]:
                    return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("chromedriver did not start")

    def _do(self, verb: str, path: str, body: dict[str, Any] | None) -> Any:
        return self._call(verb, f"/session/{self._session}{path}", body)

    def _call(self, verb: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self._port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=verb)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see the driver
        try:
            with opener.open(request, timeout=60) as response:
                return json.loads(response.read())["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.loads(error.read())["value"]["message"]) from error
