"""The workers as one: requests go in, tokens come out, and which process made them is nobody's concern.

Each sequence is on one worker, or waits for one. When its worker is lost it is submitted again to another, or to the
same place once that is back, with the tokens that its reply has: what follows is what would have followed. The choices
of one prompt go together, for they share its pages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import msgspec

from cluster.errors import DeadlineError, DrainingError, ForetokenError, UnavailableError, WorkerLostError
from cluster.gateway.client import WorkerClient
from cluster.gateway.generation import Generation, Observer, Sample
from cluster.gateway.route import WorkerLoad, choose, generated_load, prefix_key
from cluster.protocol import Abort, EngineState, Hello, RequestOutput, Submit

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 1.0  # a worker keeps a request's deadline; past this we do


class Place(NamedTuple):
    """Where a worker is. Another process of the same name is another place."""

    name: str  # "attention-0"
    address: str  # "unix:/path" or "host:port"
    worker_id: str = ""  # of the process that is meant; "": whichever answers


@dataclass(slots=True, eq=False)
class _Run:
    """A sequence on its way through the pool."""

    sample: Sample
    generation: Generation
    group: list[_Run]  # those that go to the same worker, itself among them
    member: _Member | None = None  # where it runs; None: it waits for a worker
    request_id: str = ""  # of its last submission
    num_submits: int = 0
    num_losses: int = 0  # of workers, since its last new token
    num_known: int = 0  # tokens that it had when it was last submitted
    num_prompt_left: int = 0  # what it still counts for in its member's load
    num_output_left: int = 0
    was_lost: bool = False  # since its last submission


@dataclass(slots=True, eq=False)
class _Member:
    """One worker of the pool: what its client tells, and what runs on it."""

    place: Place
    pool: WorkerPool
    runs: dict[str, _Run] = field(default_factory=dict)  # by the id of their submission
    num_tokens: int = 0  # of all its runs, as `route.WorkerLoad` counts
    refuses: bool = False  # it is shutting down
    leaves: bool = False  # it gets nothing new, and goes when what runs on it is done
    client: WorkerClient = field(init=False)

    @property
    def is_available(self) -> bool:
        return self.client.hello is not None and not self.refuses and not self.leaves

    def connected(self) -> None:
        self.refuses = False
        self.pool.member_connected()

    def received(self, output: RequestOutput) -> None:
        self.pool.member_received(self, output)

    def lost(self) -> None:
        self.pool.member_lost(self)


class WorkerPool:
    """Everything runs on one event loop, from `start` to `close`.

    `token`, `lease_s` and the other times are each `WorkerClient`'s. `max_resumptions`: so often in a row a sequence
    may lose its worker without a new token; the next time it fails with `WorkerLostError`, for it may be what kills
    them. 0: nobody starts a worker again, and nothing waits for one.
    """

    def __init__(
        self,
        places: Iterable[Place] = (),
        *,
        token: str | None = None,
        lease_s: float | None = None,
        hello_timeout_s: float = 10.0,
        write_timeout_s: float = 30.0,
        reconnect_delay_s: float = 0.1,
        max_buffered: int = 4096,
        max_resumptions: int = 5,
    ) -> None:
        self._token = token
        self._lease_s = lease_s
        self._hello_timeout_s = hello_timeout_s
        self._write_timeout_s = write_timeout_s
        self._reconnect_delay_s = reconnect_delay_s
        self._max_buffered = max_buffered
        self._max_resumptions = max_resumptions
        self._members: dict[Place, _Member] = {}
        self._leaving: set[_Member] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._runs: dict[Sample, _Run] = {}
        self._refusal: ForetokenError | None = None
        self._is_started = False
        self._changed = asyncio.Event()  # a worker is there, or `fail` was called
        self.num_connections = 0
        self.num_lost = 0  # connections that broke
        self.num_resumed = 0  # sequences submitted again because their worker was lost
        self.set_workers(places)

    async def __aenter__(self) -> WorkerPool:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start(self) -> None:
        """Connect to the workers, and go on connecting, in the background."""
        self._is_started = True
        for member in self._members.values():
            member.client.start()

    async def close(self) -> None:
        """End what runs and leave the workers."""
        self.fail(UnavailableError("the server has shut down"))
        members = [*self._members.values(), *self._leaving]
        await asyncio.gather(*(member.client.close() for member in members), *self._closing)
        self._members.clear()
        self._leaving.clear()

    # --------------------------------------------------------------------------------------------- who is in the pool

    def set_workers(self, places: Iterable[Place]) -> None:
        """From now on these are the workers. What runs on one that is no longer among them may finish there."""
        wanted = dict.fromkeys(places)
        for place in [place for place in self._members if place not in wanted]:
            member = self._members.pop(place)
            logger.info("worker %s at %s leaves the pool", place.name, place.address)
            member.leaves = True
            self._leaving.add(member)
            self._dismiss_if_idle(member)
        for place in wanted:
            if place not in self._members:
                member = self._members[place] = self._make_member(place)
                if self._is_started:
                    member.client.start()

    def _make_member(self, place: Place) -> _Member:
        member = _Member(place, self)
        member.client = WorkerClient(
            place.address,
            member,
            worker_id=place.worker_id,
            token=self._token,
            lease_s=self._lease_s,
            hello_timeout_s=self._hello_timeout_s,
            write_timeout_s=self._write_timeout_s,
            reconnect_delay_s=self._reconnect_delay_s,
        )
        return member

    def _dismiss_if_idle(self, member: _Member) -> None:
        if member.leaves and not member.runs and member in self._leaving:
            self._leaving.remove(member)
            if self._is_started:
                task = asyncio.get_running_loop().create_task(member.client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(self._members)

    def is_alive(self, name: str) -> bool:
        """Whether a worker of this name is connected."""
        return any(place.name == name and member.client.hello for place, member in self._members.items())

    @property
    def num_alive(self) -> int:
        return sum(member.client.hello is not None for member in self._members.values())

    @property
    def hello(self) -> Hello | None:
        """What a worker that is there serves; None while there is none."""
        return next(iter(self.hellos().values()), None)

    def hellos(self) -> dict[str, Hello]:
        """What each connected worker serves, by name."""
        found = {place.name: member.client.hello for place, member in self._members.items()}
        return {name: hello for name, hello in found.items() if hello is not None}

    @property
    def last_failure(self) -> str:
        """Why there is no worker, in words."""
        if not self._members:
            return "none is registered"
        if len(self._members) == 1:
            return next(iter(self._members.values())).client.last_failure
        return "; ".join(f"{place.name}: {member.client.last_failure}" for place, member in self._members.items())

    async def states(self, timeout_s: float) -> dict[str, EngineState]:
        """The engines' numbers by name, of those that answer in time."""
        members = [member for member in self._members.values() if member.client.hello is not None]
        states = await asyncio.gather(*(member.client.state(timeout_s) for member in members))
        return {member.place.name: state for member, state in zip(members, states, strict=True) if state is not None}

    # ------------------------------------------------------------------------------------------------------- requests

    async def ready(self, timeout_s: float) -> Hello:
        """Wait for a worker. Raises `DeadlineError`, or what `fail` was given."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self._refusal is not None:
                        raise self._refusal
                    if (hello := self.hello) is not None:
                        return hello
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise DeadlineError(f"no worker was ready within {timeout_s:g} s ({self.last_failure})") from None

    def submit(self, submits: Sequence[Submit], *, timeout_s: float, observer: Observer) -> Generation:
        """Start the sequences of one HTTP request; choice i is `submits[i]`. Raises what `fail` was given."""
        if self._refusal is not None:
            raise self._refusal
        deadline = asyncio.get_running_loop().time() + timeout_s
        samples = [Sample(choice, submit, deadline) for choice, submit in enumerate(submits)]
        generation = Generation(samples, send_abort=self._abort, observer=observer, max_buffered=self._max_buffered)
        groups: dict[str, list[_Run]] = {}
        for sample in samples:
            group = groups.setdefault(sample.submit.group or sample.submit.request_id, [])
            run = _Run(sample, generation, group)
            group.append(run)
            self._runs[sample] = run
        for group in groups.values():
            self._assign(group)
        error = DeadlineError(f"the request took longer than {timeout_s:.0f} s")
        generation.fail_after(timeout_s + DEADLINE_GRACE_S, error)
        return generation

    def fail(self, error: ForetokenError) -> None:
        """End all requests, running and waiting, with `error`, and refuse further ones with it."""
        self._refusal = error
        self._changed.set()
        for generation in {run.generation for run in self._runs.values()}:
            generation.fail(error, reason="shutdown")

    def stop_resuming(self) -> None:
        """Nobody starts a worker again: what loses its own, or waits for one, fails with `WorkerLostError`."""
        self._max_resumptions = 0
        for run in [run for run in self._runs.values() if run.member is None]:
            self._give_up(run)

    def _give_up(self, run: _Run) -> None:
        text = "the worker that ran this request was lost"
        if run.num_losses > 1:
            text = f"{run.num_losses} workers in a row that ran this request were lost"
        run.generation.fail(WorkerLostError(f"{text}; send it again"), reason="worker_lost")

    def _assign(self, runs: Sequence[_Run]) -> None:
        """Submit runs of one group to a worker; without one they wait."""
        first = runs[0]
        member = next((run.member for run in first.group if run.member is not None), None)
        if member is None or not member.is_available:
            member = self._choose(first.sample.submit)
        for run in runs:
            if member is not None:
                self._start(run, member)
            elif not self._max_resumptions:
                self._give_up(run)

    def _choose(self, submit: Submit) -> _Member | None:
        members = {member.place.name: member for member in self._members.values() if member.is_available}
        if not members:
            return None
        hello = next(iter(members.values())).client.hello
        assert hello is not None
        loads = [WorkerLoad(name, len(member.runs), member.num_tokens) for name, member in members.items()]
        name = choose(loads, prefix_key(submit, hello.page_size))
        return None if name is None else members[name]

    def _start(self, run: _Run, member: _Member) -> None:
        submit = run.sample.remaining(asyncio.get_running_loop().time())
        if run.num_submits:  # the worker may still have the last submission, or remember it
            submit = msgspec.structs.replace(submit, request_id=f"{submit.request_id}.{run.num_submits}")
        run.num_submits += 1
        self.num_resumed += run.was_lost
        run.was_lost = False
        run.member, run.request_id = member, submit.request_id
        run.num_known = len(submit.output_ids)
        run.num_prompt_left = len(submit.prompt_ids) + len(submit.output_ids)
        run.num_output_left = generated_load(submit)
        member.num_tokens += run.num_prompt_left + run.num_output_left
        member.runs[run.request_id] = run
        member.client.send(submit)

    def _take_off(self, run: _Run) -> None:
        """Its worker has it no longer."""
        member = run.member
        if member is None:
            return
        del member.runs[run.request_id]
        member.num_tokens -= run.num_prompt_left + run.num_output_left
        run.member = None
        self._dismiss_if_idle(member)

    def _abort(self, sample: Sample) -> None:
        run = self._runs.pop(sample, None)
        if run is not None and run.member is not None:
            run.member.client.send(Abort(request_id=run.request_id))
            self._take_off(run)

    # ------------------------------------------------------------------------------------- what a worker's client says

    def member_connected(self) -> None:
        self.num_connections += 1
        self._changed.set()
        self._assign_waiting(run for run in self._runs.values() if run.member is None)

    def member_received(self, member: _Member, output: RequestOutput) -> None:
        run = member.runs.get(output.request_id)
        if run is None:
            return
        finish = output.finish
        if finish is not None:
            self._take_off(run)
            if finish.error_code == DrainingError.code and not output.token_ids:
                member.refuses = True
                if self._finds_another(run):
                    return
            self._runs.pop(run.sample, None)  # it is gone where nobody starts a worker again
        elif run.num_prompt_left:
            member.num_tokens -= run.num_prompt_left
            run.num_prompt_left = 0
        run.generation.deliver(run.sample, output)

    def _finds_another(self, run: _Run) -> bool:
        """Whether a run that its worker did not take goes on: one whose reply has begun waits, if it must."""
        self._assign([run])
        return run.member is not None or run.sample.has_begun

    def member_lost(self, member: _Member) -> None:
        """Place anew what ran on a worker; what has cost too many of them ends."""
        self.num_lost += 1
        member.refuses = False
        runs = list(member.runs.values())
        if runs:
            logger.warning("%d sequences go on without worker %s", len(runs), member.place.name)
        for run in runs:
            self._take_off(run)
            run.was_lost = True
            if len(run.sample.output_ids) > run.num_known:
                run.num_losses = 0
            run.num_losses += 1
        self._dismiss_if_idle(member)
        for run in runs:
            if run.num_losses > self._max_resumptions:
                self._give_up(run)
        self._assign_waiting(run for run in runs if run.sample in self._runs)

    def _assign_waiting(self, runs: Iterable[_Run]) -> None:
        groups: dict[int, list[_Run]] = {}
        for run in runs:
            groups.setdefault(id(run.group), []).append(run)
        for group in groups.values():
            self._assign(group)
