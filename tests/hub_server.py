"""A hub on the loopback interface: the part of Hugging Face's HTTP API that huggingface_hub needs to fetch files.

Large files (safetensors) are answered as the hub does it: HEAD gives a redirect with the linked size and sha256, the
bytes come from another path by range requests. Faults are set per path by a test.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files of one commit, and whom they are given to."""

    files: dict[str, bytes]
    commit: str = COMMIT
    gated: bool = False
    accepted_tokens: tuple[str, ...] = ()
    """Tokens of accounts that accepted the licence; other tokens get 403, none gets 401."""


@dataclass
class HubState:
    """What the server holds, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """Path -> byte counts after which successive answers break off."""
    altered: dict[str, bytes] = field(default_factory=dict)
    """Path -> bytes sent instead of the true ones."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header)."""
    address: str = ""
    slow: float = 0.0
    """Seconds to wait before each 16 KiB of content."""
    late: dict[str, float] = field(default_factory=dict)
    """Path -> seconds to wait before its content."""

    def add(self, name: str, folder: Path, **options: Any) -> Repository:
        """A repository made of the files below `folder`."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.repositories[name] = Repository(files, **options)
        return self.repositories[name]

    def sent(self, path: str) -> list[str | None]:
        """Range headers of the GET requests for the content of `path`."""
        return [span for method, asked, span in self.requests if method == "GET" and asked.endswith(f"/{path}")]


@contextmanager
def running_hub() -> Generator[HubState]:
    """The server in a thread, on a port of its own."""
    state = HubState()

    class Handler(_Handler):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self._content(match[1], match[2])
        else:
            self._error(404, None)

    def _repository(self, name: str, revision: str | None) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(404, "RepoNotFound")
            return None
        if repository.gated:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in repository.accepted_tokens:
                self._error(403 if token else 401, "GatedRepo")
                return None
        if revision not in (None, "main", repository.commit):
            self._error(404, "RevisionNotFound")
            return None
        return repository

    def _info(self, name: str, revision: str | None) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        siblings = [
            {"rfilename": path, "size": len(data), **({"lfs": _lfs(data)} if _is_large(path) else {})}
            for path, data in repository.files.items()
        ]
        body = {"id": name, "sha": repository.commit, "siblings": siblings, "private": False}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if path not in repository.files:
            self._error(404, "EntryNotFound")
            return
        data = repository.files[path]
        headers = {"X-Repo-Commit": repository.commit}
        if _is_large(path):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            self._send(302, b"", {**headers, "Location": f"{self.hub.address}/storage/{name}/{path}"})
        elif self.command == "HEAD":
            self._send(200, b"", {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, len(data))
        else:
            self._content(name, path)

    def _content(self, name: str, path: str) -> None:
        data = self.hub.altered.get(path, self.hub.repositories[name].files[path])
        status, headers, start = 200, {}, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(match[1]), 206
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        cuts = self.hub.cut_after.get(path, [])
        if cuts and self.command == "GET":
            allowed = cuts.pop(0)
            self._send(status, body[:allowed], headers, len(body))
            self.close_connection = True
            self.connection.close()
            return
        if self.command == "GET":
            time.sleep(self.hub.late.get(path, 0.0))
        self._send(status, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):
            for start in range(0, len(body), 16384):
                time.sleep(self.hub.slow)
                self.wfile.write(body[start : start + 16384])
            self.wfile.flush()

    def _error(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _lfs(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
