"""What a pool of workers keeps of each worker, and of each sequence on its way through one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cluster.gateway.backlog import Backlog, OwnLoad, Prediction, Prefix
from cluster.gateway.client import WorkerClient
from cluster.gateway.generation import Generation, Sample
from cluster.protocol import EngineState, Hello, RequestOutput


class Endpoint(NamedTuple):
    """Where a worker is. Another process of the same name is another one."""

    name: str  # "attention-0"
    address: str  # "unix:/path" or "host:port"
    worker_id: str = ""  # of the process that is meant; "": whichever answers


class Pool(Protocol):
    """Who is told what a worker does."""

    def member_connected(self) -> None: ...

    def member_received(self, member: Member, output: RequestOutput) -> None: ...

    def member_lost(self, member: Member) -> None: ...


@dataclass(slots=True, eq=False)
class Run:
    """A sequence on its way through the pool."""

    sample: Sample
    generation: Generation
    group: list[Run]  # those that go to the same worker, itself among them
    member: Member | None = None  # where it runs; None: it waits for a worker
    request_id: str = ""  # of its last submission
    num_submits: int = 0
    num_losses: int = 0  # of workers, since its last new token
    num_known: int = 0  # tokens that it had when it was last submitted
    num_prompt_left: int = 0  # what it still counts for in its member's load
    num_output_left: int = 0
    sent_s: float = 0.0  # when it was submitted last, on the event loop's clock
    prefix: Prefix | None = None  # of its prompt, as of that
    prediction: Prediction | None = None  # of its first token, until that is there
    was_lost: bool = False  # since its last submission
    began_on: Hello | None = None  # what the worker serves that its first output came from
    waits_since: float | None = None  # for a worker like that one, on the event loop's clock


@dataclass(slots=True, eq=False)
class Member:
    """One worker of the pool: what its client tells, and what runs on it."""

    endpoint: Endpoint
    pool: Pool
    runs: dict[str, Run] = field(default_factory=dict)  # by the id of their submission
    num_tokens: int = 0  # of all its runs, as `route.WorkerLoad` counts
    refuses: bool = False  # it is shutting down
    leaves: bool = False  # it gets nothing new, and goes when what runs on it is done
    backlog: Backlog = field(default_factory=Backlog)
    client: WorkerClient = field(init=False)

    @property
    def available(self) -> Hello | None:
        """What it serves; None while it takes no requests."""
        return None if self.refuses or self.leaves else self.client.hello

    @property
    def own_load(self) -> OwnLoad:
        """What it has of this gateway's."""
        waiting = [run for run in self.runs.values() if run.num_prompt_left]
        ahead = sum(run.num_prompt_left - (run.prefix.num_cached if run.prefix else 0) for run in waiting)
        return OwnLoad(num_decoding=len(self.runs) - len(waiting), num_without_token=len(waiting), prompt_tokens=ahead)

    def connected(self) -> None:
        self.refuses = False
        hello = self.client.hello
        assert hello is not None, "it is connected"
        self.backlog.connected(hello)
        self.pool.member_connected()

    def received(self, output: RequestOutput) -> None:
        self.pool.member_received(self, output)

    def began(self, run: Run, output: RequestOutput, now: float) -> None:
        """Learn from a sequence's first token."""
        if run.prefix is not None:
            self.backlog.began(run.prefix, output.cached_tokens)
        if run.prediction is not None:
            self.backlog.came(run.prediction, now - run.sent_s)
            run.prediction = None

    def told(self, state: EngineState) -> None:
        self.backlog.told(state, self.own_load)

    def lost(self) -> None:
        self.pool.member_lost(self)
