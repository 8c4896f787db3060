"""`make cluster-demo`: a cluster on this machine, and what a client sees while its workers are killed in mid-stream.

One sampled chat is streamed undisturbed; then again while an expert worker, and again while the attention worker that
runs it, is ended by SIGKILL. Exit code 0 only where every request was finished with the very tokens of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from cluster.config import Settings
from cluster.errors import ForetokenError
from cluster.protocol import Role
from cluster.store.records import ClusterStatus
from cluster.tables import print_rows
from loadtests.cluster_process import NUM_NODES, LocalCluster, local_cluster, own_settings
from loadtests.demo_stream import Killed, watch
from loadtests.processes import BenchError
from loadtests.token_streams import TokenStream, compare

START_S = 240.0
WHOLE_S = 120.0  # until what was killed is there again
POLL_S = 0.1
INTERRUPTED = 130  # as a shell shows an interrupt
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is a river?"}],
    "temperature": 0.8,
    "seed": 10,
    "min_tokens": 90,  # a middle to be killed in, on any machine
    "max_tokens": 160,
}


@dataclass(frozen=True)
class Step:
    """A line of the summary."""

    name: str
    seconds: float
    result: str


@dataclass
class Demo:
    """What is told, and what has come of it."""

    console: Console
    steps: list[Step] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # what was not as it should be

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """A heading, then what the block does, then its seconds; the block appends what it found out."""
        number = len(self.steps) + 1
        self.say(f"\n{number}. {name}", "bold")
        started = time.monotonic()
        found: list[str] = []
        yield found
        seconds = time.monotonic() - started
        result = ", ".join(found)
        self.say(f"   {result} ({seconds:.1f} s)" if result else f"   ({seconds:.1f} s)", "green")
        self.steps.append(Step(name, seconds, result))

    def sum_up(self, seconds: float) -> int:
        """The table and the verdict; returns the exit code."""
        self.say("")
        rows = [("STEP", "SECONDS", "RESULT")]
        rows += [(f"{i}. {step.name}", f"{step.seconds:.1f}", step.result) for i, step in enumerate(self.steps, 1)]
        print_rows([*rows, ("in all", f"{seconds:.1f}", "")], console=self.console)
        self.say("")
        for fault in self.faults:
            self.say(fault, "bold red")
        if not self.faults:
            self.say("Every request was finished, and every token was the same as without the kills.", "bold green")
        return 1 if self.faults else 0


# ------------------------------------------------------------------------------------------------ starting and ending


@contextlib.contextmanager
def running(demo: Demo, settings: Settings) -> Iterator[LocalCluster]:
    """A cluster, told about as it starts and as it ends; however the block is left, nothing of it is left behind.

    Raises `BenchError` with the words of `cluster up` where that ends by itself.
    """
    with contextlib.ExitStack() as stack:
        try:
            with demo.step(f"foretoken cluster up --local {settings.local}") as found:
                cluster = stack.enter_context(local_cluster(settings))
                with demo.console.status("starting"):
                    cluster.wait_whole(START_S, _Teller(demo))
                found.append(
                    f"{settings.attention_workers + settings.expert_workers} workers on {settings.local} nodes"
                )
            yield cluster
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # the terminal may be gone
                demo.say("\nInterrupted: the cluster is told to end.", "bold yellow")
            stack.close()
            with contextlib.suppress(OSError):
                demo.say("It has ended; nothing of it is left.")
            raise
        else:
            with demo.step("The cluster is stopped (SIGTERM)") as found:
                stack.close()
                found.append("all processes have ended")


class _Teller:
    """Says of each part of a cluster once that it is up."""

    def __init__(self, demo: Demo) -> None:
        self._demo = demo
        self._started = time.monotonic()
        self._told: set[str] = set()

    def __call__(self, cluster: LocalCluster) -> None:
        for name, pid in cluster.children().items():
            self._tell(name, f"{name} (process {pid}) {_what(name)}")
        status = cluster.status()
        for worker in () if status is None else status.workers:
            if worker.condition == "serving":
                self._tell(worker.name, f"{worker.name} (process {worker.pid}) serves on {worker.node_id}")

    def _tell(self, thing: str, text: str) -> None:
        if thing not in self._told:
            self._told.add(thing)
            self._demo.say(f"   {time.monotonic() - self._started:5.1f} s  {text}")


def _what(name: str) -> str:
    about = {
        "redis": "keeps the cluster's records",
        "ray-0": "is the head of Ray",
        "gateway": "speaks HTTP",
        "controller": "places the workers and their experts",
    }
    return about.get(name, "is another node of Ray")


# --------------------------------------------------------------------------------------------------- what is streamed


def status_rows(status: ClusterStatus) -> list[tuple[str, ...]]:
    """A line a worker, by node, below its heading."""
    total = status.num_experts * status.num_layers
    rows: list[tuple[str, ...]] = [("NODE", "WORKER", "PROCESS", "CONDITION", "EXPERTS")]
    for worker in sorted(status.workers, key=lambda worker: (worker.node_id, worker.name)):
        held = f"{worker.num_experts} of {total}" if worker.num_experts else ""
        rows.append((worker.node_id, worker.name, str(worker.pid), worker.condition, held))
    return rows


def undisturbed(demo: Demo, cluster: LocalCluster) -> TokenStream:
    """Raises `BenchError` where it fails: then there is nothing to compare with."""
    question = CHAT["messages"][0]["content"]
    with demo.step("A chat, undisturbed") as found:
        demo.say(f'   "{question}" at temperature {CHAT["temperature"]}, seed {CHAT["seed"]}:')
        stream, _ = watch(demo.console, cluster, _body(cluster))
        if stream.error:
            raise BenchError(f"the undisturbed request failed: {stream.error}")
        found.append(f"{len(stream.ids)} tokens")
    return stream


def disturbed(demo: Demo, cluster: LocalCluster, role: Role, expected: TokenStream) -> None:
    """The same chat while a worker of `role` is killed; then until the cluster is whole again."""
    with demo.step(f"The same again, and an {role} worker is killed") as found:
        num_resumed = cluster.num_resumed()
        stream, killed = watch(demo.console, cluster, _body(cluster), role)
        if killed is None:
            raise BenchError(f"the answer was over before an {role} worker could be killed: {stream.error or 'ok'}")
        text, is_equal = verdict(stream, expected)
        found.append(f"{text}, pause {stream.pause_s(killed.at_s):.2f} s")
        if not is_equal:
            demo.faults.append(f"{killed.name} was killed: {text}")
        if role == "attention":
            if cluster.num_resumed() == num_resumed:
                raise BenchError(f"{killed.name} did not run this chat any more when it was killed; try again")
            found.append("resumed on another worker")
    with demo.step("Until the cluster is whole again") as found:
        found.append(_recovered(cluster, killed))


def _body(cluster: LocalCluster) -> dict[str, Any]:
    return {**CHAT, "model": cluster.server.model}


def verdict(got: TokenStream, expected: TokenStream) -> tuple[str, bool]:
    """What to say of a disturbed stream, and whether it is the undisturbed one."""
    if got.ids == expected.ids and not got.error:
        return f"all {len(expected.ids)} tokens equal", True
    difference = compare(got.ids, expected.ids)
    text = f"of {difference.checked} tokens {difference.lost} lost, {difference.repeated} repeated, "
    text += f"{difference.differing} differing"
    pairs = zip([*got.ids, None], [*expected.ids, None], strict=False)
    if where := next((f" (at {i}: {a} for {b})" for i, (a, b) in enumerate(pairs) if a != b), ""):
        text += where
    return f"{text}; {got.error}" if got.error else text, False


def _recovered(cluster: LocalCluster, killed: Killed) -> str:
    """Who took the place of the one that was killed, and how the experts are shared out now."""
    deadline = time.monotonic() + WHOLE_S
    while True:
        status = cluster.status()
        new = next((worker for worker in status.workers if worker.name == killed.name), None) if status else None
        if status is not None and new is not None and new.pid != killed.pid and not cluster.problem():
            shards = " + ".join(str(worker.num_experts) for worker in status.workers if worker.role == "expert")
            return f"{new.name} runs as process {new.pid}, experts are shared out as {shards}"
        if time.monotonic() > deadline:
            raise BenchError(f"the cluster is not whole after {WHOLE_S:g} s: {cluster.problem() or 'no new worker'}")
        time.sleep(POLL_S)


# ----------------------------------------------------------------------------------------------------------- all of it


def show(demo: Demo, cluster: LocalCluster) -> None:
    status = cluster.status()
    if status is not None:
        demo.say("")
        print_rows(status_rows(status), console=demo.console)


def run(demo: Demo, settings: Settings) -> int:
    """All steps; returns the exit code. Raises `BenchError` or `ForetokenError` where one cannot be done."""
    started = time.monotonic()
    with running(demo, settings) as cluster:
        show(demo, cluster)
        demo.say(f"\n   See it in a browser while this runs: {cluster.server.base_url}/", "bold")
        expected = undisturbed(demo, cluster)
        disturbed(demo, cluster, "expert", expected)
        disturbed(demo, cluster, "attention", expected)
        show(demo, cluster)
    return demo.sum_up(time.monotonic() - started)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make cluster-demo", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--cluster-name", default="demo", help="another than that of a cluster that runs here")
    parser.add_argument("--port", type=int, default=0, help="of the gateway; 0: any free one")
    given = parser.parse_args(argv)
    demo = Demo(Console(soft_wrap=True, highlight=False))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    flags = {"local": NUM_NODES, "attention_workers": 2, "expert_workers": 2}
    try:
        return run(demo, own_settings(**flags, cluster_name=given.cluster_name, port=given.port))
    except (BenchError, ForetokenError) as error:
        demo.say(f"\nError: {error}", "bold red")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
