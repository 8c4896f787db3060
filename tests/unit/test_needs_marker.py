"""The `needs` marker of tests/conftest.py, seen from outside: pytest on a copy of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
INI = "[pytest]\nmarkers =\n    needs(*tools): .\n"
TEST = """
import pytest

@pytest.mark.needs("{tool}")
def test_it():
    pass
"""


def _pytest(folder: Path, tool: str, require: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_it.py").write_text(TEST.format(tool=tool))
    empty = folder / "bin"
    empty.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "."]
    environment = os.environ | {"PATH": str(empty), "FORETOKEN_REQUIRE": require}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_missing_tool_skips_with_its_reason(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "make", require="")
    assert done.returncode == 0
    assert "no make on the PATH" in done.stdout
    assert "1 skipped" in done.stdout


def test_a_missing_tool_that_was_promised_fails(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "make", require="linux, make")
    assert done.returncode == 1
    assert "FORETOKEN_REQUIRE promises make, but no make on the PATH" in done.stdout


def test_a_tool_that_is_there_runs_the_test(tmp_path: Path) -> None:
    assert "1 passed" in _pytest(tmp_path, "scipy", require="scipy").stdout


@pytest.mark.parametrize(("tool", "require"), [("meak", ""), ("make", "meak")])
def test_an_unknown_tool_is_refused_where_it_is_named(tmp_path: Path, tool: str, require: str) -> None:
    done = _pytest(tmp_path, tool, require)
    assert done.returncode != 0
    assert "unknown tool" in done.stdout + done.stderr
