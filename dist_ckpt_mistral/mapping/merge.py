"""A model with a LoRA adapter merged into it: every adapted matrix W becomes W + scale * B A."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.gather.low_rank import FloatArray, MergedFile, Product
from dist_ckpt_mistral.mapping.checkpoint_map import Ignored
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.adapter_config import AdapterConfig
from dist_ckpt_mistral.model.table.adapters import A, B, peft_name
from dist_ckpt_mistral.model.table.rules import axes_in, spell
from dist_ckpt_mistral.model.table.table import HfTensor, TensorTable
from dist_ckpt_mistral.storage.local import DerivedFile, SourceFiles

_WITH_ADAPTER: Final = "weights of the model, which are not exported with the adapter alone"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Update:
    """What an adapter adds to one Hugging Face tensor: ``scale * (b @ a)``, both float32."""

    scale: float
    b: FloatArray
    a: FloatArray


def adapter_part(source: ModelSource) -> ModelSource:
    """The adapter of ``source`` alone, by the names of PEFT."""
    table = source.table.of_adapters(source.table.adapters)
    names = table.hf_tensors()
    left = [tensor.hf_name for tensor in source.tensors if tensor.hf_name not in names]
    links = {name: links for name, links in source.links.items() if name in names}
    used = {link.source for each in links.values() for link in each}
    ignored: Ignored = tuple((name, _WITH_ADAPTER) for name in source.index.tensors if left and name not in used)
    return replace(
        source,
        table=table,
        tensors=tuple(tensor for tensor in source.tensors if tensor.hf_name in names),
        links=links,
        ignored=(*source.ignored, *ignored),
        twins=(),
    )


def without_zeros(source: ModelSource) -> ModelSource:
    """The adapter in ``source`` without the matrices of which the imported one had none, if they are still zero.

    ``from_hf`` stores zeros for a matrix that Megatron-Bridge cannot leave out.
    """
    files = source.hf_files
    imported = {} if files is None else files.by_name(str(source.path), source.table.usual_name)
    names = source.table.hf_tensors()
    if not imported or not imported.keys() < names.keys():
        return source
    values = _values(source, (tensor for name, tensor in names.items() if name not in imported))
    if any(value.any() for _, value in values):
        return source
    tensors = tuple(tensor for tensor in source.tensors if tensor.hf_name in imported)
    kept = {tensor.rule.mcore_key for tensor in tensors}
    table = source.table.of_adapters(each for each in source.table.adapters if each.b.mcore_key in kept)
    links = {name: links for name, links in source.links.items() if name in imported}
    return replace(source, table=table, tensors=tensors, links=links)


def base_part(source: ModelSource) -> ModelSource:
    """The model of ``source`` without its adapter."""
    table = source.table.without_adapters()
    names = table.hf_tensors()
    return replace(
        source,
        table=table,
        tensors=tuple(tensor for tensor in source.tensors if tensor.hf_name in names),
        links={name: links for name, links in source.links.items() if name in names},
    )


def ranks_of_modules(table: TensorTable) -> dict[str, int]:
    """PEFT's name of every adapted module, such as ``model.layers.0.self_attn.q_proj`` -> its rank."""
    prefix, ends = len("base_model.model."), f".{A}"
    names = ((tensor.hf_name, tensor.shape[0]) for tensor in table.hf_tensors().values())
    return {name.removesuffix(ends)[prefix:]: rank for name, rank in names if name.endswith(ends)}


def merged(base: ModelSource, adapter: ModelSource, config: AdapterConfig, dtype: str | None = None) -> ModelSource:
    """``base`` with the values that it has once ``adapter`` is merged; adapted tensors have ``dtype``, if it is given.

    A and B of all layers are read now, and stay in memory in float32.

    Raises:
        TensorMismatchError: The adapter is for other tensors, or for one that is stored a second time.
    """
    updates = dict(_updates(base.table, adapter, config))
    links_from: dict[str, list[Link]] = defaultdict(list)
    for name in updates:
        for link in base.links[name]:
            links_from[link.source].append(link)
    twins = [twin.name for twin in base.twins if {link.source for link in twin.links} & links_from.keys()]
    if twins:
        raise TensorMismatchError(
            f"{base.path} stores adapted weights a second time, under names that the adapter does not change: "
            f"{listed(twins)}. Merge the adapter with what trained it."
        )
    tensors, derived = dict(base.index.tensors), [*base.index.derived]
    for name, links in links_from.items():
        stored = base.index.tensors[name]
        first_file = len(base.index.files) + len(derived)
        tensors[name], files = _merged(stored, links, updates, dtype or stored.dtype, first_file)
        derived += files
    return replace(
        base,
        kind=f"{base.kind} with a merged adapter",
        index=TensorIndex(files=base.index.files, tensors=tensors, derived=tuple(derived)),
        ignored=(*base.ignored, *(() if base.path == adapter.path else adapter.ignored)),
    )


def _updates(table: TensorTable, adapter: ModelSource, config: AdapterConfig) -> Iterator[tuple[str, Update]]:
    """Yield the name of every adapted Hugging Face tensor, and its update."""
    known = table.hf_tensors()
    pairs: dict[str, tuple[HfTensor, HfTensor]] = {}
    tensors = adapter.table.hf_tensors()
    for each in adapter.table.adapters:
        for part in each.parts:
            for index in _indices(each.base.lead, axes_in(part.hf_name)):
                a, b = (tensors[spell(peft_name(part.hf_name, role), index)] for role in (A, B))
                pairs[spell(part.hf_name, index)] = (a, b)
    unknown = [name for name, (a, b) in pairs.items() if name not in known or known[name].shape != _shape(a, b)]
    if unknown:
        raise TensorMismatchError(
            f"{adapter.path} adapts matrices that the model does not have, or has in other shapes: {listed(unknown)}. "
            "Give the model that the adapter was trained on."
        )
    values = dict(_values(adapter, [tensor for pair in pairs.values() for tensor in pair]))
    for name, (a, b) in pairs.items():
        yield name, Update(scale=config.scale(a.shape[0]), b=values[b.hf_name], a=values[a.hf_name])


def _indices(lead: tuple[int, ...], axes: int) -> Iterator[tuple[int, ...]]:
    yield from np.ndindex(*lead[:axes])


def _shape(a: HfTensor, b: HfTensor) -> tuple[int, int]:
    return b.shape[0], a.shape[1]


def _values(source: ModelSource, tensors: Iterable[HfTensor]) -> Iterator[tuple[str, FloatArray]]:
    """Yield name and values, in float32, of ``tensors``. Tensors that are stored once are one array."""
    plan = source.plan_of({tensor.hf_name: tensor for tensor in tensors}.values())
    shapes = {tensor.hf_name: tensor.shape for tensor in source.table.hf_tensors().values()}
    seen: dict[bytes, FloatArray] = {}
    with SourceFiles(plan.source_files, plan.derived_files) as files:
        reader = BandReader(files)
        for segment in plan.segments:
            key = segment.copies.tobytes()
            if key not in seen:
                data = b"".join(bytes(band) for band in reader.bands(segment))
                stored = np.frombuffer(data, dtype=dtypes.to_numpy(segment.dtype))
                seen[key] = stored.astype(np.float32).reshape(shapes[segment.tensor])
            yield segment.tensor, seen[key]


def _merged(
    stored: IndexedTensor, links: Iterable[Link], updates: Mapping[str, Update], dtype: str, first_file: int
) -> tuple[IndexedTensor, list[DerivedFile]]:
    """``stored`` in ``dtype`` with the updates of the tensors that ``links`` lead to, and one file for each chunk."""
    links = [*links]
    files: list[DerivedFile] = []
    columns = (stored.offsets.tolist(), stored.shapes.tolist(), stored.files.tolist(), stored.positions.tolist())
    for offset, shape, file, position in zip(*columns, strict=True):
        chunk = Link(
            source="",
            source_offset=(0,) * len(shape),
            target=stored.name,
            target_offset=tuple(offset),
            shape=tuple(shape),
        )
        files.append(
            MergedFile(
                file=file,
                position=position,
                stored_dtype=stored.dtype,
                shape=_matrix(shape),
                dtype=dtype,
                products=[*_products(chunk, links, updates)],
                where=repr(stored.name),
            )
        )
    numbers = np.arange(first_file, first_file + len(files), dtype=np.int64)
    return replace(stored, dtype=dtype, files=numbers, positions=np.zeros_like(numbers)), files


def _matrix(shape: list[int]) -> tuple[int, int]:
    """A chunk as one matrix: its rows in all layers, and its columns."""
    *rows, columns = shape
    return int(np.prod(rows)), columns


def _products(chunk: Link, links: Iterable[Link], updates: Mapping[str, Update]) -> Iterator[Product]:
    """Yield what is added to the boxes of a chunk; the chunk is a matrix of the rows of all of its layers."""
    strides = np.cumprod([1, *reversed(chunk.shape[1:-1])])[::-1].tolist()
    for link in links:
        box = compose(chunk, link)
        if box is None:
            continue
        *rows_at, column = box.source_offset
        (row, first_column), (rows, columns) = box.target_offset, box.shape[-2:]
        update = updates[link.target]
        yield Product(
            row=sum(at * stride for at, stride in zip(rows_at, strides, strict=True)),
            column=column,
            scale=update.scale,
            b=update.b[row : row + rows],
            a=update.a[:, first_column : first_column + columns],
        )
