"""The interface of what holds files: a folder, a bucket, a web server, or memory for tests.

A store keeps *objects* under *keys*, which are names with slashes. Every object appears whole or not at all, and has a
*version* that changes when it is written again. One contract suite (tests/unit/storage/test_stores.py) says what every
store does. All methods may be called from any thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeVar

from dist_ckpt_mistral.errors import OutputError, SourceError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")

#: Requests in flight at once, of the whole process. From 8 on they hide the latency of a request, and servers slow
#: down a client that sends many more.
REQUESTS_IN_FLIGHT: Final = 16
#: How often a thread that waits looks whether there was an interrupt.
_LOOK_S: Final = 0.5
#: A longer range is read by several requests at once.
MOST_BYTES_OF_A_READ: Final = 4 << 20


class Info(NamedTuple):
    """An object: its size, and its version (an ETag or generation; None where the store has none)."""

    num_bytes: int
    version: str | None


class Range(NamedTuple):
    """Bytes ``[start, stop)`` of an object."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What lies directly in a folder: objects by name, and the names of folders.

    ``is_complete`` is false where the store cannot list, so that other names may exist too.
    """

    files: Mapping[str, Info] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    is_complete: bool = True


class Store(Protocol):
    """Objects by key. The key of a folder has no slash at its end; that of the whole store is empty.

    Reading raises SourceError, writing raises OutputError. Temporary faults are retried first (``retries``).
    """

    #: What comes before keys in a URL, for errors: ``s3://bucket``.
    base: str
    #: How many first parts of a key name a bucket.
    bucket_parts: int

    def children(self, folder: str) -> Listing:
        """List what lies directly in a folder; nothing if it does not exist."""

    def below(self, folder: str) -> dict[str, Info]:
        """List all objects in a folder and in the folders below it, by key."""

    def info(self, key: str) -> Info | None:
        """Size and version of an object, asked of the server; None if there is none."""

    def read(self, key: str, start: int, stop: int, version: str | None) -> memoryview:
        """Read the bytes ``[start, stop)`` of one version of an object (None: whichever is there).

        Raises SourceError if the object has another version, has vanished, or the answer is not ``stop - start`` long.
        """

    def write(self, key: str, data: bytes, *, only_new: bool = False) -> str | None:
        """Write an object and return its version. With ``only_new``, raises ObjectExistsError if there is one."""

    def upload(self, key: str, parts: Iterable[memoryview | bytes], part_bytes: int, in_flight: int = 1) -> str | None:
        """Write an object from parts, the next one taken when there is room for it, and return its version.

        All parts but the last have ``part_bytes`` bytes; at most ``in_flight`` of them are on their way at once. If
        ``parts`` raises, nothing appears, no part is left on the server, and the exception is raised.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. Those that do not exist are ignored."""


class ObjectExistsError(OutputError):
    """An object that was to be created exists already."""


def read_many(store: Store, key: str, ranges: Sequence[Range], version: str | None) -> list[memoryview]:
    """Read several ranges of one version of an object, many at once. Errors are those of ``read``."""
    jobs = [_job(store, key, each, version) for r in ranges for each in split_range(r)]
    done = iter([*pool().map(lambda job: job(), jobs)] if len(jobs) > 1 else [job() for job in jobs])
    return [joined([next(done) for _ in split_range(r)]) for r in ranges]


def _job(store: Store, key: str, each: Range, version: str | None) -> Callable[[], memoryview]:
    return lambda: store.read(key, each.start, each.stop, version)


def split_range(whole: Range) -> Iterator[Range]:
    """Yield the pieces of a range that are read by one request each."""
    for start in range(whole.start, whole.stop, MOST_BYTES_OF_A_READ):
        yield Range(start, min(whole.stop, start + MOST_BYTES_OF_A_READ))


def joined(pieces: Sequence[memoryview]) -> memoryview:
    """Return consecutive pieces as one."""
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


def commit(store: Store, objects: Sequence[tuple[str, bytes]]) -> None:
    """Write small objects one after the other: readers see the last one only when all others are there."""
    for key, data in objects:
        store.write(key, data)


_POOLS: Final[dict[int, ThreadPoolExecutor]] = {}


def pool() -> ThreadPoolExecutor:
    """The threads that wait for answers, ``REQUESTS_IN_FLIGHT`` of them; a forked process gets its own."""
    process = os.getpid()
    if process not in _POOLS:
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  (local files need no requests)

        _POOLS[process] = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="requests")
    return _POOLS[process]


def answer_of(call: Callable[[], T]) -> T:
    """Call, and wait so that an interrupt ends it: clients in other languages do not look whether there was one."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    answer = pool().submit(call)
    wait_for([answer])
    return answer.result()


def wait_for(futures: Collection[Future[T]], return_when: str = "ALL_COMPLETED") -> None:
    """Wait as ``concurrent.futures.wait`` does, and look now and then whether there was an interrupt.

    A signal that comes just before Python begins to wait for a lock does not end that wait.
    """
    from concurrent.futures import FIRST_EXCEPTION, wait  # noqa: PLC0415  (as in pool)

    while True:
        done, others = wait(futures, timeout=_LOOK_S, return_when=return_when)
        if not others or (return_when == FIRST_EXCEPTION and any(not f.cancelled() and f.exception() for f in done)):
            return


def require_length(what: str, expected: int, got: int) -> None:
    """Raise SourceError unless an answer has the expected length: clients return short ones without an error."""
    if got != expected:
        raise SourceError(f"cannot read {what}: expected {expected} bytes, got {got}. Run the command again.")


def changed_object(what: str) -> SourceError:
    """Return the error for an object that was written again during the run."""
    return SourceError(f"{what} changed while it was read. Run the command again when nothing else writes the file.")
