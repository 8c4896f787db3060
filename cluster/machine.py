"""What this machine lets a process use: instruction set, cores, memory. Read from the system, decided purely."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
X86 = ("x86_64", "AMD64", "i386")
GPU_PROBE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Machine:
    """The processor and what of it this process may use."""

    system: str  # Linux, Darwin
    architecture: str  # x86_64, aarch64, arm64
    processor: str  # the maker's name
    cpu_flags: frozenset[str]  # as Linux names them: avx2, avx512f, amx_tile, …
    num_cores: int  # in this process's affinity mask
    cpu_quota: float | None  # cores a container may use; None: no limit
    memory_bytes: int  # of the machine, or a container's limit
    available_bytes: int  # free for use now

    @property
    def num_usable_cores(self) -> int:
        return self.num_cores if self.cpu_quota is None else max(1, min(self.num_cores, round(self.cpu_quota)))

    @property
    def isa(self) -> str:
        """The widest instruction set that matters to us, in words."""
        if self.architecture not in X86:
            return "NEON" if self.architecture in ("aarch64", "arm64") else self.architecture
        for flag, name in (("amx_tile", "AVX-512, AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2")):
            if flag in self.cpu_flags:
                return name
        return "SSE"


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The processor's name and flags in the text of /proc/cpuinfo (empty where it has none)."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (name[1].strip() if name else "", frozenset(flags[1].split()) if flags else frozenset())


def parse_cpu_quota(text: str) -> float | None:
    """Cores allowed by a cgroup-v2 ``cpu.max``: ``"150000 100000"`` -> 1.5, ``"max 100000"`` -> None."""
    quota, _, period = text.strip().partition(" ")
    return None if quota in ("", "max") or not period else int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu_quota() -> float | None:
    if quota := parse_cpu_quota(_read(CGROUP / "cpu.max")):
        return quota
    old = _read(CGROUP / "cpu/cpu.cfs_quota_us"), _read(CGROUP / "cpu/cpu.cfs_period_us")
    return parse_cpu_quota(" ".join(old)) if all(old) and int(old[0]) > 0 else None


def _memory() -> tuple[int, int]:
    """Bytes in all and bytes available, the smaller of the machine's and the container's."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    available = int(found[1]) * 1024 if found else total
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _read(CGROUP / limit_name).strip()
        if limit.isdigit() and int(limit) < total:
            total = int(limit)
            available = min(available, total - int(_read(CGROUP / used_name).strip() or 0))
    return total, available


def _processor() -> tuple[str, frozenset[str]]:
    if platform.system() != "Darwin":
        return parse_cpuinfo(_read(Path("/proc/cpuinfo")))
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    return shown.strip(), frozenset()


def gpu_bytes() -> list[int]:
    """The memory of each GPU of this machine, by index; none where they cannot be asked."""
    command = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) * 2**20 for line in done.stdout.split() if line.isdigit()]


def free_port(host: str = "") -> int:
    """A TCP port that nothing uses now, at the address `host` or, "", at any of ours."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def this_machine() -> Machine:
    """Look at the machine this process runs on."""
    name, flags = _processor()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, available = _memory()
    return Machine(
        platform.system(),
        platform.machine(),
        name or platform.machine(),
        flags,
        num_cores,
        _cpu_quota(),
        total,
        available,
    )
