"""What `make setup` would do, by `make --dry-run`: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.needs("make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(folder: Path, *arguments: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def _installs(lines: list[str]) -> list[str]:
    return [line.partition(" install ")[2] for line in lines if " -m pip " in line]


def _set_up(folder: Path) -> Path:
    version = (folder / "requirements.lock").read_text().splitlines()[0].removeprefix("# torch==")
    stamp = folder / ".venv" / f".installed-torch-{version}"
    stamp.parent.mkdir()
    stamp.touch()
    return stamp


def test_torch_comes_first_by_version_then_the_lock_by_hash_then_ourselves(checkout: Path) -> None:
    torch, lock, ourselves = _installs(_make(checkout, "setup"))
    assert torch == "torch==2.13.0"
    assert {"--no-deps", "--require-hashes", "requirements.lock"} <= set(lock.split())
    assert {"--no-deps", "--no-build-isolation", "-e", "."} <= set(ourselves.split())


def test_no_index_is_named(checkout: Path) -> None:
    assert not [line for line in _make(checkout, "setup") if "index" in line or "://" in line]


def test_a_second_setup_has_nothing_to_do_until_the_lock_changes(checkout: Path) -> None:
    stamp = _set_up(checkout)
    assert _installs(_make(checkout, "setup")) == []
    os.utime(checkout / "requirements.lock", (stamp.stat().st_mtime + 10,) * 2)
    assert len(_installs(_make(checkout, "setup"))) == 3


def test_another_torch_is_installed_anew(checkout: Path) -> None:
    _set_up(checkout)
    assert _installs(_make(checkout, "setup", "TORCH=2.11.0"))[0] == "torch==2.11.0"


@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("serve", ".venv/bin/foretoken serve"),
        ("test", ".venv/bin/python -m pytest"),
        ("lint", ".venv/bin/lint-imports"),
    ],
)
def test_each_command_begins_with_setup(checkout: Path, target: str, last: str) -> None:
    lines = _make(checkout, target)
    assert len(_installs(lines)) == 3
    assert lines[-1].strip() == last
