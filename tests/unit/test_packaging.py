from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("cluster", "workers", "loadtests", "cuda", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources: setuptools leaves its build folders where it builds."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "."]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("foretoken-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_module(wheel: zipfile.ZipFile) -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("cluster", "workers", "loadtests")
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules <= set(wheel.namelist())


def test_the_wheel_has_the_host_kernels_sources(wheel: zipfile.ZipFile) -> None:
    for path in [*(ROOT / "cuda" / "host").glob("*.cpp"), *(ROOT / "cuda" / "host").glob("*.h")]:
        assert wheel.read(f"workers/kernels/host_sources/{path.name}") == path.read_bytes()


def test_the_wheel_has_no_tests(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cluster", "workers", "loadtests"}


@pytest.mark.needs("demo")
def test_the_wheel_has_the_demo_model_whole(wheel: zipfile.ZipFile) -> None:
    files = [path for path in (ROOT / "workers" / "demo" / "model").iterdir() if path.is_file()]
    for path in files:
        assert wheel.getinfo(f"workers/demo/model/{path.name}").file_size == path.stat().st_size
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20


def test_the_wheel_has_one_command_and_its_licence(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert wheel.read(entry_points).decode().split() == ["[console_scripts]", "foretoken", "=", "cluster.cli:main"]
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    fields = Parser().parsestr(wheel.read(metadata).decode())
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"


def test_the_lock_pins_torch_by_version_and_all_else_by_hash() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert text.startswith("# torch==2.")
    assert "://" not in text  # no index, no host
    entries = [entry for entry in text.replace("\\\n", "").splitlines() if not entry.startswith("#")]
    assert len(entries) > 50
    for entry in entries:
        assert "==" in entry
        assert "--hash=sha256:" in entry, entry[:60]
    names = {entry.split("==")[0] for entry in entries}
    assert not {name for name in names if name.split("-")[0] in ("torch", "nvidia", "cuda", "triton")}
