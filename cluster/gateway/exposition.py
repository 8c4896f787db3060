"""What `GET /metrics` says."""

from __future__ import annotations

from prometheus_client import generate_latest

from cluster.gateway.pool import WorkerPool
from cluster.gateway.service import Gateway
from cluster.gateway.status import STATE_TIMEOUT_S
from cluster.metrics import vllm_text
from cluster.metrics.table import FULL_KV, kv_usage
from cluster.protocol import EngineState


async def exposition(gateway: Gateway) -> bytes:
    """All metrics in Prometheus' text format, as of now."""
    pool, metrics = gateway.pool, gateway.metrics
    states = await pool.states(STATE_TIMEOUT_S)
    gateway.engine_metrics.update(states)
    metrics.open_requests.set(gateway.admission.num_open)
    metrics.worker_up.set(pool.num_alive)
    metrics.worker_connections.set(pool.num_connections)
    metrics.workers(pool.hellos(), saturations(pool, states, gateway.settings.max_ttft_s))
    text = generate_latest(gateway.registry)
    return text + vllm_text(gateway.registry) if gateway.settings.vllm_metrics else text


def saturations(pool: WorkerPool, states: dict[str, EngineState], max_ttft_s: float | None) -> dict[str, float]:
    """How near each worker, by name, is to what it can do: 1 is there."""
    hellos, waits = pool.hellos(), pool.backlogs_s()
    found = {}
    for name, state in states.items():
        if name in hellos:
            parts = [state.num_running / hellos[name].max_num_seqs, kv_usage(state) / FULL_KV]
            if max_ttft_s is not None:
                parts.append(waits.get(name, 0.0) / max_ttft_s)
            found[name] = max(parts)
    return found
