"""A headless Chromium, driven by its DevTools protocol over two pipes: no driver, no socket, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
NO_CHROMIUM = "no Chromium on this machine: `apt-get install chromium` brings it"
WAIT_S = 30.0
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--no-default-browser-check", "--disable-features=Translate,MediaRouter,OptimizationHints"),
)
_START = "import os,sys\nos.dup2(int(sys.argv[1]),3)\nos.dup2(int(sys.argv[2]),4)\nos.execv(sys.argv[3],sys.argv[3:])"
"""descriptors 3 and 4 are where Chromium reads and writes"""
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    " ": (32, " "),
    "ArrowUp": (38, ""),
    "ArrowDown": (40, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
}


class BrowserError(AssertionError):
    """What the browser refused, or an exception of the page's."""


class Browser:
    """One process. `with Browser() as browser: tab = browser.open(url)`."""

    def __init__(self) -> None:
        assert CHROMIUM is not None, NO_CHROMIUM
        self.folder = Path(tempfile.mkdtemp(prefix="browser-"))
        their_in, self._write = os.pipe()
        self._read, their_out = os.pipe()
        arguments = [CHROMIUM, "--remote-debugging-pipe", f"--user-data-dir={self.folder / 'profile'}", *_FLAGS]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(their_in), str(their_out), *arguments, "about:blank"],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(their_in)
        os.close(their_out)
        self._ids = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result. Raises BrowserError."""
        number: int = next(self._ids)
        answer = self._answers[number] = queue.SimpleQueue()
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        try:
            told = answer.get(timeout=WAIT_S)
        except queue.Empty:
            raise BrowserError(f"{method}: no answer within {WAIT_S} s") from None
        if "error" in told:
            raise BrowserError(f"{method}: {told['error']}")
        result: dict[str, Any] = told["result"]
        return result

    def open(self, url: str, **media: str) -> Tab:
        """A tab with storage of its own. `media`: such as prefers_color_scheme="dark"."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        return self.open_beside(context, url, **media)

    def open_beside(self, context: str, url: str, **media: str) -> Tab:
        """Another tab of a context: it shares what the first one stored."""
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session, context)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        tab.media(**media)
        tab.size(1280, 800)
        tab.go(url)
        return tab

    def _listen(self) -> None:
        data = b""
        while True:
            try:
                part = os.read(self._read, 2**16)
            except OSError:
                return
            if not part:
                return
            *messages, data = (data + part).split(b"\0")
            for message in map(json.loads, messages):
                if (number := message.get("id")) is not None:
                    self._answers.pop(number).put(message)
                elif (tab := self._tabs.get(message.get("sessionId"))) is not None:
                    tab.event(message["method"], message["params"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._write)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tab:
    """One page. What went wrong in it is kept: `errors`; and every address that it asked for,
    and every body it sent: `asked`, `posted`."""

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.posted: list[dict[str, Any]] = []
        self.dialogs: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def event(self, method: str, params: dict[str, Any]) -> None:
        """From the thread that reads."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:1000])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"])[:1000])
        elif method == "Log.entryAdded" and params["entry"]["source"] in ("security", "violation", "javascript"):
            self.errors.append(params["entry"]["text"][:1000])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
            if (body := params["request"].get("postData")) is not None:
                self.posted.append(json.loads(body))
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        self.js("window.before = true")
        self.call("Page.reload")
        self.wait("document.readyState === 'complete' && !window.before")

    def media(self, **features: str) -> None:
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=told)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def js(self, expression: str) -> Any:
        """Its value as JSON; a promise is waited for. Raises BrowserError."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise BrowserError(json.dumps(told["exceptionDetails"])[:2000])
        return told["result"].get("value")

    def wait(self, expression: str, seconds: float = WAIT_S) -> Any:
        """Its value, once it is true; True where that is an element."""
        told = f"((value) => value instanceof Node ? true : value)({expression})"
        deadline = time.monotonic() + seconds
        while True:
            try:
                if value := self.js(told):
                    return value
            except BrowserError:  # between two documents
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise BrowserError(f"not within {seconds} s: {expression}\n{self.js('document.body.innerText')[:2000]}")
            time.sleep(0.03)

    def click(self, selector: str, text: str | None = None) -> None:
        """With the mouse, in the middle of the last element that is shown, matches, and has this text."""
        chosen = f"[...document.querySelectorAll({json.dumps(selector)})]"
        if text is not None:
            chosen += f".filter((node) => node.textContent.trim() === {json.dumps(text)})"
        found = f"{chosen}.filter((node) => node.getClientRects().length).pop()"
        self.wait(f"Boolean({found})")
        box = self.js(
            f"(() => {{ const node = {found}; node.scrollIntoView({{block: 'nearest', behavior: 'instant'}});"
            "const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str, shift: bool = False) -> None:
        code, text = _KEYS[key]
        common = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        common["modifiers"] = 8 if shift else 0
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def fill(self, selector: str, text: str) -> None:
        """Instead of what a field holds."""
        node = f"const node = document.querySelector({json.dumps(selector)});"
        self.js(f"(() => {{ {node} node.focus(); node.select(); }})()")
        if text:
            self.type(text)
        else:
            self.js(f"(() => {{ {node} node.value = ''; node.dispatchEvent(new Event('input')); }})()")

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def downloads(self, folder: Path) -> None:
        """Where they go."""
        self.browser.call(
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(folder),
            browserContextId=self.context,
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
