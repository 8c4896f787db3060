"""The page's playground as a test uses it: keys and clicks in, what is shown out, and the worker that answers."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.gateway.pool import WorkerPool
from tests.support.browser import Page
from tests.support.scripted_worker import ScriptedWorker, say

RUNNING = "!document.querySelector('#stop').hidden"
IDLE = "document.querySelector('#stop').hidden"
ALL = "document.querySelectorAll"


def text_of(selector: str) -> str:
    """What the last of these elements shows, as a JavaScript expression."""
    return f"[...{ALL}({selector!r})].at(-1)?.innerText"


@dataclass
class Playground:
    """The page of one gateway, and the worker behind it."""

    page: Page
    worker: ScriptedWorker
    pool: WorkerPool
    address: str

    async def open(self, address: str = "") -> None:
        """The page anew, of a worker that does as at the beginning."""
        worker = self.worker
        worker.answer, worker.raw, worker.steps_left = say("Hello, wörld! 🦀"), None, None
        worker.gate.set()
        worker.submits.clear()
        worker.aborts.clear()
        self.page.requests.clear()
        self.page.complaints.clear()
        await self.page.send("Page.navigate", url=address or self.address)
        # its settings know what is honoured: the page is there, and its script has run
        await self.page.until("document.querySelector('#reasoning-effort')?.options.length > 1")

    async def write(self, text: str, selector: str = "#message") -> None:
        await self.page.evaluate(
            f"((x) => {{ if (x.closest('details')) x.closest('details').open = true; x.focus(); }})"
            f"(document.querySelector({selector!r}))"
        )
        await self.page.evaluate("document.activeElement.select()")
        await self.page.type(text)

    async def ask(self, text: str) -> None:
        await self.write(text)
        await self.page.press("Enter")

    async def answered(self, num: int = 1) -> None:
        await self.page.until(f"{IDLE} && {ALL}('.reply-foot button').length === {num}")

    async def text(self, selector: str) -> str | None:
        found: str | None = await self.page.evaluate(text_of(selector))
        return found

    async def pause_after(self, steps: int) -> None:
        self.worker.steps_left = steps

    def go_on(self) -> None:
        self.worker.steps_left = None
        self.worker.gate.set()

    def prompt(self, number: int = -1) -> str:
        return bytes(token for token in self.worker.submits[number].prompt_ids if token < 256).decode()
