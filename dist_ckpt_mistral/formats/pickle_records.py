"""Pickles as records: read through an allowlist without executing anything, written without importing anything.

Reading builds inert stand-ins for the few classes that a format uses; any other name is refused before it is looked up.
Writing emits opcodes for classes by name, so that neither torch nor Megatron needs to be importable. Opcodes: CPython
3.11, ``Lib/pickle.py``.
"""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsafePickleError

#: (module, name) -> what stands in for it.
Allowlist = Mapping[tuple[str, str], Any]
_PROTOCOL: Final = 2
#: The length of the PROTO opcode with its argument, and of a FRAME opcode's argument.
_PROTO_BYTES: Final = 2
_FRAME_LENGTH_BYTES: Final = 8


class Record:
    """An unpickled object that is nothing but its class name and attributes. There may be millions: no code runs."""


class StateRecord(list[Any]):
    """An unpickled object that is nothing but its class name and, as item 0, its pickle state: a dict of attributes.

    There may be millions: the state is kept as it comes, by C code, instead of being copied into attributes.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # may be a key, as what it stands for
    __setstate__ = list.append


class OpaqueRecord(Record):
    """A record that also keeps what its class would have interpreted: constructor arguments and pickle state."""

    def __new__(cls, *args: object) -> OpaqueRecord:  # noqa: PYI034  (subclasses are made at run time)
        """Keep the arguments; nothing is called."""
        self = object.__new__(cls)
        self.__dict__["args"] = args
        return self

    def __init__(self, *args: object) -> None:
        """Accept what the pickle passes."""

    def __setstate__(self, state: object) -> None:
        """Keep ``state``, whatever it is."""
        self.__dict__["state"] = state


def record_class(name: str, base: type[Record | StateRecord] = Record) -> type[Record | StateRecord]:
    """A new stand-in class. Make one for every load: a pickle may set attributes of the classes that it names."""
    return type(name, (base,), {"__slots__": ()})


class _AllowlistUnpickler(pickle.Unpickler):
    """An unpickler that knows the allowlist and nothing else."""

    def __init__(self, data: bytes, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._find = find
        self._persistent = persistent

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        return self._find(module_name, global_name)

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401  (what the pickle says)
        if self._persistent is None:
            raise UnsafePickleError(f"an unexpected persistent object {pid!r}")
        return self._persistent(pid)


def loads(
    data: bytes,
    find: Callable[[str, str], Any],
    where: str,
    *,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:  # noqa: ANN401  (whatever the pickle holds)
    """Unpickle ``data``. ``find(module, name)`` gives the stand-in of a global, or raises KeyError to refuse it.

    Raises UnsafePickleError for a global outside the allowlist, FormatError for a broken pickle in the file ``where``.
    """

    def checked(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        try:
            return find(module, name)
        except KeyError:
            raise UnsafePickleError(
                f"{where} is refused: its pickle asks for {module}.{name}, which is outside the allowlist. "
                "Nothing of it was executed."
            ) from None

    try:
        return _AllowlistUnpickler(data, checked, persistent).load()
    except (FormatError, MemoryError):
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise FormatError(f"{where} is not a readable pickle: {error!r}") from error


def ended_before(pickled: bytes, key: str, *, unless_behind: str) -> bytes | None:
    """A pickled object of attributes, ended before its attribute ``key``; None if that cannot be told from the bytes.

    Those must be the frames that picklers make from protocol 4 on (PEP 3154), all of them, without the attribute
    ``unless_behind`` behind ``key``. Where ``key`` is something else than an attribute of the topmost object, loading
    the result fails, or gives something else than that object.
    """
    at = pickled.rfind(_short_string(key))
    end = _frame_end(pickled, at)
    if at < 0 or end is None or pickled.find(_short_string(unless_behind), at) >= 0:
        return None
    ending = pickle.SETITEMS + pickle.BUILD + pickle.STOP
    return b"".join((memoryview(pickled)[:at], ending.ljust(end - at, b"\0")))  # unpicklers want the whole frame


def _short_string(text: str) -> bytes:
    """The opcode of a string of less than 256 bytes."""
    return pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode()


def _frame_end(pickled: bytes, at: int) -> int | None:
    """Where the frame ends that holds byte ``at``; None unless ``pickled`` is a complete row of frames."""
    start, found = _PROTO_BYTES, None
    while pickled[start : start + 1] == pickle.FRAME:
        begin = start + 1 + _FRAME_LENGTH_BYTES
        end = begin + int.from_bytes(pickled[start + 1 : begin], "little")
        if begin <= at < end:
            found = end
        start = end
    return found if start == len(pickled) and pickled.endswith(pickle.STOP) else None


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Keep the garbage collector off: it would look again and again at millions of live records (6 times slower)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """``function(*args)``, called by whoever unpickles it."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of ``cls`` made without its constructor, then given ``state``."""

    cls: Global
    state: Any


@dataclass(frozen=True, slots=True)
class PersistentId:
    """An object that lies outside the pickle."""

    value: Any


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict given as (key, value) pairs, which may be made one by one: keys that are records are not hashable here."""

    items: Iterable[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Items:
    """A list whose items may be made one by one."""

    items: Iterable[Any]


def dumps(value: Any) -> bytes:  # noqa: ANN401  (records of any shape)
    """Pickle plain values (None, bool, int, float, str, tuple, list, dict) and the records of this module."""
    emitter = _Emitter()
    emitter.emit(value)
    return pickle.PROTO + bytes([_PROTOCOL]) + emitter.opcodes + pickle.STOP


class _Emitter:
    """Collects opcodes. Names and strings repeat for every chunk of a checkpoint, so they are memoized."""

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
    Pairs: lambda emitter, value: emitter.pairs(value.items),
    Items: lambda emitter, value: emitter.listing(value.items),
}
