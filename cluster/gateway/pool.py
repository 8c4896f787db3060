"""The workers as one: requests go in, tokens come out, and which process made them is nobody's concern.

Each sequence is on one worker, or waits for one. When its worker is lost it is submitted again to another, or to the
same place once that is back, with the tokens that its reply has: what follows is what would have followed, for nobody
gets it who might compute other tokens (`likeness`). The choices of one prompt go together, for they share its pages.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cluster.errors import DeadlineError, DrainingError, ForetokenError, UnavailableError, WorkerLostError
from cluster.gateway.backlog import Prediction, Prefix
from cluster.gateway.client import WorkerClient
from cluster.gateway.generation import Generation, Observer, Sample
from cluster.gateway.likeness import ModelsTold, PoolModel, all_unlike, token_difference
from cluster.gateway.members import Endpoint, Member, Run
from cluster.gateway.route import WorkerLoad, choose, generated_load, group_of, prefix_key
from cluster.gateway.ttft import RequestSize
from cluster.protocol import Abort, EngineState, Hello, RequestOutput, Submit

logger = logging.getLogger(__name__)

__all__ = ["Endpoint", "WorkerPool"]

DEADLINE_GRACE_S = 1.0  # a worker keeps a request's deadline; past this we do


class WorkerPool:
    """Everything runs on one event loop, from `start` to `close`.

    `token`, `lease_s` and the other times are each `WorkerClient`'s. `max_resumptions`: so often in a row a sequence
    may lose its worker without a new token; the next time it fails with `WorkerLostError`, for it may be what kills
    them. 0: nobody starts a worker again, and nothing waits for one. `alike_timeout_s`: where all workers that are
    there might compute other tokens, a sequence that has begun waits so long for one that does not; likewise new ones,
    where all have another model than those before.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint] = (),
        *,
        token: str | None = None,
        lease_s: float | None = None,
        hello_timeout_s: float = 10.0,
        write_timeout_s: float = 30.0,
        reconnect_delay_s: float = 0.1,
        max_buffered: int = 4096,
        max_resumptions: int = 5,
        alike_timeout_s: float = 30.0,
    ) -> None:
        self._token = token
        self._lease_s = lease_s
        self._hello_timeout_s = hello_timeout_s
        self._write_timeout_s = write_timeout_s
        self._reconnect_delay_s = reconnect_delay_s
        self._max_buffered = max_buffered
        self._max_resumptions = max_resumptions
        self._alike_timeout_s = alike_timeout_s
        self._model = PoolModel(alike_timeout_s)
        self._models_told = ModelsTold()
        self._timers: dict[object, asyncio.TimerHandle] = {}  # by what waits for workers that are alike
        self._members: dict[Endpoint, Member] = {}
        self._leaving: set[Member] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._runs: dict[Sample, Run] = {}
        self._refusal: ForetokenError | None = None
        self._is_started = False
        self._changed = asyncio.Event()  # a worker is there, or `fail` was called
        self.num_connections = 0
        self.num_lost = 0  # connections that broke
        self.num_resumed = 0  # sequences submitted again because their worker was lost
        self.set_workers(endpoints)

    async def __aenter__(self) -> WorkerPool:
        self.start()
        return self

    async def __aexit__(self, *raised: object) -> None:
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
        for timer in self._timers.values():
            timer.cancel()
        self._members.clear()
        self._leaving.clear()

    # --------------------------------------------------------------------------------------------- who is in the pool

    def set_workers(self, endpoints: Iterable[Endpoint]) -> None:
        """From now on these are the workers. What runs on one that is no longer among them may finish there."""
        wanted = dict.fromkeys(endpoints)
        for endpoint in [endpoint for endpoint in self._members if endpoint not in wanted]:
            member = self._members.pop(endpoint)
            logger.info("worker %s at %s leaves the pool", endpoint.name, endpoint.address)
            member.leaves = True
            self._leaving.add(member)
            self._dismiss_if_idle(member)
        for endpoint in wanted:
            if endpoint not in self._members:
                member = self._members[endpoint] = self._make_member(endpoint)
                if self._is_started:
                    member.client.start()
        if self._is_started:
            self._look_at_workers()

    def _make_member(self, endpoint: Endpoint) -> Member:
        member = Member(endpoint, self)
        member.client = WorkerClient(
            endpoint.address,
            member,
            worker_id=endpoint.worker_id,
            token=self._token,
            lease_s=self._lease_s,
            hello_timeout_s=self._hello_timeout_s,
            write_timeout_s=self._write_timeout_s,
            reconnect_delay_s=self._reconnect_delay_s,
        )
        return member

    def _dismiss_if_idle(self, member: Member) -> None:
        if member.leaves and not member.runs and member in self._leaving:
            self._leaving.remove(member)
            if self._is_started:
                task = asyncio.get_running_loop().create_task(member.client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(self._members)

    def is_alive(self, name: str) -> bool:
        """Whether a worker of this name is connected."""
        return any(endpoint.name == name and member.client.hello for endpoint, member in self._members.items())

    @property
    def num_alive(self) -> int:
        return sum(member.client.hello is not None for member in self._members.values())

    @property
    def hello(self) -> Hello | None:
        """What a worker that is there serves; None while there is none."""
        return next((hello for hello in self.hellos().values() if self._model.difference(hello) is None), None)

    @property
    def problem(self) -> str | None:
        """Which workers are there and yet get nothing new, and why, in words."""
        differences = self._model.differences(self.hellos())
        found = [f"worker {name} has another model ({text})" for name, text in differences.items()]
        return f"{', '.join(found)}: no new requests go there" if found else None

    def hellos(self) -> dict[str, Hello]:
        """What each connected worker serves, by name."""
        found = {endpoint.name: member.client.hello for endpoint, member in self._members.items()}
        return {name: hello for name, hello in found.items() if hello is not None}

    @property
    def last_failure(self) -> str:
        """Why there is no worker, in words."""
        if (problem := self.problem) is not None:
            return problem
        if not self._members:
            return "none is registered"
        if len(self._members) == 1:
            return next(iter(self._members.values())).client.last_failure
        return "; ".join(f"{endpoint.name}: {member.client.last_failure}" for endpoint, member in self._members.items())

    async def states(self, timeout_s: float) -> dict[str, EngineState]:
        """The engines' numbers by name, of those that answer in time."""
        members = [member for member in self._members.values() if member.client.hello is not None]
        states = await asyncio.gather(*(member.client.state(timeout_s) for member in members))
        return {member.endpoint.name: state for member, state in zip(members, states, strict=True) if state is not None}

    def backlogs_s(self) -> dict[str, float]:
        """How long a prompt of one token would wait for its first token at each worker that is there, by name."""
        members = [member for member in self._members.values() if member.client.hello is not None]
        found = {
            member.endpoint.name: member.backlog.predict_size(RequestSize(1), member.own_load) for member in members
        }
        return {name: prediction.ttft_s for name, prediction in found.items() if prediction is not None}

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

    def predict(self, submits: Sequence[Submit]) -> Prediction | None:
        """When all first tokens of sequences would be there that are submitted now; None: one would wait for a worker.

        Each group goes where `submit` would place it behind those before it.
        """
        placed: dict[Member, list[Submit]] = {}
        planned: Counter[str] = Counter()
        for _, same in itertools.groupby(submits, group_of):
            group = list(same)
            member = self._choose(group[0], None, planned)
            if member is None:
                return None
            placed.setdefault(member, []).extend(group)
            planned[member.endpoint.name] += sum(len(submit.prompt_ids) + generated_load(submit) for submit in group)
        found = [member.backlog.predict(there, member.own_load) for member, there in placed.items()]
        return max((prediction for prediction in found if prediction), key=lambda one: one.ttft_s, default=None)

    def submit(
        self, submits: Sequence[Submit], *, timeout_s: float, observer: Observer, prediction: Prediction | None = None
    ) -> Generation:
        """Start the sequences of one HTTP request; choice i is `submits[i]`. Raises what `fail` was given.

        `prediction`: of the first of them, to learn from.
        """
        if self._refusal is not None:
            raise self._refusal
        deadline = asyncio.get_running_loop().time() + timeout_s
        samples = [Sample(choice, submit, deadline) for choice, submit in enumerate(submits)]
        generation = Generation(samples, send_abort=self._abort, observer=observer, max_buffered=self._max_buffered)
        groups: dict[str, list[Run]] = {}
        for sample in samples:
            group = groups.setdefault(group_of(sample.submit), [])
            run = Run(sample, generation, group, prediction=None if sample.choice else prediction)
            group.append(run)
            self._runs[sample] = run
        for group in groups.values():
            self._assign(group)
        late = DeadlineError(f"the request took longer than {timeout_s:.0f} s")
        generation.fail_after(timeout_s + DEADLINE_GRACE_S, late)
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

    def _give_up(self, run: Run) -> None:
        many = f"{run.num_losses} workers in a row that ran this request were lost"
        text = many if run.num_losses > 1 else "the worker that ran this request was lost"
        run.generation.fail(WorkerLostError(f"{text}; send it again"), reason="worker_lost")

    def _assign(self, runs: Sequence[Run]) -> None:
        """Submit runs of one group to a worker; without one they wait."""
        for run in runs:
            member = next((other.member for other in run.group if other.member is not None), None)
            if member is None or not self._suits(member, run.began_on):
                member = self._choose(run.sample.submit, run.began_on)
            if member is not None:
                self._start(run, member)
            elif not self._max_resumptions:
                self._give_up(run)
            elif run.began_on is not None:
                self._wait_for_alike(run, run.began_on)

    def _suits(self, member: Member, began_on: Hello | None) -> bool:
        """Whether a worker takes requests, and may take one that has begun on such a worker, or on none yet."""
        hello = member.available
        if hello is None:
            return False
        if began_on is not None:
            return token_difference(began_on, hello) is None
        return self._model.difference(hello) is None

    def _choose(self, submit: Submit, began_on: Hello | None, planned: Counter[str] | None = None) -> Member | None:
        """`planned`: tokens that a worker will have beside those that it has, by its name."""
        more = planned or Counter()
        members = {member.endpoint.name: member for member in self._members.values() if self._suits(member, began_on)}
        if not members:
            return None
        hello = next(iter(members.values())).client.hello
        assert hello is not None
        loads = [WorkerLoad(name, len(one.runs), one.num_tokens + more[name]) for name, one in members.items()]
        name = choose(loads, prefix_key(submit, hello.page_size))
        return None if name is None else members[name]

    def _wait_for_alike(self, run: Run, began_on: Hello) -> None:
        """There is no worker that a sequence may go on at. Where others are there it fails in the end."""
        if run.waits_since is None:
            run.waits_since = asyncio.get_running_loop().time()
            self._set_timer(run.sample, self._fail_unlike, run, began_on)
        else:
            self._fail_unlike(run, began_on)

    def _set_timer(self, key: object, callback: Callable[..., object], *args: object) -> None:
        self._stop_timer(key)
        self._timers[key] = asyncio.get_running_loop().call_later(self._alike_timeout_s, callback, *args)

    def _stop_timer(self, key: object) -> None:
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()

    def _fail_unlike(self, run: Run, began_on: Hello) -> None:
        """Fail a sequence that has waited too long beside workers none of which is like the one that began it."""
        if run.sample not in self._runs or run.waits_since is None:
            return
        is_late = asyncio.get_running_loop().time() - run.waits_since >= self._alike_timeout_s
        if is_late and (why := all_unlike(began_on, self.hellos())) is not None:
            text = f"the worker that ran this request was lost, and no other would go on with the same tokens: {why}"
            run.generation.fail(WorkerLostError(f"{text}. Send it again"), reason="worker_lost")

    def _start(self, run: Run, member: Member) -> None:
        now = asyncio.get_running_loop().time()
        submit = run.sample.remaining(now)
        run.prefix = None if submit.output_ids else self._prefix(run, member, submit)
        run.sent_s = now
        if run.num_submits:  # the worker may still have the last submission, or remember it
            run.prediction = None
            submit = msgspec.structs.replace(submit, request_id=f"{submit.request_id}.{run.num_submits}")
        run.num_submits += 1
        self.num_resumed += run.was_lost
        run.was_lost = False
        run.waits_since = None
        self._stop_timer(run.sample)
        run.member, run.request_id = member, submit.request_id
        run.num_known = len(submit.output_ids)
        run.num_prompt_left = len(submit.prompt_ids) + len(submit.output_ids)
        run.num_output_left = generated_load(submit)
        member.num_tokens += run.num_prompt_left + run.num_output_left
        member.runs[run.request_id] = run
        member.client.send(submit)

    def _prefix(self, run: Run, member: Member, submit: Submit) -> Prefix:
        """What a worker has of a prompt; of a group it computes one, and the others take its pages."""
        if any(other.member is member for other in run.group):
            return member.backlog.shared_prefix(submit)
        return member.backlog.prefix(submit)

    def _take_off(self, run: Run) -> None:
        """Its worker has it no longer."""
        member = run.member
        if member is None:
            return
        del member.runs[run.request_id]
        member.num_tokens -= run.num_prompt_left + run.num_output_left
        run.member = None
        self._dismiss_if_idle(member)

    def _abort(self, sample: Sample) -> None:
        self._stop_timer(sample)
        if (run := self._runs.pop(sample, None)) is not None and run.member is not None:
            run.member.client.send(Abort(request_id=run.request_id))
            self._take_off(run)

    # ------------------------------------------------------------------------------------- what a worker's client says

    def member_connected(self) -> None:
        self.num_connections += 1
        self._look_at_workers()

    def _look_at_workers(self) -> None:
        """One has come or gone. What waits goes on where it may now."""
        hellos = self.hellos()
        before, now = self._model, asyncio.get_running_loop().time()
        self._model = before.counted(hellos.values(), len(self._members) - len(hellos), now)
        self._models_told.tell(before, self._model, hellos)
        self._stop_timer("look")
        if hellos and self.hello is None:
            self._set_timer("look", self._look_at_workers)
        self._changed.set()
        self._assign_waiting([run for run in self._runs.values() if run.member is None])

    def member_received(self, member: Member, output: RequestOutput) -> None:
        run = member.runs.get(output.request_id)
        if run is None:
            return
        finish = output.finish
        if output.token_ids and run.num_prompt_left:
            member.began(run, output, asyncio.get_running_loop().time())
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
        if finish is not None and finish.reason in ("stop", "length") and not run.sample.submit.pooling:
            member.backlog.ended(len(run.sample.output_ids))
        if run.began_on is None and run.sample.has_begun:
            run.began_on = member.client.hello

    def _finds_another(self, run: Run) -> bool:
        """Whether a run that its worker did not take goes on: one whose reply has begun waits, if it must."""
        self._assign([run])
        return run.member is not None or run.sample.has_begun

    def member_lost(self, member: Member) -> None:
        """Place anew what ran on a worker; what has cost too many of them ends."""
        self.num_lost += 1
        member.refuses = False
        runs = list(member.runs.values())
        if runs:
            logger.warning("%d sequences go on without worker %s", len(runs), member.endpoint.name)
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
        self._look_at_workers()

    def _assign_waiting(self, runs: Iterable[Run]) -> None:
        groups: dict[int, list[Run]] = {}
        for run in runs:
            groups.setdefault(id(run.group), []).append(run)
        for group in groups.values():
            self._assign(group)
