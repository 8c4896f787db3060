from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.machine import Machine, gpu_bytes, parse_cpu_quota, parse_cpuinfo, this_machine

MACHINE = Machine("Linux", "x86_64", "A processor", frozenset({"avx2"}), 8, None, 2**34, 2**33)


def test_cpuinfo_of_x86_and_of_arm() -> None:
    assert parse_cpuinfo("processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f\n") == (
        "Some CPU @ 2GHz",
        frozenset({"fpu", "avx2", "avx512f"}),
    )
    assert parse_cpuinfo("processor\t: 0\nFeatures\t: fp asimd sve\n") == ("", frozenset({"fp", "asimd", "sve"}))
    assert parse_cpuinfo("") == ("", frozenset())


@pytest.mark.parametrize(
    ("text", "quota"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), ("50000 100000", 0.5)]
)
def test_cpu_quota(text: str, quota: float | None) -> None:
    assert parse_cpu_quota(text) == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (1.5, 2), (0.2, 1), (100.0, 8)])
def test_usable_cores_follow_the_quota(quota: float | None, cores: int) -> None:
    assert replace(MACHINE, cpu_quota=quota).num_usable_cores == cores


@pytest.mark.parametrize(
    ("architecture", "flags", "isa"),
    [
        ("x86_64", {"avx2"}, "AVX2"),
        ("x86_64", {"avx2", "avx512f"}, "AVX-512"),
        ("x86_64", {"avx2", "avx512f", "amx_tile"}, "AVX-512, AMX"),
        ("x86_64", {"sse4_2"}, "SSE"),
        ("aarch64", {"asimd"}, "NEON"),
        ("arm64", set(), "NEON"),
        ("riscv64", set(), "riscv64"),
    ],
)
def test_isa(architecture: str, flags: set[str], isa: str) -> None:
    assert replace(MACHINE, architecture=architecture, cpu_flags=frozenset(flags)).isa == isa


@pytest.mark.parametrize(
    ("script", "sizes"),
    [
        ("echo 81559; echo 40960", [81559 * 2**20, 40960 * 2**20]),
        ("echo No devices were found; exit 6", []),
        (None, []),
    ],
)
def test_gpus_are_asked_for_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, sizes: list[int]
) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() == sizes


def test_this_machine_is_plausible() -> None:
    machine = this_machine()
    assert 1 <= machine.num_usable_cores <= machine.num_cores
    assert 0 < machine.available_bytes <= machine.memory_bytes
    assert machine.processor
