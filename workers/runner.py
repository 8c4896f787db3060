"""The one thread that owns an engine: takes messages from an inbox, steps, hands outputs on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from cluster.errors import DrainingError, ForetokenError, PeerLostError
from cluster.protocol import EngineState, Finish, RequestOutput, StepOutput
from workers.engine import Engine
from workers.lease import Lease
from workers.request import Request

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.25  # how often an engine that runs no steps looks at deadlines


class EngineRunner:
    """Runs `Engine.step` while there is work. All methods may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        publish: Callable[[StepOutput], None],
        die: Callable[[], None] = lambda: os._exit(1),
        can_step: Callable[[], bool] = lambda: True,
        reroute_timeout_s: float = 60.0,
        turns: Lease | None = None,
    ) -> None:
        """`publish` gets each step's output, in order, on the engine's thread; `die` ends the process at a fault.

        While `can_step` says no (`wake` when that changes), requests wait: before it first said yes for as long as
        their deadlines allow, later for `reroute_timeout_s`; then they end with `peer_lost`.

        `turns` is renewed at each turn of the thread, and by whoever gets on with its step: a worker whose engine is
        stuck ends, since its event loop lives on and would go on saying that the worker does. A thread that waits, for
        work or for experts, takes turns.
        """
        self._engine = engine
        self._publish = publish
        self._die = die
        self._can_step = can_step
        self._reroute_timeout_s = reroute_timeout_s
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._woken = False
        self._stopping = False
        self._draining = False
        self._has_stepped = False
        self._stalled_since: float | None = None  # while there is work and no step succeeds
        self._turns = turns or Lease(None, "")
        self._snapshot = engine.snapshot()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._turns.start()

    def submit(self, request: Request) -> None:
        """Queue a request; whatever goes wrong reaches its caller as its terminal event."""
        self._post(lambda: self._submit(request))

    def abort(self, request_id: str) -> None:
        self._post(lambda: self._engine.abort(request_id))

    def wake(self) -> None:
        """Look at `can_step` again."""
        with self._wake:
            self._woken = True
            self._wake.notify()

    def drain(self) -> None:
        """Refuse new requests from now on; what runs goes on."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._inbox and not self._engine.has_work

    def snapshot(self) -> EngineState:
        """The state after the latest step."""
        return self._snapshot

    def stop(self, deadline_s: float) -> bool:
        """End the thread after its current step; False where it did not end in time."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    def _submit(self, request: Request) -> None:
        try:
            if self._draining:
                raise DrainingError("the server is shutting down and takes no new requests; try another, or later")
            self._engine.submit(request)
        except ForetokenError as error:
            self._publish(refusal(request.request_id, error))

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException:
            # Nobody else would notice: the process would go on answering, and every request would hang. The launcher
            # starts a process that has ended again, and its clients learn that their worker is lost.
            log.critical("the engine's thread failed; the worker ends", exc_info=True)
            self._die()
        finally:
            self._turns.end()

    def _loop(self) -> None:
        while True:
            self._turns.renew()
            with self._wake:
                if not (self._inbox or self._woken or self._stopping or self._has_a_step()):
                    self._wake.wait(IDLE_WAIT_S)
                self._woken = False
                if self._stopping:
                    return
            while self._inbox:
                self._inbox.popleft()()
            output = self._advance()
            self._snapshot = self._engine.snapshot()
            if output.outputs:
                self._publish(output)

    def _has_a_step(self) -> bool:
        return self._engine.has_work and self._can_step() and not self._engine.stalled

    def _advance(self) -> StepOutput:
        """A step; while experts are out of reach, what goes without one."""
        self._give_up_the_late()
        if self._can_step():
            self._has_stepped = True
            output, stalled = self._engine.step(), self._engine.stalled
        else:
            output, stalled = self._engine.tend(), self._has_stepped
        if not stalled or not self._engine.has_work:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = time.monotonic()
        return output

    def _give_up_the_late(self) -> None:
        """End whoever was there when the stall began, once it lasts too long; who came later has its own time."""
        arrived_by = time.monotonic() - self._reroute_timeout_s
        if self._stalled_since is not None and self._stalled_since <= arrived_by:
            message = f"experts that this request needs were out of reach for {self._reroute_timeout_s:g} s; try again"
            self._engine.give_up(arrived_by, PeerLostError(message))


def refusal(request_id: str, error: ForetokenError) -> StepOutput:
    """The terminal event of a request that was never taken."""
    finish = Finish(reason="error", error_code=error.code, error_message=error.message)
    return StepOutput(outputs=[RequestOutput(request_id=request_id, index=0, finish=finish)])
