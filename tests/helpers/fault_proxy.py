"""A proxy in front of a store that does to requests and answers what networks and servers do to them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

_BLOCK_BYTES: Final = 1 << 16
_HEAD_END: Final = b"\r\n\r\n"
_ERROR: Final = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>%s</Code><Message>%s</Message>%s</Error>"
_REGION: Final = b"<Region>eu-west-1</Region>"
_ENDPOINT: Final = b"<Endpoint>bucket.s3-eu-west-1.amazonaws.com</Endpoint><Bucket>bucket</Bucket>"
_MALFORMED: Final = b"The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'"
#: What S3 refuses requests with: code -> status, message and what else is in the document
#: (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
ERRORS: Final = {
    "ExpiredToken": (b"400 Bad Request", b"The provided token has expired.", b"<Token-0>FwoGZ</Token-0>"),
    "InvalidAccessKeyId": (b"403 Forbidden", b"The AWS Access Key Id you provided does not exist in our records.", b""),
    "SignatureDoesNotMatch": (b"403 Forbidden", b"The request signature we calculated does not match.", b""),
    "AccessDenied": (b"403 Forbidden", b"Access Denied", b""),
    "PermanentRedirect": (b"301 Moved Permanently", b"The bucket must be addressed by its endpoint.", _ENDPOINT),
    "AuthorizationHeaderMalformed": (b"400 Bad Request", _MALFORMED, _REGION),
    "NoSuchBucket": (b"404 Not Found", b"The specified bucket does not exist", b"<BucketName>bucket</BucketName>"),
    "RequestTimeTooSkewed": (b"403 Forbidden", b"The difference between the times is too large.", b""),
    "SlowDown": (b"503 Slow Down", b"Please reduce your request rate.", b""),
    "InternalError": (b"500 Internal Server Error", b"We encountered an internal error. Please try again.", b""),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to every ``every``-th request of ``method`` whose target contains ``match``, ``most`` times.

    ``method`` may be several, such as ``PUT|POST``.

    ``kind`` is one of: reset (the connection breaks within the answer), truncated (it ends there), short (the answer
    is half as long, and says so), stalled (it stops there), silent (the request is not passed on, and no answer comes),
    error-in-200 (the answer is an error with the status 200), reset-request (the connection breaks within the request),
    slow (the answer comes late), or a code of ``ERRORS`` (the answer is that).
    """

    kind: str
    method: str = "GET"
    match: str = ""
    every: int = 3
    most: int = 1_000_000


@dataclass(kw_only=True)
class FaultProxy:
    """Passes requests on to ``port``, with faults. ``done`` counts them by kind, ``sent`` the bytes of answers.

    A slow answer comes after ``slow_s`` seconds.
    """

    port: int
    faults: list[Fault] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    seen: Counter[Fault] = field(default_factory=Counter)
    sent: int = 0
    address: str = ""
    slow_s: float = 1.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, method: str, target: str) -> str:
        """The kind of fault for a request, empty for none."""
        with self.lock:
            for fault in self.faults:
                if method in fault.method.split("|") and fault.match in target:
                    self.seen[fault] += 1
                    if self.seen[fault] % fault.every == 0 and self.seen[fault] <= fault.every * fault.most:
                        self.done[fault.kind] += 1
                        return fault.kind
        return ""

    @contextlib.contextmanager
    def serving(self) -> Iterator[FaultProxy]:
        """Pass requests on meanwhile, from ``address``."""
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
            self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            thread = threading.Thread(target=self._listen, args=[listener], daemon=True)
            thread.start()
            yield self
            listener.shutdown(socket.SHUT_RDWR)
        thread.join()

    def _listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._converse, args=[client], daemon=True).start()

    def _converse(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.port)) as server, contextlib.suppress(OSError):
            while self._exchange(client, server):
                pass

    def _exchange(self, client: socket.socket, server: socket.socket) -> bool:
        """Pass on one request and its answer. Returns whether the connection goes on."""
        head, body = _head(client)
        if not head:
            return False
        method, target, _ = head.split(b" ", 2)
        fault = self.choose(method.decode(), target.decode())
        if fault == "reset-request":
            return _reset(client)
        if b"100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue" + _HEAD_END)
            head = head.replace(b"Expect: 100-continue\r\n", b"").replace(b"expect: 100-continue\r\n", b"")
        body += _exactly(client, _length(head) - len(body))
        if fault == "silent":
            return _wait_for_end(client)
        if fault in ERRORS:
            client.sendall(_refusal(fault, with_body=method != b"HEAD"))
            return True
        server.sendall(head + body)
        head, body = _head(server)
        if b"chunked" in head.lower():
            while not body.endswith(b"0" + _HEAD_END):
                body += server.recv(_BLOCK_BYTES)
            client.sendall(head + body)
            return True
        length = 0 if method == b"HEAD" or head.split(b" ", 2)[1] in {b"204", b"304"} else _length(head)
        return self._reply(client, fault, head, body + _exactly(server, length - len(body)))

    def _reply(self, client: socket.socket, fault: str, head: bytes, body: bytes) -> bool:
        half = body[: len(body) // 2]
        if fault == "error-in-200":
            client.sendall(_refusal("InternalError", status=b"200 OK"))
            return True
        if fault == "slow":
            time.sleep(self.slow_s)
        if fault == "short":
            head, body = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % len(half)), half
        client.sendall(head + (half if fault in {"reset", "truncated", "stalled"} else body))
        with self.lock:
            self.sent += len(body)
        if fault == "reset":
            return _reset(client)
        if fault == "stalled":
            return _wait_for_end(client)
        return fault != "truncated"


def _head(connection: socket.socket) -> tuple[bytes, bytes]:
    """The head of a message, and what came of its body; nothing if the connection has ended."""
    data = b""
    while _HEAD_END not in data:
        block = connection.recv(_BLOCK_BYTES)
        if not block:
            return b"", b""
        data += block
        if data.startswith(b"HTTP/1.1 100"):
            data = data.partition(_HEAD_END)[2]
    head, end, body = data.partition(_HEAD_END)
    return head + end, body


def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
    blocks = []
    while num_bytes > 0:
        block = connection.recv(min(num_bytes, 1 << 20))
        if not block:
            raise ConnectionError
        blocks.append(block)
        num_bytes -= len(block)
    return b"".join(blocks)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _refusal(code: str, *, status: bytes = b"", with_body: bool = True) -> bytes:
    """The answer with an error's document, or with its status alone."""
    usual, message, more = ERRORS[code]
    body = _ERROR % (code.encode(), message, more) if with_body else b""
    head = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d"
    return head % (status or usual, len(body)) + _HEAD_END + body


def _wait_for_end(connection: socket.socket) -> bool:
    """Say nothing more until the client gives up."""
    while connection.recv(_BLOCK_BYTES):
        pass
    return False


def _reset(connection: socket.socket) -> bool:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return False
