"""A worker process for tests of starting one as a child: argv[1] says how it fails, and it speaks to nobody.

It needs the standard library only, so that it starts in milliseconds. With a folder as argv[2] it leaves there, in
files named by its process id, the launch line and the environment that it got.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path


def main() -> None:
    behaviour, folder = sys.argv[1], Path(sys.argv[2])
    launch = json.loads(sys.stdin.readline())
    (folder / f"{os.getpid()}.json").write_text(json.dumps({"launch": launch, "environment": dict(os.environ)}))
    if behaviour == "refuses":
        print("loading; error: only a warning", file=sys.stderr, flush=True)
        print("error: config.json: no field 'rope'", file=sys.stderr, flush=True)
        raise SystemExit(2)
    if behaviour == "fails":
        print("a first line", file=sys.stderr)
        print("config.json: the field 'rope' is not supported", file=sys.stderr)
        raise SystemExit(3)
    if behaviour == "fails-after-first" and len(list(folder.glob("*.json"))) > 1:
        print("the model is gone", file=sys.stderr)
        raise SystemExit(4)
    if behaviour == "hangs":
        print("loading for ever", file=sys.stderr, flush=True)
        signal.pause()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else lambda *_: os._exit(0))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(launch["address"].removeprefix("unix:"))
    print("ready", file=sys.stderr, flush=True)  # before anybody can connect, and end us
    print("on stdout", flush=True)
    listener.listen()

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        connection, _ = listener.accept()
        connection.close()
        if behaviour == "grumbles" and (folder / "served").exists():
            print("error: a step failed\nTraceback of it", file=sys.stderr, flush=True)


main()
