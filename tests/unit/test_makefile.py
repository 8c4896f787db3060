"""What `make setup` would do, by `make --dry-run`, and where it stops: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.needs("make")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _run(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, *arguments],
        cwd=folder,
        env=clean | ({} if path is None else {"PATH": path}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _make(folder: Path, *arguments: str, path: str | None = None) -> list[str]:
    done = _run(folder, "--dry-run", *arguments, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _pythons(folder: Path, **versions: str) -> str:
    """A PATH with programs of these names, each a Python that says it is of that version; and with no others."""
    folder.mkdir()
    for name, version in versions.items():
        claim = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0); exec(sys.argv[1])"
        program = folder / name.replace("_", ".")
        program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{claim}' \"$2\"\n")
        program.chmod(0o755)
    sed = shutil.which("sed")
    assert sed is not None
    (folder / "sed").symlink_to(sed)
    return str(folder)


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
        ("cluster-demo", ".venv/bin/python -m loadtests.cluster_demo"),
    ],
)
def test_each_command_begins_with_setup(checkout: Path, target: str, last: str) -> None:
    lines = _make(checkout, target)
    assert len(_installs(lines)) == 3
    assert lines[-1].strip() == last


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        ({"python3": "3.12", "python3_13": "3.13"}, "python3"),
        ({"python3": "3.14", "python3_12": "3.12", "python3_11": "3.11"}, "python3.12"),
        ({"python3": "3.9", "python3_11": "3.11"}, "python3.11"),
        ({"python3_13": "3.13"}, "python3.13"),
    ],
)
def test_a_python_that_the_lock_covers_is_taken(
    checkout: Path, tmp_path: Path, versions: dict[str, str], taken: str
) -> None:
    lines = _make(checkout, "setup", path=_pythons(tmp_path / "bin", **versions))
    assert f"{taken} -m venv .venv" in lines


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14", "4.0"])
@pytest.mark.parametrize("chosen", [[], ["PYTHON=python3"]])
def test_without_one_it_is_said_what_to_install(
    checkout: Path, tmp_path: Path, version: str, chosen: list[str]
) -> None:
    done = _run(checkout, "setup", *chosen, path=_pythons(tmp_path / "bin", python3=version))
    assert done.returncode != 0
    assert "Foretoken needs Python 3.11 to 3.13, and " in done.stderr
    assert f" is python{version}. Install it" in done.stderr
    assert not (checkout / ".venv").exists()


def test_without_any_python_it_is_said_too(checkout: Path, tmp_path: Path) -> None:
    done = _run(checkout, "setup", path=_pythons(tmp_path / "bin"))
    assert done.returncode != 0
    assert "Foretoken needs Python 3.11 to 3.13." in done.stdout + done.stderr
    assert not (checkout / ".venv").exists()
