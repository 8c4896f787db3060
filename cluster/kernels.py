"""What `foretoken kernels` does: builds the CPU kernels before the first start needs them."""

from __future__ import annotations

import os
import subprocess
import sys

from cluster.config import Settings
from cluster.control.worker_folders import kernels_dir
from cluster.environment import child_environment
from cluster.errors import ConfigError

BUILD_TIMEOUT_S = 600.0


def build(settings: Settings) -> str:
    """Compile what the cache does not have; -> the library's path. Raises `ConfigError` with the compiler's words."""
    command = [sys.executable, "-m", "workers.kernels.build", str(kernels_dir(settings))]
    try:
        run = subprocess.run(
            command, env=child_environment(os.environ), capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"the CPU kernels were not built within {BUILD_TIMEOUT_S:g} s") from error
    if run.returncode:
        raise ConfigError(run.stderr.strip().removeprefix("error: "))
    return run.stdout.strip()
