"""`make picture`: the page as docs/images/page.png shows it, of a cluster on this machine while a chat is answered."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path

import aiohttp

from loadtests.cluster_process import NUM_NODES, LocalCluster, local_cluster, own_settings
from tests.support.browser import Page, open_page

START_S = 240.0
WIDTH, HEIGHT = 1440, 800  # it is made as high as what it shows
MARGIN = 24
MAX_BYTES = 300_000
NUM_OTHERS = 3  # who ask at the same time, so that there is something to see
OTHERS_S = 60.0  # before the picture is taken
MAX_TRIES = 50
FIRST, SECOND = "What is a river?", "What is a mountain?"
PROMPTS = ("What is bread?", "What is a bridge?", "What is the moon?", "What is a violin?", "What is iron?")


async def ask_on(session: aiohttp.ClientSession, url: str, offset: int) -> None:
    for prompt in itertools.islice(itertools.cycle(PROMPTS), offset, None):
        body = {"messages": [{"role": "user", "content": prompt}], "min_tokens": 20 + 15 * offset, "max_tokens": 160}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            await response.read()
        await asyncio.sleep(offset)


async def ask(page: Page, text: str) -> None:
    await page.evaluate("document.querySelector('#message').focus()")
    await page.type(text)
    await page.press("Enter")


async def take(page: Page) -> bytes:
    """A picture with a reply in the midst of being written. Raises `TimeoutError` where none lasted long enough."""
    for _ in range(MAX_TRIES):
        await page.evaluate("document.querySelector('#new-chat').click()")
        await ask(page, FIRST)
        await page.until("document.querySelectorAll('.reply-foot button').length === 1")
        await ask(page, SECOND)
        written = "[...document.querySelectorAll('.written')].at(-1).innerText.length"
        await page.until(
            f"document.querySelectorAll('.written').length === 2 && {written} > 30"
            " || document.querySelectorAll('.reply-foot button').length === 2"
        )
        picture = await page.screenshot(is_whole=False)
        if await page.evaluate("document.querySelectorAll('.writing').length") == 1:
            return picture
        await page.until("document.querySelectorAll('.reply-foot button').length === 2")
    raise TimeoutError(f"none of {MAX_TRIES} replies was still being written when its picture had been taken")


async def picture_of(url: str, scheme: str) -> bytes:
    async with open_page() as page, aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        others = [group.create_task(ask_on(session, url, i)) for i in range(NUM_OTHERS)]
        await page.emulate(WIDTH, HEIGHT, scheme)
        await page.send("Page.navigate", url=f"{url}/")
        await page.until("document.querySelector('#connection')?.innerText === 'live'")
        await asyncio.sleep(OTHERS_S)
        bottom = "Math.max(...[playground, live].map((part) => part.getBoundingClientRect().bottom))"
        await page.emulate(WIDTH, round(await page.evaluate(bottom)) + MARGIN, scheme)
        picture = await take(page)
        for task in others:
            task.cancel()
    return picture


@contextlib.contextmanager
def running_cluster() -> Iterator[LocalCluster]:
    settings = own_settings(local=NUM_NODES, cluster_name=f"picture-{secrets.token_hex(4)}")
    with local_cluster(settings) as cluster:
        cluster.wait_whole(START_S)
        yield cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--url", help="of a server that runs already, in place of a cluster", default="")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url.rstrip("/") or stack.enter_context(running_cluster()).url
        picture = asyncio.run(picture_of(url, options.scheme))
    if len(picture) > MAX_BYTES:
        raise SystemExit(f"the picture has {len(picture)} bytes, more than the {MAX_BYTES} that it may have")
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_bytes(picture)
    print(f"{options.file}: {len(picture)} bytes")


if __name__ == "__main__":
    main()
