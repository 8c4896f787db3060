"""How a worker is launched, whoever starts it: its command, its options, its environment.

A worker is ``python -m workers.server``, which reads a `Launch` as one JSON line from its standard input.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from cluster.config import Settings
from cluster.control.worker_folders import kernels_dir
from cluster.environment import child_environment
from cluster.machine import X86, Machine
from cluster.protocol import Launch

COMMAND = (sys.executable, "-P", "-m", "workers.server")
POLL_S = 0.02  # between two looks whether it serves


def launch_message(
    settings: Settings, *, address: str, model_path: Path, served_name: str, progress: bool, machine: Machine
) -> Launch:
    """A worker's options from the settings and the machine that it starts on."""
    return Launch(
        address=address,
        model_path=str(model_path),
        served_name=served_name,
        device=settings.device,
        numerics=settings.numerics,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        host_memory_bytes=machine.available_bytes,
        token_budget=settings.token_budget,
        page_size=settings.page_size,
        kv_cache_bytes=None if settings.kv_cache_bytes is None else int(settings.kv_cache_bytes),  # not pydantic's type
        prefix_cache=settings.prefix_cache,
        static_batching=settings.static_batching,
        num_threads=settings.num_threads,
        kernels_dir=str(kernels_dir(settings)) if settings.host_kernels else None,
        drain_timeout_s=settings.drain_timeout_s,
        log_level=settings.log_level,
        log_format=settings.log_format,
        progress=progress,
    )


def worker_environment(launch: Launch, machine: Machine, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: no secret, and what must stand before torch is imported.

    ``MKL_CBWR`` holds Intel's MKL to one order of additions whatever the number of rows (numerics class `invariant`).
    A container's CPU quota is not seen by OpenMP, which would start a thread for each core of the machine.
    """
    environment = child_environment(inherited)
    invariant = launch.numerics == "invariant" or (launch.numerics == "auto" and not launch.device.startswith("cuda"))
    if invariant and machine.architecture in X86:
        for flag, isa in (("avx512f", "AVX512"), ("avx2", "AVX2")):
            if flag in machine.cpu_flags:
                environment["MKL_CBWR"] = f"{isa},STRICT"
                break
    num_threads = launch.num_threads
    if num_threads is None and machine.num_usable_cores < machine.num_cores:
        num_threads = machine.num_usable_cores
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(num_threads)
    return environment
