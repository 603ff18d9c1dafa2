"""Chromium without a screen, driven over chromedriver's HTTP interface: enough to open a page, to ask it something, and
to take its picture.
"""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seaweed import free_ports

DRIVER, PROGRAM = shutil.which("chromedriver"), shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DARK = ("--blink-settings=preferredColorScheme=0",)


class Browser:
    """One window of a size, light or dark."""

    def __init__(self, root: str) -> None:
        self.root = root

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url: str) -> None:
        self.ask("/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.ask("/execute/sync", {"script": f"return ({script})", "args": []})

    def complaints(self) -> list[dict[str, Any]]:
        """What the console holds."""
        return self.ask("/se/log", {"type": "browser"})

    def picture(self, file: Path) -> None:
        """The window as PNG."""
        file.write_bytes(base64.b64decode(self.ask("/screenshot")))


@contextmanager
def browser(width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> Iterator[Browser]:
    """A fresh browser; it and its driver end with the block."""
    (port,) = free_ports(1)
    assert DRIVER
    assert PROGRAM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        opened = Browser(f"http://127.0.0.1:{port}/session")
        metrics = {"width": width, "height": height, "pixelRatio": scale, "mobile": width < 600, "touch": width < 600}
        options = {
            "binary": PROGRAM,
            "args": [*FLAGS, *(DARK if dark else ()), f"--user-data-dir={profile}"],
            "mobileEmulation": {"deviceMetrics": metrics},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    session = opened.ask("", {"capabilities": {"alwaysMatch": wanted}})
                    break
                except urllib.error.URLError:
                    assert time.monotonic() < until
                    time.sleep(0.2)
            opened.root += f"/{session['sessionId']}"
            try:
                yield opened
            finally:  # ends the browser, which would outlive its driver
                urllib.request.urlopen(urllib.request.Request(opened.root, method="DELETE"), timeout=60).close()
        finally:
            driver.terminate()
            driver.wait(60)
