"""The page at ``/`` in a real browser: what it shows, and that it follows what the cluster does."""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec
import pytest

from cluster.gateway.status import LastStatus
from cluster.protocol import EngineState
from cluster.store.records import ClusterStatus, NodeStatus, WorkerStatus
from tests.browser.conftest import MODEL, OpenGateway
from tests.support.browser import Page

pytestmark = [pytest.mark.anyio, pytest.mark.needs("chromium"), pytest.mark.timeout(240)]

MARKUP = "<img src=x onerror=alert(1)>"  # a name is text, whatever it looks like
OLD = "[...document.querySelectorAll('#live, #cluster')].map((part) => part.className)"
LONG = "a-node-whose-name-is-as-long-as-those-of-a-cloud.eu-central-1.compute.internal"


def worker(name: str, role: str, node_id: str, **state: Any) -> WorkerStatus:
    shown: dict[str, Any] = {"condition": "serving", "address": "", "pid": 0, "name": name, "node_id": node_id}
    return msgspec.convert(shown | {"role": role, "state": {"worker_id": f"{name}#1"} | state}, WorkerStatus)


def holding(status: WorkerStatus, *shards: tuple[int, ...]) -> WorkerStatus:
    return msgspec.structs.replace(status, shards=shards, num_experts=sum(map(len, shards)))


class Script:
    """A cluster of three nodes; each attention worker makes `tokens_per_s`, an expert worker its `rows_per_s`."""

    def __init__(self) -> None:
        self.tokens_per_s = 1000
        self.rows_per_s = {"expert-0": 2500, "expert-1": 40}
        self.silent_s = 0.0
        self.problem: str | None = None
        self.nodes = [NodeStatus("n0", 3 * 2**30, ("cuda:0", "cuda:1")), NodeStatus("n1", 2**30), NodeStatus(LONG, 0)]
        self.workers = {
            status.name: status
            for status in (
                worker("attention-0", "attention", "n0", num_running=3, num_waiting=40, pages_total=8, pages_free=6),
                worker(MARKUP, "attention", "n1", num_running=1, pages_total=8, pages_free=8),
                holding(worker("expert-0", "expert", "n1"), (0, 1), (), (0, 2)),  # its layer 1 has no experts
                holding(worker("expert-1", "expert", LONG), (2, 3), (), (1, 3)),
            )
        }

    def change(self, name: str, **changes: Any) -> None:
        self.workers[name] = msgspec.structs.replace(self.workers[name], **changes)

    async def look(self) -> LastStatus:
        at_s = int(10 * (time.time() - self.silent_s)) / 10
        workers = []
        for status in self.workers.values():
            tokens = round(self.tokens_per_s * at_s) if status.role == "attention" else 0
            rows = round(self.rows_per_s.get(status.name, 0) * at_s)
            state: EngineState = msgspec.structs.replace(status.state, generated_tokens=tokens, expert_rows=rows)
            workers.append(msgspec.structs.replace(status, state=state))
        return LastStatus(
            ClusterStatus(
                cluster="ours", model=MODEL, epoch=4, controller_id="c", at_s=at_s, num_layers=3, num_experts=4,
                nodes=tuple(self.nodes), workers=tuple(workers), problem=self.problem,
            )
        )  # fmt: skip


async def visit(page: Page, address: str) -> None:
    page.requests.clear()
    page.complaints.clear()
    await page.send("Page.navigate", url=address)


def tile(name: str) -> str:
    """What stands below this name, as a JavaScript expression."""
    return f"[...document.querySelectorAll('#numbers dt')].find((x) => x.innerText === '{name}')?.nextSibling.innerText"


async def texts(page: Page, selector: str) -> list[str]:
    """The words of each element, one space between them."""
    shown = f"[...document.querySelectorAll({selector!r})].map((x) => x.innerText.split(/\\s+/).join(' ').trim())"
    found: list[str] = await page.evaluate(shown)
    return found


async def test_it_follows_the_cluster(page: Page, open_gateway: OpenGateway) -> None:
    script = Script()
    await page.emulate(1400, 900)
    async with open_gateway(script) as address:
        await visit(page, address)
        await page.until(f"{tile('Tokens a second')} === '2,000'")
        assert await texts(page, "#subtitle") == [f"{MODEL} on the cluster ours"]
        assert await texts(page, "#warnings *") == []
        assert await texts(page, "#nodes > li") == [
            "n0 3 GiB of memory · 2 × cuda attention-0 serving 1,000 tokens/s, 3 running, 40 waiting",
            f"n1 1 GiB of memory {MARKUP} serving 1,000 tokens/s, 1 running "
            "expert-0 serving 2,500 rows/s, holds 4 experts",
            f"{LONG} expert-1 serving 40.0 rows/s, holds 4 experts",
        ]
        assert await texts(page, "#workers tr") == [
            "attention-0 attention n0 serving – 3 40 2 of 8 1,000 –",
            f"{MARKUP} attention n1 serving – 1 0 0 of 8 1,000 –",
            "expert-0 expert n1 serving 4 – – – – 2,500",
            f"expert-1 expert {LONG} serving 4 – – – – 40.0",
        ]
        labels = "[...document.querySelectorAll('#shards svg')].map((x) => x.getAttribute('aria-label'))"
        each = "2 in layer 0, 2 in layer 2"
        assert await page.evaluate(labels) == [f"Experts of expert-{i}: {each}" for i in range(2)]
        drawn = "document.querySelector('#shards svg path').getAttribute('d')"
        assert await page.evaluate(drawn) == "M0 0h2v1h-2zM0 2h1v1h-1zM2 2h1v1h-1z"
        assert await page.evaluate(f"[{tile('Workers serving')}, {tile('Experts held')}]") == ["4 of 4", "8 of 8"]
        assert await page.evaluate("document.querySelectorAll('img').length") == 0

        script.tokens_per_s = 3000  # counters of other processes from here on: there is no jump
        for name in ("attention-0", MARKUP):
            script.change(name, state=msgspec.structs.replace(script.workers[name].state, worker_id=f"{name}#2"))
        script.change("expert-1", condition="lost")
        script.rows_per_s["expert-0"] = 100
        script.change("expert-0", state=msgspec.structs.replace(script.workers["expert-0"].state, worker_id="new"))
        script.nodes[2] = NodeStatus(LONG, 0, is_alive=False)
        script.problem = "a node is missing"
        await page.until(f"{tile('Tokens a second')} === '6,000'")
        assert await texts(page, "#warnings p") == ["A node is missing"]
        assert await page.evaluate(f"[{tile('Workers serving')}, {tile('Experts held')}]") == ["3 of 4", "4 of 8"]
        assert (await texts(page, "#nodes > li"))[2] == f"{LONG} lost It has left the cluster. expert-1 lost"
        assert "4 are on no live worker" in (await texts(page, "#shards-note"))[0]
        rows = "[...document.querySelectorAll('#workers td:last-child')].map((x) => x.innerText).join()"
        await page.until(f"{rows} === '–,–,100,–'")

        script.workers.pop("expert-1")
        script.workers["expert-0"] = holding(script.workers["expert-0"], (0, 1, 2, 3), (), (0, 1, 2, 3))
        script.nodes.pop()
        script.problem = None
        await page.until(f"{tile('Experts held')} === '8 of 8'")
        assert len(await texts(page, "#nodes > li")) == 2
        assert await texts(page, "#warnings *") == []
        assert await page.evaluate(drawn) == "M0 0h4v1h-4zM0 2h4v1h-4z"
        await page.until("document.querySelectorAll('#shards > li').length === 1")
        assert not page.complaints
        asked = {request.removeprefix(address) for request in page.requests}
        assert {"", "cluster", "v1/capabilities"} <= asked
        assert all(re.fullmatch(r"|cluster|v1/capabilities|dashboard/\w+\.(js|css|svg)", path) for path in asked)


async def test_old_news_is_called_old(page: Page, open_gateway: OpenGateway) -> None:
    script = Script()
    async with open_gateway(script) as address:
        await visit(page, address)
        await page.until(f"{tile('Tokens a second')} === '2,000'")
        script.silent_s = 65
        await page.until("document.querySelector('#warnings').innerText.includes('1 minute old')")
        assert await page.evaluate(tile("Tokens a second")) == "–"
        for node in await texts(page, "#nodes > li"):
            assert "/s" not in node
        assert await page.evaluate(OLD) == ["old", "old"]
        assert await texts(page, "#connection") == ["old numbers"]
        script.silent_s = 0
        await page.until("document.querySelector('#warnings').innerText === ''")
        await page.until(f"{tile('Tokens a second')} === '2,000'")
        assert await page.evaluate(OLD) == ["", ""]
        assert await texts(page, "#connection") == ["live"]
    await page.until("document.querySelector('#warnings').innerText.includes('gateway does not answer')")
    assert len(await texts(page, "#workers tr")) == 4
    assert await page.evaluate(OLD) == ["old", "old"]
    assert await texts(page, "#connection") == ["not connected"]


@pytest.mark.parametrize("width", [360, 700, 1000, 1600])
async def test_it_fits_the_screen(page: Page, open_gateway: OpenGateway, width: int) -> None:
    await page.emulate(width, 800, "dark")
    async with open_gateway(Script()) as address:
        await visit(page, address)
        await page.until("document.querySelectorAll('#workers tr').length === 4")
        hidden = "thead, thead *, .unseen" if width < 1024 else ".unseen"
        shown = f"[...document.querySelectorAll('main :not({hidden})')]"
        inside = f"{shown}.every((x) => x.getBoundingClientRect().right <= {width})"
        assert await page.evaluate(inside), "something sticks out"
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        tree = await page.send("Accessibility.getFullAXTree")
        roles = [node["role"]["value"] for node in tree["nodes"] if "role" in node]
        assert roles.count("columnheader") == 10  # a table for who listens, whatever it looks like
        assert roles.count("rowheader") == 4


async def test_the_keyboard_gets_to_the_numbers(page: Page, open_gateway: OpenGateway) -> None:
    async with open_gateway(Script()) as address:
        await visit(page, address)
        await page.until("document.querySelectorAll('#workers tr').length === 4")
        for place in ("message", "live"):
            await page.press("Tab")
            skip = "[document.activeElement.hash, document.activeElement.getBoundingClientRect().left >= 0]"
            assert await page.evaluate(skip) == [f"#{place}", True]
        await page.press("Enter")
        await page.until("document.activeElement.id === 'live'")
