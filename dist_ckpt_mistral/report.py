"""What is in a checkpoint or a Hugging Face directory, and what is wrong with it, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.checkpoint_config import Agreed, checkpoint_config, directory_config, matched
from dist_ckpt_mistral.errors import DistCkptMistralError, FormatError
from dist_ckpt_mistral.formats import backends, common_state, hf_directory
from dist_ckpt_mistral.formats.places import Kind, Place, locate
from dist_ckpt_mistral.formats.quantized import Quantized, match_quantized
from dist_ckpt_mistral.formats.safetensors import FileTensor
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.mapping import CheckpointMap
from dist_ckpt_mistral.matching import match_consolidated, match_hf
from dist_ckpt_mistral.model.config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.stored_entries import model_prefix, why_ignored
from dist_ckpt_mistral.model.tensor_table import TensorTable, tensor_table
from dist_ckpt_mistral.own_links import consolidated_shapes

#: Version of the JSON that ``inspect --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One stored tensor. ``shape`` in elements, ``num_bytes`` of the whole, ``hf_names`` what it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_chunks: int
    num_bytes: int
    hf_names: tuple[str, ...]
    ignored: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that ``inspect`` says. ``files`` are names and sizes in bytes (None: the file is missing)."""

    path: str
    kind: str
    format: str
    config_from: str | None
    config: dict[str, Any] | None
    tensors: tuple[TensorReport, ...]
    objects: tuple[tuple[str, str], ...]
    files: dict[str, int | None]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, stable within ``JSON_VERSION``."""
        content = asdict(self)
        content["objects"] = [{"name": name, "ignored": reason} for name, reason in self.objects]
        return {"json_version": JSON_VERSION, **content}


def inspect(path: str | Path, *, config: GivenConfig | None = None) -> Report:
    """Look at a checkpoint, a Hugging Face directory or a hub id without reading tensor data (the hub's is downloaded).

    What is wrong with it becomes a problem of the report. Raises FormatError only if ``path`` is none of them.
    """
    place, known = locate(path, Kind.HF, Kind.OWN, Kind.CHECKPOINT), chosen_config(config)
    return _inspect_megatron(place.path, known) if place.kind is Kind.CHECKPOINT else _inspect_hf(place, known)


def _inspect_hf(place: Place, config: ChosenConfig | None) -> Report:
    path, where, is_consolidated = place.path, str(place.path), place.kind is Kind.OWN
    file_set = hf_directory.read_directory(path)
    hf_directory.warn_of_files_not_read(path, file_set)
    hf_names = {} if is_consolidated else {tensor.name: tensor.name for tensor in file_set.tensors()}
    problems: list[str] = []
    ignored: dict[str, str] = {}
    quantized, known = Quantized(), None
    try:
        known = directory_config(path, config, file_set.names())
        table = tensor_table(known.config)
        if is_consolidated:
            hf_names = _names_of_consolidated(table, file_set, where)
        else:
            by_name = {name: tensor for name, (_, _, tensor) in file_set.by_name(where, table.usual_name).items()}
            quantized = match_quantized(file_set.tensors(table.usual_name), known.config, where)
            ignored = _ignored_of_hf(table, by_name, quantized, where)
    except DistCkptMistralError as error:
        problems.append(str(error))
    return Report(
        path=where,
        kind=place.kind.value,
        format=f"safetensors, {quantized}" if quantized.weights else "safetensors",
        config_from=known.source if known else None,
        config=_config_values(known),
        tensors=tuple(_hf_tensor_report(tensor, hf_names, ignored) for tensor in file_set.tensors()),
        objects=(),
        files={name: file.num_bytes for name, file in file_set.files.items()},
        problems=tuple(problems),
    )


def _names_of_consolidated(table: TensorTable, file_set: hf_directory.FileSet, where: str) -> dict[str, str]:
    """The Hugging Face tensor that each tensor of Mistral AI's own files is, or is a part of."""
    found = match_consolidated(table, {tensor.name: tensor.shape for tensor in file_set.tensors()}, where)
    return {name: tensor.hf_name for tensor in found for name in consolidated_shapes(tensor)}


def _ignored_of_hf(
    table: TensorTable, by_name: Mapping[str, FileTensor], quantized: Quantized, where: str
) -> dict[str, str]:
    """The stored tensors that are no weights, and why; ``by_name`` are all, by their names in the table."""
    left = dict(quantized.ignored)
    shapes = {name: tensor.shape for name, tensor in by_name.items() if name not in left}
    left.update(match_hf(table, shapes, where)[1])
    return {by_name[name].name: reason for name, reason in left.items()}


def _hf_tensor_report(tensor: FileTensor, hf_names: Mapping[str, str], ignored: Mapping[str, str]) -> TensorReport:
    is_known = tensor.name in hf_names and tensor.name not in ignored
    return TensorReport(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        num_chunks=1,
        num_bytes=tensor.end - tensor.begin,
        hf_names=(hf_names[tensor.name],) if is_known else (),
        ignored=ignored.get(tensor.name),
    )


def _inspect_megatron(path: Path, config: ChosenConfig | None) -> Report:
    checkpoint = backends.open_stored(path)
    problems: list[str] = []
    known, found = None, None
    try:
        known = checkpoint_config(checkpoint, config)
        found = matched(checkpoint, known).found
    except DistCkptMistralError as error:
        problems.append(str(error))
    prefix = model_prefix(checkpoint.tensors)
    files = _file_sizes(checkpoint)
    try:
        checkpoint.require_whole(files)
    except FormatError as error:
        problems.append(str(error))
    return Report(
        path=str(checkpoint.directory),
        kind=f"Megatron {checkpoint.backend} checkpoint",
        format=_generation(checkpoint),
        config_from=known.source if known else None,
        config=_config_values(known),
        tensors=_tensor_reports(checkpoint, found),
        objects=tuple((name, why_ignored(name, prefix) or "not a tensor") for name in checkpoint.objects),
        files=files,
        problems=tuple(problems),
    )


def _tensor_reports(checkpoint: StoredCheckpoint, found: CheckpointMap | None) -> tuple[TensorReport, ...]:
    prefix = model_prefix(checkpoint.tensors)
    hf_names: dict[str, list[str]] = {}
    if found is not None:
        for tensor in found.table.hf_tensors().values():
            for name in () if tensor.is_alias else dict.fromkeys(link.source for link in found.links(tensor)):
                hf_names.setdefault(name, []).append(tensor.hf_name)
    return tuple(
        TensorReport(
            name=stored.name,
            dtype=stored.dtype,
            shape=stored.global_shape,
            num_chunks=stored.num_chunks,
            num_bytes=stored.num_bytes,
            hf_names=tuple(hf_names.get(stored.name, ())),
            ignored=why_ignored(stored.name, prefix),
        )
        for stored in checkpoint.tensors.values()
    )


def _file_sizes(checkpoint: StoredCheckpoint) -> dict[str, int | None]:
    return {
        name: path.stat().st_size if (path := checkpoint.directory / name).is_file() else None
        for name in checkpoint.file_bytes
    }


def _generation(checkpoint: StoredCheckpoint) -> str:
    if checkpoint.backend == ZARR:
        return "legacy zarr (as megatron-core until 0.15 writes)"
    if (checkpoint.directory / common_state.COMMON_FILE).is_file():
        return "torch_dist with common.pt (as megatron-core 0.12 to 0.16 write)"
    if common_state.SHARDED_KEY in checkpoint.objects:
        return "torch_dist with the common state in the shards (as megatron-core 0.17 and newer write)"
    return "torch_dist without common state"


def _config_values(known: Agreed | None) -> dict[str, Any] | None:
    return None if known is None else {n: value for n, value in asdict(known.config).items() if n != "hf_config"}
