"""The journal of a run: notes in its staging directory of what it has copied, from which ``--resume`` continues."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
from zlib_ng import zlib_ng

from dist_ckpt_mistral._version import __version__
from dist_ckpt_mistral.errors import OutputError
from dist_ckpt_mistral.gather.casts import Lost
from dist_ckpt_mistral.gather.execute import Copied
from dist_ckpt_mistral.gather.plan import BytePlan, Part
from dist_ckpt_mistral.storage import documents
from dist_ckpt_mistral.storage.local import TargetFile
from dist_ckpt_mistral.storage.sources import Sources
from dist_ckpt_mistral.storage.staging import Staging

_FINGERPRINT_FILE: Final = "fingerprint.json"
_NOTES: Final = "copied-{rank}"
#: Number, begin and end of a part, values that became infinite or zero, CRC-32. A torn line lacks digits of the CRC-32.
_NOTE: Final = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) ([0-9a-f]{8})")
_BLOCK_BYTES: Final = 512 << 10
#: Differences that an error lists.
_MOST_LISTED: Final = 3

Fingerprint: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything besides the plan that determines the bytes of an output.

    ``inputs`` are the source files, with their stamps before they were opened. ``options`` are the caller's choices, in
    JSON types.
    """

    inputs: Sources
    options: Mapping[str, object]

    @classmethod
    def of(cls, plan: BytePlan, inputs: Sources, options: Mapping[str, object]) -> Self:
        """A recipe whose inputs include the source files of ``plan``, with their present stamps if they have none."""
        inputs.look_at(plan.source_files)
        return cls(inputs=inputs, options=options)

    def fingerprint(self, plan: BytePlan, file_bytes: Mapping[str, int]) -> Fingerprint:
        """Names and values, for people, of everything that determines the output. The plan, as a hash, comes last."""
        digest = hashlib.sha256(json.dumps(file_bytes).encode())
        for s in plan.segments:
            digest.update(f"{s.tensor} {s.file} {s.position} {s.source_dtype} {s.dtype} {s.num_bytes}\n".encode())
            digest.update(s.copies.tobytes())
        facts = {"version of dist-ckpt-mistral": __version__}
        facts |= {option: json.dumps(value, sort_keys=True) for option, value in self.options.items()}
        for path, stamp in self.inputs.first.items():
            state = np.datetime64(stamp.mtime_ns, "ns") if stamp.version is None else f"version {stamp.version}"
            facts[str(path.absolute())] = f"{stamp.num_bytes} bytes of {state}"
        return facts | {"plan": digest.hexdigest()}

    def stamps(self) -> dict[str, list[int | str | None]]:
        """The stamps of all inputs, by absolute path, in JSON types. Only those of objects have a version."""
        stamps = self.inputs.first.items()
        return {str(path.absolute()): [*stamp[:-1], *filter(None, stamp[-1:])] for path, stamp in stamps}


def begin(staging: Staging, fingerprint: Fingerprint, recipe: Recipe) -> None:
    """Store fingerprint, stamps and the identity of the output directory, for a later ``--resume``."""
    begun = {"directory": _identity(staging), "facts": fingerprint, "stamps": recipe.stamps()}
    documents.write_whole(staging.path / _FINGERPRINT_FILE, json.dumps(begun).encode())


def may_resume(staging: Staging, fingerprint: Fingerprint) -> bool:
    """Whether an earlier run with the same fingerprint has left data in ``staging``.

    If the fingerprint differs, releases ``staging`` unchanged and raises OutputError with the differences.
    """
    begun = _begun(staging)
    if begun is None:
        return False
    changes = differences(begun["facts"], fingerprint)
    if changes:
        staging.release()
        raise OutputError(
            f"cannot resume {staging.target}, because the earlier run differs: {changes}. "
            f"Start again without --resume, which removes {staging.path}."
        )
    return True


def differences(then: Fingerprint, now: Fingerprint) -> str:
    """The first facts that differ, in words; empty if none does."""
    different = [fact for fact in {**then, **now} if then.get(fact) != now.get(fact)]
    return "; ".join(
        f"{fact} was {then.get(fact, 'absent')}, is {now.get(fact, 'absent')}" for fact in different[:_MOST_LISTED]
    )


def has_seen(staging: Staging, recipe: Recipe) -> bool:
    """Whether the earlier run read the very files of ``recipe``, by their stamps. Otherwise its data must be proven.

    A copy of a file has another stamp, and a file seen from another machine may have one.
    """
    begun = _begun(staging)
    return begun is not None and begun["stamps"] == recipe.stamps()


def has_work(staging: Staging) -> bool:
    """Whether a run has noted any copied part in ``staging``."""
    notes = staging.path.glob(_NOTES.format(rank="*"))
    return _begun(staging) is not None and any(path.stat().st_size for path in notes)


def _begun(staging: Staging) -> dict[str, Any] | None:
    """The content that ``begin`` stored for the unfinished output in ``staging``; None if there is none."""
    try:
        begun = json.loads((staging.path / _FINGERPRINT_FILE).read_bytes())
        is_unfinished = begun["directory"] == _identity(staging)  # not an old output, replaced just before a kill
        return begun if is_unfinished and {"facts", "stamps"} <= begun.keys() else None
    except (OSError, ValueError):
        return None


def _identity(staging: Staging) -> list[int]:
    status = staging.output.lstat()
    return [status.st_dev, status.st_ino]


def _notes_in(notes: bytes) -> Iterator[tuple[Part, Copied]]:
    """Yield all notes; torn lines are none."""
    for line in filter(None, map(_NOTE.fullmatch, notes.split(b"\n"))):
        *part, overflowed, vanished = map(int, line.groups()[:5])
        yield Part(*part), Copied(int(line[6], 16), Lost(overflowed, vanished))


class NewNotes:
    """What all ranks note while they copy, read again and again."""

    def __init__(self, folder: Path) -> None:
        """Read the notes in ``folder``, which may have none yet."""
        self._folder = folder
        self._positions: dict[Path, int] = {}

    def read(self) -> list[Part]:
        """The parts noted since the last call; the last one of a file may come twice. Raises OSError."""
        parts: list[Part] = []
        for path in sorted(self._folder.glob(_NOTES.format(rank="*"))):
            with path.open("rb") as file:
                position = file.seek(self._positions.get(path, 0))
                notes = file.read()
            # A line begins with its line end, and the last line may not be there as a whole yet: it is read again.
            parts += [part for part, _ in _notes_in(notes)]
            self._positions[path] = position + max(notes.rfind(b"\n"), 0)
        return parts


class Journal:
    """Record of the parts of a plan that are already copied, with their CRC-32, for ``--resume``.

    Every rank writes its own file of notes, one line for each part, and reads the notes of all ranks of earlier runs. A
    line is written after its part. Nothing is synced: after a power failure a part may have no line, or another
    checksum than its line.
    """

    def __init__(
        self, folder: Path, rank: int, plan: BytePlan, targets: Mapping[int, TargetFile], *, must_prove: bool
    ) -> None:
        """Read the notes in ``folder``. ``targets`` has the open output files of this rank, by number.

        ``must_prove`` means that sources may have changed since the notes were written.
        """
        self._plan, self._targets, self.must_prove = plan, targets, must_prove
        self._noted: dict[Part, Copied] = {}
        for path in folder.glob(_NOTES.format(rank="*")):
            self._noted.update(_notes_in(path.read_bytes()))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(folder / _NOTES.format(rank=rank), flags, 0o666)

    def note(self, part: Part, copied: Copied) -> None:
        """Note that ``part`` was written. May be called from any thread."""
        # The last line may be torn: each line begins with a line end.
        os.write(self._file, b"\n%d %d %d %d %d %08x" % (*part, *copied.lost, copied.crc32))

    def recall(self, part: Part) -> Copied | None:
        """The note of ``part`` if its bytes in the output match it; None if the part must be copied."""
        noted = self._noted.get(part)
        if noted is None:
            return None
        segment = self._plan.segments[part.number]
        (position, rest), crc32 = segment.stored(part.low, part.high), 0
        while rest and (block := self._targets[segment.file].read(position, min(rest, _BLOCK_BYTES))):
            crc32 = zlib_ng.crc32(block, crc32)
            position, rest = position + len(block), rest - len(block)
        return noted if rest == 0 and crc32 == noted.crc32 else None

    def close(self) -> None:
        """Close the file of notes."""
        os.close(self._file)
