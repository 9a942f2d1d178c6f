"""A headless Chromium that opens a page and tells what it asked for and complained of.

It is spoken to over a pipe in its DevTools protocol, so that nothing but the browser itself is needed.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
)


@dataclass
class Visit:
    """What came of opening a page: addresses asked for (data: URIs apart), complaints, its title, text and picture."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    title: str = ""
    text: str = ""
    picture: bytes = b""


def executable() -> str | None:
    """The browser's program, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """`with Browser(folder) as browser: browser.visit(file)`; `folder` holds its profile."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        program = executable()
        assert program is not None
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4; neither may be one of the pipes' own ends.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_commands, write_answers)]
        words = [program, *OPTIONS, f"--user-data-dir={self.folder}", "about:blank"]
        script = f'exec 3<&{ends[0]} 4>&{ends[1]}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "browser", *words],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self.folder)},
        )
        for end in (read_commands, write_answers, *ends):
            os.close(end)
        self.stream = os.fdopen(self.answers, "rb")
        self.buffer = b""
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stream.close()
        os.close(self.commands)

    def visit(self, file: Path, width: int = 1280, wait: float = 0.5, top: int = 0, height: int = 0) -> Visit:
        """Open a file; its picture is `height` pixels from `top`, all of the page if 0."""
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Network", "Log", "Runtime", "Page"):
            self._ask(f"{domain}.enable", {}, session)
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", screen, session)
        self.events.clear()
        self._ask("Page.navigate", {"url": file.as_uri()}, session)
        deadline = time.monotonic() + 300
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, f"{file} did not load"
            self.events.append(self._read())
        time.sleep(wait)
        visit = Visit(
            title=self._value("document.title", session), text=self._value("document.body.innerText", session)
        )
        content = self._ask("Page.getLayoutMetrics", {}, session)["cssContentSize"]
        clip = {"x": 0, "y": top, "width": width, "height": height or content["height"] - top, "scale": 1}
        asked = {"format": "png", "clip": clip, "captureBeyondViewport": True}
        visit.picture = base64.b64decode(self._ask("Page.captureScreenshot", asked, session)["data"])
        for event in self.events:
            self._note(event, visit)
        return visit

    def _note(self, event: dict[str, Any], visit: Visit) -> None:
        found = event.get("params", {})
        match event["method"]:
            case "Network.requestWillBeSent" if not found["request"]["url"].startswith("data:"):
                visit.requests.append(found["request"]["url"])
            case "Log.entryAdded":
                visit.complaints.append(found["entry"]["text"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Page.javascriptDialogOpening":
                visit.complaints.append(json.dumps(found))

    def _value(self, expression: str, session: str) -> Any:
        return self._ask("Runtime.evaluate", {"expression": expression}, session)["result"].get("value")

    def _ask(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self.last += 1
        command = {"id": self.last, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self.last:
                assert "error" not in message, message
                return dict(message["result"])
            if "method" in message:
                self.events.append(message)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.stream.fileno(), 2**20)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))
