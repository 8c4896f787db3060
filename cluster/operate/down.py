"""`foretoken cluster down`: stops what `cluster up` keeps up on this machine."""

from __future__ import annotations

import os
import signal
import time

from rich.console import Console

from cluster.config import Settings
from cluster.operate.leftovers import clean_up
from cluster.operate.state_file import ClusterFiles, nothing_runs

NOT_DONE = 1  # exit code: there is no such cluster, or it could not be told or ended; the line printed says which
MARGIN_S = 60.0  # beside its drain, until a supervisor must have ended
POLL_S = 0.1


def run(settings: Settings) -> int:
    """Stop the cluster and wait until it has ended; returns the exit code."""
    files = ClusterFiles(settings)
    state = files.read()
    if not files.is_held():
        if state is None:
            print(nothing_runs(settings))
            return NOT_DONE
        with files.held():
            num_ended = clean_up(files)
        print(f"{settings.cluster_name} had no supervisor any more; ended {num_ended} processes that it had left")
        return 0
    if state is None:
        print(f"{settings.cluster_name} is just starting or ending; try again")
        return NOT_DONE
    try:
        os.kill(state.pid, signal.SIGTERM)
    except PermissionError:
        print(f"{settings.cluster_name} (process {state.pid}) is another user's")
        return NOT_DONE
    except ProcessLookupError:  # it has just ended by itself
        pass
    deadline = time.monotonic() + state.drain_timeout_s + MARGIN_S
    with Console(stderr=True).status(f"stopping {settings.cluster_name}; running requests may finish"):
        while files.is_held():
            if time.monotonic() > deadline:
                print(f"{settings.cluster_name} has not ended yet; end it at once with: kill {state.pid}")
                return NOT_DONE
            time.sleep(POLL_S)
    print(f"{settings.cluster_name} has ended")
    return 0
