"""The playground in a real browser, in front of a worker that says what a test wants, one token a step."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from cluster.gateway.auth import Keys, parse_keys
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.protocol import Finish, RequestOutput
from tests.browser.conftest import MODEL, OpenGateway
from tests.browser.playground import ALL, IDLE, RUNNING, Playground, text_of
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, say, text_ids

pytestmark = [pytest.mark.anyio, pytest.mark.needs("chromium"), pytest.mark.timeout(240)]

MARKUP = "<img src=x onerror=\"document.title='owned'\"> <b>bold</b>"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm", "note": "<b>x</b>"}}\n</tool_call>'
KEY = "a-key-of-the-browsers-own"


async def test_a_chat_is_shown_as_it_comes(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    await playground.pause_after(5)
    await playground.ask("Say hello\nto Ulm")
    await page.until(f"{text_of('.written')} === 'Hello'")
    assert await page.evaluate(RUNNING)
    assert await page.evaluate(f"{ALL}('.writing').length") == 1
    assert await playground.text(".asked .text") == "Say hello\nto Ulm"
    assert await page.evaluate("document.querySelector('#message').value") == ""
    assert await page.evaluate("document.querySelector('#empty').hidden")
    assert await playground.text("#announcer") == "The model is writing."  # and not each token
    assert await page.evaluate("document.querySelector('#transcript').closest('[aria-live]')") is None
    await playground.ask("Not while it writes")
    playground.go_on()
    await playground.answered()
    assert await playground.text(".written") == "Hello, wörld! 🦀"
    numbers = await playground.text(".reply-numbers")
    assert numbers is not None
    for part in ("20 tokens", "first token after", "tokens/s", "prompt"):
        assert part in numbers
    assert (await playground.text("#announcer") or "").endswith("The reply is complete: 20 tokens.")
    assert await page.evaluate("document.querySelector('#message').value") == "Not while it writes"

    await playground.ask("And again")
    await playground.answered(2)
    for said in ("user\nSay hello\nto Ulm", "assistant\nHello, wörld! 🦀", "user\nAnd again"):
        assert said in playground.prompt()
    await page.evaluate("document.querySelector('#new-chat').click()")
    assert await page.evaluate(f"{ALL}('#transcript *').length") == 0
    await page.evaluate("document.querySelector('#examples button').click()")
    await playground.answered()
    assert "Say hello" not in playground.prompt()
    assert "user\nWhat is a river?" in playground.prompt()
    assert len(playground.worker.submits) == 3
    assert not page.complaints
    assert {request[: len(playground.address)] for request in page.requests} == {playground.address}


@pytest.mark.parametrize("how", ["Escape", "the button"])
async def test_stopping_aborts(playground: Playground, how: str) -> None:
    await playground.open()
    page = playground.page
    await playground.pause_after(3)
    await playground.ask("Go on")
    await page.until(f"{text_of('.written')} === 'Hel'")
    if how == "Escape":
        await page.press("Escape")
    else:
        await page.evaluate("document.querySelector('#stop').focus(); document.querySelector('#stop').click()")
    await playground.worker.wait_for_aborts()
    assert playground.worker.aborts == [playground.worker.submits[0].request_id]
    await playground.answered()
    assert await playground.text(".reply-end") == "Stopped."
    assert await page.evaluate("document.activeElement.id") == "message"
    playground.go_on()
    await playground.ask("And now?")
    await playground.answered(2)
    assert "assistant\nHeluser\nAnd now?" in playground.prompt().replace("\n\n", "\n").replace("Hel\n", "Hel")
    assert not page.complaints


async def test_a_new_chat_stops_the_old_one(playground: Playground) -> None:
    await playground.open()
    await playground.pause_after(3)
    await playground.ask("Go on")
    await playground.page.until(f"{text_of('.written')} === 'Hel'")
    await playground.page.evaluate("document.querySelector('#new-chat').click()")
    await playground.worker.wait_for_aborts()
    await playground.page.until(IDLE)
    playground.go_on()
    await playground.ask("Something else")
    await playground.answered()
    assert "Go on" not in playground.prompt()


async def test_errors_are_shown_as_what_they_are(playground: Playground, open_gateway: OpenGateway) -> None:
    await playground.open()
    page, worker = playground.page, playground.worker
    await playground.write("5", "[name=temperature]")
    await playground.ask("Hot?")
    await playground.answered()
    error = await playground.text(".error")
    assert error is not None
    for part in ("400 · invalid_value", "temperature: ", "less than or equal to 2", "Go to temperature"):
        assert part in error
    assert await page.evaluate("document.querySelector('[name=temperature]').ariaInvalid") == "true"
    assert await page.evaluate("document.querySelector('#message').value") == "Hot?"
    assert "less than or equal to 2" in (await playground.text("#announcer") or "")
    await page.evaluate("document.querySelector('.error button').click()")
    assert await page.evaluate("document.activeElement.name") == "temperature"
    await page.evaluate("document.querySelector('#settings').requestSubmit()")  # leads nowhere
    await playground.write("1", "[name=temperature]")
    assert await page.evaluate("document.querySelector('[name=temperature]').ariaInvalid") is None

    await playground.write("[{", "[name=tools]")
    await playground.ask("With tools")
    await page.until(f"{text_of('.error')}.includes('tools: ')")
    assert worker.submits == []
    await page.evaluate("document.querySelector('#settings').reset()")

    worker.raw = lambda submit: [
        RequestOutput(request_id=submit.request_id, index=0, token_ids=[72], text="H"),
        RequestOutput(
            request_id=submit.request_id,
            index=1,
            finish=Finish(reason="error", error_code="engine_error", error_message="the engine broke"),
        ),
    ]
    await playground.ask("Break")
    await playground.answered(2)
    assert await playground.text(".written") == "H"
    assert (await playground.text(".error") or "").split("\n")[0].startswith("Ended early · ")
    assert "the engine broke" in (await playground.text(".error") or "")
    # the browser itself tells of the 400
    assert all("400" in complaint for complaint in page.complaints)

    worker.raw = None
    async with open_gateway() as address:
        await playground.open(address)
    await playground.ask("Is anybody there?")
    await playground.answered()
    assert "The gateway did not answer" in (await playground.text(".error") or "")
    assert await page.evaluate("document.querySelector('#message').value") == "Is anybody there?"


async def test_what_is_set_is_sent(playground: Playground) -> None:
    await playground.open()
    values = {
        "system": "Be brief.",
        "temperature": "0.5",
        "max_tokens": "7",
        "top_p": "0.9",
        "top_k": "12",
        "min_p": "0.05",
        "seed": "42",
        "stop": "END\\n\nX",
        "presence_penalty": "0.25",
        "frequency_penalty": "-0.5",
        "repetition_penalty": "1.1",
    }
    for name, value in values.items():
        await playground.write(value, f"[name={name}]")
    choose = "((x) => { x.value = 'low'; x.dispatchEvent(new Event('input', { bubbles: true })); })"
    await playground.page.evaluate(f"{choose}(document.querySelector('[name=reasoning_effort]'))")
    await playground.ask("Hi")
    await playground.answered()
    submit = playground.worker.submits[-1]
    sampling, stopping = submit.sampling, submit.stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 12, 0.05)
    assert (sampling.seed, stopping.max_tokens, stopping.stop) == (42, 7, ("END\n", "X"))
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (0.25, -0.5, 1.1)
    assert "system\nBe brief." in playground.prompt()
    assert "assistant effort=low" in playground.prompt()
    assert await playground.page.evaluate("document.querySelector('#settings-changed').textContent") == "12 set"
    assert "cut at the limit" in (await playground.text(".reply-numbers") or "")


async def test_a_completion_goes_on_with_a_text(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    disabled = f"[...{ALL}('#settings [name]:disabled')].map((x) => x.name)"
    assert await page.evaluate(disabled) == []
    await page.evaluate("document.querySelector('[value=chat]').focus()")
    await page.press("ArrowRight")
    assert await page.evaluate("document.activeElement.value") == "completions"
    assert await page.evaluate(disabled) == ["system", "reasoning_effort", "tools"]
    assert await page.evaluate("document.querySelector('.not-here').innerText") == "not in this mode"
    playground.worker.answer = say(" upon a time")
    await playground.ask("Once")
    await playground.answered()
    assert await playground.text(".reply .text") == "Once upon a time"
    assert list(playground.worker.submits[-1].prompt_ids)[-4:] == text_ids("Once")
    assert await page.evaluate("document.querySelector('#message').value") == "Once"  # to be tried again
    await page.evaluate("document.querySelector('[value=completions]').focus()")
    await page.press("ArrowLeft")
    assert await page.evaluate(disabled) == []
    assert await page.evaluate(f"{ALL}('#transcript *').length") == 0
    assert not page.complaints


async def test_thoughts_are_folded_and_calls_can_be_answered(playground: Playground) -> None:
    await playground.open()
    page, worker = playground.page, playground.worker
    await playground.write(json.dumps([WEATHER]), "[name=tools]")
    worker.answer = say(f"<think>\nHm, {MARKUP}\n</think>\n\nI look.\n{CALL}")
    await playground.ask("Weather?")
    await playground.answered()
    assert await page.evaluate("document.querySelector('.thoughts').open") is False
    assert (await playground.text(".thoughts summary") or "").startswith("Thought for ")
    assert (await page.evaluate("document.querySelector('.thoughts .text').textContent")) == f"Hm, {MARKUP}"
    assert await playground.text(".call h4") == "Calls weather"
    assert await playground.text(".call pre") == json.dumps({"place": "Ulm", "note": "<b>x</b>"}, indent=2)
    worker.answer = say("It rains.")
    await playground.write("rain", ".call textarea")
    await page.evaluate("document.querySelector('#send').click()")
    await playground.answered(2)
    assert "<tool_response>\nrain\n</tool_response>" in playground.prompt()
    assert '{"name": "weather", "arguments": {"' in playground.prompt()
    assert await playground.text(".written") == "It rains."
    assert await page.evaluate("document.querySelector('.call textarea').readOnly")
    assert await page.evaluate(f"{ALL}('#transcript img, #transcript b').length") == 0


async def test_text_stays_text(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    playground.worker.answer = say(MARKUP)
    await playground.ask(MARKUP)
    await playground.answered()
    assert await playground.text(".written") == MARKUP
    assert await playground.text(".asked .text") == MARKUP
    await page.evaluate("document.querySelector('[value=completions]').click()")
    await playground.ask(MARKUP)
    await playground.answered()
    assert await playground.text(".reply .text") == MARKUP + MARKUP
    assert await page.evaluate(f"{ALL}('main img, main b').length") == 0
    assert await page.evaluate("document.title") == f"{MODEL} · Foretoken"
    inline = "document.body.append(Object.assign(document.createElement('script'), { text: 'document.title = 1' }))"
    await page.evaluate(inline)
    assert await page.evaluate("document.title") == f"{MODEL} · Foretoken"  # the policy forbids it


async def test_a_request_is_copied_as_curl(playground: Playground) -> None:
    await playground.open()
    page = playground.page
    await playground.ask("It's me")
    await playground.answered()
    stub = "Object.defineProperty(navigator, 'clipboard', { value: { writeText: async (text) => { %s } } })"
    await page.evaluate(stub % "window.copied = text")
    await page.evaluate("document.querySelector('.reply-foot button').click()")
    await page.until(f"{text_of('.reply-foot button')} === 'Copied'")
    words = shlex.split((await page.evaluate("window.copied")).replace("\\\n", ""))
    assert words[:3] == ["curl", "-N", f"{playground.address}v1/chat/completions"]
    body = json.loads(words[-1])
    assert body == {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "It's me"}]}
    async with httpx.AsyncClient() as client:
        reply = await client.post(words[2], content=words[-1], headers={"content-type": "application/json"})
    assert reply.text.endswith("data: [DONE]\n\n")

    await playground.open()  # a browser that gives no clipboard
    await page.evaluate(stub % "throw new Error('no')")
    await playground.ask("It's me")
    await playground.answered()
    await page.evaluate("document.querySelector('.reply-foot button').click()")
    await page.until("document.activeElement.className === 'curl'")
    assert "It'\\''s me" in await page.evaluate("document.activeElement.value")


@pytest.fixture
async def locked(playground: Playground, open_gateway: OpenGateway, tmp_path: Path) -> AsyncIterator[Playground]:
    """The same of a gateway that asks for a key."""
    worker = ScriptedWorker(f"unix:{tmp_path}/worker.sock")
    await worker.start()
    pool = WorkerPool([Endpoint("worker", worker.address)], reconnect_delay_s=0.01)
    async with open_gateway(pool=pool, keys=Keys.of(parse_keys(KEY, "test"), None)) as address:
        await pool.ready(DEADLINE_S)
        yield Playground(playground.page, worker, pool, address)
    await worker.kill()


async def test_who_has_logged_in_can_ask(locked: Playground) -> None:
    playground, page, address = locked, locked.page, locked.address
    async with httpx.AsyncClient() as client:
        login = await client.post(f"{address}login", data={"key": KEY}, headers={"origin": address.rstrip("/")})
    (name, value), *_ = login.cookies.items()
    await page.send("Network.setCookie", url=address, name=name, value=value, httpOnly=True, sameSite="Strict")
    await playground.open()
    await playground.ask("Hi")
    await playground.answered()
    assert await playground.text(".written") == "Hello, wörld! 🦀", await playground.text(".error")
    await page.until("document.querySelector('#connection').innerText === 'live'")
    stub = "{ value: { writeText: async (text) => { window.copied = text } } }"
    await page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {stub})")
    await page.evaluate("document.querySelector('.reply-foot button').click()")
    await page.until(f"{text_of('.reply-foot button')} === 'Copied'")
    assert '-H "Authorization: Bearer $FORETOKEN_API_KEY"' in await page.evaluate("window.copied")

    await page.send("Network.clearBrowserCookies")  # the session is over
    await page.until("document.querySelector('#warnings').innerText.includes('log in again')")
    await playground.ask("Hi")
    await playground.answered(2)
    assert "401" in (await playground.text(".error") or "")
