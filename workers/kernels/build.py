"""Compiles the host kernels for the processor that is here, once for each source, compiler and processor."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.errors import ConfigError

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast")
COMPILERS = ("c++", "g++", "clang++")
BUILD_DEADLINE_S = 300.0


def source_dir() -> Path:
    """Where the sources are: in a checkout beside the packages, in an installation inside this one."""
    checkout = Path(__file__).resolve().parents[2] / "cuda" / "host"
    return checkout if checkout.is_dir() else Path(__file__).resolve().parent / "host_sources"


def find_compiler() -> str | None:
    """A C++ compiler on the path, `CXX` first; None where there is none."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    return None


def processor() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout


def library_path(cache_dir: Path, compiler: str) -> Path:
    """The library's place in the cache: its name holds everything that it depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for source in sorted(source_dir().glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(repr((FLAGS, _version(compiler), processor())).encode())
    suffix = "dylib" if platform.system() == "Darwin" else "so"
    return cache_dir / f"foretoken-host-{digest.hexdigest()}.{suffix}"


def build_host_kernels(cache_dir: Path) -> Path:
    """The compiled library, built where the cache does not have it. Raises `ConfigError` where that fails.

    Processes that build at the same time each write a file of their own; the last rename wins, with the same content.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError(
            "no C++ compiler is on the path (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)"
        )
    try:
        path = library_path(cache_dir, compiler)
        if path.exists():
            return path
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            built = Path(folder) / path.name
            sources = [str(source) for source in sorted(source_dir().glob("*.cpp"))]
            run = subprocess.run(
                [compiler, *FLAGS, "-o", str(built), *sources],
                capture_output=True,
                text=True,
                timeout=BUILD_DEADLINE_S,
            )
            if run.returncode:
                raise ConfigError(f"{compiler} could not build the host kernels: {run.stderr.strip()[-2000:]}")
            os.replace(built, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"the host kernels could not be built in {cache_dir}: {error}") from error
    return path


def main() -> None:
    """``python -m workers.kernels.build FOLDER``: build into that cache, print the library's path."""
    try:
        print(build_host_kernels(Path(sys.argv[1])))
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
