"""A worker process for tests of Ray: it reads its `Launch`, announces itself, and speaks to nobody until its end.

Its command line names ``workers.server``, as what watches workers expects. ``model_path`` with a file ``refusal`` makes
it end with that file's text as its last word; one with a file ``gate`` makes it wait until the file is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.01
COMMAND = (sys.executable, "-S", str(Path(__file__)), "workers.server")


def main() -> None:
    line = bytearray()
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    launch = json.loads(line)
    model = Path(launch["model_path"])
    if (model / "refusal").exists():
        print(f"error: {(model / 'refusal').read_text()}", file=sys.stderr, flush=True)
        raise SystemExit(1)
    while (model / "gate").exists():
        time.sleep(POLL_S)
    (model / f"{launch['name']}.environment").write_text(json.dumps(dict(os.environ)))
    (model / f"{launch['name']}.launch").write_text(line.decode())
    path = Path(launch["announce_path"])
    draft = path.with_suffix(".draft")
    address = launch["address"].rpartition(":")[0] + ":1"
    draft.write_text(json.dumps({"pid": os.getpid(), "address": address, "worker_id": f"stand-in-{os.getpid()}"}))
    draft.replace(path)
    signal.pause()


if __name__ == "__main__":
    main()
