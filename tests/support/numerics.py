"""The numerics that tests run with, and where the host kernels for them are."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from workers.kernels.build import build_host_kernels
from workers.kernels.native import HostKernels
from workers.numerics import Numerics

KERNELS_DIR = Path(os.environ.get("FORETOKEN_HOME", "~/.cache/foretoken")).expanduser() / "kernels"


@functools.cache
def host_kernels(num_threads: int = 2) -> HostKernels:
    """The kernels of this checkout; whoever asks for them is marked `needs("compiler")`."""
    return HostKernels(build_host_kernels(KERNELS_DIR), num_threads)


def numerics(name: str) -> Numerics:
    """native: the host kernels; blocks: torch in blocks of 16 rows; plain: torch as it comes."""
    if name == "native":
        return Numerics("invariant", native=host_kernels())
    return Numerics("invariant", row_block=16) if name == "blocks" else Numerics("fast")
