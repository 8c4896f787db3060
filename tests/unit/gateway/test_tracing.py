"""Traces: what spans a request makes, what is in them and what is not, and where a trace context goes."""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from cluster.config import load
from cluster.errors import ConfigError
from cluster.gateway.embeddings import WAVE
from cluster.gateway.tracing import MAX_TRACED_CHOICES, NO_TRACING, OpenTelemetry, open_tracing
from cluster.protocol import Finish, RequestOutput, Submit
from cluster.serve import tracing
from tests.support.eventually import eventually
from tests.support.scripted_worker import PREFILL_S, ScriptedWorker
from tests.unit.gateway.conftest import Serve, Served

pytestmark = [pytest.mark.anyio, pytest.mark.needs("opentelemetry")]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SECRET = "zebra-xylophone"  # of a prompt


class Traced:
    """A gateway whose spans stay in memory."""

    def __init__(self, served: Served, exporter: Any) -> None:
        self.served = served
        self._exporter = exporter

    async def spans(self, num: int) -> list[Any]:
        """So many, in the order of their ends; a stream's ends after its last byte."""
        await eventually(lambda: len(self._exporter.get_finished_spans()) >= num, f"the end of {num} spans")
        found = list(self._exporter.get_finished_spans())
        assert len(found) == num
        self._exporter.clear()
        return found


@pytest.fixture
async def traced(serve: Serve) -> Traced:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    served = await serve(tracing=OpenTelemetry(provider))
    await served.ready()
    return Traced(served, exporter)


def by_name(spans: list[Any]) -> dict[str, Any]:
    return {span.name: span for span in spans}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_request_is_a_span_with_its_queue_prefill_and_decode(traced: Traced, stream: bool) -> None:
    reply = await traced.served.chat(
        max_tokens=3, temperature=0.5, seed=7, stream=stream, messages=[{"role": "user", "content": SECRET}]
    )
    assert reply.status_code == 200
    spans = await traced.spans(4)
    found = by_name(spans)
    assert set(found) == {"chat org/scripted", "queue", "prefill", "decode"}
    request = found["chat org/scripted"]
    assert request.kind.name == "SERVER"
    assert request.status.status_code.name == "UNSET"
    given = dict(request.attributes)
    assert given["gen_ai.operation.name"] == "chat"
    assert given["gen_ai.request.model"] == "org/scripted"
    assert (given["gen_ai.request.max_tokens"], given["gen_ai.request.seed"]) == (3, 7)
    assert given["gen_ai.request.temperature"] == 0.5
    assert given["gen_ai.usage.output_tokens"] == 3
    assert given["gen_ai.usage.input_tokens"] > len(SECRET)
    assert given["gen_ai.response.finish_reasons"] == ("length",)
    assert given["gen_ai.latency.time_in_model_prefill"] == PREFILL_S
    assert given["gen_ai.latency.time_to_first_token"] > 0
    assert given["foretoken.predicted_time_to_first_token"] > 0
    assert given["foretoken.request_id"] == reply.headers["x-request-id"]
    for name in ("queue", "prefill", "decode"):
        assert found[name].parent.span_id == request.context.span_id
        assert found[name].start_time <= found[name].end_time
    assert found["queue"].end_time == found["prefill"].start_time
    assert found["prefill"].end_time == found["decode"].start_time
    assert request.start_time <= found["queue"].start_time
    assert found["decode"].end_time <= request.end_time
    assert SECRET not in json.dumps([json.loads(span.to_json()) for span in spans])


async def test_a_trace_context_comes_in_and_goes_on_to_the_worker(traced: Traced, worker: ScriptedWorker) -> None:
    body = {"prompt": "Hi", "max_tokens": 1}
    await traced.served.http.post("/v1/completions", json=body, headers={"traceparent": PARENT})
    found = by_name(await traced.spans(4))
    request = found["text_completion org/scripted"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    (submit,) = worker.submits
    assert submit.traceparent == f"00-{TRACE}-{request.context.span_id:016x}-01"


async def test_a_refusal_is_a_span_with_its_code_and_without_its_words(traced: Traced) -> None:
    assert (await traced.served.complete(prompt=SECRET, temperature=-1)).status_code == 400
    (span,) = await traced.spans(1)
    assert span.status.status_code.name == "ERROR"
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("invalid_value", 400)
    assert not span.events
    assert SECRET not in span.to_json()


async def test_a_client_that_goes_ends_its_spans(traced: Traced, worker: ScriptedWorker) -> None:
    worker.steps_left = 1
    body = {"prompt": "Hi", "max_tokens": 9, "stream": True}
    async with traced.served.http.stream("POST", "/v1/completions", json=body) as reply:
        await anext(reply.aiter_bytes())
    found = by_name(await traced.spans(4))
    assert found["text_completion org/scripted"].attributes["error.type"] == "disconnect"
    assert found["decode"].attributes["error.type"] == "disconnect"


async def test_of_many_samples_only_the_first_have_spans_of_their_own(traced: Traced) -> None:
    num = MAX_TRACED_CHOICES + 3
    assert (await traced.served.complete(max_tokens=2, n=num)).status_code == 200
    spans = await traced.spans(1 + 3 * MAX_TRACED_CHOICES)
    request = by_name(spans)["text_completion org/scripted"]
    assert request.attributes["gen_ai.usage.output_tokens"] == 2 * num
    assert request.attributes["gen_ai.request.choice.count"] == num


async def test_the_first_sample_to_begin_tells_the_requests_latencies(traced: Traced, worker: ScriptedWorker) -> None:
    """Each ends at once: there is a moment in which none runs and one has not begun."""

    def whole(submit: Submit) -> list[RequestOutput]:
        queue_s = 0.25 + submit.sampling.choice
        finish = Finish(reason="stop")
        return [
            RequestOutput(
                submit.request_id, 0, [ord("a")], text="a", queue_s=queue_s, prefill_s=2 * queue_s, finish=finish
            )
        ]

    worker.raw = whole
    assert (await traced.served.complete(n=2)).status_code == 200
    request = by_name(await traced.spans(7))["text_completion org/scripted"]
    latencies = [request.attributes[f"gen_ai.latency.time_in_{name}"] for name in ("queue", "model_prefill")]
    assert latencies == [0.25, 0.5]
    assert 0 < request.attributes["gen_ai.latency.time_to_first_token"] * 1e9 < request.end_time - request.start_time
    assert request.attributes["gen_ai.response.finish_reasons"] == ("stop", "stop")


async def test_embeddings_have_traces_too(traced: Traced, worker: ScriptedWorker) -> None:
    body = {"input": [SECRET, *["x"] * WAVE]}  # in two waves
    reply = await traced.served.http.post("/v1/embeddings", json=body, headers={"traceparent": PARENT})
    assert reply.status_code == 200
    spans = await traced.spans(1 + 2 * MAX_TRACED_CHOICES)
    found = by_name(spans)
    assert set(found) == {"embeddings org/scripted", "queue", "prefill"}
    request = found["embeddings org/scripted"]
    assert f"{request.context.trace_id:032x}" == TRACE
    given = dict(request.attributes)
    assert given["gen_ai.operation.name"] == "embeddings"
    assert given["gen_ai.request.encoding_formats"] == ("float",)
    assert given["gen_ai.usage.input_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert given["gen_ai.response.id"] == reply.json()["id"]
    assert given["foretoken.request_id"] == reply.headers["x-request-id"]
    expected = f"00-{TRACE}-{request.context.span_id:016x}-01"
    assert [submit.traceparent for submit in worker.submits] == [expected] * (WAVE + 1)
    assert SECRET not in json.dumps([json.loads(span.to_json()) for span in spans])
    assert (await traced.served.http.post("/v1/embeddings", json={"input": ""})).status_code == 400
    (span,) = await traced.spans(1)
    assert span.attributes["error.type"] == "invalid_value"


async def test_what_no_worker_does_has_no_trace(traced: Traced) -> None:
    assert (await traced.served.http.post("/tokenize", json={"prompt": "Hi"})).status_code == 200
    assert (await traced.served.complete(max_tokens=1)).status_code == 200
    assert "text_completion org/scripted" in by_name(await traced.spans(4))


async def test_without_traces_a_context_still_goes_on(served: Served, worker: ScriptedWorker) -> None:
    for headers in ({"traceparent": PARENT}, {"traceparent": "00-zz"}, {"traceparent": f"{PARENT} x"}, {}):
        body = {"prompt": "Hi", "max_tokens": 1}
        assert (await served.http.post("/v1/completions", json=body, headers=headers)).status_code == 200
    assert [submit.traceparent for submit in worker.submits] == [PARENT, "", "", ""]


# ------------------------------------------------------------------------------------------------------ where they go


def test_traces_are_off_unless_somebody_says_where_to() -> None:
    assert tracing(load(), {}) is NO_TRACING
    base = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert tracing(load(), base | {"OTEL_SDK_DISABLED": "true"}) is NO_TRACING
    assert tracing(load(), base | {"OTEL_TRACES_EXPORTER": "none"}) is NO_TRACING


def test_without_the_packages_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'foretoken\[otel\]'"):
        tracing(load({"otlp_traces_endpoint": "http://127.0.0.1:9/v1/traces"}), {})


@pytest.mark.parametrize("url", ["localhost:4318", "http://user:secret@host/", "grpc://host"])
def test_an_endpoint_is_an_http_url_without_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="must be a URL that begins with http") as refused:
        load({"otlp_traces_endpoint": url})
    assert refused.value.param == "otlp_traces_endpoint"


async def test_spans_arrive_at_a_receiver_before_the_end() -> None:
    bodies: list[tuple[str, bytes]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        sent = open_tracing(f"http://127.0.0.1:{server.server_port}/v1/traces")
        with sent.request("POST", "/v1/completions", {"traceparent": PARENT}, time.perf_counter()):
            pass
        await sent.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, body),) = bodies
    assert path == "/v1/traces"
    assert bytes.fromhex(TRACE) in body
    assert b"foretoken" in body
