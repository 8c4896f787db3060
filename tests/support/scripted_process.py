"""The command line `foretoken` as a process, whose worker is a process with a `scripted_worker`; all else is real.

``python -m tests.support.scripted_process serve …`` runs the command line; its worker is this module with ``worker``
as its only argument, a `ScriptedWorker` behind the launcher's real seam. The environment says how it behaves:
SCRIPTED_MODEL is the folder with the tokenizer's files, served where no model is named (`save_tokenizer` makes one);
SCRIPTED_GATE names a file, and no token flows before it exists; SCRIPTED_REFUSAL is why it cannot start.
gRPC is imported only where it is used: the command line has something to say before that.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.protocol import Launch

if TYPE_CHECKING:
    from tests.support.scripted_worker import ScriptedWorker

POLL_S = 0.01
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """What the gateway reads of a checkpoint."""
    from tests.support.scripted_worker import byte_tokenizer

    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "config.json").write_text("{}")


async def _serve(launch: Launch) -> None:
    from tests.support.scripted_worker import ScriptedWorker, hello

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    worker = ScriptedWorker(launch.address)
    worker.hello = hello(served_name=launch.served_name, worker_id=str(os.getpid()))
    await worker.start()
    gate = asyncio.create_task(_open_gate(worker, os.environ.get("SCRIPTED_GATE", "")))
    await stop.wait()
    gate.cancel()
    await worker.kill()


async def _open_gate(worker: ScriptedWorker, path: str) -> None:
    if path:
        worker.gate.clear()
        while not Path(path).exists():
            await asyncio.sleep(POLL_S)
        worker.gate.set()


def _run_worker() -> None:
    line = bytearray()
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    launch = msgspec.json.decode(line, type=Launch)
    if refusal := os.environ.get("SCRIPTED_REFUSAL"):
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    asyncio.run(_serve(launch))


def main() -> None:
    if sys.argv[1:] == ["worker"]:
        _run_worker()
        return
    from cluster import cli
    from cluster.control import model, worker_process

    model.DEMO_PATH = Path(os.environ["SCRIPTED_MODEL"])
    worker_process.COMMAND = (sys.executable, "-m", "tests.support.scripted_process", "worker")
    cli.main()


if __name__ == "__main__":
    main()
