"""What is in a checkpoint or a Hugging Face directory, and what is wrong with it, as data."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral.analysis.sheet import sheet
from dist_ckpt_mistral.errors import DistCkptMistralError, FormatError
from dist_ckpt_mistral.formats import hf_directory, stored_checkpoint
from dist_ckpt_mistral.formats.places import Kind, Place, locate
from dist_ckpt_mistral.formats.safetensors import FileTensor
from dist_ckpt_mistral.formats.stored_checkpoint import ZARR, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.configuration import Agreed, checkpoint_config, directory_config, matched
from dist_ckpt_mistral.mapping.consolidated import consolidated_shapes
from dist_ckpt_mistral.mapping.matching import match_consolidated, match_hf
from dist_ckpt_mistral.mapping.quantized import Quantized, match_quantized
from dist_ckpt_mistral.messages import grouped, human_bytes
from dist_ckpt_mistral.model.config.mistral_config import SLIDING, ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.entries import model_prefix, why_ignored
from dist_ckpt_mistral.model.table.table import TensorTable, tensor_table
from dist_ckpt_mistral.storage import documents

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: Version of the JSON that ``inspect --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
#: A table with more rows than this shows tensors of the same kind in one.
_MOST_ROWS: Final = 100
#: No model comes near; of a file of millions of names nobody reads them all.
_END_OF_TABLE: Final = 1000
_TOO_MANY: Final = 100_000


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
    place, known = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.CHECKPOINT), chosen_config(config)
    return _inspect_megatron(place.path, known) if place.kind is Kind.CHECKPOINT else _inspect_hf(place, known)


def _inspect_hf(place: Place, config: ChosenConfig | None) -> Report:
    path, where, is_consolidated = place.path, str(place.path), place.kind is Kind.CONSOLIDATED
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
    checkpoint = stored_checkpoint.open_stored(path)
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


def render(report: Report) -> RenderableType:
    """The report as a rich renderable."""
    weights = [tensor for tensor in report.tensors if tensor.ignored is None]
    rows = [*(_rows(weights) if len(weights) <= _TOO_MANY else weights)]
    cells = [_cells(tensor) for tensor in rows[:_END_OF_TABLE]]
    if len(rows) > _END_OF_TABLE:
        cells.append((f"... and {len(rows) - _END_OF_TABLE} more rows",))
    return sheet(
        report.path,
        _facts(report),
        [(name, "left") for name in ("tensor", "dtype", "shape", "chunks", "size", "Hugging Face names")],
        cells,
        notes=[f"problem: {problem}" for problem in report.problems],
        notes_style="red",
    )


def _cells(tensor: TensorReport) -> tuple[str, ...]:
    shape, size = " x ".join(map(str, tensor.shape)), human_bytes(tensor.num_bytes)
    return tensor.name, tensor.dtype, shape, str(tensor.num_chunks), size, _summary(tensor.hf_names)


def _rows(tensors: list[TensorReport]) -> Iterable[TensorReport]:
    """The tensors; of very many, those of the same kind in all layers or experts as one, with the sums of both."""
    if len(tensors) <= _MOST_ROWS:
        return tensors
    by_kind: dict[tuple[str, tuple[int, ...]], dict[str, TensorReport]] = defaultdict(dict)
    for tensor in tensors:
        by_kind[tensor.dtype, tensor.shape][tensor.name] = tensor
    return (
        replace(
            of_kind[names[0]],
            name=pattern,
            num_chunks=sum(of_kind[name].num_chunks for name in names),
            num_bytes=sum(of_kind[name].num_bytes for name in names),
            hf_names=tuple(hf_name for name in names for hf_name in of_kind[name].hf_names),
        )
        for of_kind in by_kind.values()
        for pattern, names in grouped(of_kind).items()
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    weights = [tensor for tensor in report.tensors if tensor.ignored is None]
    facts = [
        ("kind", f"{report.kind}, {report.format}"),
        ("configuration", report.config_from or "none"),
        ("files", f"{len(report.files)}, {human_bytes(sum(size or 0 for size in report.files.values()))}"),
        ("weights", f"{len(weights)} tensors, {human_bytes(sum(tensor.num_bytes for tensor in weights))}"),
    ]
    if report.config is not None:
        facts.insert(1, ("model", _model_line(report.config)))
    reasons = Counter(tensor.ignored for tensor in report.tensors if tensor.ignored is not None)
    reasons.update(reason for _, reason in report.objects)
    facts += [("ignored", f"{count} entries: {reason}") for reason, count in sorted(reasons.items())]
    return facts


def _model_line(config: dict[str, Any]) -> str:
    experts, latent, window = config["experts"], config["latent_attention"], config["sliding_window"]
    kind = "" if config["model_type"] == "mistral" else config["model_type"]
    mlp = f"ffn {config['intermediate_size']}"
    if experts is not None:
        size, shared = experts["intermediate_size"], experts["shared_intermediate_size"]
        mlp = f"{experts['num_experts']} experts of ffn {size}, {experts['experts_per_token']} a token"
        mlp += f", a shared one of {shared}" if shared else ""
    heads = f"in {config['num_key_value_heads']} groups of dimension {config['head_dim']}"
    if latent is not None:
        heads = f"of latent attention (keys and values {latent['kv_lora_rank']}, queries {latent['q_lora_rank']})"
    some = f" in {config['layer_types'].count(SLIDING)} layers" if window and config["layer_types"] else ""
    parts = [
        *(kind, f"{config['num_hidden_layers']} layers", f"hidden {config['hidden_size']}", mlp),
        *(f"{config['num_attention_heads']} heads {heads}", f"vocabulary {config['vocab_size']}"),
        "tied embeddings" if config["tie_word_embeddings"] else "",
        f"sliding window {window}{some}" if window else "",
        f"vision tower of {config['vision']['num_hidden_layers']} layers" if config["vision"] else "",
    ]
    return ", ".join(filter(None, parts))


def _summary(hf_names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    if not hf_names:
        return ""
    return hf_names[0] + (f" and {len(hf_names) - 1} more" if len(hf_names) > 1 else "")


def save_html(report: Report, path: Path) -> None:
    """Write the report as one self-contained page; an old one is replaced. Raises OutputError."""
    from rich.console import Console  # noqa: PLC0415  (only what is shown needs rich)

    console: Console = Console(record=True, width=180, file=io.StringIO(), markup=False, emoji=False)
    console.print(render(report))
    documents.write_whole(path, console.export_html().encode())
