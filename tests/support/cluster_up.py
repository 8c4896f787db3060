"""`foretoken cluster up` as a user runs it: a process, its output, and what it leaves in its home."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import Settings, load
from cluster.operate.state_file import ClusterFiles, SupervisorState

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 150.0
END_TIMEOUT_S = 60.0
POLL_S = 0.1
READY = re.compile(r"is ready on (http://\S+) after")


def clean_environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Without settings of whoever runs the tests, and without a Ray of theirs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FORETOKEN_", "RAY_"))}
    return inherited | {"FORETOKEN_HOME": str(home), "FORETOKEN_PORT": "0"} | dict(extra or {})


def settings(home: Path, name: str) -> Settings:
    return load({"home": home, "cluster_name": name})


def foretoken(
    home: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=ROOT,
        env=clean_environment(home, environment),
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
        check=False,
    )


def wait_state(files: ClusterFiles, timeout_s: float = START_TIMEOUT_S) -> SupervisorState:
    deadline = time.monotonic() + timeout_s
    while (state := files.read()) is None:
        assert time.monotonic() < deadline, "no supervisor has written its state"
        time.sleep(POLL_S)
    return state


def wait_ended(files: ClusterFiles) -> None:
    """Until the supervisor is gone and has taken its state away."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while files.is_held() or files.read() is not None:
        assert time.monotonic() < deadline, "the supervisor does not end"
        time.sleep(POLL_S)


def complete(url: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """A greedy completion."""
    body = {"model": "foretoken-demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


class Up:
    """A `cluster up` in the background; what it prints goes to a file."""

    def __init__(self, home: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._log = home / "up.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", "cluster", "up", *arguments],
                cwd=ROOT,
                env=clean_environment(home, environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> str:
        """The gateway's url."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (found := READY.search(self.output)) is None:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(POLL_S)
        return found[1]

    def wait_end(self) -> int:
        return self.process.wait(END_TIMEOUT_S)
