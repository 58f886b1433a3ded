"""What a run has copied so far, noted in its staging directory, so that another run can go on from there."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
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
from dist_ckpt_mistral.storage.local import Sources, TargetFile
from dist_ckpt_mistral.storage.staging import Staging

_FINGERPRINT_FILE: Final = "fingerprint.json"
_NOTES: Final = "copied-{rank}"
#: Number and ends of a part, values that became infinite or zero, CRC-32: its fixed length tells a torn line.
_NOTE: Final = re.compile(rb"(\d+) (\d+) (\d+) (\d+) (\d+) ([0-9a-f]{8})")
_BLOCK_BYTES: Final = 512 << 10
#: So many differences tell enough.
_TOLD: Final = 3

Fingerprint: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What determines the bytes of an output, together with its plan.

    ``inputs`` are the files that it is made from, as they were before they were opened, ``options`` what the caller
    chose, in JSON types.
    """

    inputs: Sources
    options: Mapping[str, object]

    @classmethod
    def of(cls, plan: BytePlan, inputs: Sources, options: Mapping[str, object]) -> Self:
        """With the files of ``plan`` among the inputs, as they are now, if they were not looked at before."""
        inputs.look_at(plan.source_files)
        return cls(inputs=inputs, options=options)

    def fingerprint(self, plan: BytePlan, file_bytes: Mapping[str, int]) -> Fingerprint:
        """All of it, by what a user would call it. The plan, of which only a digest is told, comes last."""
        digest = hashlib.sha256(json.dumps(file_bytes).encode())
        for s in plan.segments:
            digest.update(f"{s.tensor} {s.file} {s.position} {s.source_dtype} {s.dtype} {s.num_bytes}\n".encode())
            digest.update(s.copies.tobytes())
        facts = {"version of dist-ckpt-mistral": __version__}
        facts |= {option: json.dumps(value, sort_keys=True) for option, value in self.options.items()}
        for path, stamp in self.inputs.first.items():
            facts[str(path.absolute())] = f"{stamp.num_bytes} bytes of {np.datetime64(stamp.mtime_ns, 'ns')}"
        return facts | {"plan": digest.hexdigest()}

    def stamps(self) -> dict[str, list[int | None]]:
        """The whole stamps of all inputs, in JSON types."""
        return {str(path.absolute()): list(stamp) for path, stamp in self.inputs.first.items()}


def begin(staging: Staging, fingerprint: Fingerprint, recipe: Recipe) -> None:
    """Note for a later run what this one makes, and in which directory."""
    begun = {"directory": _identity(staging), "facts": fingerprint, "stamps": recipe.stamps()}
    documents.write_whole(staging.path / _FINGERPRINT_FILE, json.dumps(begun).encode())


def may_resume(staging: Staging, fingerprint: Fingerprint) -> bool:
    """Whether there is something to go on with: what a run left that made the same from the same.

    Raises OutputError that says what is different, after releasing ``staging`` as it is.
    """
    begun = _begun(staging)
    if begun is None:
        return False
    then = begun["facts"]
    different = [fact for fact in {**then, **fingerprint} if then.get(fact) != fingerprint.get(fact)]
    if different:
        staging.release()
        told = "; ".join(
            f"{fact} was {then.get(fact, 'absent')}, is {fingerprint.get(fact, 'absent')}" for fact in different[:_TOLD]
        )
        raise OutputError(
            f"cannot resume {staging.target}, which was begun from something else: {told}. "
            f"Start again without --resume, which removes {staging.path}."
        )
    return True


def has_seen(staging: Staging, recipe: Recipe) -> bool:
    """Whether the run that was begun saw the very files that ``recipe`` has: then what it copied need not be proven.

    Their stamps must be equal. Copies have other ones than their originals, and so may a file on another machine.
    """
    begun = _begun(staging)
    return begun is not None and begun["stamps"] == recipe.stamps()


def has_work(staging: Staging) -> bool:
    """Whether a run has left anything there that it copied."""
    notes = staging.path.glob(_NOTES.format(rank="*"))
    return _begun(staging) is not None and any(path.stat().st_size for path in notes)


def _begun(staging: Staging) -> dict[str, Any] | None:
    """What was noted of the output that lies there unfinished, if one does."""
    try:
        found = json.loads((staging.path / _FINGERPRINT_FILE).read_bytes())
        is_unfinished = found["directory"] == _identity(staging)  # and not an old one, replaced just before a kill
        return found if is_unfinished and {"facts", "stamps"} <= found.keys() else None
    except (OSError, ValueError):
        return None


def _identity(staging: Staging) -> list[int]:
    status = staging.output.lstat()
    return [status.st_dev, status.st_ino]


class Journal:
    """The parts of a plan that lie in their files, and what is known of them: those that were found, and those to note.

    Every rank notes its own in a file of its own, a line for each, and knows what all ranks of an earlier run noted. A
    line is written after its part, but nothing is synced: what a power cut took away has another checksum, or no line.
    """

    def __init__(
        self, folder: Path, rank: int, plan: BytePlan, targets: Mapping[int, TargetFile], *, must_prove: bool
    ) -> None:
        """Read what was noted in ``folder``; ``targets`` are the open files by number, of the parts to ask for.

        ``must_prove`` says that sources may have changed since.
        """
        self._plan, self._targets, self.must_prove = plan, targets, must_prove
        self._found: dict[Part, Copied] = {}
        for path in folder.glob(_NOTES.format(rank="*")):
            for line in filter(None, map(_NOTE.fullmatch, path.read_bytes().split(b"\n"))):
                *part, overflowed, vanished = map(int, line.groups()[:5])
                self._found[Part(*part)] = Copied(int(line[6], 16), Lost(overflowed, vanished))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(folder / _NOTES.format(rank=rank), flags, 0o666)

    def note(self, part: Part, copied: Copied) -> None:
        """Note that ``part`` was written. From any thread."""
        # The line before may be torn: each line begins with its own end.
        os.write(self._file, b"\n%d %d %d %d %d %08x" % (*part, *copied.lost, copied.crc32))

    def recall(self, part: Part) -> Copied | None:
        """What was noted of ``part`` if its bytes are still those; else None: then it must be copied."""
        noted = self._found.get(part)
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
