"""Read pickles through an allowlist of names and opcodes, without executing anything.

Unpickling builds inert stand-ins for the few classes that a format uses. Any other name is refused without being
imported. Time and memory are linear in the length of the pickle, whatever it contains.
"""

from __future__ import annotations

import contextlib
import gc
import io
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator
from reprlib import repr as short
from types import FunctionType
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsafePickleError
from dist_ckpt_mistral.formats.pickles.opcodes import made_safe

#: The longest part of a name in errors, in characters: a pickle may contain a name of a gigabyte.
_MAX_NAME_LENGTH: Final = 200
#: The most arguments of a call. Genuine ones have fewer, and each call copies its arguments.
_MAX_ARGUMENTS: Final = 64
#: Pickles are refused that have more than ``_FEW_CONTAINERS`` lists and dicts and one in fewer than this many bytes. An
#: empty one takes one byte in the pickle and 64 in memory; large genuine pickles have fifty bytes and more for each.
_BYTES_OF_A_CONTAINER: Final = 10
_FEW_CONTAINERS: Final = 1000
#: The opcodes that picklers of protocol 2 to 5 write for plain values, calls, and objects made without keywords.
_OPCODES: Final = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
)
#: The unpickler in CPython's pickle.py, which is the same from 3.8 to 3.14.
_PythonUnpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009  (mypy knows no such name)


class _RefusedError(Exception):
    """A pickle asks for something outside the allowlist."""


class Inert:
    """An unpickled object: a class name and attributes. None of its code runs, so that millions of them are cheap."""


class StateRecord(list[Any]):
    """An unpickled object: a class name and, as item 0 of this list, its pickle state, a dict of attributes.

    There may be millions. ``list.append`` is C code and keeps the state as it is, instead of copying it to attributes.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # objects can be keys, lists cannot
    __setstate__ = list.append

    def __init__(self) -> None:
        """Accept no arguments, which a list would copy."""
        super().__init__()


class OpaqueRecord(Inert):
    """An inert object that keeps its constructor arguments and its pickle state, which its class would interpret."""

    def __new__(cls, *args: object) -> OpaqueRecord:  # noqa: PYI034  (subclasses are made at run time)
        """Keep the arguments; nothing is called."""
        self = object.__new__(cls)
        self.__dict__["args"] = _few(args)
        return self

    def __init__(self, *args: object) -> None:
        """Accept what the pickle passes."""

    def __setstate__(self, state: object) -> None:
        """Keep ``state``."""
        self.__dict__["state"] = state


def record_class(name: str, base: type[Inert | StateRecord] = StateRecord) -> type[Inert | StateRecord]:
    """A new stand-in class. Make one for every load, because a pickle can set attributes of the classes it names."""
    return type(name, (base,), {"__slots__": ()})


class _Function:
    """A callable that stands in for a function. A pickle cannot set its attributes, which would outlast the load."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: object) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        return self._call(*_few(args))

    def __setstate__(self, state: object) -> None:
        raise _RefusedError(f"a change of a function ({short(state)})")


def is_function(value: object) -> bool:
    """Whether an unpickled value is what stands in for a function."""
    return isinstance(value, _Function)


def _few(args: tuple[object, ...]) -> tuple[object, ...]:
    """``args``, unless there are more than ``_MAX_ARGUMENTS``."""
    if len(args) > _MAX_ARGUMENTS:
        raise _RefusedError(f"a call with {len(args)} arguments")
    return args


#: Stands in for ``torch.Size``: returns the tuple that it is called with, and raises for anything else.
as_tuple: Final = ().__add__


def empty_dict() -> dict[Any, Any]:
    """Stands in for the constructor of an ordered dict, which a pickle fills afterwards."""
    return {}


class _Loads(dict[int, Callable[[Any], None]]):
    """Opcode -> the unpickler's method for it; refuses all others by name."""

    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        names = {code.code: code.name for code in pickletools.opcodes}
        raise _RefusedError(f"the opcode {names.get(chr(opcode), hex(opcode))}")


class _OneFrame:
    """A file with a pickle in one frame, as CPython's C unpickler reads it: of ``io.BytesIO`` it would copy the frame.

    The unpickler takes any buffer (CPython 3.11 to 3.14, ``Modules/_pickle.c``, ``_Unpickler_SetStringInput``).
    """

    def __init__(self, pickled: bytearray) -> None:
        self._rest = memoryview(pickled)

    def read(self, num_bytes: int) -> memoryview:
        part, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return part

    def readline(self) -> bytes:
        return b""  # no line lies outside of the frame


class _Hooks:
    """The hooks of both unpicklers: names and persistent ids are looked up in the allowlist, and nowhere else."""

    def __init__(self, file: object, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]) -> None:
        super().__init__(file)  # type: ignore[call-arg]  # an unpickler stands behind this class
        self._find = find
        self._persistent = persistent

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        name = f"{module_name:.{_MAX_NAME_LENGTH}}.{global_name:.{_MAX_NAME_LENGTH}}"
        if len(name) > _MAX_NAME_LENGTH:
            raise _RefusedError(f"{name:.{_MAX_NAME_LENGTH}}...")
        try:
            stand_in = self._find(module_name, global_name)
        except KeyError:
            raise _RefusedError(name) from None
        return _Function(stand_in) if isinstance(stand_in, FunctionType) else stand_in

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401  (what the pickle says)
        return self._persistent(pid)


class _FastUnpickler(_Hooks, pickle.Unpickler):
    """CPython's unpickler in C, for pickles in the plain subset of pickles/opcodes.py."""


class _CarefulUnpickler(_Hooks, _PythonUnpickler):  # type: ignore[misc]  # of no type that mypy knows
    """CPython's unpickler in Python, for all other pickles: slow, but its memo is no larger than its content.

    It carries out only ``_OPCODES``, and refuses dict keys that take long to hash.
    """

    def load_setitem(self) -> None:
        _require_flat(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _require_flat(self.stack[::2])
        super().load_setitems()

    dispatch = _Loads(
        {code: _PythonUnpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPCODES)}
    )
    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


def _require_flat(keys: Iterable[object]) -> None:
    """Refuse keys that are long or nested tuples: Python hashes all of a tuple each time, to any depth."""
    for key in keys:
        if type(key) is tuple and (len(key) > _MAX_ARGUMENTS or any(type(item) is tuple for item in key)):
            raise _RefusedError("a dict whose keys are tuples, long or of tuples")


def _no_persistent(pid: object) -> object:
    """Refuse persistent ids, in formats that have none."""
    raise _RefusedError(f"the persistent object {short(pid)}")


def loads(
    data: bytes,
    find: Callable[[str, str], Any],
    where: str,
    *,
    persistent: Callable[[Any], Any] = _no_persistent,
) -> Any:  # noqa: ANN401  (whatever the pickle holds)
    """Unpickle ``data`` through an allowlist.

    Args:
        data: The pickle.
        find: Returns the stand-in of a global, given its module and name; raises KeyError to refuse it. A stand-in must
            not make tuples, see pickles/opcodes.py.
        where: Names the file in errors.
        persistent: Returns what a persistent id stands for.

    Returns:
        The unpickled object.

    Raises:
        UnsafePickleError: The pickle asks for a global or an opcode outside the allowlist. Nothing was executed.
        FormatError: The pickle is damaged.
    """
    num_containers = data.count(pickle.EMPTY_DICT) + data.count(pickle.EMPTY_LIST)
    if num_containers > _FEW_CONTAINERS + len(data) // _BYTES_OF_A_CONTAINER:
        raise FormatError(f"{where} is refused: its pickle has more lists and dicts than any genuine one of its length")
    safe = made_safe(data)
    if safe is None and not data.rstrip(b"\0").endswith(pickle.STOP):
        raise FormatError(f"{where} is not a readable pickle: it has no end")
    unpickler: _CarefulUnpickler | _FastUnpickler
    if safe is None:
        unpickler = _CarefulUnpickler(io.BytesIO(data), find, persistent)
    else:
        unpickler = _FastUnpickler(_OneFrame(safe), find, persistent)
    del data, safe  # a caller that does not keep the pickle has room for its content
    try:
        return unpickler.load()
    except _RefusedError as error:
        raise UnsafePickleError(
            f"{where} is refused: its pickle asks for {error}, which is outside the allowlist. "
            "Nothing of it was executed."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise FormatError(f"{where} is not a readable pickle: {error!r:.{_MAX_NAME_LENGTH}}") from error


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the garbage collector, which would traverse millions of live records again and again (6 times slower)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
