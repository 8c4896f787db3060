"""The host kernels' thread pool, under the thread sanitizer where the compiler has it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from workers.kernels.build import find_compiler, source_dir

STRESS = Path(__file__).with_name("parallel_stress.cpp")


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("sanitizer", [(), ("-fsanitize=thread",)], ids=["plain", "thread"])
def test_every_task_runs_once_and_within_its_call(tmp_path: Path, sanitizer: tuple[str, ...]) -> None:
    program = tmp_path / "stress"
    command = [str(find_compiler()), "-O1", "-g", "-std=c++17", "-pthread", *sanitizer, f"-I{source_dir()}"]
    sources = [str(STRESS), str(source_dir() / "parallel.cpp")]
    built = subprocess.run([*command, "-o", str(program), *sources], capture_output=True, text=True, timeout=120)
    if built.returncode and sanitizer:
        pytest.skip("the compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, env=environment)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel's address layout is too random for the thread sanitizer")
    assert run.returncode == 0, run.stdout + run.stderr
