"""How the ranks of one machine exchange values without torch: all talk to the first one, over Unix sockets.

The first rank listens in Linux's abstract namespace: no file stands for its name, so a job that was killed leaves
nothing behind, and the name is as unique on the machine as the port that it is made of. Any user may take or call such
a name. Both sides therefore ask the kernel who is at the other end, before they read a byte, and only accept this user.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from dist_ckpt_mistral.errors import DistCkptMistralError, LostRankError

#: What torchrun tells all ranks of one job, and no other job of the machine.
_SHARED: Final = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
#: How long the ranks wait for one another to start, in seconds: a busy file system may take minutes to import Python.
_PATIENCE_S: Final = 300.0
_PAUSE_S: Final = 0.01
#: Linux's ``struct ucred``: process, user and group.
_CREDENTIALS: Final = struct.Struct("3i")


def join(rank: int, world_size: int) -> Callable[[Any], list[Any]]:
    """Meet the other ranks of this job, all on this machine; returns their exchange: own value in, all values out.

    Every rank must call it, and the exchange, equally often. Raises LostRankError there and here when a rank does not
    come or ends too early, and DistCkptMistralError when the meeting point belongs to someone else.
    """
    if rank == 0:
        return functools.partial(_collect, _accept_others(world_size))
    return functools.partial(_hand_in, _connect_to_first(rank, world_size))


def meeting_point(world_size: int) -> str:
    """The abstract name at which the first rank of this job listens."""
    identity = repr([os.geteuid(), world_size, *(os.environ.get(name) for name in _SHARED)])
    return f"\0dist-ckpt-mistral-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"


def _accept_others(world_size: int) -> dict[int, Connection]:
    """On the first rank: the connections to all others, by rank."""
    others: dict[int, Connection] = {}
    with _listening(world_size) as listener:
        while missing := set(range(1, world_size)) - others.keys():
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                text = f"ranks {sorted(missing)} of {world_size} did not come within {_PATIENCE_S:.0f} s"
                raise LostRankError(text) from None
            if _user_of(accepted) != os.geteuid():
                accepted.close()
                continue
            connection = Connection(accepted.detach())
            rank = _receive(connection, "another rank")
            if rank not in missing:
                raise DistCkptMistralError(f"two processes call themselves rank {rank} of {world_size}: {_taken()}")
            others[rank] = connection
    return others


def _listening(world_size: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(meeting_point(world_size))
    except OSError as error:
        listener.close()
        raise DistCkptMistralError(f"rank 0 cannot listen ({error.strerror}): {_taken()}") from error
    listener.listen(world_size)
    listener.settimeout(_PATIENCE_S)
    return listener


def _connect_to_first(rank: int, world_size: int) -> Connection:
    """On any other rank: the connection to the first, as soon as it listens."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        connecting = socket.socket(socket.AF_UNIX)
        try:
            connecting.connect(meeting_point(world_size))
            break
        except ConnectionRefusedError:
            connecting.close()
            if time.monotonic() > deadline:
                raise LostRankError(f"rank 0 did not come within {_PATIENCE_S:.0f} s") from None
            time.sleep(_PAUSE_S)
    if (user := _user_of(connecting)) != os.geteuid():
        connecting.close()
        raise DistCkptMistralError(f"rank {rank} reached a process of user {user} in place of rank 0: {_taken()}")
    connection = Connection(connecting.detach())
    connection.send(rank)
    return connection


def _taken() -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"another job of this machine meets at {where}. Give this one a MASTER_PORT of its own."


def _user_of(connected: socket.socket) -> int:
    """The user at the other end of a connection, as the kernel noted it."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user


def _collect(others: Mapping[int, Connection], value: Any) -> list[Any]:  # noqa: ANN401  (whatever the ranks have to say)
    """The first rank's exchange: it tells the others all values, or which rank is lost."""
    values = {0: value}
    try:
        while missing := others.keys() - values.keys():
            wait([others[rank] for rank in missing])
            for rank in missing:
                if others[rank].poll():
                    values[rank] = _receive(others[rank], f"rank {rank} of {1 + len(others)}")
    except LostRankError as error:
        _tell(others, (None, str(error)))
        raise
    in_order = [values[rank] for rank in sorted(values)]
    _tell(others, (in_order, None))
    return in_order


def _tell(others: Mapping[int, Connection], message: tuple[list[Any] | None, str | None]) -> None:
    for connection in others.values():
        with contextlib.suppress(OSError):  # who is gone is missed at the next exchange
            connection.send(message)


def _hand_in(first: Connection, value: Any) -> list[Any]:  # noqa: ANN401
    """Any other rank's exchange."""
    with contextlib.suppress(OSError):  # the first rank is gone, and may have said why
        first.send(value)
    values, reason = _receive(first, "rank 0")
    if reason is not None:
        raise DistCkptMistralError(reason)
    in_order: list[Any] = values
    return in_order


def _receive(connection: Connection, whom: str) -> Any:  # noqa: ANN401
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise LostRankError(f"{whom} ended before the job was done. What it printed, or torchrun, says why.") from error
