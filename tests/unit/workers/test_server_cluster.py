"""One attention worker and two expert workers as real processes; the test is their controller."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.protocol import Assign, Peer, Route, WorkerReport
from tests.support.checkpoints import random_tensors, write
from tests.support.tokenizers_ import build
from tests.support.worker_process import (
    DEADLINE_S,
    TINY,
    ControlStream,
    RunningWorker,
    connect,
    control,
    submit,
    tiny_checkpoint,
)
from workers.models.fingerprint import fingerprint

TOKEN = "a token that nobody guesses"
NUM_EXPERTS = 8
ALL = (tuple(range(NUM_EXPERTS)),) * 2
HALVES = (((0, 1, 2, 5), (3, 4, 5, 6)), ((3, 4, 6, 7), (0, 1, 2, 7)))  # by worker, by layer
LONG = 400  # tokens: it still runs when a worker is killed after the first


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


REQUESTS = (submit("greedy", 40, temperature=0.0), submit("seeded", 40), submit("long", LONG))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What one worker with every expert beside it answers."""

    async def run(worker: RunningWorker) -> dict[str, list[int]]:
        async with connect(worker) as stream:
            answers = {}
            for request in REQUESTS:
                await stream.send(request)
                answers[request.request_id] = await stream.tokens(request.request_id)
            return answers

    with RunningWorker(checkpoint, tmp_path_factory.mktemp("all")) as worker:
        answers = asyncio.run(run(worker))
    assert all(len(set(tokens)) > 5 for tokens in answers.values())  # they say something
    return answers


@dataclass
class Cluster:
    attention: RunningWorker
    experts: Sequence[RunningWorker]
    attention_control: ControlStream
    expert_controls: Sequence[ControlStream]
    peers: Sequence[Peer]

    async def assign(self, number: int, version: int, experts: tuple[tuple[int, ...], ...]) -> None:
        """Have expert worker `number` hold `experts`, and wait until it does."""
        await self.expert_controls[number].send(Assign(version=version, experts=experts))
        report = await self.expert_controls[number].until(lambda report: report.assign_version == version)
        assert report.experts == experts

    async def route(self, version: int, held: Sequence[tuple[tuple[int, ...], ...]]) -> WorkerReport:
        """Tell the attention worker who holds what, and wait until it goes there."""
        owners = tuple(
            tuple(
                tuple(place for place, layers in enumerate(held) if expert in layers[layer])
                for expert in range(NUM_EXPERTS)
            )
            for layer in range(2)
        )
        peers = tuple(self.peers[: len(held)])
        await self.attention_control.send(Route(version=version, peers=peers, owners=owners))
        return await self.attention_control.until(lambda report: report.route_version == version)


@contextlib.asynccontextmanager
async def cluster(checkpoint: Path, folder: Path, other: Path | None = None) -> AsyncIterator[Cluster]:
    """`other` is the checkpoint of the second expert worker."""

    def start(name: str, role: str) -> RunningWorker:
        return stack.enter_context(
            RunningWorker(
                other if other is not None and name == "expert-1" else checkpoint,
                folder,
                name,
                role=role,
                address="127.0.0.1:0",
                token=TOKEN,
                announce_path=str(folder / f"{name}.json"),
                exit_with_parent=False,
                drain_timeout_s=DEADLINE_S,
                peer_timeout_s=DEADLINE_S / 4,
            )
        )

    with contextlib.ExitStack() as stack:
        experts = [start(f"expert-{number}", "expert") for number in range(2)]
        attention = start("attention-0", "attention")
        announced = [await worker.announced() for worker in (*experts, attention)]
        peers = [
            Peer(name=worker.launch.name, worker_id=known.worker_id, address=known.address)
            for worker, known in zip(experts, announced, strict=False)
        ]
        async with contextlib.AsyncExitStack() as controls:
            first, second, last = [
                await controls.enter_async_context(control(worker.address, token=TOKEN))
                for worker in (*experts, attention)
            ]
            yield Cluster(attention, experts, last, (first, second), peers)


def test_two_expert_workers_give_the_same_tokens_as_one_worker_with_all(
    checkpoint: Path, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    async def run() -> None:
        async with cluster(checkpoint, tmp_path) as here, connect(here.attention) as stream:
            for request in REQUESTS[:2]:
                await stream.send(request)  # before there is anybody to compute its experts: it waits
            for number, half in enumerate(HALVES):
                await here.assign(number, 1, half)
            report = await here.route(1, HALVES)
            assert (report.name, report.lost_peers, report.error) == ("attention-0", (), None)
            outputs: dict[str, list[int]] = {request.request_id: [] for request in REQUESTS[:2]}
            while any(len(token_ids) < 40 for token_ids in outputs.values()):
                for output in (await stream.step()).outputs:
                    assert output.index == len(outputs[output.request_id])
                    outputs[output.request_id] += output.token_ids
            assert outputs == {name: expected[name] for name in outputs}
            for controller in here.expert_controls:
                state = (await controller.until(lambda report: report.state.expert_rows > 0)).state
                assert state.expert_rows >= state.expert_calls > 0
                assert state.expert_s > 0.0
            await stops_in_peace(here)

    asyncio.run(run())


async def stops_in_peace(here: Cluster) -> None:
    """An expert worker that is told to end serves the links that it has, offers none, and ends when they are closed."""
    leaving = here.experts[0]
    leaving.process.send_signal(signal.SIGTERM)
    async with connect(here.attention) as stream:
        await stream.send(submit("meanwhile", 20))
        assert len(await stream.tokens("meanwhile")) == 20
    assert leaving.process.poll() is None
    here.attention.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(here.attention.process.wait, DEADLINE_S / 2) == 0
    assert await asyncio.to_thread(leaving.process.wait, DEADLINE_S / 2) == 0
    here.experts[1].process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(here.experts[1].process.wait, DEADLINE_S / 2) == 0


def test_a_killed_expert_worker_is_a_pause_and_then_the_same_tokens(
    checkpoint: Path, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    async def run() -> None:
        async with cluster(checkpoint, tmp_path) as here, connect(here.attention) as stream:
            for number, half in enumerate(HALVES):
                await here.assign(number, 1, half)
            await here.route(1, HALVES)
            await stream.send(submit("long", LONG))
            (first,) = (await stream.step()).outputs
            here.experts[1].process.kill()
            report = await here.attention_control.until(lambda report: bool(report.lost_peers))
            assert report.lost_peers == (here.peers[1].worker_id,)
            assert report.route_version == 1
            assert report.state.num_running == 1  # it waits
            await here.assign(0, 2, ALL)
            assert (await here.route(2, [ALL])).lost_peers == ()
            outputs = await stream.outputs("long")
            token_ids = list(first.token_ids)
            for output in outputs:
                assert not output.token_ids or output.index == len(token_ids)
                token_ids += output.token_ids
            assert outputs[-1].finish is not None
            assert outputs[-1].finish.reason == "length"
            assert token_ids == expected["long"]
            state = await stream.state()
            assert (state.num_running, state.pages_free) == (0, state.pages_total)

    asyncio.run(run())


def test_an_expert_worker_of_another_checkpoint_computes_nothing_and_both_are_named(
    checkpoint: Path, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """The same shapes and names, other weights: a finetune, or a revision."""
    tensors = {name: -tensor for name, tensor in random_tensors(TINY).items()}
    other = build("byte_level", write(tmp_path / "other", TINY, tensors))

    async def run() -> None:
        async with cluster(checkpoint, tmp_path, other) as here, connect(here.attention) as stream:
            for number, half in enumerate(HALVES):
                await here.assign(number, 1, half)
            report = await here.route(1, HALVES)
            assert report.lost_peers == (here.peers[1].worker_id,)
            ours, theirs = fingerprint(checkpoint), fingerprint(other)
            assert report.error is not None
            assert "expert-1 at" in report.error
            assert f"attention-0 has checkpoint {ours!r} instead of {theirs!r} here: give all workers" in report.error
            await stream.send(REQUESTS[0])  # it waits
            await here.assign(0, 2, ALL)
            report = await here.route(2, [ALL])
            assert (report.lost_peers, report.error) == ((), None)
            assert await stream.tokens("greedy") == expected["greedy"]
            unlike = await here.expert_controls[1].until(lambda report: report.assign_version == 1)
            assert unlike.state.expert_calls == 0

    asyncio.run(run())
