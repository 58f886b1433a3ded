"""A checkpoint of the parameters of ranks' modules as one of global tensors: every parameter is a box of one.

In Megatron's legacy ``torch`` format, the names of the folders and the tensors in them tell the layout. In
``torch_dcp`` all parameters are those of one rank. ``local_tensors`` tells the boxes of a layout's ranks. Nothing is
copied: the new stored tensors have the same bytes for their chunks.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.errors import TensorMismatchError, UnsupportedFormatError
from dist_ckpt_mistral.formats.legacy_torch import (
    RankTensor,
    key_of,
    rank_folders,
    split_key,
    split_state_key_of,
)
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH, TORCH_DCP, StoredCheckpoint
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredTensor
from dist_ckpt_mistral.formats.torch_dcp import parameter_name
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.mapping.checkpoint_map import Twin
from dist_ckpt_mistral.mapping.rank_layout import coordinates_of, layout_of
from dist_ckpt_mistral.messages import counted, listed
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout, RankCoordinates
from dist_ckpt_mistral.model.layout.local_tensors import LocalBox, LocalTensor, local_tensors
from dist_ckpt_mistral.model.table.entries import is_optimizer_state, state_key, why_ignored
from dist_ckpt_mistral.model.table.rules import LayerSpec, Stage
from dist_ckpt_mistral.model.table.table import TensorTable

_LOG = logging.getLogger(__name__)
#: The parameters of all experts of a rank in one (GroupedMLP of megatron-core 0.4 to 0.16).
_GROUPED: Final = re.compile(r".*\.experts\.weight[12]")
#: Versions of the format (``checkpoint_version``) before this one have the rows of queries, keys and values elsewhere
#: (Megatron-LM training/checkpointing.py, ``fix_query_key_value_ordering``).
_OLDEST_VERSION: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """A checkpoint of modules' parameters, whose ``stored`` tensors are global ones, and the layout that saved it.

    ``copies`` are tensors that other ranks store again: their names are those of ``raw``, the checkpoint as it was
    opened. ``heads`` are those of them that are a tied model's embeddings in the last pipeline stage.
    """

    stored: StoredCheckpoint
    raw: StoredCheckpoint
    layout: ParallelLayout
    copies: tuple[Twin, ...]

    @property
    def heads(self) -> tuple[Twin, ...]:
        """The copies of embeddings."""
        return tuple(twin for twin in self.copies if twin.is_head)


class _Box(NamedTuple):
    """A box of a global tensor, the key of the stored tensor that holds it, and the first of its rows there."""

    box: LocalBox
    key: str
    row: int


def joined_ranks(raw: StoredCheckpoint, config: MistralConfig, table: TensorTable) -> RankFiles:
    """The global tensors of a checkpoint of modules' parameters, of a model with this configuration.

    Raises TensorMismatchError, which names all problems, if tensors of a rank are missing, unknown, or have another
    shape; FormatError if folders are missing or the layout cannot be told; LayoutError if the model does not fit it.
    """
    where = str(raw.directory)
    args = raw.common_state.get("args")
    _require_version(raw)
    names = _names(raw)
    if raw.backend == TORCH_DCP:
        layout = ParallelLayout()
        places = {"": layout.coordinates(0)}
    else:
        folders = rank_folders(raw.directory)
        layout = layout_of(folders, names, args if isinstance(args, Mapping) else {}, config, where)
        layout.check(config)
        places = coordinates_of(folders, layout, where)
    rows = _vocabulary_rows(raw, table, names, layout)
    boxes: dict[str, dict[Shape, _Box]] = defaultdict(dict)
    copies: list[Twin] = []
    problems: list[str] = []
    used: set[str] = set()
    states_of = _states_of_parameters(raw, table, names)
    for tensor, keys in _held(table, layout, places, names, rows, problems):
        used.update(keys)
        expected = [tensor.local_shape] if len(keys) == 1 else [_local_shape(tensor, box) for box in tensor.boxes]
        if wrong := [(key, shape) for key, shape in zip(keys, expected, strict=True) if _shape(raw, key) != shape]:
            problems += [
                f"shape of {key}: expected {list(shape)} ({layout.text or 'one rank'}), got {list(_shape(raw, key))}"
                for key, shape in wrong
            ]
            continue
        if any(box.global_offset in boxes[box.mcore_key] for box in tensor.boxes):
            copies.append(_copy(tensor, keys[0]))
            continue
        row = 0
        for number, box in enumerate(tensor.boxes):
            key = keys[min(number, len(keys) - 1)]
            boxes[box.mcore_key][box.global_offset] = _Box(box, key, row)
            for state, name in states_of.get(key, {}).items():
                boxes[state_key(box.mcore_key, name)][box.global_offset] = _Box(box, state, row)
            row += box.shape[tensor.prepended_axes] if len(keys) == 1 else 0
    unknown = [key for key in raw.tensors if key not in used and why_not_of_model(raw, key) is None]
    _refuse_grouped(unknown, where)
    if unknown:
        count = counted(len(unknown), "tensor is", "tensors are")
        described = listed([f"{key} {list(_shape(raw, key))}" for key in unknown])
        problems.append(f"{count} unknown to the table: {described}")
    if problems:
        raise TensorMismatchError(
            f"{where} does not hold the model that its configuration describes: {'; '.join(problems)}. "
            "Check that the configuration belongs to this checkpoint."
        )
    return RankFiles(stored=_stored(raw, boxes), raw=raw, layout=layout, copies=tuple(copies))


def _shape(raw: StoredCheckpoint, key: str) -> Shape:
    return raw.tensors[key].global_shape


def _local_shape(tensor: LocalTensor, box: LocalBox) -> Shape:
    """The shape of a box without the axes that only the stored tensor has."""
    return box.shape[tensor.prepended_axes :]


def _require_version(raw: StoredCheckpoint) -> None:
    """Raise UnsupportedFormatError for a version of the format with other rows of queries, keys and values."""
    version = raw.common_state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _OLDEST_VERSION:
        raise UnsupportedFormatError(
            f"checkpoint_version for {raw.directory}: expected {_OLDEST_VERSION} or newer (rows of queries, keys and "
            f"values are in another order before), got {version!r:.40}. Load and save it with the Megatron-LM that "
            "wrote it or a later one."
        )


def why_not_of_model(raw: StoredCheckpoint, key: str) -> str | None:
    """Why a stored tensor is no parameter of the model, or None if it may be one."""
    if is_optimizer_state(key):
        return why_ignored(key)
    if raw.backend == TORCH_DCP:
        return why_ignored(parameter_name(key) or key)
    return why_ignored(split_key(key).name)


def _names(raw: StoredCheckpoint) -> dict[str, list[dict[str, str]]]:
    """Folder -> for each of its model chunks, the name of every tensor -> its key. There are none in ``torch_dcp``."""
    if raw.backend == TORCH_DCP:
        return {"": [{name: key for key in raw.tensors if (name := parameter_name(key)) is not None}]}
    found: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in raw.tensors:
        if is_optimizer_state(key):
            continue
        tensor = split_key(key)
        found[tensor.folder][tensor.chunk][tensor.name] = key
    return {folder: [chunks.get(number, {}) for number in range(1 + max(chunks))] for folder, chunks in found.items()}


def _states_of_parameters(
    raw: StoredCheckpoint, table: TensorTable, names: Mapping[str, list[dict[str, str]]]
) -> dict[str, dict[str, str]]:
    """Key of a parameter -> key of each of its states in the plain optimizer of its rank -> the state's name.

    An optimizer does not name its parameters. It has those of a state dict in their order, group by group, and the
    settings of a group tell which: weights of several axes decay, experts that are spread have groups of their own
    (mcore optimizer/__init__.py, ``_get_param_groups``, 0.4 to 0.19). Where numbers or shapes of the two do not fit,
    all states are left alone, with a warning.
    """
    by_place: dict[tuple[str, int, int], dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in raw.tensors if raw.backend == TORCH else ():
        if is_optimizer_state(key):
            folder, place = split_state_key_of(key)
            by_place[folder, place.optimizer, place.group][place.parameter][key] = place.name
    if not by_place:
        return {}
    common = raw.common_state["optimizer"]
    optimizers = [*common.values()] if 0 in common else [common]
    groups = [each.get("optimizer", each)["param_groups"] for each in optimizers]
    apart = any(_is_of_experts(settings) for settings in chain.from_iterable(groups))
    patterns = _expert_names(table) if apart else []
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for (folder, number, group), states in by_place.items():
        settings = groups[number][group]
        parameters = [
            key
            for name, key in chain.from_iterable(model.items() for model in names[folder])
            if why_ignored(name) is None
            and (len(raw.tensors[key].global_shape) == 1) == (settings.get("wd_mult", 1.0) == 0)
            and any(pattern.fullmatch(name) for pattern in patterns) == _is_of_experts(settings)
        ]
        fits = [*states] == [*range(len(parameters))] and all(
            raw.tensors[key].global_shape == raw.tensors[state].global_shape
            for at, key in enumerate(parameters)
            for state in states[at]
        )
        if not fits:
            _LOG.warning(
                "%s: the parameters of its optimizer cannot be told apart (group %s of %s): their state is not read",
                *(raw.directory, group, folder),
            )
            return {}
        for at, key in enumerate(parameters):
            found[key] |= states[at]
    return found


def _expert_names(table: TensorTable) -> list[re.Pattern[str]]:
    """Patterns of the names of experts' parameters."""
    names = (re.escape(name) for rule in table.rules if rule.is_of_experts for name in rule.names)
    return [re.compile(re.sub(r"\\{\w+\\}", r"\\d+", name)) for name in names]


def _is_of_experts(settings: Mapping[str, Any]) -> bool:
    """Whether a group of parameters is of experts that are spread."""
    return bool(settings.get("is_expert_parallel") or settings.get("is_expert"))


def _vocabulary_rows(
    raw: StoredCheckpoint, table: TensorTable, names: Mapping[str, list[dict[str, str]]], layout: ParallelLayout
) -> int | None:
    """The number of rows of the padded vocabulary; None if no rank holds an embedding, which is reported later."""
    embedding = next(rule for rule in table.rules if rule.stage is Stage.EMBEDDING)
    keys = (chunks[0].get(name) for chunks in names.values() for name in embedding.names)
    shape = next((raw.tensors[key].global_shape for key in keys if key is not None), ())
    rows = shape[0] * layout.tp if shape else 0
    if 0 < rows < embedding.shape[0]:
        raise TensorMismatchError(
            f"vocabulary of {raw.directory}: expected at least {embedding.shape[0]} rows (vocab_size), got {rows}. "
            "Check that the configuration belongs to this checkpoint."
        )
    return rows or None


def _held(
    table: TensorTable,
    layout: ParallelLayout,
    places: Mapping[str, RankCoordinates],
    names: Mapping[str, list[dict[str, str]]],
    rows: int | None,
    problems: list[str],
) -> Iterator[tuple[LocalTensor, tuple[str, ...]]]:
    """Yield every tensor of every rank's part of the model, with its key, or with a key for each of its boxes.

    Adds to ``problems`` what is missing.
    """
    language = table.without_carried()
    spec = max(LayerSpec, key=lambda spec: _num_known(language, layout, places, names, rows, spec))
    missing = []
    for folder, at in places.items():
        chunks = layout.model_chunks(language.num_layers, at.pp)
        for number, chunk in enumerate(chunks):
            present = names[folder][number] if folder in names else {}
            for tensor in local_tensors(layout, language, chunk, at, spec=spec, vocab_rows=rows):
                found = [name for name in tensor.names if name in present]
                halves = [(f"{name}_w", f"{name}_v") for name in tensor.names if f"{name}_w" in present]
                if len(found) + len(halves) > 1:
                    problems.append(f"{folder} holds one tensor twice: {' and '.join([*found, *chain(*halves)])}")
                elif found:
                    yield tensor, (present[found[0]],)
                elif halves and len(tensor.boxes) == len(halves[0]) and halves[0][1] in present:
                    yield tensor, tuple(present[name] for name in halves[0])
                else:
                    missing.append(_key(folder, number, tensor.module_name))
    if missing:
        problems.append(f"{counted(len(missing), 'tensor is', 'tensors are')} missing: {listed(missing)}")


def _key(folder: str, chunk: int, name: str) -> str:
    """The key under which a tensor of a module would be listed. There are no folders in ``torch_dcp``."""
    return key_of(RankTensor(folder, chunk, name)) if folder else f"model.{name}"


def _num_known(
    table: TensorTable,
    layout: ParallelLayout,
    places: Mapping[str, RankCoordinates],
    names: Mapping[str, list[dict[str, str]]],
    rows: int | None,
    spec: LayerSpec,
) -> int:
    """How many tensors of the first rank have the names of a layer spec."""
    folder, at = next(iter(places.items()))
    chunk = layout.model_chunks(table.num_layers, at.pp)[0]
    present = names[folder][0] if folder in names else {}
    tensors = local_tensors(layout, table, chunk, at, spec=spec, vocab_rows=rows)
    return sum(tensor.module_name in present for tensor in tensors)


def _copy(tensor: LocalTensor, key: str) -> Twin:
    """A rank's tensor that another rank has stored before."""
    links, row = [], 0
    for box in tensor.boxes:
        rest = box.shape[tensor.prepended_axes :]
        target = (row, *(0,) * (len(rest) - 1))
        links.append(
            Link(source=box.mcore_key, source_offset=box.global_offset, target=key, target_offset=target, shape=rest)
        )
        row += rest[0]
    is_head = bool(tensor.replica_id[0])
    return Twin(name=key, main=links[0].source, shape=tensor.local_shape, links=tuple(links), is_head=is_head)


def _stored(raw: StoredCheckpoint, boxes: Mapping[str, Mapping[Shape, _Box]]) -> StoredCheckpoint:
    """The checkpoint with the global tensors for tensors; ``boxes`` maps the offsets in each to its boxes."""
    tensors: dict[str, StoredTensor] = {}
    columns: list[tuple[int, int, int]] = []
    for name, parts in boxes.items():
        stored = [raw.tensors[part.key] for part in parts.values()]
        if len(different := {tensor.dtype for tensor in stored}) > 1:
            raise TensorMismatchError(
                f"dtype of {name} in {raw.directory}: expected one, got {listed(sorted(different))}, by rank"
            )
        chunks = [chunk for part in parts.values() for chunk in _chunks(raw, part)]
        shape, num_chunks = next(iter(parts.values())).box.global_shape, len(chunks)
        offsets = np.array([chunk.offset for chunk in chunks], np.int64).reshape(num_chunks, len(shape))
        tensors[name] = StoredTensor(
            name=name,
            dtype=stored[0].dtype,
            global_shape=shape,
            stored_shape=shape,
            offsets=offsets,
            shapes=np.array([chunk.shape for chunk in chunks], np.int64).reshape(num_chunks, len(shape)),
            stored_offsets=offsets,
            archives=np.arange(len(columns), len(columns) + num_chunks),
        )
        columns += [chunk.place for chunk in chunks]
    archives = Archives(*np.array(columns, np.int64).reshape(len(columns), 3).T)
    return replace(raw, metadata=replace(raw.metadata, tensors=tensors, archives=archives))


class _Chunk(NamedTuple):
    """A chunk of a global tensor, in elements, and its file, first byte and number of bytes."""

    offset: Shape
    shape: Shape
    place: tuple[int, int, int]


def _chunks(raw: StoredCheckpoint, part: _Box) -> Iterator[_Chunk]:
    """The chunks that a box of a global tensor consists of.

    The tensor of a rank's archive is in one piece, of which the box may be some rows. Of ``torch_dcp`` every box has
    the chunks of its parameter, and is whole or half of one.
    """
    stored, box = raw.tensors[part.key], part.box
    axes = len(box.shape) - len(stored.global_shape)
    chunks = raw.chunks(part.key)
    places = zip(*(column.tolist() for column in chunks[2:]), strict=True)
    if raw.backend != TORCH_DCP:
        ((file, position, _),) = places
        itemsize = dtypes.itemsize_bytes(stored.dtype)
        begin = part.row * math.prod(stored.global_shape[1:]) * itemsize
        yield _Chunk(box.global_offset, box.shape, (file, position + begin, math.prod(box.shape) * itemsize))
        return
    if part.row:
        return  # the second half of gate and up: the first has yielded the chunks of both
    first = np.array(box.global_offset[axes:], np.int64)
    for offset, shape, place in zip((chunks.offsets + first).tolist(), chunks.shapes.tolist(), places, strict=True):
        yield _Chunk((*box.global_offset[:axes], *offset), (*(1,) * axes, *shape), place)


def _refuse_grouped(unknown: Sequence[str], where: str) -> None:
    """Raise UnsupportedFormatError for experts whose weights are stored transposed, all of a rank in one tensor."""
    if grouped := [key for key in unknown if _GROUPED.fullmatch(key)]:
        raise UnsupportedFormatError(
            f"{where} holds experts of GroupedMLP, which are stored column by column: {listed(grouped)}. Load and save "
            "it with the Megatron-LM that wrote it, with --ckpt-convert-format torch_dist and --ckpt-convert-save DIR."
        )
