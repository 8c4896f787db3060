"""The table of all metrics, and what collects each. The registry is the caller's; nothing is registered at import."""

from cluster.metrics.engines import CountCollector, EngineCollector
from cluster.metrics.requests import GatewayMetrics, GenerationTimer
from cluster.metrics.table import RESUMED, WORKER_LOST
from cluster.metrics.vllm import vllm_text

__all__ = [
    "RESUMED",
    "WORKER_LOST",
    "CountCollector",
    "EngineCollector",
    "GatewayMetrics",
    "GenerationTimer",
    "vllm_text",
]
