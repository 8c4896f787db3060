"""The login form in a real browser: what it sends is what the server asks of it, and then the page works."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cluster.gateway.auth import Keys, parse_keys
from cluster.gateway.status import LastStatus
from tests.browser.conftest import OpenGateway
from tests.support.browser import DEADLINE_S, Page

pytestmark = [pytest.mark.anyio, pytest.mark.needs("chromium"), pytest.mark.timeout(240)]

KEY = "a-key-of-the-browser's".replace("'", "_")


class Nothing:
    async def look(self) -> LastStatus:
        return LastStatus(None, "nothing is known yet")


async def until(page: Page, condition: str) -> None:
    """Like `page.until`, over pages that come and go."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(RuntimeError):  # the document was just replaced
                if await page.evaluate(condition):
                    return
            await asyncio.sleep(0.01)


async def log_in(page: Page, key: str) -> None:
    await page.evaluate(f"document.querySelector('#key').value = {key!r}; document.querySelector('button').click()")


async def test_a_browser_logs_in_once(page: Page, open_gateway: OpenGateway) -> None:
    async with open_gateway(Nothing(), Keys.of(parse_keys(KEY, "test"), None)) as address:
        await page.send("Page.navigate", url=address)
        await until(page, "document.activeElement?.id === 'key'")
        assert await page.evaluate("getComputedStyle(document.querySelector('button')).display") == "block"
        await log_in(page, "x" * 20)
        await until(page, "document.querySelector('[role=alert]') !== null")
        page.complaints.clear()
        await log_in(page, KEY)
        await until(page, "document.querySelector('#warnings')?.innerText.includes('othing is known yet')")
        assert await page.evaluate("document.cookie") == ""
        assert await page.evaluate("location.href") == address
        page.requests.clear()
        await page.send("Page.navigate", url=f"{address}cluster")
        await until(page, "document.body?.innerText.includes('open_requests')")
        assert not [complaint for complaint in page.complaints if "401" not in complaint]
        # another site's form, as a page without an address has it
        await page.send("Page.navigate", url="about:blank")
        form = f"<form method=post action='{address}admin/drain'><button>x</button></form>"
        await until(page, "location.href === 'about:blank'")
        await page.evaluate(f"document.body.innerHTML = `{form}`; document.querySelector('button').click()")
        await until(page, "document.body?.innerText.includes('invalid_api_key')")
