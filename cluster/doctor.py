"""`foretoken doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import Settings
from cluster.environment import PACKAGES
from cluster.machine import X86, Machine, this_machine

GIB = 1024**3
LOW_DISK_BYTES = 10 * GIB
LOW_MEMORY_BYTES = 2 * GIB
PROBE_TIMEOUT_S = 120
COMPILERS = ("c++", "g++", "clang++")  # as workers/kernels/build.py looks for them
_TORCH_PROBE = """
import json, torch
num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
gpus = [torch.cuda.get_device_properties(index) for index in range(num_gpus)]
print(json.dumps({
    "version": torch.__version__, "threads": torch.get_num_threads(), "mkl": torch.backends.mkl.is_available(),
    "cuda": torch.version.cuda, "gpus": [[gpu.name, gpu.total_memory, f"{gpu.major}.{gpu.minor}"] for gpu in gpus],
}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    state: Literal["ok", "note", "missing"] = "ok"
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; takes some seconds, for torch is asked in a process of its own."""
    machine = this_machine()
    return [
        *machine_findings(machine),
        python_finding(sys.version_info[:3], sys.executable),
        *package_findings(required_packages()),
        *torch_findings(probe_torch()),
        driver_finding(_output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")),
        compiler_finding(),
        disk_finding("disk for FORETOKEN_HOME", settings.home),
        demo_finding(PACKAGES / "workers" / "demo" / "model"),
    ]


def machine_findings(machine: Machine) -> list[Finding]:
    """Processor, cores and memory."""
    wide = machine.architecture not in X86 or "avx2" in machine.cpu_flags
    cores = f"{machine.num_usable_cores}"
    if machine.num_usable_cores < machine.num_cores:
        cores += f" (a container's quota; the machine shows {machine.num_cores})"
    low = machine.available_bytes < LOW_MEMORY_BYTES
    return [
        Finding("system", f"{machine.system} {platform.release()}, {machine.architecture}"),
        Finding(
            "processor",
            f"{machine.processor} ({machine.isa})",
            "ok" if wide else "note",
            "" if wide else "without AVX2 the CPU path is slow",
        ),
        Finding("cores", cores),
        Finding(
            "memory",
            f"{machine.memory_bytes / GIB:.1f} GiB, {machine.available_bytes / GIB:.1f} GiB available",
            "note" if low else "ok",
            "little memory is free: close something, or set kv_cache_bytes" if low else "",
        ),
    ]


def python_finding(version: tuple[int, int, int], executable: str) -> Finding:
    """The interpreter that runs us."""
    found = f"{'.'.join(map(str, version))} ({executable})"
    if version < (3, 11, 0):
        return Finding("Python", found, "missing", "Foretoken needs Python 3.11 or newer")
    return Finding("Python", found)


def required_packages() -> list[str]:
    """The distributions that Foretoken declares, extras left out; empty where it runs from a bare folder."""
    try:
        requirements = importlib.metadata.requires("foretoken") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line]


def package_findings(names: Iterable[str]) -> list[Finding]:
    """Which of the packages are there, in one line, and a line for each that is not."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if not versions:
        return [Finding("packages", "Foretoken is not installed here", "note", "pip install . (or: make setup)")]
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    missing = [
        Finding(name, "not installed", "missing", f"pip install {name}")
        for name, found in versions.items()
        if not found
    ]
    return [Finding("packages", there), *missing]


def probe_torch() -> dict[str, Any] | str:
    """What torch says of itself, asked in a child (this process never imports it); its last error line if it fails."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", _TORCH_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"gave no answer within {PROBE_TIMEOUT_S} s"
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def torch_findings(probe: dict[str, Any] | str) -> list[Finding]:
    """torch itself, and the device it would run on."""
    if isinstance(probe, str):
        return [Finding("torch", f"does not import: {probe}", "missing", "pip install 'torch>=2.11,<2.14'")]
    build = f"CUDA {probe['cuda']}" if probe["cuda"] else "CPU build"
    findings = [Finding("torch", f"{probe['version']} ({build}{', MKL' if probe['mkl'] else ''})")]
    for name, memory_bytes, capability in probe["gpus"]:
        findings.append(Finding("device", f"{name}, {memory_bytes / GIB:.0f} GiB, compute capability {capability}"))
    if not probe["gpus"]:
        findings.append(Finding("device", f"CPU, {probe['threads']} threads"))
    return findings


def driver_finding(nvidia_smi: str) -> Finding:
    """NVIDIA's driver, whether or not torch can use it."""
    if not nvidia_smi:
        return Finding("NVIDIA driver", "none", "note", "models run on the CPU")
    return Finding("NVIDIA driver", "; ".join(nvidia_smi.splitlines()))


def compiler_finding() -> Finding:
    """A C++ compiler builds our CPU kernels on the first start; without one torch's operations are used."""
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        if path := shutil.which(name):
            return Finding("C++ compiler", path)
    advice = "the CPU path is several times faster with one: apt-get install g++ (Fedora: dnf install gcc-c++)"
    return Finding("C++ compiler", "none", "note", advice)


def disk_finding(what: str, folder: Path) -> Finding:
    """Room where prepared files go; the folder itself need not exist yet."""
    nearest = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free_bytes = shutil.disk_usage(nearest).free
    if not os.access(nearest, os.W_OK):
        return Finding(what, f"{folder}: cannot be written", "missing", "set FORETOKEN_HOME to a folder of yours")
    low = free_bytes < LOW_DISK_BYTES
    advice = "a large model needs more: set FORETOKEN_HOME to a larger disk" if low else ""
    return Finding(what, f"{folder}: {free_bytes / GIB:.1f} GiB free", "note" if low else "ok", advice)


def demo_finding(folder: Path) -> Finding:
    """The model that `foretoken serve` without a name serves."""
    if (folder / "model.safetensors").is_file():
        return Finding("demo model", str(folder))
    return Finding("demo model", "not there", "missing", "install again, or name a model: foretoken serve MODEL")


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
