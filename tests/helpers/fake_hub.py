"""A hub on this machine: the part of huggingface.co's HTTP interface that huggingface_hub downloads snapshots by."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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
    """Repositories by id; of each, its revisions by name, as local directories. ``downloaded`` counts file names."""

    repositories: dict[str, dict[str, Path]]
    address: str = ""
    downloaded: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
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
        return 200, {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit}, file.read_bytes()

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
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)
                    if "/resolve/" in self.path:
                        hub.downloaded.append(self.path.rpartition("/")[2])

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def run(self, home: Path, *arguments: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        """``dist-ckpt-mistral`` in a process of its own that knows no other hub, with its cache in ``home``."""
        self.downloaded.clear()
        return subprocess.run(
            [sys.executable, "-m", "dist_ckpt_mistral", *map(str, arguments)],
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


def _commit(revision: str) -> str:
    return hashlib.sha1(revision.encode(), usedforsecurity=False).hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
