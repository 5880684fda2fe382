"""A headless Chromium for the tests, driven through a pipe with its DevTools protocol.

No library is needed, no port is opened, and the page under test stays as it is. The
commands are those of https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
LAUNCH = (
    "import os, sys; commands, answers = int(sys.argv[1]), int(sys.argv[2]); "
    "os.dup2(commands, 3); os.dup2(answers, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
LEVELS = ("error", "warning", "assert")
SILENCE_S = 30


class Browser:
    """One Chromium process with one page.

    Attributes:
        requests: Addresses that the page asked for.
        errors: What its console reported as an error or a warning, and uncaught
            exceptions.
    """

    def __init__(self, profile: Path) -> None:
        """Starts Chromium.

        Args:
            profile: An empty folder for its files.
        """
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._last_id = 0
        self._session: str | None = None
        self._unread = b""

        their_commands, self._commands = os.pipe()
        self._answers, their_answers = os.pipe()
        # Numbers from 10 on are not in the way of 3 and 4.
        passed = [
            fcntl.fcntl(their_commands, fcntl.F_DUPFD, 10),
            fcntl.fcntl(their_answers, fcntl.F_DUPFD, 10),
        ]
        launch = [sys.executable, "-c", LAUNCH, *map(str, passed)]
        self._process = subprocess.Popen(
            [*launch, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=passed,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (their_commands, their_answers, *passed):
            os.close(descriptor)

        # The blank page is there a moment after the browser.
        deadline = time.monotonic() + SILENCE_S
        pages = []
        while not pages and time.monotonic() < deadline:
            targets = self.command("Target.getTargets")["targetInfos"]
            pages = [target for target in targets if target["type"] == "page"]
        page_id = pages[0]["targetId"]
        attached = self.command("Target.attachToTarget", targetId=page_id, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        """Returns the next message; takes note of it if it is an event."""
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], SILENCE_S)
            chunk = os.read(self._answers, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("Chromium ended, or says nothing")
            self._unread += chunk
        first, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(first)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, event: dict[str, Any]) -> None:
        """Keeps what an event says of requests and errors."""
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(event["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and event["type"] in LEVELS:
            self.errors.append(str(event["args"]))
        if method == "Log.entryAdded" and event["entry"]["level"] in LEVELS:
            self.errors.append(event["entry"]["text"])

    def open(self, path: Path, fragment: str = "") -> None:
        """Opens a file and waits until all of it is loaded."""
        # Another fragment alone would not load the page again.
        self.command("Page.navigate", url="about:blank")
        self.requests.clear()
        self.errors.clear()
        self.command("Page.navigate", url=path.resolve().as_uri() + fragment)
        while not self.run(
            "location.protocol === 'file:' && document.readyState === 'complete'"
        ):
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """Evaluates JavaScript in the page, awaits a promise, returns a plain value."""
        answer = self.command(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """Presses a key, as a person does."""
        code = {"Tab": 9, "Enter": 13, "ArrowDown": 40}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=code,
            )

    def show_as(self, width: int, height: int, scheme: str = "light") -> None:
        """Sets the size of the window in pixels and the colour scheme."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", features=[preference])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        answer = self.command(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """Ends the process."""
        self._session = None
        try:
            self.command("Browser.close")
            self._process.wait(timeout=10)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
