"""A hub on this machine: the part of huggingface.co's HTTP interface that huggingface_hub reads and downloads by.

As there, files of weights are served by another server, at addresses that are valid for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass(kw_only=True)
class FakeHub:
    """Repositories by id; of each, its revisions by name, as local directories.

    ``downloaded`` are the names of the files that were asked for whole, ``ranges`` names and sizes of what was asked
    for by ranges. An address of weights answers ``uses_of_an_address`` times. ``tokens`` are what each server got.
    """

    repositories: dict[str, dict[str, Path]]
    address: str = ""
    weights_address: str = ""
    uses_of_an_address: int = 1_000_000
    downloaded: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int]] = field(default_factory=list)
    tokens: dict[str, set[str | None]] = field(default_factory=lambda: {"hub": set(), "weights": set()})
    _uses: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        if path.startswith("/weights/"):
            return self._weights(path)
        parts = unquote(path.partition("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, what, *rest = [*(parts[2:] if api else parts), "", "", ""][:5]
        revisions = self.repositories.get(f"{owner}/{name}", {})
        commits = {_commit(revision): folder for revision, folder in revisions.items()}
        folder = (revisions | commits).get(rest[0] or "main")
        if folder is None:
            code = "RevisionNotFound" if revisions else "RepoNotFound"
            return 404, {"X-Error-Code": code, "X-Error-Message": f"{owner}/{name}: {code}"}, b""
        commit = next(commit for commit, other in commits.items() if other == folder)
        if api and what == "tree":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
                for file in sorted(folder.iterdir())
            ]
            return 200, {}, json.dumps(tree).encode()
        if api:
            siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
            return 200, {}, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}).encode()
        file = folder / rest[1]
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit}
        if file.suffix != ".safetensors":
            return 200, headers, file.read_bytes()
        with self._lock:
            address = f"/weights/{len(self._uses)}{file}"
            self._uses[address] = 0
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.stat().st_size)}
        return 302, {**headers, **linked, "Location": self.weights_address + address}, b""

    def _weights(self, address: str) -> tuple[int, dict[str, str], bytes]:
        with self._lock:
            self._uses[address] += 1
            if self._uses[address] > self.uses_of_an_address:
                return 403, {}, b"Request has expired"
        file = Path("/" + address.split("/", 3)[3])
        return 200, {"ETag": f'"{_digest(file)}"'}, file.read_bytes()

    def note(self, path: str, status: int, num_bytes: int) -> None:
        """Remember that a file, or a range of it, was sent."""
        name = path.partition("?")[0].rpartition("/")[2]
        if not path.startswith("/weights/") and "/resolve/" not in path:
            return
        if status == 206:
            self.ranges.append((name, num_bytes))
        elif status == 200:
            self.downloaded.append(name)

    @contextlib.contextmanager
    def serving(self) -> Iterator[FakeHub]:
        """Answer requests meanwhile, at ``address``."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            """Answers as the hub says."""

            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                """Send all."""
                self._send(with_body=True)

            def do_HEAD(self) -> None:
                """Send the headers."""
                self._send(with_body=False)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def _send(self, *, with_body: bool) -> None:
                status, headers, body = hub.answer(self.path)
                is_weights = self.path.startswith("/weights/")
                hub.tokens["weights" if is_weights else "hub"].add(self.headers.get("Authorization"))
                if status == 200:
                    status, headers, body = _range(self.headers.get("Range", ""), headers, body)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)
                    hub.note(self.path, status, len(body))

        servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        threads = [threading.Thread(target=server.serve_forever) for server in servers]
        for thread in threads:
            thread.start()
        self.address, self.weights_address = [f"http://127.0.0.1:{server.server_port}" for server in servers]
        try:
            yield self
        finally:
            for server, thread in zip(servers, threads, strict=True):
                server.shutdown()
                thread.join()
                server.server_close()

    def download(self, home: Path, name: str) -> None:
        """Download a whole model into the cache in ``home``, as ``hf download`` does."""
        program = f"import huggingface_hub; huggingface_hub.snapshot_download({name!r})"
        self._run(home, "-c", program).check_returncode()

    def run(self, home: Path, *arguments: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        """``dist-ckpt-mistral`` in a process of its own that knows no other hub, with its cache in ``home``."""
        return self._run(home, "-m", "dist_ckpt_mistral", *map(str, arguments), offline=offline)

    def _run(self, home: Path, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        self.downloaded.clear()
        self.ranges.clear()
        return subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=os.environ
            | {
                "HF_ENDPOINT": self.address,
                "HF_HOME": str(home),
                "HF_HUB_OFFLINE": str(int(offline)),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )


def _range(asked: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body for a range of a file, or for all of it."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    if match is None:
        return 200, headers, body
    start, stop = int(match[1]), min(len(body), int(match[2] or len(body) - 1) + 1)
    return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}, body[start:stop]


def _commit(revision: str) -> str:
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
