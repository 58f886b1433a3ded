"""Bit-exact comparison of two models, whatever they are stored as, in bounded memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import stored_checkpoint
from dist_ckpt_mistral.formats.places import Kind, what_is
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.archive_writer import PICKLE, pickle_in_list
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE, Entry
from dist_ckpt_mistral.formats.torch_dist.writer import object_bytes
from dist_ckpt_mistral.gather.compare import compare_bits
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import whole
from dist_ckpt_mistral.gather.plan import BytePlan, plan_segments
from dist_ckpt_mistral.mapping.source import ModelSource, completed, open_source, twin_differences
from dist_ckpt_mistral.model.config.agreement import Disagreement
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.table.table import HfTensor
from dist_ckpt_mistral.storage.local import SourceFiles

#: The records of an object's archive that hold the data of its tensors; others tell of the archive.
_STORAGES: Final = "data/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor or object that differs between A and B, and how."""

    name: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The outcome of a comparison.

    Args:
        num_tensors: Number of tensors that both hold with equal shapes and dtypes.
        num_bytes: Size of what was compared bit for bit.
        differences: What differs, by ascending name.
        not_compared: What checkpoints hold besides the model, in words.
        configurations: Values that the configurations of A and B give differently.
        named_by: What the names of ``differences`` are: ``"hf_name"``, or ``"mcore_key"`` for stored entries.
    """

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    not_compared: tuple[str, ...]
    configurations: tuple[Disagreement, ...] = ()
    named_by: str = "hf_name"

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit, and read them in the same way."""
        return not self.differences and not any(each.of_weights for each in self.configurations)

    def to_json(self) -> dict[str, Any]:
        """Plain values; each difference has its name under ``hf_name`` or ``mcore_key``."""
        content = asdict(self)
        named_by = content.pop("named_by")
        differences = [{named_by: each.name, "what": each.what} for each in self.differences]
        return {"equal": self.is_equal, **content, "differences": differences}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Side:
    """A or B: in words what stands under each name, and the plan that reads those whose bits are compared."""

    described: Mapping[str, str]
    tensors: Collection[str]
    plan_of: Callable[[list[str]], BytePlan]


def _compare(a: _Side, b: _Side, effort: Effort) -> tuple[list[Difference], list[str], int]:
    """What differs; the names of the tensors whose bits were compared, and how many bytes that were."""
    differences = [
        Difference(name=name, what="only in A" if name in a.described else "only in B")
        for name in a.described.keys() ^ b.described.keys()
    ]
    common = []
    for name in (name for name in a.described if name in b.described):
        in_a, in_b = a.described[name], b.described[name]
        if in_a != in_b:
            differences.append(Difference(name=name, what=f"{in_a} in A, {in_b} in B"))
        elif name in a.tensors:
            common.append(name)
    plan_a, plan_b = a.plan_of(common), b.plan_of(common)
    differences += [Difference(name=name, what=what) for name, what in compare_bits(plan_a, plan_b, common, effort)]
    return differences, common, plan_a.num_bytes


def _sorted(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    return tuple(sorted(differences, key=lambda difference: difference.name))


def open_pair(a: Path, b: Path, *, config: ChosenConfig | None = None) -> tuple[ModelSource, ModelSource]:
    """Open both sides. A checkpoint that tells no configuration goes by ``config``, else by the other side's."""
    if config is not None:
        return open_source(a, config=config), open_source(b, config=config)
    try:
        source_a = open_source(a)
    except ConfigError:
        source_b = open_source(b)
        return open_source(a, config=_of_other(source_b)), source_b
    try:
        source_b = open_source(b)
    except ConfigError:
        return source_a, open_source(b, config=_of_other(source_a))
    return _as_part_of(source_b, source_a), _as_part_of(source_a, source_b)


def _as_part_of(whole: ModelSource, source: ModelSource) -> ModelSource:
    """``source``, but the language model of ``whole`` if that is multimodal and training saved ``source`` without."""
    if not whole.table.carried or source.table.carried or source.config.hf_config is not None:
        return source
    return open_source(source.path, config=_of_other(whole))


def _of_other(source: ModelSource) -> ChosenConfig:
    """The configuration of one side, for the other one to go by."""
    return ChosenConfig(config=source.config, source=f"{source.config_from} of {source.path}")


def compare(
    a: str | Path,
    b: str | Path,
    *,
    config: GivenConfig | None = None,
    effort: Effort = DEFAULT_EFFORT,
) -> Comparison:
    """Compare two models tensor by tensor and bit by bit: Megatron checkpoints, Hugging Face directories or hub ids.

    A checkpoint that tells no configuration goes by ``config``, else by the other side's; a directory given for
    ``config`` also completes one that holds only the language model of a multimodal model. Raises DistCkptMistralError
    if either cannot be read.
    """
    source_a, source_b = open_pair(Path(a), Path(b), config=chosen_config(config))
    directory = given_directory(config, vision=True)
    if directory is not None:
        source_a, source_b = completed(source_a, directory), completed(source_b, directory)
    return compare_sources(source_a, source_b, effort)


def compare_sources(a: ModelSource, b: ModelSource, effort: Effort) -> Comparison:
    """Compare all tensors of ``a`` and ``b`` by their Hugging Face names: presence, shape, dtype, and every bit.

    What one stores besides, such as the head of tied embeddings, must be what the other stores, or else what would
    stand for it there. What a checkpoint stores under two keys must be the same.
    """
    in_a, in_b = ({tensor.hf_name: tensor for tensor in source.tensors} for source in (a, b))
    aliases_a, aliases_b = (
        {t.hf_name: t for t in source.table.hf_tensors().values() if t.is_alias} for source in (a, b)
    )
    besides = (in_a.keys() ^ in_b.keys()) & aliases_a.keys() & aliases_b.keys()
    in_a, in_b = in_a | {name: aliases_a[name] for name in besides}, in_b | {name: aliases_b[name] for name in besides}
    side_a, side_b = _side_of(a, in_a), _side_of(b, in_b)
    differences, common, num_bytes = _compare(side_a, side_b, effort)
    for source, where in ((a, "A"), (b, "B")):
        found = twin_differences(source.index, source.hidden_twins, effort)
        differences += [Difference(name=twin.name, what=f"in {where}, {what}") for twin, what in found]
    return Comparison(
        num_tensors=len(common),
        num_bytes=num_bytes,
        differences=_sorted(differences),
        not_compared=_not_compared(a, b),
        configurations=tuple(a.agreed.disagreements(b.agreed)),
    )


def _side_of(source: ModelSource, tensors: Mapping[str, HfTensor]) -> _Side:
    """The tensors of a model that are compared, by Hugging Face name."""
    return _Side(
        described={name: f"{source.dtype_of(each)} {list(each.shape)}" for name, each in tensors.items()},
        tensors=tensors.keys(),
        plan_of=lambda names: source.plan_of(tensors[name] for name in names),
    )


def _not_compared(a: ModelSource, b: ModelSource) -> tuple[str, ...]:
    """What two checkpoints hold besides the model: who deletes one because both are equal must know of it."""
    if {what_is(source.path).kind for source in (a, b)} != {Kind.CHECKPOINT}:
        return ()
    in_a, in_b = (Counter(reason for _, reason in source.ignored) for source in (a, b))
    return tuple(f"{reason}: {in_a[reason]} entries in A, {in_b[reason]} in B" for reason in sorted({*in_a, *in_b}))


def compare_stored(a: str | Path, b: str | Path, *, effort: Effort = DEFAULT_EFFORT) -> Comparison:
    """Compare two Megatron checkpoints by their own keys: optimizer state, objects and common state, too.

    How tensors are cut does not matter, nor whether they lie in ``torch_dist`` or in legacy ``zarr``. Objects are the
    same if their pickles are, byte for byte, and the data of their tensors. Raises DistCkptMistralError if either
    cannot be read.
    """
    in_a, in_b = (_Stored.of(Path(path)) for path in (a, b))
    differences, _, num_bytes = _compare(in_a.side, in_b.side, effort)
    return Comparison(
        num_tensors=len(in_a.keys & in_b.keys),
        num_bytes=num_bytes,
        differences=_sorted(differences),
        not_compared=("files beside the shards",),
        named_by="mcore_key",
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

    @property
    def side(self) -> _Side:
        """What is compared of it, by Megatron's keys."""
        return _Side(described=self.described, tensors=self.index.tensors.keys(), plan_of=self._plan_of)

    def _plan_of(self, names: list[str]) -> BytePlan:
        """A plan for reading: one segment for each of ``names``, in this order."""
        shapes = {name: self.index.tensors[name].global_shape for name in names}
        return plan_segments(self.index, {name: (shape, [whole(name, shape)]) for name, shape in shapes.items()})


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
