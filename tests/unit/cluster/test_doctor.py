from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import doctor
from cluster.config import load
from cluster.doctor import GIB
from cluster.machine import Machine

MACHINE = Machine("Linux", "x86_64", "A processor", frozenset({"avx2"}), 8, None, 16 * GIB, 8 * GIB)


def _states(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_a_machine_that_has_all_is_ok() -> None:
    assert set(_states(doctor.machine_findings(MACHINE)).values()) == {"ok"}


def test_an_old_processor_and_little_memory_are_noted_with_advice() -> None:
    weak = replace(MACHINE, cpu_flags=frozenset({"sse4_2"}), available_bytes=GIB)
    noted = {finding.what: finding for finding in doctor.machine_findings(weak) if finding.state == "note"}
    assert set(noted) == {"processor", "memory"}
    assert all(finding.advice for finding in noted.values())


def test_a_containers_quota_is_shown_beside_the_machines_cores() -> None:
    findings = {f.what: f.found for f in doctor.machine_findings(replace(MACHINE, cpu_quota=2.0))}
    assert findings["cores"] == "2 (a container's quota; the machine shows 8)"


def test_python_below_3_11_is_missing() -> None:
    assert doctor.python_finding((3, 10, 4), "/usr/bin/python3").state == "missing"
    assert doctor.python_finding((3, 11, 0), "/usr/bin/python3").state == "ok"


def test_a_package_that_is_not_there_gets_its_install_line() -> None:
    findings = doctor.package_findings(["pytest", "no-such-distribution-of-ours"])
    assert "pytest" in findings[0].found
    assert findings[1].state == "missing"
    assert findings[1].advice == "pip install no-such-distribution-of-ours"


def test_torch_that_does_not_import_is_missing_and_its_error_shown() -> None:
    (finding,) = doctor.torch_findings("ImportError: libgomp.so.1")
    assert finding.state == "missing"
    assert "libgomp.so.1" in finding.found


def test_torch_on_a_gpu_and_on_a_cpu() -> None:
    probe = {"version": "2.13.0", "threads": 4, "mkl": True, "cuda": "13.0", "gpus": [["A GPU", 80 * GIB, "9.0"]]}
    assert [f.found for f in doctor.torch_findings(probe)] == [
        "2.13.0 (CUDA 13.0, MKL)",
        "A GPU, 80 GiB, compute capability 9.0",
    ]
    probe |= {"cuda": None, "gpus": [], "mkl": False}
    assert [f.found for f in doctor.torch_findings(probe)] == ["2.13.0 (CPU build)", "CPU, 4 threads"]


def test_torch_is_asked_in_a_child() -> None:
    probe = doctor.probe_torch()
    assert isinstance(probe, dict)
    assert probe["version"].startswith("2.")


def test_disk_is_looked_up_where_the_home_will_be(tmp_path: Path) -> None:
    finding = doctor.disk_finding("disk", tmp_path / "not" / "yet")
    assert finding.state in ("ok", "note")
    assert "GiB free" in finding.found


def test_the_demo_model_that_is_missing_says_what_to_do(tmp_path: Path) -> None:
    assert doctor.demo_finding(tmp_path).state == "missing"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert doctor.demo_finding(tmp_path).state == "ok"


def test_a_missing_compiler_is_noted_with_its_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.compiler_finding()
    assert finding.state == "note"
    assert "apt-get install g++" in finding.advice
    compiler = tmp_path / "my-c++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "my-c++")
    assert doctor.compiler_finding().found == str(compiler)


def test_the_whole_report_covers_each_part_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "probe_torch", lambda: "not asked here")
    findings = doctor.examine(load({"home": tmp_path}))
    names = [finding.what for finding in findings]
    for expected in ("system", "processor", "cores", "memory", "Python", "torch", "NVIDIA driver", "demo model"):
        assert names.count(expected) == 1
    assert any(sys.executable in finding.found for finding in findings)
