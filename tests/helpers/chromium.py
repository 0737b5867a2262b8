"""A headless Chromium that a test drives by Chromium's own protocol, through a pipe: no server, no port, no driver."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str:
    """Its path. Raises FileNotFoundError where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed: install Chromium, as with Debian's package")
    return found


class Browser:
    """One page. `log` has what it complained of, `requests` whatever it asked for, the page itself included."""

    def __init__(self, profile: Path, width: int = 1366, height: int = 900, touch: bool = False):
        ours, theirs = os.pipe(), os.pipe()  # what it reads as 3, and what it writes as 4
        command = 'exec 9<&"$1" 10>&"$2" 3<&9- 4>&10-; shift 2; exec "$@"'  # in two moves: one may be 4 itself
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", str(ours[0]), str(theirs[1]), find_browser(), "--headless=new",
             "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}",
             "--no-first-run", "--disable-component-update", "--disable-background-networking", "about:blank"],
            pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = ours[1], os.fdopen(theirs[0], "rb")
        self._buffer, self._number, self._session = b"", 0, None
        self.log: list[str] = []
        self.requests: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        if touch:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)

    def call(self, method: str, **params) -> dict:
        """A command of the protocol, and its answer. Raises RuntimeError where it is refused."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._event(answer.get("method", ""), answer.get("params", {}))

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            piece = os.read(self._in.fileno(), 2**16)
            if not piece:
                raise EOFError("the browser ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _event(self, method: str, params: dict) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.log.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.log.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.log.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.log.append(f"a dialog: {params['message']}")

    def open(self, path: Path, ready: str = "true") -> None:
        """A file, until it is loaded and `ready` is true."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until(f"document.readyState === 'complete' && ({ready})")

    def value(self, expression: str) -> Any:
        """Of JavaScript, as JSON has it. What it throws is a RuntimeError."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", expression))
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Waits for it to be true; raises TimeoutError where it never is."""
        self.wait(lambda: self.value(f"Boolean({expression})"), expression, seconds)

    def wait(self, what: Callable[[], bool], name: str, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                raise TimeoutError(f"{name}: not after {seconds:g} s; the page said: {self.log}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """In the middle of the first element that fits, brought into view first."""
        place = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.click_at(*place)

    def click_at(self, x: float, y: float) -> None:
        self.move_to(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def move_to(self, x: float, y: float) -> None:
        """In two moves, as a hand does: what a pointer enters may listen from the next one on."""
        for nearly in (1, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - nearly, y=y)

    def type(self, words: str) -> None:
        self.call("Input.insertText", text=words)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot, of what is in view or of the whole page."""
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True, "clip": {**size, "x": 0, "y": 0, "scale": 1}}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
        except (OSError, EOFError, RuntimeError):
            self._process.kill()
        self._process.wait(timeout=30)
        os.close(self._out)
        self._in.close()
