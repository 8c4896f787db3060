"""What a gateway knows of a worker's backlog, and what follows for a request: header, refusal, histogram."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from cluster.errors import OverloadedError
from cluster.gateway.backlog import Backlog, OwnLoad, Prediction, SeenPages, page_hashes
from cluster.gateway.limits import check_ttft
from cluster.gateway.ttft import PRIOR, RequestSize
from cluster.protocol import EngineState, Sampling, Stopping, Submit
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, hello
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio
HEADER = "x-foretoken-predicted-ttft-ms"
NOTHING = OwnLoad(num_decoding=0, num_without_token=0, prompt_tokens=0)
STATE = EngineState(worker_id="worker-1", pages_total=64, pages_free=64)


def submit(ids: range | list[int], **changes: Any) -> Submit:
    values = {"request_id": "r", "sampling": Sampling(seed=1), "stopping": Stopping(max_tokens=4)} | changes
    return Submit(prompt_ids=tuple(ids), **values)


def connected(**changes: Any) -> Backlog:
    backlog = Backlog()
    backlog.connected(hello(**changes))
    return backlog


def ttft_s(backlog: Backlog, length: int = 100, own: OwnLoad = NOTHING) -> float:
    prediction = backlog.predict([submit(range(length))], own)
    assert prediction is not None
    return prediction.ttft_s


# ---------------------------------------------------------------------------------------------------- what is known


def test_nothing_is_predicted_before_a_worker_was_there() -> None:
    assert Backlog().predict([submit(range(9))], NOTHING) is None
    assert Backlog().snapshot(NOTHING) is None


def test_our_own_sequences_are_known_at_once_and_the_others_as_they_were_told() -> None:
    backlog = connected()
    own = OwnLoad(num_decoding=2, num_without_token=1, prompt_tokens=100)
    backlog.told(
        msgspec.structs.replace(STATE, num_running=6, num_waiting=3, prompt_tokens_ahead=500, pages_free=7), own
    )
    found = backlog.snapshot(own)
    assert found is not None
    assert (found.num_running, found.num_waiting, found.prompt_tokens_ahead) == (6, 3, 500)
    assert (found.pages_free, found.token_budget, found.max_num_seqs, found.page_size) == (7, 2048, 64, 64)
    more = backlog.snapshot(OwnLoad(num_decoding=2, num_without_token=5, prompt_tokens=900))
    assert more is not None
    assert (more.num_running, more.num_waiting, more.prompt_tokens_ahead) == (6, 7, 1300)


def test_what_is_still_on_its_way_to_a_worker_is_nobody_elses() -> None:
    backlog = connected()
    own = OwnLoad(num_decoding=0, num_without_token=5, prompt_tokens=900)
    backlog.told(STATE, own)
    found = backlog.snapshot(own)
    assert found is not None
    assert (found.num_running, found.num_waiting, found.prompt_tokens_ahead) == (0, 5, 900)


def test_another_process_of_that_name_has_an_empty_cache_and_nobody_waits_there() -> None:
    backlog = connected()
    backlog.told(msgspec.structs.replace(STATE, num_running=3), NOTHING)
    backlog.began(backlog.prefix(submit(range(128))), num_cached=0)
    assert backlog.prefix(submit(range(128))).num_cached == 128
    backlog.connected(hello(worker_id="worker-2"))
    assert backlog.prefix(submit(range(128))).num_cached == 0
    found = backlog.snapshot(NOTHING)
    assert found is not None
    assert (found.num_running, found.pages_free) == (0, 64)


def test_a_longer_backlog_takes_longer() -> None:
    backlog = connected()
    waits = [ttft_s(backlog, own=OwnLoad(num_decoding=0, num_without_token=n, prompt_tokens=100 * n)) for n in range(4)]
    assert waits == sorted(waits)
    assert waits[3] > 2 * waits[0]


# ------------------------------------------------------------------------------------------------------ the prefix


def test_prompts_that_begin_alike_share_pages_up_to_where_they_differ() -> None:
    one = page_hashes(submit(range(300)), 64)
    other = page_hashes(submit([*range(200), *range(900, 1000)]), 64)
    assert (len(one), len(other)) == (4, 4)
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, True, False]
    assert not set(one) & set(page_hashes(submit(range(300), cache_salt="tenant"), 64))


def test_pages_are_forgotten_from_the_end_of_the_prompt_that_was_there_longest() -> None:
    seen = SeenPages(5)
    seen.add([b"a1", b"a2", b"a3"])
    seen.add([b"b1", b"b2", b"b3"])
    assert (seen.num_found([b"a1", b"a2", b"a3"]), seen.num_found([b"b1", b"b2", b"b3"])) == (2, 3)


def test_a_prefix_that_was_computed_shortens_the_wait_unless_workers_keep_none() -> None:
    backlog, without = connected(), connected(prefix_cache=False)
    fresh = ttft_s(backlog, 1024)
    for one in (backlog, without):
        one.began(one.prefix(submit(range(1024))), num_cached=0)
    assert ttft_s(backlog, 1024) < 0.2 * fresh
    assert ttft_s(without, 1024) == pytest.approx(fresh)


def test_a_cache_that_keeps_less_than_expected_is_expected_to() -> None:
    backlog = connected()
    backlog.began(backlog.prefix(submit(range(640))), num_cached=0)
    for _ in range(100):
        backlog.began(backlog.prefix(submit(range(640))), num_cached=0)
    assert backlog.prefix(submit(range(640))).num_cached < 64


def test_sequences_that_come_together_are_as_large_as_their_prompts_and_samples() -> None:
    backlog, without = connected(), connected(prefix_cache=False)
    backlog.began(backlog.prefix(submit(range(128))), num_cached=0)
    samples = [submit(range(128), request_id=f"a{n}", group="a") for n in range(3)]
    other = submit(range(500, 600), request_id="b")
    assert backlog.size([*samples, other]) == RequestSize(228, cached_tokens=127, num_prompts=2, num_samples=4)
    assert without.size([*samples, other]) == RequestSize(484, num_prompts=4, num_samples=4)


# ---------------------------------------------------------------------------------------------------- what it learns


def test_predictions_that_are_off_all_the_time_are_put_right() -> None:
    backlog = connected()
    for _ in range(200):
        prediction = backlog.predict([submit(range(100))], NOTHING)
        assert prediction is not None
        backlog.came(prediction, 3 * prediction.uncorrected_s)
    assert ttft_s(backlog) == pytest.approx(3 * ttft_s(connected()), rel=0.05)


def test_an_outlier_changes_little() -> None:
    backlog = connected()
    before = ttft_s(backlog)
    backlog.came(Prediction(before, before, before), 1000 * before)
    assert ttft_s(backlog) < 1.1 * before


def test_longer_replies_make_a_full_batch_wait_longer() -> None:
    full = OwnLoad(num_decoding=64, num_without_token=0, prompt_tokens=0)
    backlog = connected()
    before = ttft_s(backlog, own=full)
    for _ in range(50):
        backlog.ended(1000)
    assert ttft_s(backlog, own=full) > 2 * before


# ------------------------------------------------------------------------------------------------------- admission


@pytest.mark.parametrize(
    ("predicted", "alone", "retry"),
    [
        (0.9, 0.5, None),
        (1.0, 1.0, None),
        (4.0, 0.5, 3.0),  # what is over the bound is what must be done first
        (2.5, 2.0, None),  # one that takes two seconds by itself may wait one
        (5.0, 2.0, 2.0),
    ],
)
def test_a_first_token_that_would_come_too_late_is_refused(predicted: float, alone: float, retry: float | None) -> None:
    prediction = Prediction(predicted, alone, predicted)
    if retry is None:
        check_ttft(prediction, 1.0)
        return
    with pytest.raises(OverloadedError) as refused:
        check_ttft(prediction, 1.0)
    assert refused.value.retry_after_s == pytest.approx(retry)
    assert f"{predicted:.1f} s" in refused.value.message


async def test_every_reply_says_when_its_first_token_was_predicted(served: Served) -> None:
    replies = [
        await served.complete(max_tokens=2),
        await served.complete(max_tokens=2, stream=True),
        await served.chat(max_tokens=2),
        await served.http.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2}),
        await served.http.post(
            "/v1/messages",
            json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "model": "org/scripted"},
        ),
    ]
    assert [reply.status_code for reply in replies] == [200] * 5
    assert all(0 < float(reply.headers[HEADER]) < 60_000 for reply in replies)
    name, labels = "foretoken:ttft_prediction_error_ratio", '{model_name="org/scripted"}'
    assert await served.metric(f"{name}_count{labels}") == len(replies)
    assert await served.metric(f"foretoken:predicted_ttft_seconds_count{labels}") == len(replies)


async def test_a_request_is_refused_for_the_last_of_its_sequences(serve: Serve, worker: ScriptedWorker) -> None:
    """Each prompt takes a fifth of the bound."""
    served = await serve(max_ttft_s=1.0)
    await served.ready()
    worker.gate.clear()
    prompts = [letter * 400 for letter in "abc"]
    before = [asyncio.create_task(served.complete(prompt=prompts[0], max_tokens=1)) for _ in range(3)]
    await worker.wait_for_submits(3)
    refused = await served.complete(prompt=prompts, max_tokens=1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert len(worker.submits) == 3
    before.append(asyncio.create_task(served.complete(prompt=prompts[1], max_tokens=1)))
    await worker.wait_for_submits(4)
    worker.gate.set()
    assert [reply.status_code for reply in await asyncio.gather(*before)] == [200] * 4
    assert await served.metric("foretoken:request_prompt_tokens_count") == 4, "what was refused has no prompt"


async def test_the_header_is_about_the_first_sequence(served: Served, worker: ScriptedWorker) -> None:
    worker.gate.clear()
    asked_s = time.perf_counter()
    task = asyncio.create_task(served.complete(prompt=[letter * 500 for letter in "abcdefgh"], max_tokens=1))
    await worker.wait_for_submits(8)
    taken_s = time.perf_counter() - asked_s
    worker.gate.set()
    first_s = PRIOR.step_s(prompt_tokens=501, sequences=0)
    assert first_s < float((await task).headers[HEADER]) / 1e3 < taken_s + 2 * first_s


async def test_prompts_that_go_to_two_workers_wait_at_both(served: Served, crowd: Served) -> None:
    prompts = [submit([letter] * 60, request_id=str(letter)) for letter in range(4)]
    alone, at_one, at_two = (
        target.app.state.gateway.pool.predict(given)
        for target, given in ((served, prompts[:1]), (served, prompts), (crowd, prompts))
    )
    assert alone.ttft_s == pytest.approx(PRIOR.step_s(prompt_tokens=60, sequences=0))
    assert at_one.ttft_s == pytest.approx(PRIOR.step_s(prompt_tokens=240, sequences=0))
    assert at_two.ttft_s == pytest.approx(PRIOR.step_s(prompt_tokens=120, sequences=0))


async def test_a_request_over_the_bound_is_told_when_to_come_back(serve: Serve, worker: ScriptedWorker) -> None:
    """Each takes a fifth of the bound, so that the first is not refused and soon one is."""
    served = await serve(max_ttft_s=1.0)
    await served.ready()
    worker.gate.clear()
    before: list[asyncio.Task[Any]] = []
    while True:
        asked = asyncio.ensure_future(served.complete(prompt="x" * 400, max_tokens=2))
        taken = asyncio.ensure_future(worker.wait_for_submits(len(before) + 1))
        await asyncio.wait({asked, taken}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            break
        before.append(asked)
    taken.cancel()
    refused = await asked
    assert 2 <= len(before) <= 8
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("overloaded", "rate_limit_error")
    assert "would have its first token after some" in error["message"]
    assert refused.headers["retry-after"] == "1"
    worker.gate.set()
    assert [reply.status_code for reply in await asyncio.gather(*before)] == [200] * len(before)
    assert (await served.complete(prompt="x" * 400, max_tokens=2)).status_code == 200
