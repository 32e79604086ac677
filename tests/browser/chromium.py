"""Headless Chromium, driven over the pipe of its DevTools protocol: no package, no port."""

import base64
import fcntl
import functools
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Seconds without an answer, on whatever machine.
PATIENCE = 300


@functools.cache
def find_chromium() -> str | None:
    """Return the browser, None where there is none that starts; ``CHROMIUM`` names another."""
    if os.environ.get("CHROMIUM"):
        return os.environ["CHROMIUM"]
    # Ubuntu's chromium-browser may be a script that asks for a snap.
    result = filter(None, map(shutil.which, NAMES))
    return next(
        (name for name in result if not subprocess.call([name, "--version"], **QUIET)), None
    )


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def pipe() -> tuple[int, int]:
    """Return both ends of a pipe, neither of them where Chromium looks for its own."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high


class Page:
    """One tab.

    Whatever the page logs, throws or asks the network for is kept, and asserted on by the tests.
    """

    def __init__(self, profile: Path):
        to_browser, self._write = pipe()
        self._read, from_browser = pipe()
        words = [
            find_chromium(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            # No name resolves: whatever asks for the network fails, and is seen below.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]

        def pipes() -> None:
            # Chromium reads the protocol from 3 and writes it to 4.
            os.dup2(to_browser, 3)
            os.dup2(from_browser, 4)

        self._process = subprocess.Popen(words, preexec_fn=pipes, close_fds=False, **QUIET)
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._ids, self._session = b"", itertools.count(1), None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params):
        """Send one command and return its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "the browser is gone"
            self._rest += chunk
        line, self._rest = self._rest.split(b"\0", 1)
        answer = json.loads(line)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, event: str | None, params: dict) -> None:
        if event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif event == "Runtime.consoleAPICalled" and params["type"] in {
            "error",
            "warning",
            "assert",
        }:
            self.problems.append(json.dumps(params["args"])[:500])
        elif event == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
            self.problems.append(params["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
        elif event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "data:", "blob:")
        ):
            self.requests.append(params["request"]["url"])

    def size(self, width: int, height: int = 900, mobile: bool = False) -> None:
        """Set the size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def open(
        self,
        path: Path,
        fragment: str = "",
        ready: str = "document.documentElement?.dataset.ready === '1'",
    ) -> None:
        """Open a file and wait until it is ready."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.wait(ready)

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while self.js(expression) is not True:
            assert time.monotonic() < end, f"never: {expression}; {self.problems}"
            time.sleep(0.02)

    def freeze_layout(self) -> None:
        """Wait until the page has drawn: Plotly delays resizing by 100 ms."""
        frames = (
            "new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(() => "
            "setTimeout(drawn, 200))))"
        )
        self.js(f"{frames}.then(() => true)")

    def js(self, expression: str):
        """Evaluate an expression in the page and return its value."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Press and release a key, such as ``Enter`` or ``ArrowDown``."""
        code = {
            "Enter": 13,
            " ": 32,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Tab": 9,
        }[name]
        text = {"text": "\r"} if name == "Enter" else {}
        for event in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=event, key=name, windowsVirtualKeyCode=code, **text
            )

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the page, or of what the window shows."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)[
            "data"
        ]
        path.write_bytes(base64.b64decode(data))
