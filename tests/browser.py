"""A headless chromium for tests, driven by its DevTools protocol over two pipes: no driver and no package is needed."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--no-first-run", "--mute-audio",
         "--remote-debugging-pipe")
KEYS = {"Tab": 9, "Enter": 13, "Space": 32}
TEXTS = {"Enter": "\r", "Space": " "}


def find_chromium():
    """Return the path of the browser, None where Debian's package `chromium` is not installed."""
    return shutil.which("chromium")


class Browser:
    """One page of a browser process.

    Attributes:
        complaints: errors and warnings that the page has logged, or thrown, since it was opened.
        requests: addresses that the page has asked for since then.
    """

    def __init__(self, timeout=30):
        self.profile = tempfile.mkdtemp()
        # the browser reads commands from its descriptor 3 and answers on 4
        command = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', find_chromium(), *FLAGS,
                   f"--user-data-dir={self.profile}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.timeout, self.numbers, self.buffer = timeout, itertools.count(1), b""
        self.session, self.events, self.complaints, self.requests = None, [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self.process.stdin.close()  # at which it ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **parameters):
        """Run one command and return its result; events that come meanwhile are noted."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._read()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self):
        """Return the next message of the browser."""
        end, pipe = time.monotonic() + self.timeout, self.process.stdout.fileno()
        while b"\0" not in self.buffer:
            if not select.select([pipe], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser has not answered for {self.timeout} s")
            part = os.read(pipe, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, parameters):
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
        if method:
            self.events.append(method)

    def open(self, address):
        """Open a page and wait until it is loaded; return the seconds that took."""
        self.complaints, self.requests, self.events = [], [], []
        start = time.perf_counter()
        self.call("Page.navigate", url=str(address))
        while "Page.loadEventFired" not in self.events:
            self._read()
        return time.perf_counter() - start

    def run(self, expression):
        """Return the value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def press(self, *keys):
        """Press keys, one after the other: those of `KEYS`, or characters."""
        for key in keys:
            name, code, text = (" " if key == "Space" else key), KEYS.get(key, 0), TEXTS.get(key, "")
            if key not in KEYS:
                text = key
            self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=key, text=text,
                      windowsVirtualKeyCode=code)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=key, windowsVirtualKeyCode=code)

    def look(self, width=1200, height=900, dark=False, scale=1):
        """Set the size of the window, its pixels per CSS pixel and the colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=False)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, file, **clip):
        """Write what is seen, or the part of the page `clip` (x, y, width, height), as PNG."""
        options = {"clip": clip | {"scale": 1}, "captureBeyondViewport": True} if clip else {}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))
