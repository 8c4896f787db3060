"""Steps that lose their experts: nothing is kept of them, and the same tokens come when the experts are back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch

from cluster.errors import PeerLostError
from cluster.protocol import Peer, RequestOutput, Sampling, Stopping, Submit
from tests.support.experts import FaultyLink, make_host, make_route, serve_in_thread
from tests.support.models import TINY, random_weights
from tests.support.numerics import numerics
from tests.support.tokenizers_ import build
from workers.engine import Engine, EngineOptions
from workers.experts.routed import RoutedExperts
from workers.models.decoder import Decoder
from workers.models.tokenizer import Tokenizer
from workers.scheduler import SchedulerOptions

SPEC = replace(TINY, vocab_size=500)
WEIGHTS = random_weights(SPEC)
BLOCKS = numerics("blocks")
HELD = {"a": (0, 1, 2, 3), "b": (4, 5, 6, 7)}
PROMPT = tuple(range(10, 50))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build("byte_level", tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The engine's and the hosts' threads would each have torch's own beside them, on the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """An engine whose experts are behind links that break at the calls in `faults` (counted over all links)."""

    def __init__(self, tokenizer: Tokenizer, faults: frozenset[int] = frozenset(), num_pages: int = 12) -> None:
        self.faults = faults
        self.num_messages = 0
        self.num_stalls = 0
        self._versions = count(1)
        self._hosts = {name: make_host(SPEC, WEIGHTS, BLOCKS, ids) for name, ids in HELD.items()}
        self.experts = RoutedExperts(SPEC, BLOCKS, 10.0, self._open_link)
        scheduler = SchedulerOptions(token_budget=16, max_num_seqs=4)
        self.engine = Engine(
            Decoder(SPEC, WEIGHTS, self.experts, BLOCKS),
            tokenizer,
            [3],
            EngineOptions(max_model_len=256, num_pages=num_pages, page_size=8, scheduler=scheduler),
        )
        self.outputs: dict[str, list[RequestOutput]] = {}

    def _open_link(self, peer: Peer) -> FaultyLink:
        return FaultyLink(serve_in_thread(self._hosts[peer.worker_id]), self._breaks)

    def _breaks(self, _what: str, _number: int) -> bool:
        self.num_messages += 1
        return self.num_messages - 1 in self.faults

    def connect(self) -> None:
        self.experts.set_route(make_route(next(self._versions), SPEC, HELD))

    def submit(self, name: str, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 12, **fields: object) -> None:
        submit = Submit(
            request_id=name,
            prompt_ids=prompt,
            sampling=Sampling(seed=3, temperature=1.0, logprobs=1),
            stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
            **fields,  # type: ignore[arg-type]
        )
        self.engine.submit(self.engine.request_from(submit))

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.engine.pool.check()

    def step(self) -> None:
        self.take(self.engine.step().outputs)
        if self.engine.stalled:
            self.num_stalls += 1
            assert not self.experts.ready

    def finish(self) -> dict[str, list[tuple[int, float]]]:
        """Connect after each stall, until all is done; -> each request's tokens and their log probabilities."""
        for _ in range(500):
            if not self.engine.has_work:
                break
            self.step()
            if self.engine.stalled:
                self.connect()
        assert not self.engine.has_work
        assert self.engine.pool.num_used == 0
        found = {}
        for name, outputs in self.outputs.items():
            tokens = [
                (token, row) for output in outputs for token, row in zip(output.token_ids, output.logprobs, strict=True)
            ]
            assert [output.index for output in outputs if output.token_ids] == list(range(len(tokens)))
            assert sum(output.finish is not None for output in outputs) == 1
            found[name] = [(token, row.logprob) for token, row in tokens]
        return found


def run_mix(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Prefill in chunks, decodes beside prefills, a shared prefix, and pages that run out."""
    run.connect()
    run.submit("x")
    run.submit("y", PROMPT[::-1])
    for _ in range(6):
        run.step()
        if run.engine.stalled:
            run.connect()
    run.submit("prefix", (*PROMPT[:24], 7, 8))
    run.submit("late", (9, 8, 7), 20)
    return run.finish()


def test_a_step_tried_again_gives_the_same_tokens_wherever_it_broke(tokenizer: Tokenizer) -> None:
    whole = Run(tokenizer)
    expected = run_mix(whole)
    assert whole.engine.snapshot().preemptions > 0
    assert whole.engine.snapshot().cached_tokens > 0
    assert whole.num_stalls == 0
    for first in range(0, whole.num_messages, 13):  # sends and replies, either worker, any layer and kind of step
        run = Run(tokenizer, frozenset({first, first + 31}))
        assert run_mix(run) == expected, f"broken at messages {first} and {first + 31}"
        assert run.num_stalls > 0


def test_a_stalled_engine_takes_requests_ends_them_and_goes_on(tokenizer: Tokenizer) -> None:
    alone = Run(tokenizer)
    alone.connect()
    alone.submit("x")
    expected = alone.finish()["x"]
    run = Run(tokenizer, frozenset({9}))
    run.connect()
    run.submit("x")
    run.submit("aborted", PROMPT[::-1])
    while not run.engine.stalled:
        run.step()
    run.submit("late", deadline_s=0.0)
    run.engine.abort("aborted")
    run.step()
    assert run.engine.stalled
    reasons = {name: outputs[-1].finish for name, outputs in run.outputs.items()}
    assert reasons["aborted"] is not None
    assert reasons["aborted"].reason == "abort"
    assert reasons["late"] is not None
    assert reasons["late"].error_code == "deadline_exceeded"
    run.engine.pool.check()
    run.connect()
    assert run.finish()["x"] == expected


def test_without_experts_an_engine_still_minds_deadlines_and_aborts(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer)
    run.submit("late", deadline_s=0.0)
    run.submit("aborted")
    run.submit("x", max_tokens=2)
    run.engine.abort("aborted")
    run.take(run.engine.tend().outputs)
    assert sorted(run.outputs) == ["aborted", "late"]
    run.connect()
    assert len(run.finish()["x"]) == 2


def test_who_waited_long_enough_is_given_up_and_others_go_on(tokenizer: Tokenizer) -> None:
    run = Run(tokenizer, frozenset({9}))
    run.connect()
    run.submit("old")
    while not run.engine.stalled:
        run.step()
    then = time.monotonic()
    run.submit("new", max_tokens=3)
    run.engine.give_up(then, PeerLostError("experts were out of reach"))
    run.take(run.engine.tend().outputs)
    finish = run.outputs["old"][-1].finish
    assert finish is not None
    assert (finish.reason, finish.error_code) == ("error", "peer_lost")
    run.connect()
    assert len(run.finish()["new"]) == 3
