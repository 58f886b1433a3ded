"""Write pickles of plain values and of objects whose classes are given by name, without importing these classes.

Opcodes: protocol 2, CPython 3.11, ``Lib/pickle.py``.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_PROTOCOL: Final = 2


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of ``function(*args)``, which the unpickler calls."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of ``cls``, made without calling its constructor; ``state`` is its pickle state."""

    cls: Global
    state: Any


@dataclass(frozen=True, slots=True)
class PersistentId:
    """A persistent id: stands for an object outside the pickle, such as a storage in a ``torch.save`` archive."""

    value: Any


@dataclass(frozen=True, slots=True)
class LazyDict:
    """A dict as (key, value) pairs, which may be made one by one. Keys may be records, which cannot be hashed."""

    items: Iterable[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class LazyList:
    """A list whose items may be made one by one."""

    items: Iterable[Any]


def dumps(value: Any) -> bytes:  # noqa: ANN401  (records of any shape)
    """Pickle plain values (None, bool, int, float, str, tuple, list, dict) and the records of this module."""
    emitter = _Emitter()
    emitter.emit(value)
    return pickle.PROTO + bytes([_PROTOCOL]) + emitter.opcodes + pickle.STOP


class _Emitter:
    """Collects opcodes. Memoizes names and strings, which repeat for every chunk of a checkpoint."""

    def __init__(self) -> None:
        self.opcodes = bytearray()
        self._memo: dict[str | Global, bytes] = {}

    def emit(self, value: Any) -> None:  # noqa: ANN401  (records of any shape)
        _EMITTERS[type(value)](self, value)

    def _remember(self, value: str | Global, opcodes: bytes) -> None:
        number = struct.pack("<I", len(self._memo))
        self._memo[value] = pickle.LONG_BINGET + number
        self.opcodes += opcodes + pickle.LONG_BINPUT + number

    def none(self, _: None) -> None:
        self.opcodes += pickle.NONE

    def boolean(self, value: bool) -> None:
        self.opcodes += pickle.NEWTRUE if value else pickle.NEWFALSE

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.opcodes += pickle.BININT1 + bytes([value])
        elif -(1 << 31) <= value < 1 << 31:
            self.opcodes += pickle.BININT + struct.pack("<i", value)
        else:
            encoded = pickle.encode_long(value)
            self.opcodes += pickle.LONG1 + bytes([len(encoded)]) + encoded

    def real(self, value: float) -> None:
        self.opcodes += pickle.BINFLOAT + struct.pack(">d", value)

    def text(self, value: str) -> None:
        known = self._memo.get(value)
        if known is not None:
            self.opcodes += known
        else:
            encoded = value.encode(errors="surrogatepass")  # as pickle itself
            self._remember(value, pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded)

    def named(self, value: Global) -> None:
        known = self._memo.get(value)
        if known is not None:
            self.opcodes += known
        else:
            self._remember(value, pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    def sequence(self, value: tuple[Any, ...]) -> None:
        self.opcodes += pickle.MARK
        for item in value:
            self.emit(item)
        self.opcodes += pickle.TUPLE

    def listing(self, value: Iterable[Any]) -> None:
        self.opcodes += pickle.EMPTY_LIST + pickle.MARK
        for item in value:
            self.emit(item)
        self.opcodes += pickle.APPENDS

    def mapping(self, value: dict[Any, Any]) -> None:
        self.pairs(value.items())

    def pairs(self, value: Iterable[tuple[Any, Any]]) -> None:
        self.opcodes += pickle.EMPTY_DICT + pickle.MARK
        for key, item in value:
            self.emit(key)
            self.emit(item)
        self.opcodes += pickle.SETITEMS

    def call(self, value: Call) -> None:
        self.named(value.function)
        self.sequence(value.args)
        self.opcodes += pickle.REDUCE

    def instance(self, value: Instance) -> None:
        self.named(value.cls)
        self.opcodes += pickle.EMPTY_TUPLE + pickle.NEWOBJ
        self.emit(value.state)
        self.opcodes += pickle.BUILD

    def persistent(self, value: PersistentId) -> None:
        self.emit(value.value)
        self.opcodes += pickle.BINPERSID


_EMITTERS: Final[Mapping[type, Callable[[_Emitter, Any], None]]] = {
    type(None): _Emitter.none,
    bool: _Emitter.boolean,
    int: _Emitter.integer,
    float: _Emitter.real,
    str: _Emitter.text,
    tuple: _Emitter.sequence,
    list: _Emitter.listing,
    dict: _Emitter.mapping,
    Global: _Emitter.named,
    Call: _Emitter.call,
    Instance: _Emitter.instance,
    PersistentId: _Emitter.persistent,
    LazyDict: lambda emitter, value: emitter.pairs(value.items),
    LazyList: lambda emitter, value: emitter.listing(value.items),
}
