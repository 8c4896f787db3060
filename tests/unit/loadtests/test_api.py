"""`foretoken bench api`: all that its users expect is honoured; every promised row is there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from loadtests.api import ApiBench, Options, main, parse, processor_s
from loadtests.api_client import connected
from loadtests.api_rows import ROWS, honoured
from loadtests.processes import BenchError, Server
from tests.support.openai_server import OpenAIServer, Reply, running

pytestmark = pytest.mark.anyio

BEYOND_IT = {"a client that leaves", "errors", "size caps"}  # the simple server breaks on what they send
PROMISED = {
    ("expected", "capability_honoured"),
    ("idle", "refusal_p99_s"),
    ("streams64", "refusal_p99_s"),
    ("streams64", "stream_overhead_s"),
    ("concurrent1", "ttft_prediction_error"),
    ("concurrent8", "ttft_prediction_error"),
    ("concurrent32", "ttft_prediction_error"),
    ("all", "ttft_prediction_error"),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.timeout(420)
@pytest.mark.needs("demo", "linux")
def test_the_demo_honours_all_of_them(tmp_path: Path) -> None:
    file = tmp_path / "api.json"
    assert main(["--quick", "--json", str(file)]) == 0
    rows = {(row["case"], row["metric"]): row for row in json.loads(file.read_text())}
    assert rows.keys() == PROMISED
    assert [row for row in rows.values() if row["value"] is None] == []
    expected = rows["expected", "capability_honoured"]
    assert expected["value"] == 1.0, expected["note"]
    assert rows["streams64", "stream_overhead_s"]["value"] > 0


async def test_a_server_that_only_completes_honours_next_to_nothing() -> None:
    with running(OpenAIServer(lambda body: Reply(num_tokens=1))) as server:
        async with connected(server.url, "fake") as api:
            found = {row.name: await honoured(api, row) for row in ROWS if row.name not in BEYOND_IT}
    assert [name for name, why in found.items() if not why] == []
    assert found["embeddings"].startswith("embeddings: HTTP 404")


@pytest.mark.needs("demo")
async def test_rows_that_cannot_be_measured_say_why() -> None:
    """This server predicts nothing, is none of ours, and refuses nothing."""
    with running(OpenAIServer(lambda body: Reply(num_tokens=1))) as server:
        options = Options(quick=True, base_url=server.url)
        rows = await ApiBench(options, Server(server.url, "fake"), [1], lambda words: None).rows()
    assert {(row.case, row.metric) for row in rows} == PROMISED
    assert [row.case for row in rows if row.value is None and not row.reason] == []
    assert "no header" in next(row.reason for row in rows if row.metric == "ttft_prediction_error")


@pytest.mark.needs("linux")
def test_the_processor_time_of_a_process() -> None:
    before = processor_s(os.getpid())
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert processor_s(os.getpid()) >= before + 0.05
    with pytest.raises(BenchError, match="does not tell"):
        processor_s(0)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--base-url", "127.0.0.1:8000"], "--base-url"),
        (["--model", "/nowhere"], "--model"),
        (["--json", "/nowhere/api.json"], "--json"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], culprit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=culprit):
        parse(arguments)
    assert main(arguments) == 1
    assert culprit in capsys.readouterr().err


def test_the_options() -> None:
    assert parse(["--base-url", "http://a:1/v1/"]) == Options(base_url="http://a:1")
