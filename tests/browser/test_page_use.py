"""The page in use: its numbers while it is asked, by keyboard, for who listens, in light and dark, on small screens."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from cluster.protocol import EngineState
from tests.browser.playground import ALL, Playground, text_of
from tests.support.scripted_worker import say

pytestmark = [pytest.mark.anyio, pytest.mark.needs("chromium"), pytest.mark.timeout(240)]


async def test_the_numbers_follow_a_request(playground: Playground) -> None:
    await playground.open()
    page, worker = playground.page, playground.worker

    async def work() -> None:
        while True:
            state = worker.state
            worker.state = msgspec.structs.replace(
                state,
                num_running=9,
                num_waiting=5,
                pages_free=16,
                steps=state.steps + 10,
                prompt_tokens=state.prompt_tokens + 40,
                step_tokens=state.step_tokens + 60,
                generated_tokens=state.generated_tokens + 20,
            )
            await asyncio.sleep(0.02)

    def tile(name: str) -> str:
        return f"[...{ALL}('#numbers > div')].find((x) => x.innerText.startsWith({name!r}))?.innerText"

    before: EngineState = worker.state
    await page.until(f"{tile('Sequences running')}?.startsWith('Sequences running\\n3\\n0 waiting')")
    assert "0" in await page.evaluate(tile("Open requests"))
    await playground.pause_after(3)
    await playground.ask("Hi")
    task = asyncio.create_task(work())
    try:
        await page.until(f"{tile('Sequences running')}.startsWith('Sequences running\\n9\\n5 waiting')")
        await page.until(f"{tile('Open requests')}.startsWith('Open requests\\n1')")
        assert await page.evaluate(f"{tile('KV cache in use')}.split('\\n').slice(1)") == ["75 %", "48 of 64 pages"]
        await page.until(f"{text_of('#decode-now')} === '2.0' && {text_of('#prompt-now')} === '4.0'")
        await page.until("document.querySelector('#decode-line').getAttribute('d').includes('L')")
        assert await page.evaluate("document.querySelector('#tokens-line').getAttribute('d').includes('L')")
        playground.go_on()
        await playground.answered()
        for name in ("Time to first token", "Between tokens"):
            await page.until(f"/^{name}\\n[\\d.]+ m?s p50\\np99 [\\d.]+ m?s$/.test({tile(name)})")
        await page.until(f"{tile('Open requests')}.startsWith('Open requests\\n0')")
    finally:
        task.cancel()
        worker.state = before


async def test_a_lost_connection_is_said_and_found_again(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    await page.until("document.querySelector('#connection').innerText === 'live'")

    async def go_offline(offline: bool) -> None:
        rates = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await page.send("Network.emulateNetworkConditions", offline=offline, **rates)

    await go_offline(True)
    try:
        await page.until("document.querySelector('#connection').innerText === 'not connected'")
        assert await page.evaluate("live.className") == "old"
        assert "does not answer" in await page.evaluate("warnings.innerText")
        await playground.ask("Hi")
        await playground.answered()
        assert "The gateway did not answer" in (await playground.text(".error") or "")
    finally:
        await go_offline(False)
    await page.until("document.querySelector('#connection').innerText === 'live'")
    assert await page.evaluate("[live.className, warnings.innerText]") == ["", ""]
    await page.evaluate("document.querySelector('#send').click()")  # what was asked is there to be sent again
    await playground.answered(2)
    assert await playground.text(".written") == "Hello, wörld! 🦀"


async def test_sentences_are_read_out_now_and_then(playground: Playground) -> None:
    await playground.open()
    said = await playground.page.evaluate("""(async () => {
        const { Announcer } = await import("./dashboard/announcer.js");
        const [said, announcer] = [[], new Announcer()];
        const step = (at_ms, work) => {
            performance.now = () => at_ms;
            work();
            said.push(document.querySelector("#announcer").textContent);
        };
        step(0, () => announcer.begin());
        step(3000, () => announcer.follow("One. Two. Thr"));
        step(5000, () => announcer.follow("One. Two. Three"));
        step(8000, () => announcer.follow("One. Two. Three. Fo"));
        step(8500, () => announcer.end("One. Two. Three. Four", "It is complete."));
        return said;
    })()""")
    assert said == ["The model is writing."] * 2 + ["One. Two."] * 2 + ["Three. Four It is complete."]


async def test_all_of_it_works_by_keyboard(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    await page.evaluate("document.querySelectorAll('#settings details').forEach((x) => (x.open = true))")
    reached, outlined = [], []
    for _ in range(60):
        await page.press("Tab")
        name, style = await page.evaluate(
            "((x) => [x.id || x.name || x.textContent.trim(), getComputedStyle("
            "x.type === 'radio' ? x.nextSibling : x).outlineStyle])(document.activeElement)"
        )
        if name in reached[:1]:
            break
        reached.append(name)
        outlined.append(style)
    controls = f"[...{ALL}('main button, main input, main textarea, main select')].filter((x) => x.checkVisibility())"
    names = set(await page.evaluate(f"{controls}.map((x) => x.id || x.name || x.textContent.trim())"))
    assert len(names) >= 18
    assert names <= set(reached), names - set(reached)
    assert {"theme", "Skip to the message"} <= set(reached)
    assert "none" not in outlined[: len(names)]
    tree = (await page.send("Accessibility.getFullAXTree"))["nodes"]
    roles = {"button", "textbox", "spinbutton", "radio", "combobox", "link", "region", "form", "img"}
    found = [node for node in tree if not node["ignored"] and node["role"]["value"] in roles]
    unnamed = [node["role"] for node in found if not node.get("name", {}).get("value")]
    assert len(found) >= 25
    assert not unnamed

    await playground.open()
    await page.press("Tab")
    await page.press("Enter")
    await page.until("document.activeElement.id === 'message'")
    await page.type("one")
    await page.press("Enter", shift=True)
    await page.type("two")
    assert await page.evaluate("document.querySelector('#message').value") == "one\ntwo"
    await playground.pause_after(2)
    await page.press("Enter")
    await page.until(f"{text_of('.written')} === 'He'")
    await page.press("Tab")
    assert await page.evaluate("document.activeElement.id") == "stop"
    await page.press("Enter")
    await playground.worker.wait_for_aborts()
    await playground.answered()
    assert await page.evaluate("document.activeElement.id") == "message"
    assert "user\none\ntwo" in playground.prompt()


async def test_light_and_dark(playground: Playground) -> None:
    page = playground.page
    back = "getComputedStyle(document.body).backgroundColor"
    colours = {}
    for scheme in ("light", "dark"):
        await page.emulate(1600, 1000, scheme)
        await playground.open()
        colours[scheme] = await page.evaluate(back)
    assert colours["light"] != colours["dark"]
    label = "document.querySelector('#theme').textContent"
    for choice, shown in (("light", "light"), ("dark", "dark"), ("system", "dark"), ("light", "light")):
        await page.evaluate("document.querySelector('#theme').click()")
        assert await page.evaluate(f"[{label}, {back}]") == [f"Theme: {choice}", colours[shown]]
    await playground.open()  # it is remembered
    assert await page.evaluate(f"[{label}, {back}]") == ["Theme: light", colours["light"]]
    await page.evaluate("localStorage.clear()")
    await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    await playground.open()
    await playground.pause_after(2)
    await playground.ask("Hi")
    await page.until(f"{text_of('.written')} === 'He'")
    moves = "getComputedStyle(document.querySelector('.written'), '::after').animationName"
    assert await page.evaluate(moves) == "none"
    playground.go_on()
    await playground.answered()
    await page.emulate(1600, 1000)


async def test_a_long_word_fits_a_small_screen(playground: Playground) -> None:
    await playground.page.emulate(360, 700)
    await playground.open()
    page = playground.page
    top, bottom = "querySelector('.bar').getBoundingClientRect().bottom", "composer.getBoundingClientRect().top"
    between = f"((x) => document.{top} <= x.top && x.bottom <= {bottom})(empty.getBoundingClientRect())"
    assert await page.evaluate(between)
    playground.worker.answer = say("a" * 300)
    await playground.ask("b" * 200)
    await playground.answered()
    assert await page.evaluate("document.documentElement.scrollWidth") <= 360
    assert await page.evaluate("document.querySelector('#transcript').scrollWidth") <= 360
    assert await page.evaluate("document.querySelector('[name=seed]').checkVisibility()") is False
    await page.evaluate("document.querySelector('#settings-toggle').click()")
    assert await page.evaluate("document.querySelector('[name=seed]').checkVisibility()") is True
    assert await page.evaluate("document.querySelector('#settings-toggle').ariaExpanded") == "true"
    # a reader of the end stays there, and gets back up by key
    await page.until("((x) => x.scrollHeight - x.scrollTop - x.clientHeight)(transcript) <= 48")
    assert await page.evaluate("transcript.scrollHeight > transcript.clientHeight && transcript.tabIndex === 0")
    await page.emulate(1600, 1000)
