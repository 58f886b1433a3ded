"""Bit-exact comparison of all that two Megatron checkpoints store, of whatever model, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.formats import stored_checkpoint
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.archive_writer import PICKLE, pickle_in_list
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE, Entry
from dist_ckpt_mistral.formats.torch_dist.writer import object_bytes
from dist_ckpt_mistral.gather.compare import Difference, compare_bits
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import whole
from dist_ckpt_mistral.gather.plan import BytePlan, plan_reading
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.verify import Comparison

#: The records of an object's archive that hold the data of its tensors; others tell of the archive.
_STORAGES: Final = "data/"


def compare_stored(a: str | Path, b: str | Path, *, effort: Effort = DEFAULT_EFFORT) -> Comparison:
    """Compare two Megatron checkpoints by their own keys: optimizer state, objects and common state, too.

    How tensors are cut does not matter, nor whether they lie in ``torch_dist`` or in legacy ``zarr``. Objects are the
    same if their pickles are, byte for byte, and the data of their tensors. Raises DistCkptMistralError if either
    cannot be read.
    """
    in_a, in_b = (_Stored.of(Path(path)) for path in (a, b))
    differences = [
        Difference(hf_name=name, what="only in A" if name in in_a.described else "only in B")
        for name in in_a.described.keys() ^ in_b.described
    ]
    common = []
    for name in (name for name in in_a.described if name in in_b.described):
        one, other = in_a.described[name], in_b.described[name]
        if one != other:
            differences.append(Difference(hf_name=name, what=f"{one} in A, {other} in B"))
        elif name in in_a.index.tensors:
            common.append(name)
    differences += compare_bits(in_a.plan_of(common), in_b.plan_of(common), common, effort)
    return Comparison(
        num_tensors=len(in_a.keys & in_b.keys),
        num_bytes=sum(in_a.index.tensors[name].num_bytes for name in common),
        differences=tuple(sorted(differences, key=lambda difference: difference.hf_name)),
        not_compared=("files beside the shards",),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stored:
    """All that a checkpoint stores. ``index`` has the tensors ``keys``, and the data of tensors in objects as bytes.

    ``described`` says of each tensor its dtype and shape, and of each object what its pickle is.
    """

    keys: frozenset[str]
    index: TensorIndex
    described: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> _Stored:
        """Read metadata, and the pickles of objects."""
        stored = stored_checkpoint.open_stored(path, with_common_state=False)
        index = stored.index(stored.tensors)
        files, tensors, pickles = [*index.files], dict(index.tensors), dict[str, str]()
        for key, entry in _entries(stored):
            pickles[key], records = _read(stored, key, entry, file=len(files))
            tensors |= records
            files += [stored.directory / entry.file] if records else []
        described = {name: f"{tensor.dtype} {list(tensor.global_shape)}" for name, tensor in tensors.items()}
        whole_index = TensorIndex(files=tuple(files), tensors=tensors)
        return cls(keys=frozenset(stored.tensors), index=whole_index, described=described | pickles)

    def plan_of(self, names: list[str]) -> BytePlan:
        """A plan for reading: one segment for each of ``names``, in this order."""
        shapes = {name: self.index.tensors[name].global_shape for name in names}
        return plan_reading(self.index, {name: (shape, [whole(name, shape)]) for name, shape in shapes.items()})


def _entries(stored: StoredCheckpoint) -> Iterator[tuple[str, Entry]]:
    """The objects, and the common state as if it were one."""
    stored.require_whole({entry.file for entry in stored.objects.values()})
    yield from stored.objects.items()
    common = stored.directory / COMMON_FILE
    if common.is_file():
        yield COMMON_FILE, Entry(COMMON_FILE, 0, common.stat().st_size)


def _read(stored: StoredCheckpoint, key: str, entry: Entry, *, file: int) -> tuple[str, dict[str, IndexedTensor]]:
    """What the pickle of an object is, as ``torch_dist`` has it, and where the data of its tensors lie."""
    path = stored.directory / entry.file
    where = f"{key!r} in {path}"
    with SourceFiles([path]) as files:
        archive = ArchiveReader(files, 0, entry.offset, entry.num_bytes, where)
        pickled = archive.read(PICKLE)
        members = {name: archive.member(name) for name in archive.names if name.startswith(_STORAGES)}
    if stored.backend == ZARR and key != COMMON_FILE:
        pickled = pickle_in_list(pickled, where)
    tensors = {
        f"{key} {name}": object_bytes(f"{key} {name}", each.num_bytes, file=file, position=each.position)
        for name, each in members.items()
    }
    return f"an object whose pickle has the SHA-256 {hashlib.sha256(pickled).hexdigest()}", tensors
