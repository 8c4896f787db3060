"""The load generator against a small server that can be slow, broken or silent."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.machine import free_port
from loadtests import generator
from loadtests.generator import StreamReader, result_of
from loadtests.measures import Record
from loadtests.processes import LineProcess
from tests.support.openai_server import DEADLINE_S, OpenAIServer, Reply, running


def job(url: str, num: int = 3, **changes: Any) -> bytes:
    requests = [{"prompt": [5] * (index + 1), "max_tokens": 4} for index in range(num)]
    return msgspec.json.encode(
        {"base_url": url, "model": "fake", "requests": requests, "timeout_s": DEADLINE_S} | changes
    )


def test_a_load_is_sent_and_measured() -> None:
    with running() as server:
        result = result_of(job(server.url, body={"temperature": 0}, headers={"Authorization": "Bearer key"}))
    assert result["completed"] == 3
    assert result["errors"] == ["", "", ""]
    assert result["input_lens"] == [1, 2, 3]
    assert result["output_lens"] == [4, 4, 4]
    assert result["total_output_tokens"] == 12
    assert all(len(itls) == 3 for itls in result["itls"])
    assert all(0 < ttft <= result["duration"] for ttft in result["ttfts"])
    assert result["max_ttft_ms"] <= result["max_e2el_ms"] <= 1e3 * result["duration"]
    sent = sorted(server.bodies, key=lambda body: len(body["prompt"]))
    assert [body["prompt"] for body in sent] == [[5], [5, 5], [5, 5, 5]]
    assert sent[0] == {
        "model": "fake",
        "prompt": [5],
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }
    assert server.headers[0]["authorization"] == "bearer key"


def test_arrivals_wait_for_no_answer() -> None:
    """The server answers nobody before all have come: a client that waits for answers would never get one."""
    with running(OpenAIServer(barrier=40)) as server:
        result = result_of(job(server.url, 40, arrivals={"kind": "constant", "rate": 400}))
    assert result["completed"] == 40
    assert result["max_concurrent_requests"] == 40


def test_requests_are_sent_when_due_and_lateness_is_told() -> None:
    due = [0.0, 0.05, 0.05, 0.12]
    with running() as server:
        result = result_of(job(server.url, 4, arrivals={"kind": "listed", "at_s": due}))
    delays = [sent - at for sent, at in zip(result["start_times"], due, strict=True)]
    assert min(delays) >= 0
    assert result["max_send_delay_ms"] == pytest.approx(1e3 * max(delays))


def test_a_request_may_have_a_body_of_its_own() -> None:
    own = {"prompt": "a", "max_tokens": 2, "body": {"temperature": 0.5, "user": "u"}}
    with running() as server:
        result_of(job(server.url, requests=[own], body={"temperature": 0}))
    assert (server.bodies[0]["temperature"], server.bodies[0]["user"]) == (0.5, "u")


def test_a_role_alone_is_no_token() -> None:
    message = {"prompt": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    with running() as server:
        result = result_of(job(server.url, requests=[message], endpoint="/v1/chat/completions"))
    assert result["completed"] == 1
    assert len(result["itls"][0]) == 2
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]


def test_without_usage_events_are_counted() -> None:
    with running(OpenAIServer(lambda body: Reply(usage=False))) as server:
        assert result_of(job(server.url))["output_lens"] == [4, 4, 4]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(status=429, error="the queue is full"), "HTTP 429: .*the queue is full"),
        (Reply(error="the worker died"), "the worker died"),
        (Reply(cut=True), "Error|before"),
        (Reply(num_tokens=0), "no tokens"),
        (Reply(hang=True), "no end within 0.5 s"),
    ],
)
def test_a_failure_is_told_and_hurts_nobody_else(reply: Reply, error: str) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        return reply if len(body["prompt"]) == 2 else Reply()

    timeout_s = 0.5 if reply.hang else DEADLINE_S
    with running(OpenAIServer(answer)) as server:
        result = result_of(job(server.url, timeout_s=timeout_s))
    assert (result["completed"], result["failed"]) == (2, 1)
    assert [bool(text) for text in result["errors"]] == [False, True, False]
    assert (result["output_lens"][0], result["output_lens"][2]) == (4, 4)
    assert re.search(error, result["errors"][1])


def test_nobody_listens() -> None:
    result = result_of(job(f"http://127.0.0.1:{free_port()}"))
    assert result["failed"] == 3
    assert "Connect" in result["errors"][0]


STREAM = (
    b'data: {"choices":[{"text":" a","finish_reason":null}]}\r\n\r\n: a comment\n\n'
    b'data: {"choices":[{"text":"\xe2\x82\xac","finish_reason":null}]}\n\n'
    b'data:{"choices":[{"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("size", [1, 2, 7, 50, len(STREAM)])
def test_a_stream_is_read_whatever_the_pieces(size: int) -> None:
    clock = iter(range(100))
    record = Record(due_s=0.0, sent_s=0.0)
    reader = StreamReader(record, lambda: float(next(clock)))
    for start in range(0, len(STREAM), size):
        reader.feed(STREAM[start : start + size])
    reader.close()
    assert record == Record(0.0, 0.0, token_times_s=[0.0, 1.0], input_tokens=7, output_tokens=9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"requests": []}, "requests"),
        ({"requests": [{"prompt": "a"}]}, "max_tokens"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"arrivals": {"kind": "poisson", "rate": -1}}, "rate"),
        ({"arrivals": {"kind": "tidal"}}, "tidal"),
        ({"endpoint": "/v1/embeddings"}, "embeddings"),
        ({"mode": "open"}, "mode"),
    ],
)
def test_a_bad_job_names_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    assert named in result_of(job("http://localhost:1", **changes))["error"]


def test_lines_in_lines_out() -> None:
    """One process takes one job after another; a bad one spoils nothing."""
    with running() as server, LineProcess("loadtests.generator", "--lines") as process:
        for num in (2, 5):
            assert process.ask(msgspec.Raw(job(server.url, num)), DEADLINE_S)["completed"] == num
            with pytest.raises(Exception, match="nothing to send"):
                process.ask(msgspec.Raw(job(server.url, requests=[])), DEADLINE_S)


def test_a_job_from_a_file_or_standard_input(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as server:
        text = job(server.url)
        (tmp_path / "job.json").write_bytes(msgspec.json.format(text))
        arguments = ["--job", str(tmp_path / "job.json"), "--out", str(tmp_path / "result.json")]
        assert generator.main(arguments) == 0
        assert json.loads((tmp_path / "result.json").read_text())["completed"] == 3
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert generator.main([]) == 0
    assert json.loads(capfdbinary.readouterr().out)["completed"] == 3
    (tmp_path / "job.json").write_text("{")
    assert generator.main(["--job", str(tmp_path / "job.json")]) == 1
