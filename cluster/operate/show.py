"""What a cluster looks like, for people: the tables of `cluster status` and the summary of `cluster up`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from cluster.config import Settings
from cluster.operate.state_file import ClusterFiles, SupervisorState
from cluster.serve import curl_line, needs_key
from cluster.store.records import STALE_S, ClusterStatus, WorkerStatus
from cluster.tables import print_rows

logger = logging.getLogger(__name__)


def work_per_s(before: ClusterStatus, after: ClusterStatus) -> dict[str, float]:
    """Generated tokens a second of each worker, or rows of an expert worker, between two looks.

    0 for one that was started anew in between.
    """
    seconds = after.at_s - before.at_s
    earlier = {worker.state.worker_id: _work_done(worker) for worker in before.workers}
    return {
        worker.name: max(0, _work_done(worker) - earlier[worker.state.worker_id]) / seconds
        if seconds > 0 and worker.state.worker_id in earlier
        else 0.0
        for worker in after.workers
    }


def _work_done(worker: WorkerStatus) -> int:
    return worker.state.expert_rows if worker.role == "expert" else worker.state.generated_tokens


def node_rows(status: ClusterStatus) -> list[tuple[str, ...]]:
    """A line a node, below its heading."""
    rows: list[tuple[str, ...]] = [("NODE", "STATE", "MEMORY", "DEVICES", "WORKERS")]
    for node in status.nodes:
        names = ", ".join(worker.name for worker in status.workers if worker.node_id == node.node_id)
        state = "up" if node.is_alive else "gone"
        rows.append((node.node_id, state, f"{node.memory_bytes / 2**30:.1f} GiB", ", ".join(node.devices), names))
    return rows


def worker_rows(status: ClusterStatus, rates: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A line a worker, below its heading."""
    rows: list[tuple[str, ...]] = [
        ("WORKER", "NODE", "CONDITION", "RUNNING", "WAITING", "TOKENS/S", "EXPERTS", "ROWS/S", "PID")
    ]
    rows += [_worker_row(worker, rates) for worker in status.workers]
    return rows


def _worker_row(worker: WorkerStatus, rates: Mapping[str, float]) -> tuple[str, ...]:
    steps = worker.role != "expert"
    return (
        worker.name,
        worker.node_id,
        worker.condition,
        str(worker.state.num_running) if steps else "",
        str(worker.state.num_waiting) if steps else "",
        f"{rates.get(worker.name, 0.0):.1f}" if steps else "",
        str(worker.num_experts) if worker.num_experts else "",
        "" if steps else f"{rates.get(worker.name, 0.0):.0f}",
        str(worker.pid),
    )


def print_status(
    status: ClusterStatus, rates: Mapping[str, float], state: SupervisorState | None, *, age_s: float
) -> None:
    """The tables. `age_s`: how old the status is; where it is no news any more that is said."""
    console = Console(soft_wrap=True, highlight=False)
    where = f" on {state.url}" if state else ""
    print(f"{status.cluster} serves {status.model}{where}")
    print(f"controller {status.controller_id}, epoch {status.epoch}\n")
    print_rows(node_rows(status), console=console)
    print()
    print_rows(worker_rows(status, rates), console=console)
    if state is not None and state.children:
        print()
        children = sorted(state.children.items())
        print_rows([("PROCESS", "PID"), *((name, str(pid)) for name, pid in children)], console=console)
    for left_out in status.left_out:
        print(f"\nleft out: {left_out.worker}: {left_out.reason}")
    if status.problem:
        print(f"\nproblem: {status.problem}")
    if age_s > STALE_S:
        print(f"\nthis is {age_s:.0f} s old: the controller does not write")


def announce_cluster(status: ClusterStatus, url: str, settings: Settings, logs: Path, start_s: float) -> None:
    """The start-up summary: tables on a terminal, log lines otherwise."""
    curl = curl_line(url, status.model, needs_key(settings))
    if settings.log_format == "json" or not sys.stdout.isatty():
        for row in node_rows(status)[1:]:
            logger.info("node %s", "  ".join(filter(None, row)))
        logger.info("page: %s/ shows what runs where, live; logs are in %s", url, logs)
        logger.info("%s is ready on %s after %.1f s; try: %s", status.model, url, start_s, curl)
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold green]Ready[/] on [bold]{url}/v1[/] after {start_s:.1f} s: {status.model}\n")
    print_rows(node_rows(status), console=console)
    console.print(f"\n[dim]Page:[/] {url}/ shows what runs where, live\n[dim]Logs:[/] {logs}\n\nTry:")
    console.print(curl, markup=False)
    look = f"foretoken cluster status{ClusterFiles(settings).flag}"
    console.print(f"\n[dim]Ctrl-C ends it; running requests may finish. `{look}` shows it.[/]\n")
