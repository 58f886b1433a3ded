"""Compare two models, or everything that two Megatron checkpoints store, bit for bit and in bounded memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import ConfigError, UnsupportedFormatError
from dist_ckpt_mistral.formats import stored_checkpoint
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import what_is
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
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.mapping.twins import twin_differences
from dist_ckpt_mistral.mapping.vision import completed
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.model.config.agreement import Disagreement
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config, given_directory
from dist_ckpt_mistral.model.table.table import HfTensor
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.remote_path import as_path

#: Prefix of the records in an object's archive that hold the data of its tensors. The other records are metadata.
_TENSOR_DATA: Final = "data/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor or object that differs between A and B.

    Args:
        name: Its Hugging Face name, or its key in the checkpoints (``Comparison.named_by``).
        what: The difference, in words.
    """

    name: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of ``compare`` or ``compare_stored``.

    Args:
        num_tensors: Number of tensors that were compared.
        num_bytes: Size of the data that was compared bit for bit.
        differences: The differences, by ascending name.
        not_compared: Stored entries besides the model that were not compared, in words.
        configurations: Values that differ between the configurations of A and B.
        named_by: The kind of name in ``differences``: ``"hf_name"``, or ``"mcore_key"`` for stored entries.
    """

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    not_compared: tuple[str, ...]
    configurations: tuple[Disagreement, ...] = ()
    named_by: str = "hf_name"

    __repr__ = concise_repr

    @property
    def is_equal(self) -> bool:
        """Whether all compared bits are equal, and both configurations read stored rows in the same way."""
        return not self.differences and not any(each.of_weights for each in self.configurations)

    def to_json(self) -> dict[str, Any]:
        """The content of ``verify A B --json``: JSON types; differences have their name under ``named_by``."""
        content = asdict(self)
        named_by = content.pop("named_by")
        differences = [{named_by: difference.name, "what": difference.what} for difference in self.differences]
        return {"equal": self.is_equal, **content, "differences": differences}


def compare(
    a: str | Path,
    b: str | Path,
    *,
    config: GivenConfig | None = None,
    effort: Effort = DEFAULT_EFFORT,
) -> Comparison:
    """Compare two models tensor by tensor, by Hugging Face name: presence, shape, dtype and every bit.

    Args:
        a: Megatron checkpoint (root, ``iter_*`` or ``release`` directory), Hugging Face directory or hub id.
        b: The model to compare with ``a``, in any of these formats.
        config: Configuration for a checkpoint that has lost its own; by default that of the other model. A directory
            also supplies the vision tower and projector of a multimodal model whose checkpoint does not have them.
        effort: Threads and memory to use.

    Returns:
        All differences; ``is_equal`` says whether there are none.

    Raises:
        DistCkptMistralError: ``a`` or ``b`` cannot be read.

    Example:
        >>> dist_ckpt_mistral.compare("hf_dir", "ckpt").is_equal  # doctest: +SKIP
        True
    """
    require_types(compare, **locals())
    source_a, source_b = open_pair(as_path(a), as_path(b), config=chosen_config(config))
    directory = given_directory(config)
    if directory is not None:
        source_a, source_b = completed(source_a, directory), completed(source_b, directory)
    return compare_sources(source_a, source_b, effort)


def compare_stored(a: str | Path, b: str | Path, *, effort: Effort = DEFAULT_EFFORT) -> Comparison:
    """Compare everything that two Megatron checkpoints store, by Megatron key, for any model.

    This includes optimizer state, objects and the common state. Two tensors are equal if their dtype, shape and bits
    are; neither chunks nor backend (``torch_dist`` or ``zarr``) matter. Two objects are equal if their pickles are the
    same bytes, and the data of their tensors.

    Args:
        a: Megatron checkpoint: its root, or one ``iter_*`` or ``release`` directory in it.
        b: The checkpoint to compare with ``a``.
        effort: Threads and memory to use.

    Returns:
        All differences, by Megatron key.

    Raises:
        DistCkptMistralError: ``a`` or ``b`` cannot be read.

    Example:
        >>> dist_ckpt_mistral.compare_stored("old", "ckpt").differences  # doctest: +SKIP
        ()
    """
    require_types(compare_stored, **locals())
    (keys_a, side_a), (keys_b, side_b) = _stored_side(as_path(a)), _stored_side(as_path(b))
    differences, _, num_bytes = _compare(side_a, side_b, effort)
    return Comparison(
        num_tensors=len(keys_a & keys_b),
        num_bytes=num_bytes,
        differences=_sorted(differences),
        not_compared=("files beside the shards",),
        named_by="mcore_key",
    )


def compare_sources(a: ModelSource, b: ModelSource, effort: Effort) -> Comparison:
    """Compare two open models by Hugging Face name: presence, shape, dtype and every bit.

    A tensor that only one side stores, but that is an alias in both (such as the head of tied embeddings), is compared
    with the tensor that it is an alias of. Tensors that a checkpoint stores twice must have equal values.
    """
    in_a, in_b = ({tensor.hf_name: tensor for tensor in source.tensors} for source in (a, b))
    aliases_a, aliases_b = (
        {name: tensor for name, tensor in source.table.hf_tensors().items() if tensor.is_alias} for source in (a, b)
    )
    shared_aliases = (in_a.keys() ^ in_b.keys()) & aliases_a.keys() & aliases_b.keys()
    side_a = _model_side(a, in_a | {name: aliases_a[name] for name in shared_aliases})
    side_b = _model_side(b, in_b | {name: aliases_b[name] for name in shared_aliases})
    differences, compared, num_bytes = _compare(side_a, side_b, effort)
    for source, side in ((a, "A"), (b, "B")):
        for twin, what in twin_differences(source.index, source.hidden_twins, effort):
            differences.append(Difference(name=twin.name, what=f"in {side}, {what}"))
    return Comparison(
        num_tensors=len(compared),
        num_bytes=num_bytes,
        differences=_sorted(differences),
        not_compared=_not_compared(a, b),
        configurations=tuple(a.agreed.disagreements(b.agreed)),
    )


def open_pair(a: Path, b: Path, *, config: ChosenConfig | None = None) -> tuple[ModelSource, ModelSource]:
    """Open two models. A checkpoint without configuration uses ``config``, else the configuration of the other model.

    A checkpoint of the language model alone is opened as the language model of the other one, if that is multimodal.
    """
    if config is not None:
        return open_source(a, config=config, adapters=True), open_source(b, config=config, adapters=True)
    try:
        source_a = open_source(a, adapters=True)
    except ConfigError:
        source_b = open_source(b, adapters=True)
        return open_source(a, config=_config_of(source_b), adapters=True), source_b
    try:
        source_b = open_source(b, adapters=True)
    except ConfigError:
        return source_a, open_source(b, config=_config_of(source_a), adapters=True)
    return _as_part_of(source_b, source_a), _as_part_of(source_a, source_b)


def _as_part_of(multimodal: ModelSource, source: ModelSource) -> ModelSource:
    """``source``, opened with the configuration of ``multimodal`` if training saved only its language model."""
    if not multimodal.table.carried or source.table.carried or source.config.hf_config is not None:
        return source
    return open_source(source.path, config=_config_of(multimodal))


def _config_of(source: ModelSource) -> ChosenConfig:
    return ChosenConfig(config=source.config, source=f"{source.config_from} of {source.path}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Side:
    """A or B. ``described`` has dtype and shape of each tensor, or the hash of each object's pickle, in words.

    ``plan_of`` makes the plan that reads some of ``tensors``, the names whose bits are compared.
    """

    described: Mapping[str, str]
    tensors: Collection[str]
    plan_of: Callable[[list[str]], BytePlan]


def _compare(a: _Side, b: _Side, effort: Effort) -> tuple[list[Difference], list[str], int]:
    """The differences, the names of the tensors whose bits were compared, and the size of these in bytes."""
    differences = [
        Difference(name=name, what="only in A" if name in a.described else "only in B")
        for name in a.described.keys() ^ b.described.keys()
    ]
    compared = []
    for name in (name for name in a.described if name in b.described):
        in_a, in_b = a.described[name], b.described[name]
        if in_a != in_b:
            differences.append(Difference(name=name, what=f"{in_a} in A, {in_b} in B"))
        elif name in a.tensors:
            compared.append(name)
    plan_a, plan_b = a.plan_of(compared), b.plan_of(compared)
    differences += [Difference(name=name, what=what) for name, what in compare_bits(plan_a, plan_b, compared, effort)]
    return differences, compared, plan_a.num_bytes


def _sorted(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    return tuple(sorted(differences, key=lambda difference: difference.name))


def _model_side(source: ModelSource, tensors: Mapping[str, HfTensor]) -> _Side:
    """``tensors`` of a model, by Hugging Face name."""
    return _Side(
        described={name: f"{source.dtype_of(tensor)} {list(tensor.shape)}" for name, tensor in tensors.items()},
        tensors=tensors.keys(),
        plan_of=lambda names: source.plan_of(tensors[name] for name in names),
    )


def _not_compared(a: ModelSource, b: ModelSource) -> tuple[str, ...]:
    """Counts of the entries besides the model, if both are checkpoints: the user may want to delete one of them."""
    if {what_is(source.path).kind for source in (a, b)} != {Kind.CHECKPOINT}:
        return ()
    in_a, in_b = (Counter(reason for _, reason in source.ignored) for source in (a, b))
    return tuple(f"{reason}: {in_a[reason]} entries in A, {in_b[reason]} in B" for reason in sorted({*in_a, *in_b}))


def _stored_side(path: Path) -> tuple[frozenset[str], _Side]:
    """The keys of the tensors of a checkpoint, and everything that it stores, by Megatron key."""
    stored = stored_checkpoint.open_stored(path, with_common_state=False)
    if stored.is_of_modules:
        raise UnsupportedFormatError(
            f"{stored.directory} is in Megatron's format {stored.backend}, whose tensors are parameters of modules and "
            "have no keys to compare. Compare the models: verify without --stored."
        )
    index = stored.index(stored.tensors)
    files, tensors, pickles = [*index.files], dict(index.tensors), dict[str, str]()
    for key, entry in _objects(stored):
        pickles[key], data = _read_object(stored, key, entry, file=len(files))
        tensors |= data
        files += [stored.directory / entry.file] if data else []
    described = {name: f"{tensor.dtype} {list(tensor.global_shape)}" for name, tensor in tensors.items()} | pickles
    index = TensorIndex(files=tuple(files), tensors=tensors)

    def plan_of(names: list[str]) -> BytePlan:
        shapes = {name: tensors[name].global_shape for name in names}
        return plan_segments(index, {name: (shape, [whole(name, shape)]) for name, shape in shapes.items()})

    return frozenset(stored.tensors), _Side(described=described, tensors=tensors.keys(), plan_of=plan_of)


def _objects(stored: StoredCheckpoint) -> Iterator[tuple[str, Entry]]:
    """The objects by key, and common.pt as one more object."""
    stored.require_whole({entry.file for entry in stored.objects.values()})
    yield from stored.objects.items()
    common = stored.directory / COMMON_FILE
    if common.is_file():
        yield COMMON_FILE, Entry(COMMON_FILE, 0, common.stat().st_size)


def _read_object(
    stored: StoredCheckpoint, key: str, entry: Entry, *, file: int
) -> tuple[str, dict[str, IndexedTensor]]:
    """The SHA-256 of an object's pickle, in words, and the data of its tensors as indexed bytes of ``file``.

    The pickle of a ``zarr`` checkpoint is hashed as ``torch_dist`` would store it, in a list.
    """
    path = stored.directory / entry.file
    location = f"{key!r} in {path}"
    with SourceFiles([path]) as files:
        archive = ArchiveReader(files, 0, entry.offset, entry.num_bytes, location)
        pickled = archive.read(PICKLE)
        records = {name: archive.member(name) for name in archive.names if name.startswith(_TENSOR_DATA)}
    if stored.backend == ZARR and key != COMMON_FILE:
        pickled = pickle_in_list(pickled, location)
    tensors = {
        f"{key} {name}": object_bytes(f"{key} {name}", record.num_bytes, file=file, position=record.position)
        for name, record in records.items()
    }
    return f"an object whose pickle has the SHA-256 {hashlib.sha256(pickled).hexdigest()}", tensors
