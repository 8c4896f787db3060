"""What placing a model needs to know of it, asked of a child process: cluster/ reads no checkpoints itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from cluster.control.last_words import last_lines, last_word
from cluster.environment import child_environment
from cluster.errors import CheckpointError
from cluster.protocol import ModelShape

COMMAND = (sys.executable, "-P", "-m", "workers.describe")
TIMEOUT_S = 120.0  # torch may have to come from a cold disk


def describe(model_path: Path, device: str) -> ModelShape:
    """The shape of a model, with its sizes on that kind of device; blocks. Raises `CheckpointError`."""
    try:
        done = subprocess.run(
            (*COMMAND, str(model_path), "--device", device),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=child_environment(os.environ),
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"{model_path} was not read within {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        raise CheckpointError(last_word(done.stderr) or last_lines(done.stderr))
    return msgspec.json.decode(done.stdout, type=ModelShape)
