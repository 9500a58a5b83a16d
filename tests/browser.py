"""Chromium without a window and without a network, driven as a person would: look, point, click, type."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
PATIENCE = 120.0  # seconds


class Browser:
    """Drives a session of chromedriver.

    Args:
        address: of the session.
    """

    def __init__(self, address):
        self.address = address

    def visit(self, path):
        """Open a file and wait until its charts are drawn."""
        _ask(f"{self.address}/url", {"url": Path(path).resolve().as_uri()})
        self.wait_for("return document.body.dataset.ready === 'yes'")

    def run(self, script, *arguments):
        """Return what a script returns."""
        return _ask(f"{self.address}/execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, script, *arguments):
        """Wait until a script returns something true, and return that."""
        end = time.monotonic() + PATIENCE
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"waited in vain for {script}"
            time.sleep(0.05)
        return found

    def look(self, width, height=900, *, dark=False, touch=False):
        """Make the window so large, and prefer light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.tell("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", {"features": [scheme]})

    def tell(self, command, parameters):
        """Give Chromium a command of its developer tools."""
        return _ask(f"{self.address}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def point(self, selector, place=0):
        """Move the pointer onto the middle of an element, which is scrolled to first."""
        middle = self.run(
            "const one = document.querySelectorAll(arguments[0])[arguments[1]]; one.scrollIntoView({block: 'center'});"
            "const box = one.getBoundingClientRect(); return {x: box.x + box.width / 2, y: box.y + box.height / 2};",
            selector,
            place,
        )
        self.tell("Input.dispatchMouseEvent", {"type": "mouseMoved", **middle})
        return middle

    def click(self, selector, place=0):
        """Click on an element."""
        middle = self.point(selector, place)
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", {"type": kind, "button": "left", "clickCount": 1, **middle})

    def type(self, selector, text, place=0):
        """Click on a field and write into it."""
        self.click(selector, place)
        self.tell("Input.insertText", {"text": text})

    def messages(self):
        """Return what the page has said on its console since it was last asked."""
        return [entry["message"] for entry in _ask(f"{self.address}/se/log", {"type": "browser"})]


@contextmanager
def browser(folder):
    """Give a browser whose profile lies in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    here = f"http://127.0.0.1:{port}"
    session = None
    try:
        _wait_until_ready(here)
        wanted = {"binary": CHROMIUM, "args": [*OPTIONS, f"--user-data-dir={folder}"]}
        capabilities = {"goog:chromeOptions": wanted, "goog:loggingPrefs": {"browser": "ALL"}}
        begun = _ask(f"{here}/session", {"capabilities": {"alwaysMatch": capabilities}})
        session = f"{here}/session/{begun['sessionId']}"
        yield Browser(session)
    finally:
        if session is not None:
            urllib.request.urlopen(urllib.request.Request(session, method="DELETE"), timeout=PATIENCE).close()
        driver.terminate()
        driver.wait(PATIENCE)


def _wait_until_ready(here):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{here}/status", timeout=PATIENCE) as answer:
                if json.load(answer)["value"]["ready"]:
                    return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("chromedriver does not answer")


def _ask(address, content):
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error
