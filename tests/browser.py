"""A headless Chromium that tests look at pages with: open, click, read, take a picture."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")


class Browser:
    """One page of a browser, driven by the DevTools protocol."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: Any) -> None:
        self._loop = loop
        self._socket = socket
        self._sent = 0

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, return its result."""
        return self._loop.run_until_complete(self._tell(method, params))

    def open(self, url: str, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Show a page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.tell("Page.navigate", url=url)

    def get(self, script: str) -> Any:
        """Return what a JavaScript expression evaluates to."""
        return self.tell("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, timeout_s: float = 60) -> Any:
        """Return the expression's value once it is true."""
        end = time.monotonic() + timeout_s
        while not (value := self.get(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {script}; the page reads: {self.get('document.body.innerText')}")
            time.sleep(0.2)
        return value

    def type(self, element: str, text: str) -> None:
        """Put the cursor into an element, write a text and press the key Enter."""
        self.get(f"{element}.focus()")
        self.tell("Input.insertText", text=text)
        for kind in ("rawKeyDown", "keyUp"):
            self.tell("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)

    def save(self, path: Path) -> None:
        """Write a picture of the window."""
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"]))

    async def _tell(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        while (answer := await self._socket.receive_json(timeout=120)).get("id") != self._sent:
            pass  # an event
        return dict(answer["result"])


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Run a browser inside the block.

    Args:
        profile: a directory for its files.
    """
    import aiohttp

    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    loop = asyncio.new_event_loop()

    async def connect(port: str) -> tuple[Any, Any]:
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{port}/json") as listed:
            page = next(entry for entry in await listed.json() if entry["type"] == "page")
        return session, await session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    try:
        assert process.stderr is not None
        port = next(found[1] for line in process.stderr if (found := re.search(r"listening on ws://[^:]*:(\d+)", line)))
        session, socket = loop.run_until_complete(connect(port))
        yield Browser(loop, socket)
        loop.run_until_complete(session.close())
    finally:
        process.kill()
        process.communicate()
        loop.close()
