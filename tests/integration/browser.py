# SPDX-FileCopyrightText: mala.hpc_db contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real headless browser, on this machine or on a host of the test cluster."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.proxy import Proxy
from selenium.webdriver.remote.client_config import ClientConfig
from target import ROOT, Target
from urllib3.exceptions import HTTPError

SCREENSHOTS = ROOT / ".cache" / "test" / "screenshots"
DOOR = Path(__file__).with_name("chromedriver_door.py")
SECONDS = 90  # for any step of a page: a loaded machine takes ten times as long as an idle one

ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # root cannot use the sandbox; the tests open their own pages only
    "--disable-dev-shm-usage",  # containers have little of it
    "--enable-unsafe-swiftshader",  # WebGL without a graphics card
    "--window-size=1280,900",
    "--force-device-scale-factor=1",
    "--disable-background-networking",
    "--no-first-run",
    "--no-proxy-server",
]

# Descends into open shadow roots and frames, which TensorBoard and others use; hidden elements do not count.
WALK = """
const found = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) { seen(node, found); return; }
  if (node.nodeType === Node.ELEMENT_NODE) {
    if (['SCRIPT', 'STYLE', 'TEMPLATE', 'NOSCRIPT'].includes(node.tagName) || !node.checkVisibility()) return;
    seen(node, found);
    if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
    if (node.contentDocument && node.contentDocument.body) walk(node.contentDocument.body);
  }
  node.childNodes.forEach(walk);
};
if (document.body) walk(document.body);
return found;
"""
TEXTS = "const seen = (node, found) => { if (node.nodeType === Node.TEXT_NODE) found.push(node.data); };" + WALK
ELEMENTS = """
const seen = (node, found) => {
  if (node.nodeType === Node.ELEMENT_NODE && node.matches(selector)) found.push(node);
};
""" + WALK


class Browser:
    """A page in headless Chromium."""

    def __init__(self, driver: webdriver.Remote) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Open an address, or a file by its file:// address."""
        self.driver.get(address)

    def text(self) -> str:
        """Return the visible text, including shadow roots and frames; runs of white space become single spaces."""
        return " ".join(" ".join(self.driver.execute_script(TEXTS)).split())

    def find(self, selector: str) -> list[Any]:
        """Return the visible elements that match a CSS selector, including those in shadow roots and frames."""
        return self.driver.execute_script(f"const selector = {json.dumps(selector)};{ELEMENTS}")

    def wait_for(self, condition: Callable[[], object], seconds: float = SECONDS) -> Any:
        """Wait until a condition holds; return what it returned."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"not within {seconds} s; the page says: {self.text()[:2000]}"
            time.sleep(0.2)
        return found

    def wait_for_text(self, text: str, seconds: float = SECONDS) -> None:
        """Wait until the page shows a text."""
        self.wait_for(lambda: text in self.text(), seconds)

    def wait_for_element(self, selector: str, seconds: float = SECONDS) -> Any:
        """Wait until the page shows an element; return the first."""
        return self.wait_for(lambda: self.find(selector), seconds)[0]

    def go_offline(self) -> None:
        """Disable the network from now on."""
        self.driver.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def requests(self) -> list[str]:
        """Return the addresses requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Return the errors that the page has written to the console since the last call."""
        return [entry["message"] for entry in self._log("browser") if entry["level"] == "SEVERE"]

    def _log(self, name: str) -> list[dict]:
        return self.driver.execute("getLog", {"type": name})["value"]

    def screenshot(self, name: str, height: int = 900) -> Path:
        """Save a screenshot of the page's top, ``height`` pixels high, for people: .cache/test/screenshots/NAME.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.set_window_size(1280, height)
        picture = SCREENSHOTS / f"{name}.png"
        assert self.driver.save_screenshot(str(picture))
        return picture


@contextlib.contextmanager
def chromium(place: Target) -> Iterator[Browser]:
    """Start a browser on a host; it shares that host's 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"http://127.0.0.1:{door.getsockname()[1]}"
        command = shlex.join(["/usr/bin/python3", "-c", DOOR.read_text(), str(door.fileno())])
        process = place.start(f"exec {command}", door.fileno())
    try:
        driver = drive(address)
        yield Browser(driver)
        with contextlib.suppress(HTTPError):  # the host may be gone, and the browser with it
            driver.quit()
    finally:
        process.communicate(timeout=SECONDS)


def drive(address: str) -> webdriver.Remote:
    """Return selenium's driver of the chromedriver at an address."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ["chromium", "google-chrome"])))
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for argument in ARGUMENTS:
        options.add_argument(argument)
    config = ClientConfig(address, proxy=Proxy({"proxyType": "DIRECT"}), timeout=3 * SECONDS)
    return webdriver.Remote(address, options=options, client_config=config)
