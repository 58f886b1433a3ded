"""Pickles as records: read through an allowlist of names and opcodes, without executing anything.

Reading builds inert stand-ins for the few classes that a format uses; any other name is refused before it is looked up.
What a pickle can make of them is bounded, too: time and memory are in proportion to its length.
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

#: Names in errors: a pickle may ask for one of a gigabyte.
_MOST_LETTERS: Final = 200
#: More arguments than any call has that a format knows: each call copies its arguments.
_MAX_ARGUMENTS: Final = 64
#: Genuine pickles of many bytes have fifty and more for each list or dict, which takes one byte and makes 64.
_BYTES_OF_A_CONTAINER: Final = 10
_FEW: Final = 1000
#: What picklers of protocol 2 to 5 emit for plain values, calls, and objects made without keyword arguments.
_OPCODES: Final = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
)
#: How CPython's pickle.py names its unpickler, which is the same from 3.8 to 3.14.
_PythonUnpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009  (mypy knows no such name)


class _RefusedError(Exception):
    """What a pickle asks for and may not have."""


class Inert:
    """An unpickled object that is nothing but its class name and attributes. There may be millions: no code runs."""


class StateRecord(list[Any]):
    """An unpickled object that is nothing but its class name and, as item 0, its pickle state: a dict of attributes.

    There may be millions: the state is kept as it comes, by C code, instead of being copied into attributes.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]  # may be a key, as what it stands for
    __setstate__ = list.append

    def __init__(self) -> None:
        """Accept no arguments: a list of them would be a copy."""
        super().__init__()


class OpaqueRecord(Inert):
    """A record that also keeps what its class would have interpreted: constructor arguments and pickle state."""

    def __new__(cls, *args: object) -> OpaqueRecord:  # noqa: PYI034  (subclasses are made at run time)
        """Keep the arguments; nothing is called."""
        self = object.__new__(cls)
        self.__dict__["args"] = few(args)
        return self

    def __init__(self, *args: object) -> None:
        """Accept what the pickle passes."""

    def __setstate__(self, state: object) -> None:
        """Keep ``state``, whatever it is."""
        self.__dict__["state"] = state


def record_class(name: str, base: type[Inert | StateRecord] = StateRecord) -> type[Inert | StateRecord]:
    """A new stand-in class. Make one for every load: a pickle may set attributes of the classes that it names."""
    return type(name, (base,), {"__slots__": ()})


class _Function:
    """Stands in for a function. Of one of Python's own, a pickle could set the attributes, for all pickles to come."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: object) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        return self._call(*few(args))

    def __setstate__(self, state: object) -> None:
        raise _RefusedError(f"a change of a function ({short(state)})")


def few(args: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments of a call, if they are as few as those of calls in genuine files."""
    if len(args) > _MAX_ARGUMENTS:
        raise _RefusedError(f"a call with {len(args)} arguments")
    return args


#: Stands in for ``torch.Size``: gives back the tuple that it is called with, and raises for all else.
as_tuple: Final = ().__add__


def empty_dict() -> dict[Any, Any]:
    """Stands in for the constructor of an ordered dict, which picklers fill afterwards."""
    return {}


class _Loads(dict[int, Callable[[Any], None]]):
    """How opcodes are carried out."""

    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        names = {code.code: code.name for code in pickletools.opcodes}
        raise _RefusedError(f"the opcode {names.get(chr(opcode), hex(opcode))}")


class _Hooks:
    """What both unpicklers ask: the allowlist, and nothing else."""

    def __init__(self, file: io.BytesIO, find: Callable[[str, str], Any], persistent: Callable[[Any], Any]) -> None:
        super().__init__(file)  # type: ignore[call-arg]  # an unpickler stands behind this class
        self._find = find
        self._persistent = persistent

    def find_class(self, module_name: str, global_name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        name = f"{module_name:.{_MOST_LETTERS}}.{global_name:.{_MOST_LETTERS}}"
        if len(name) > _MOST_LETTERS:
            raise _RefusedError(f"{name:.{_MOST_LETTERS}}...")
        try:
            found = self._find(module_name, global_name)
        except KeyError:
            raise _RefusedError(name) from None
        return _Function(found) if isinstance(found, FunctionType) else found

    def persistent_load(self, pid: Any) -> Any:  # noqa: ANN401  (what the pickle says)
        return self._persistent(pid)


class _FastUnpickler(_Hooks, pickle.Unpickler):
    """CPython's unpickler in C, for plain pickles."""


class _CarefulUnpickler(_Hooks, _PythonUnpickler):  # type: ignore[misc]  # of no type that mypy knows
    """CPython's unpickler in Python: slow, but its memo takes no more than is in it.

    It loads any pickle of the opcodes that are allowed and whose keys can be hashed at once.
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
    """Python hashes a tuple anew each time, with all that is in it, without looking at the depth."""
    for key in keys:
        if type(key) is tuple and (len(key) > _MAX_ARGUMENTS or any(type(item) is tuple for item in key)):
            raise _RefusedError("a dict whose keys are tuples, long or of tuples")


def _no_persistent(pid: object) -> object:
    raise _RefusedError(f"the persistent object {short(pid)}")


def loads(
    data: bytes,
    find: Callable[[str, str], Any],
    where: str,
    *,
    persistent: Callable[[Any], Any] = _no_persistent,
) -> Any:  # noqa: ANN401  (whatever the pickle holds)
    """Unpickle ``data``. ``find(module, name)`` gives the stand-in of a global, or raises KeyError to refuse it.

    Stand-ins must make no tuples, see pickles/opcodes.py. Raises UnsafePickleError for a global or an opcode outside
    the allowlist, FormatError for a broken pickle in the file ``where``.
    """
    if data.count(pickle.EMPTY_DICT) + data.count(pickle.EMPTY_LIST) > _FEW + len(data) // _BYTES_OF_A_CONTAINER:
        raise FormatError(f"{where} is refused: its pickle has more lists and dicts than any genuine one of its length")
    safe = made_safe(data)
    if safe is None and not data.rstrip(b"\0").endswith(pickle.STOP):
        raise FormatError(f"{where} is not a readable pickle: it has no end")
    unpickler, content = (_CarefulUnpickler, data) if safe is None else (_FastUnpickler, safe)
    try:
        return unpickler(io.BytesIO(content), find, persistent).load()
    except _RefusedError as error:
        raise UnsafePickleError(
            f"{where} is refused: its pickle asks for {error}, which is outside the allowlist. "
            "Nothing of it was executed."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise FormatError(f"{where} is not a readable pickle: {error!r:.{_MOST_LETTERS}}") from error


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
