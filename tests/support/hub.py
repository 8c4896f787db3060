"""A hub on this machine: as much of the Hugging Face hub's HTTP as its library needs to list and fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository of files; `fetched` records which were sent."""

    repo_id: str
    files: Mapping[str, bytes]
    fetched: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            path = unquote(urlsplit(self.path).path)
            file = path.removeprefix(f"/{hub.repo_id}/resolve/{COMMIT}/").removeprefix(f"/{hub.repo_id}/resolve/main/")
            listing = [{"rfilename": name, "size": len(data), "blobId": etag(data)} for name, data in hub.files.items()]
            if path == f"/api/models/{hub.repo_id}/revision/main" or path == f"/api/models/{hub.repo_id}":
                self.answer(json.dumps({"id": hub.repo_id, "sha": COMMIT, "siblings": listing}).encode())
            elif path == f"/api/models/{hub.repo_id}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": f["rfilename"], "size": f["size"], "oid": f["blobId"]} for f in listing
                ]
                self.answer(json.dumps(tree).encode())
            elif file in hub.files:
                if self.command == "GET":
                    hub.fetched.append(file)
                self.answer(hub.files[file], {"ETag": f'"{etag(hub.files[file])}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, status=404)

        def answer(self, body: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
