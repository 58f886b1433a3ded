"""The report of ``inspect``: the contents and the problems of a checkpoint or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import DistCkptMistralError, SourceError
from dist_ckpt_mistral.formats import checkpoint_directory, hf_directory, stored_checkpoint
from dist_ckpt_mistral.formats.kinds import Kind, Place
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.formats.safetensors import FileTensor
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH, TORCH_DCP, ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.configuration import Agreed, checkpoint_config, directory_config, matched
from dist_ckpt_mistral.mapping.consolidated import consolidated_shapes
from dist_ckpt_mistral.mapping.matching import match_consolidated, match_hf
from dist_ckpt_mistral.mapping.quantized import Quantized, match_quantized
from dist_ckpt_mistral.messages import concise_repr, counted
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.config.parts import is_positive_int
from dist_ckpt_mistral.model.table.entries import is_optimizer_state, kind_of, model_prefix, why_ignored
from dist_ckpt_mistral.model.table.table import TensorTable, tensor_table

#: The kind of what is not a tensor of the model.
OTHER: Final = "other"
#: Version of the JSON that ``inspect --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
#: Axis of a layout -> the name of its size in Megatron-LM's args.
_AXES: Final = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One stored tensor.

    Args:
        name: Its name in the files: a Megatron key, or a Hugging Face or consolidated name.
        dtype: Its torch dtype name.
        shape: Its shape in elements.
        num_chunks: Number of stored chunks.
        num_bytes: Size of its data in bytes.
        hf_names: Names of the Hugging Face tensors with rows in it.
        ignored: Reason why it is not a weight, or None.
        kind: Its kind: embedding, attention, MLP, experts, norms, output layer, vision, optimizer state, or other.
        cut: Number of pieces along each axis of its shape, as it was saved.
        files: Names of the data files with its chunks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_chunks: int
    num_bytes: int
    hf_names: tuple[str, ...]
    ignored: str | None = None
    kind: str = "other"
    cut: tuple[int, ...] = ()
    files: tuple[str, ...] = ()

    __repr__ = concise_repr


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of ``inspect``.

    Args:
        path: The inspected directory.
        kind: Kind of directory, in words.
        format: Format of its files, in words.
        config_from: Source of the configuration, in words; None if there is none.
        config: Configuration with Hugging Face's names; None if there is none.
        tensors: The stored tensors.
        objects: Name of each stored entry that is not a tensor, and the reason why it is no weight.
        files: Name and size in bytes of each data file; None if the file is missing.
        problems: Error messages; empty if nothing is wrong.
        iterations: Names of the iterations in the root of a Megatron checkpoint, this one among them.
        saved_at: The layout of the ranks that saved it, as Megatron's args tell it: name of an axis such as ``tp`` ->
            its size; None if nothing tells it.
    """

    path: str
    kind: str
    format: str
    config_from: str | None
    config: dict[str, Any] | None
    tensors: tuple[TensorReport, ...]
    objects: tuple[tuple[str, str], ...]
    files: dict[str, int | None]
    problems: tuple[str, ...]
    iterations: tuple[str, ...] = ()
    saved_at: dict[str, int] | None = None

    __repr__ = concise_repr

    def to_json(self) -> dict[str, Any]:
        """The content of ``inspect --json``, in JSON types."""
        content = asdict(self)
        content["objects"] = [{"name": name, "ignored": reason} for name, reason in self.objects]
        return {"json_version": JSON_VERSION, **content}


def inspect(path: str | Path, *, config: GivenConfig | None = None) -> Report:
    """Report the contents and the problems of a checkpoint or a Hugging Face directory. Tensor data is not read.

    Args:
        path: Megatron checkpoint (root, ``iter_*`` or ``release`` directory), Hugging Face directory or hub id. The
            files of a hub id are downloaded.
        config: Configuration for a checkpoint that has lost its own.

    Returns:
        The report. Missing or wrong tensors, files and configurations are among its ``problems``.

    Raises:
        FormatError: ``path`` is neither a checkpoint nor a Hugging Face directory, or its metadata is damaged.

    Example:
        >>> dist_ckpt_mistral.inspect("ckpt").problems  # doctest: +SKIP
        ()
    """
    require_types(inspect, **locals())
    place = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT, Kind.ADAPTER)
    chosen = chosen_config(config)
    if place.kind is Kind.ADAPTER:
        return _inspect_adapter(place, chosen)
    return _inspect_megatron(place.path, chosen) if place.kind is Kind.CHECKPOINT else _inspect_hf(place, chosen)


def _inspect_adapter(place: Place, config: ChosenConfig | None) -> Report:
    """The report on a directory of PEFT."""
    from dist_ckpt_mistral.mapping.source import adapter_file_set, open_adapter  # noqa: PLC0415  (others do without)

    file_set = adapter_file_set(place.path)
    problems: list[str] = []
    agreed, names, ignored = None, {tensor.name: tensor.name for tensor in file_set.tensors()}, dict[str, str]()
    try:
        source = open_adapter(place.path, config=config)
        agreed, ignored = source.agreed, dict(source.ignored)
    except DistCkptMistralError as error:
        problems.append(str(error))
    return Report(
        path=str(place.path),
        kind=place.kind.value,
        format="safetensors",
        config_from=agreed.source if agreed else None,
        config=_config_values(agreed),
        tensors=_hf_tensor_reports(file_set, names, ignored, {}),
        objects=(),
        files={name: file.num_bytes for name, file in file_set.files.items()},
        problems=tuple(problems),
    )


def _inspect_hf(place: Place, config: ChosenConfig | None) -> Report:
    path, location, is_consolidated = place.path, str(place.path), place.kind is Kind.CONSOLIDATED
    file_set = hf_directory.read_directory(path)
    hf_directory.warn_of_files_not_read(path, file_set)
    hf_names = {} if is_consolidated else {tensor.name: tensor.name for tensor in file_set.tensors()}
    problems: list[str] = []
    ignored: dict[str, str] = {}
    quantized, agreed = Quantized(), None
    kinds: dict[str, str] = {}
    try:
        agreed = directory_config(path, config, file_set.names())
        table = tensor_table(agreed.config)
        kinds = {name: kind_of(tensor.rule) for name, tensor in table.hf_tensors().items()}
        if is_consolidated:
            hf_names = _hf_names_of_consolidated(table, file_set, location)
        else:
            by_name = {name: tensor for name, (_, _, tensor) in file_set.by_name(location, table.usual_name).items()}
            quantized = match_quantized(file_set.tensors(table.usual_name), agreed.config, location)
            ignored = _ignored_in_hf(table, by_name, quantized, location)
    except DistCkptMistralError as error:
        problems.append(str(error))
    return Report(
        path=location,
        kind=place.kind.value,
        format=f"safetensors, {quantized}" if quantized.weights else "safetensors",
        config_from=agreed.source if agreed else None,
        config=_config_values(agreed),
        tensors=_hf_tensor_reports(file_set, hf_names, ignored, kinds),
        objects=(),
        files={name: file.num_bytes for name, file in file_set.files.items()},
        problems=tuple(problems),
    )


def _hf_names_of_consolidated(table: TensorTable, file_set: hf_directory.FileSet, location: str) -> dict[str, str]:
    """The name of each tensor in Mistral AI's consolidated files -> the Hugging Face tensor that it is a part of."""
    hf_tensors = match_consolidated(table, {tensor.name: tensor.shape for tensor in file_set.tensors()}, location)
    return {name: tensor.hf_name for tensor in hf_tensors for name in consolidated_shapes(tensor)}


def _ignored_in_hf(
    table: TensorTable, by_name: Mapping[str, FileTensor], quantized: Quantized, location: str
) -> dict[str, str]:
    """The stored name of each tensor that is no weight -> the reason. ``by_name`` has all tensors by table name."""
    ignored = dict(quantized.ignored)
    shapes = {name: tensor.shape for name, tensor in by_name.items() if name not in ignored}
    ignored.update(match_hf(table, shapes, location)[1])
    return {by_name[name].name: reason for name, reason in ignored.items()}


def _hf_tensor_reports(
    files: hf_directory.FileSet, hf_names: Mapping[str, str], ignored: Mapping[str, str], kinds: Mapping[str, str]
) -> tuple[TensorReport, ...]:
    return tuple(
        _hf_tensor_report(tensor, name, hf_names, ignored, kinds)
        for name, file in files.files.items()
        for tensor in file.tensors
    )


def _hf_tensor_report(
    tensor: FileTensor, file: str, hf_names: Mapping[str, str], ignored: Mapping[str, str], kinds: Mapping[str, str]
) -> TensorReport:
    is_weight = tensor.name in hf_names and tensor.name not in ignored
    return TensorReport(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        num_chunks=1,
        num_bytes=tensor.end - tensor.begin,
        hf_names=(hf_names[tensor.name],) if is_weight else (),
        ignored=ignored.get(tensor.name),
        kind=kinds.get(hf_names.get(tensor.name, ""), OTHER) if is_weight else OTHER,
        cut=(1,) * len(tensor.shape),
        files=(file,),
    )


def _inspect_megatron(path: Path, config: ChosenConfig | None) -> Report:
    checkpoint = stored_checkpoint.open_stored(path)
    problems: list[str] = []
    agreed, checkpoint_map = None, None
    try:
        agreed = checkpoint_config(checkpoint, config)
        match = matched(checkpoint, agreed)
        checkpoint, checkpoint_map = match.stored, match.found
    except DistCkptMistralError as error:
        problems.append(str(error))
    prefix = model_prefix(checkpoint.tensors)
    is_adapter = checkpoint_map is not None and bool(checkpoint_map.table.adapters)
    files = _file_sizes(checkpoint)
    try:
        checkpoint.require_whole(files)
    except SourceError as error:
        problems.append(str(error))
    return Report(
        path=str(checkpoint.directory),
        kind=f"Megatron {checkpoint.backend} checkpoint" + (" of an adapter" if is_adapter else ""),
        format=_generation(checkpoint),
        config_from=agreed.source if agreed else None,
        config=_config_values(agreed),
        tensors=_tensor_reports(checkpoint, checkpoint_map),
        objects=tuple((name, why_ignored(name, prefix) or "not a tensor") for name in checkpoint.objects),
        files=files,
        problems=tuple(problems),
        iterations=_iterations(checkpoint.directory),
        saved_at=_saved_at(checkpoint),
    )


def _iterations(directory: Path) -> tuple[str, ...]:
    """The names of the iterations beside the directory of one, in order; itself alone outside a root."""
    root = checkpoint_directory.root_of(directory)
    names = {directory.resolve().name}
    if root is not None:
        names |= {
            path.name
            for path in root.iterdir()
            if checkpoint_directory.is_iteration_name(path.name) and path.is_dir() and not path.is_symlink()
        }
    return tuple(sorted(names))


def _saved_at(checkpoint: StoredCheckpoint) -> dict[str, int] | None:
    """The layout in the args of a training; None where they do not tell it."""
    args = checkpoint.common_state.get("args")
    if not isinstance(args, Mapping) or "world_size" not in args:  # which an import's do not tell
        return None
    sizes = {axis: args.get(name) for axis, name in _AXES.items()}
    return {axis: size for axis, size in sizes.items() if is_positive_int(size)} or None


def _tensor_reports(checkpoint: StoredCheckpoint, checkpoint_map: CheckpointMap | None) -> tuple[TensorReport, ...]:
    prefix, files = model_prefix(checkpoint.tensors), tuple(checkpoint.file_bytes)
    file_of = checkpoint.metadata.archives.files
    hf_names: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    if checkpoint_map is not None:
        kinds = {name: kind_of(rule) for name, rule, _ in checkpoint_map.tensors()}
        for tensor in checkpoint_map.table.hf_tensors().values():
            for name in () if tensor.is_alias else checkpoint_map.sources(tensor):
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
            kind=_kind(stored.name, kinds),
            cut=tuple(len(set(starts)) for starts in stored.offsets.T.tolist()),
            files=tuple(files[number] for number in sorted({*file_of[stored.archives].tolist()})),
        )
        for stored in checkpoint.tensors.values()
    )


def _kind(name: str, kinds: Mapping[str, str]) -> str:
    """The kind of a stored tensor; ``kinds`` has those of the weights."""
    return kinds.get(name) or ("optimizer state" if is_optimizer_state(name) else OTHER)


def _file_sizes(checkpoint: StoredCheckpoint) -> dict[str, int | None]:
    return {
        name: path.stat().st_size if (path := checkpoint.directory / name).is_file() else None
        for name in checkpoint.file_bytes
    }


def _generation(checkpoint: StoredCheckpoint) -> str:
    if checkpoint.backend == ZARR:
        return "legacy zarr (as megatron-core until 0.15 writes)"
    if checkpoint.backend == TORCH:
        from dist_ckpt_mistral.formats.legacy_torch import rank_folders  # noqa: PLC0415  (others do without)

        ranks = counted(len(rank_folders(checkpoint.directory)), "rank")
        return f"an archive for each of {ranks} (as Megatron-LM writes with --ckpt-format torch)"
    if checkpoint.backend == TORCH_DCP:
        return "torch's distributed checkpoint of parameters (as Megatron-LM writes with FSDP)"
    if (checkpoint.directory / common_state.COMMON_FILE).is_file():
        return "torch_dist with common.pt (as megatron-core 0.12 to 0.16 write)"
    if common_state.SHARDED_KEY in checkpoint.objects:
        return "torch_dist with the common state in the shards (as megatron-core 0.17 and newer write)"
    return "torch_dist without common state"


def _config_values(agreed: Agreed | None) -> dict[str, Any] | None:
    return None if agreed is None else {n: value for n, value in asdict(agreed.config).items() if n != "hf_config"}
