"""A pickle that wants to run something is refused wherever a checkpoint has one, and nothing is executed."""

from __future__ import annotations

import builtins
import functools
import io
import operator
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import refusal
from spoilable import set_entry
from torch_reading import edited_metadata


class Payload:
    """Unpickles into a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        """Call ``function(*arguments)`` when unpickled."""
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Tell pickle what to call."""
        return self.call


def payloads(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that create ``sentinel`` where an ordinary unpickler reads them, and the name that each asks for."""
    touch = f"touch {sentinel}"
    write = f"open({str(sentinel)!r}, 'w').close()"
    calls = {
        "os.system": Payload(os.system, touch),
        "eval": Payload(builtins.eval, write),
        "exec": Payload(builtins.exec, write),
        "check_call": Payload(subprocess.check_call, ["touch", str(sentinel)]),
        "partial": Payload(functools.partial(os.system, touch)),
        "attrgetter": Payload(operator.methodcaller("system", touch), os),
        "inside a dict": {"args": [Payload(os.system, touch)]},
    }
    asked = {"eval": "builtins.eval", "exec": "builtins.exec", "check_call": "subprocess.check_call"}
    asked |= {"partial": "functools.partial", "attrgetter": "operator.methodcaller"}
    result = {}
    for name, call in calls.items():
        if name != "attrgetter":  # modules cannot be pickled
            result[name] = (pickle.dumps(call), asked.get(name, f"{os.system.__module__}.system"))
    line = touch.encode()
    result["INST opcode"] = (b"(S'" + line + b"'\nios\nsystem\n.", "the opcode STRING")
    result["dotted name"] = (
        b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93\x8c" + bytes([len(line)]) + line + b"\x85R.",
        "torch.serialization.os.system",
    )
    return result


KINDS = [*payloads(Path("x"))]


def archive(pickled: bytes, **records: bytes) -> bytes:
    """A torch.save archive as torch would write it around a pickle, made by Python's zipfile."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", **records, "version": b"3\n"}.items():
            zipped.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.fixture(params=KINDS)
def payload(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str, Path]:
    """A pickle that is shown to be dangerous, the name it asks for, and the file that must not appear."""
    sentinel = tmp_path_factory.mktemp("danger") / "x"
    pickled, asked = payloads(sentinel)[request.param]
    pickle.loads(pickled)  # noqa: S301  (to see that it would do it)
    assert sentinel.exists()
    sentinel.unlink()
    return pickled, asked, sentinel


@pytest.mark.parametrize("place", [".metadata", "planner_data", "common.pt", "chunk", "common state in shards"])
def test_nothing_of_a_pickle_is_executed(
    place: str, payload: tuple[bytes, str, Path], genuine: Path, tmp_path: Path
) -> None:
    """Wherever a checkpoint has a pickle, one that wants to run something is refused by the name that it asks for."""
    pickled, asked, sentinel = payload
    if place == ".metadata":
        (genuine / ".metadata").write_bytes(pickled)
    elif place == "common.pt":
        (genuine / "common.pt").write_bytes(archive(pickled))
    elif place == "planner_data":
        with edited_metadata(genuine) as metadata:
            metadata.planner_data = "planned"
        content = (genuine / ".metadata").read_bytes()
        head, body = (b"\x80\x04", pickled[2:-1]) if pickled[:1] == b"\x80" else (b"", pickled[:-1])
        body = body[9:] if body[:1] == b"\x95" else body  # the frame of protocol 4
        # the payload is put onto the stack and popped again, before the genuine record
        (genuine / ".metadata").write_bytes(head + body + b"0" + content[2:])
    else:
        blob = archive(pickled, **{"data/0": bytes(256)})
        (genuine / "more.distcp").write_bytes(blob)
        with edited_metadata(genuine) as metadata:
            if place == "chunk":
                set_entry(relative_path="more.distcp", offset=0, length=len(blob))(metadata)
            else:
                (genuine / "common.pt").unlink()
                objects = [index for index in metadata.storage_data if "_extra_state" in index.fqn]
                info = metadata.storage_data.pop(objects[0])
                vars(info).update(relative_path="more.distcp", offset=0, length=len(blob))
                metadata.storage_data[type(objects[0])("common_state/shard_0_1")] = info
                described = metadata.state_dict_metadata.pop(objects[0].fqn)
                metadata.state_dict_metadata["common_state/shard_0_1"] = described
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"asks for {asked}, which is outside the allowlist. Nothing of it was executed." in line
    assert str(genuine) in line
    assert not sentinel.exists()
