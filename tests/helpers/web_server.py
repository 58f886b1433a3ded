"""A web server with ranges, in this process: what http:// sources are read from."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(kw_only=True)
class WebServer:
    """Serves the files of a folder, with ETags and ranges. ``requests`` counts (method, status)."""

    folder: Path
    address: str = ""
    requests: list[tuple[str, int]] = field(default_factory=list)

    @contextlib.contextmanager
    def serving(self) -> Iterator[WebServer]:
        """Answer requests meanwhile, at ``address``."""
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                """Send a file, or a range of it."""
                path = site.folder / self.path.lstrip("/")
                if not path.is_file():
                    self.answer(404, b"")
                    return
                data = path.read_bytes()
                etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
                if self.headers.get("If-Match") not in {None, etag}:
                    self.answer(412, b"")
                    return
                match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if match is None:
                    self.answer(200, data, etag)
                    return
                start, stop = int(match[1]), int(match[2]) + 1
                self.answer(206, data[start:stop], etag, f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}")

            do_HEAD = do_GET  # noqa: N815  (the name that http.server looks for)

            def answer(
                self, status: int, data: bytes, etag: str | None = None, content_range: str | None = None
            ) -> None:
                """Send a status, headers and a body."""
                site.requests.append((self.command, status))
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
                if etag is not None:
                    self.send_header("ETag", etag)
                if content_range is not None:
                    self.send_header("Content-Range", content_range)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
