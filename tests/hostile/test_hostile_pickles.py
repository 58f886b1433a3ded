"""Pickles that want to fill the memory, to run for ever or to overflow the stack are refused or harmless, at once."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from typing import Any, Final

import numpy as np
import pytest
from genuine import GENUINE, shards

from dist_ckpt_mistral.formats.pickles import opcodes, reader
from dist_ckpt_mistral.formats.torch_dist import metadata
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk, NewObject, lay_out

SIZE: Final = b"ctorch\nSize\n"
CHUNK: Final = b"ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n"
LAYOUT: Final = b"ctorch.serialization\n_get_layout\n"
LEVELS: Final = 64
MANY: Final = 300_000


def as_key(opcodes: bytes) -> bytes:
    """A dict whose key these opcodes make."""
    return b"\x80\x04}" + opcodes + b"Ns."


def last_as_key(opcodes: bytes) -> bytes:
    """A list of what these opcodes make, and of a dict whose key is what lies in memo slot 64."""
    return b"\x80\x04](" + opcodes + b"}h\x40Nse."


def doubled(step: bytes) -> bytes:
    """A tuple in the memo, and then this step for every level: ``?`` stands for the memo slot of the level before."""
    return b")\x94" + b"".join(step.replace(b"?", b"%c" % level) for level in range(LEVELS))


#: Name -> the pickle. An ordinary unpickler takes gigabytes for it, or for ever, or crashes.
BOMBS: Final[dict[str, bytes]] = {
    "a memo slot of a high number": b"\x80\x02}r\xff\xff\xff\xef.",
    "a memo slot of a high number for a name": b"\x80\x02" + SIZE + b"r\xff\xff\xff\xef.",
    "the same beside counted slots": b"\x80\x04}\x94r\xff\xff\xff\xef.",
    "a memo slot in decimal": b"\x80\x02}p99999999999\n.",
    "text of four gigabytes": b"\x80\x02X\xff\xff\xff\xffab.",
    "bytes of four exabytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3f.",
    "bytes of two gigabytes": b"\x80\x03B\xff\xff\xff\x7fab.",
    "a byte array of a terabyte": b"\x80\x05\x96\0\0\0\0\0\1\0\0ab.",
    "a frame of four exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x3f}.",
    "a number of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7fab.",
    "a key of twice the same": as_key(doubled(b"h?h?\x86\x94")),
    "a key of twice the same, by DUP": as_key(b")" + b"2\x86" * LEVELS),
    "a member of twice the same": b"\x80\x04\x8f(" + doubled(b"h?h?\x86\x94") + b"\x90.",
    "a key a million deep": as_key(b")" + b"\x85" * 1_000_000),
    "a key a million deep, with junk": as_key(b")" + b"N\x86" * 1_000_000),
    "a key through calls": last_as_key(doubled(SIZE + b"(h?h?t\x94R")),
    "a key through calls of one argument": last_as_key(doubled(SIZE + b"h?h?\x86\x94\x85R")),
    "a key through states": last_as_key(doubled(CHUNK + b")\x81(h?h?t\x94b")),
    "a key through one state": b"\x80\x02](" + (CHUNK + b")\x81(h\0h\0tq\0b") * LEVELS + b"}h\0Nse.",
    "a long key many times": b"\x80\x04}((" + b"K\0" * 100_000 + b"t\x94N" + b"h\0N" * MANY + b"u.",
    "many arguments": b"\x80\x04](" + LAYOUT + b"\x94(" + b"K\0" * MANY + b"t\x94R" + b"h\0h\1R" * MANY + b"e.",
    "many arguments of a class": b"\x80\x04](" + CHUNK + b"\x94(" + b"N" * MANY + b"t\x94R" + b"h\0h\1R" * MANY + b"e.",
    "a list as a tuple": b"\x80\x04](" + SIZE + b"\x94](" + b"N" * MANY + b"e\x85\x94R" + b"h\0h\1R" * MANY + b"e.",
    "a list of itself": b"\x80\x02}X\1\0\0\0a]q\0h\0as.",
    "a list of twice the same": b"\x80\x04}\x8c\1a](" + doubled(b"](h?h?e\x94") + b"es.",
    "a list ten thousand deep": b"\x80\x04}\x8c\1a" + b"](" * 10_000 + b"e" * 10_000 + b"s.",
    "ten million dicts": b"\x80\x04](" + b"}" * 10_000_000 + b"e.",
    "a name of ten megabytes": b"\x80\x02cmegatron.core\n" + b"A" * 10_000_000 + b"\n.",
    "attributes of a function": b"\x80\x02" + LAYOUT + b"}X\1\0\0\0aNsb.",
    "attributes of a class": b"\x80\x02" + CHUNK + b"}X\1\0\0\0aNsb.",
    "nothing": b"",
    "a frame of nothing": b"\x80\x04\x95\0\0\0\0\0\0\0\0",
}  # fmt: skip

#: Reads every checkpoint of a folder, and says of each what came of it.
READER: Final = """
import json, resource, sys, time
from pathlib import Path
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.torch_dist import common_state, metadata
resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60,) * 2)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    told = {"name": folder.name}
    for place, read in {
        "metadata": lambda: metadata.read_metadata((folder / ".metadata").read_bytes, "it"),
        "common": lambda: common_state.read(folder, None),
    }.items():
        start = time.process_time()
        try:
            told[place] = read() and "read"
        except FormatError as error:
            told[place] = str(error)
        told[place + " s"] = time.process_time() - start
    print(json.dumps(told), flush=True)
"""


def archive(pickled: bytes) -> bytes:
    """A torch.save archive around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            zipped.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of each bomb, in a process that the kernel would end."""
    where = tmp_path_factory.mktemp("bombs")
    for name, pickled in BOMBS.items():
        (where / name).mkdir()
        (where / name / ".metadata").write_bytes(pickled)
        (where / name / "common.pt").write_bytes(archive(pickled))
    command = [sys.executable, "-c", READER, str(where)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    found = {each["name"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert (done.returncode, done.stderr) == (0, ""), f"behind {[*found][-1:]}: {done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(name: str, told: dict[str, dict[str, Any]]) -> None:
    """None of them is metadata; as common state, one is refused or is nothing special. Neither takes long."""
    outcome = told[name]
    assert outcome["metadata"].startswith("it is ")
    assert len(outcome["metadata"]) < 500
    assert outcome["common"] == "read" or len(outcome["common"]) < 500
    assert max(outcome["metadata s"], outcome["common s"]) < 5


def as_read(pickled: bytes) -> object:
    """The attributes in a pickled ``Metadata``; arrays as lists, which compare as a whole."""
    found = metadata.read_metadata(lambda: pickled, "it")
    tensors = [getattr(tensor, name) for tensor in found.tensors.values() for name in tensor.__slots__]
    columns = [value.tolist() if isinstance(value, np.ndarray) else value for value in (*found.archives, *tensors)]
    return [found.file_bytes, found.objects, columns]


@pytest.mark.parametrize("case", GENUINE)
def test_genuine_metadata_is_plain(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own files are left to the fast unpickler, with their plans and without; the other gives the same."""
    pickled = (shards(case) / ".metadata").read_bytes()
    short = opcodes.ended_before(pickled, "all_local_plans", unless_behind="mcore_data")
    assert len(short) < len(pickled)
    for content in (pickled, short):
        safe = opcodes.made_safe(content)
        assert safe is not None
        before, after = (opcodes.unframed(each) for each in (content, bytes(safe)))
        assert len(before) == len(after)
        changed = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert changed
        for one, other in zip(changed[::2], changed[1::2], strict=True):
            assert other == one + 1
            assert before[one : one + 1] == pickle.MEMOIZE
            assert before[other : other + 1] in (pickle.REDUCE, pickle.BUILD)
            assert after[one : other + 1] == before[other : other + 1] + pickle.MEMOIZE
    fast = as_read(pickled)
    monkeypatch.setattr(reader, "made_safe", lambda _: None)
    assert as_read(pickled) == fast


def test_what_the_package_writes_is_plain() -> None:
    """So is the metadata of an import, whose memo slots are numbered."""
    chunks = [
        NewChunk(mcore_key=f"t{n}", dtype="bfloat16", global_shape=(4, n), offset=(2 * at, 0), shape=(2, n), file=at)
        for n in range(1, 300)
        for at in range(2)
    ]
    written = lay_out(chunks, [NewObject.empty(["a"])], num_files=2).metadata()
    safe = opcodes.made_safe(written)
    assert safe is not None
    assert opcodes.unframed(bytes(safe)) == opcodes.unframed(written)


@pytest.mark.parametrize("name", [*BOMBS, *GENUINE])
def test_strings_are_found_in_small_and_large_pickles_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pickles are plain whether strings are skipped one by one or by the regular expression."""
    pickled = BOMBS[name] if name in BOMBS else (shards(name) / ".metadata").read_bytes()
    monkeypatch.setattr(opcodes, "_LONG_BYTES", len(pickled) + 1)
    one_by_one = opcodes.made_safe(pickled)
    monkeypatch.setattr(opcodes, "_LONG_BYTES", 0)
    assert opcodes.made_safe(pickled) == one_by_one


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 1000])
@pytest.mark.parametrize("slot", ["", "r\1\2\0\0", "r\1\2\1\0"])
def test_a_string_is_plain_and_its_slot_has_a_low_number(
    limit: int, length: int, slot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every length, in small and large pickles; a string with a slot of 2**16 or above is not plain."""
    monkeypatch.setattr(opcodes, "_LONG_BYTES", limit)
    pickled = b"\x80\x02](X" + length.to_bytes(4, "little") + b"." * length + slot.encode() + b"K\1e."
    assert (opcodes.made_safe(pickled) is None) == (slot == "r\1\2\1\0")


@pytest.mark.parametrize("split", range(1, 22))
def test_frames_hide_nothing(split: int) -> None:
    """Where a frame ends in the middle of an argument, what was looked at is what is unpickled."""
    opcodes = b"]\x94(\x8c\x09r~~~\x7ftext\x94J\1\2\3\4e."
    framed = b"".join(b"\x95" + len(part).to_bytes(8, "little") + part for part in (opcodes[:split], opcodes[split:]))
    assert reader.loads(b"\x80\x04" + framed, lambda _, name: name, "it") == ["r~~~\x7ftext", 0x04030201]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_protocol_is_read(protocol: int) -> None:
    """Whatever protocol metadata is pickled with, it says the same."""
    torch_reading = pytest.importorskip("torch_reading")
    metadata = torch_reading.read_metadata(shards("opt_fr_0192"))
    vars(metadata).pop("all_local_plans")
    assert as_read(pickle.dumps(metadata, protocol=protocol)) == as_read(
        (shards("opt_fr_0192") / ".metadata").read_bytes()
    )
