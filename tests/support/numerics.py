"""The numerics that tests run with, and where the host kernels for them are."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import pytest

from workers.kernels.build import build_host_kernels, find_compiler
from workers.kernels.native import HostKernels
from workers.numerics import Numerics

KERNELS_DIR = Path(os.environ.get("FORETOKEN_HOME", "~/.cache/foretoken")).expanduser() / "kernels"


@functools.cache
def host_kernels(num_threads: int = 2) -> HostKernels:
    """The kernels of this checkout; skips the test where there is no compiler."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler: the host kernels cannot be built")
    try:
        KERNELS_DIR.mkdir(parents=True, exist_ok=True)
        folder = KERNELS_DIR
    except OSError:
        folder = Path(tempfile.gettempdir()) / "foretoken-kernels"
    return HostKernels(build_host_kernels(folder), num_threads)


def numerics(name: str) -> Numerics:
    """native: the host kernels; blocks: torch in blocks of 16 rows; plain: torch as it comes."""
    if name == "native":
        return Numerics("invariant", native=host_kernels())
    return Numerics("invariant", row_block=16) if name == "blocks" else Numerics("fast")
