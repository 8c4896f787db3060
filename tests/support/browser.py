"""Headless Chromium with one page, driven through the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

DEADLINE_S = 60.0
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it does not start for root otherwise
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)
KEYS = {  # its Windows code, and what it writes
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "ArrowRight": (39, ""),
    "ArrowLeft": (37, ""),
}
LISTENS = re.compile(rb"DevTools listening on (ws://\S+)")


@dataclass
class Page:
    """A tab. `requests` are the addresses that it asked for, `complaints` its console's warnings and errors."""

    socket: aiohttp.ClientWebSocketResponse
    session_id: str = ""
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _answers: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Raises `RuntimeError` for what the browser refuses, `TimeoutError` where it does not answer."""
        number = next(self._ids)
        answered = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        await self.socket.send_json(message | ({"sessionId": self.session_id} if self.session_id else {}))
        answer = await asyncio.wait_for(answered, DEADLINE_S)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def listen(self) -> None:
        """Take answers and events until the browser goes."""
        async for message in self.socket:
            event = json.loads(message.data)
            params = event.get("params", {})
            if "id" in event:
                answered = self._answers.pop(event["id"])
                if not answered.done():  # or nobody waits for it any more
                    answered.set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in {"error", "warning", "assert"}:
                self.complaints.append(str([argument.get("value", argument) for argument in params["args"]]))
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in {"error", "warning"}:
                self.complaints.append(params["entry"]["text"])

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it comes to."""
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until the document is such that this JavaScript expression is true. Raises `TimeoutError` naming it."""
        promise = f"""new Promise((resolve) => {{
            const look = () => ({condition}) && (observer.disconnect(), resolve(true));
            const observer = new MutationObserver(look);
            observer.observe(document, {{ subtree: true, childList: true, attributes: true, characterData: true }});
            look();
        }})"""
        try:
            await self.evaluate(promise)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise TimeoutError(f"the page never came to {condition}; it shows:\n{text}") from None

    async def press(self, key: str, *, shift: bool = False) -> None:
        """A key of `KEYS`, as somebody at a keyboard presses it."""
        code, text = KEYS[key]
        keys: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        await self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **keys)

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def emulate(self, width: int, height: int, scheme: str = "light") -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self, *, is_whole: bool = True) -> bytes:
        """All of the document, or what is in view, as PNG."""
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=is_whole, optimizeForSpeed=False)
        return base64.b64decode(answer["data"])


@asynccontextmanager
async def open_page() -> AsyncIterator[Page]:
    """A browser of our own with a blank page; it ends with the context."""
    program = next(filter(None, map(shutil.which, PROGRAMS)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = await asyncio.create_subprocess_exec(
            program, *FLAGS, f"--user-data-dir={profile}", stderr=asyncio.subprocess.PIPE
        )
        try:
            address = await asyncio.wait_for(_address(browser), DEADLINE_S)
            async with aiohttp.ClientSession() as client, client.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                target = await page.send("Target.createTarget", url="about:blank")
                attached = await page.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
                page.session_id = attached["sessionId"]
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await page.send(f"{domain}.enable")
                await page.send("Emulation.setScrollbarsHidden", hidden=True)  # they would be cut out of a picture
                yield page
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
        finally:
            browser.kill()
            await browser.wait()


async def _address(browser: asyncio.subprocess.Process) -> str:
    assert browser.stderr is not None
    said = b""
    while line := await browser.stderr.readline():
        said += line
        if found := LISTENS.search(line):
            return found[1].decode()
    raise RuntimeError(f"the browser ended: {said.decode(errors='replace')}")
