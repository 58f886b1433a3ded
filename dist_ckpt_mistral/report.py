"""What people look at: the content of a checkpoint or a Hugging Face directory, as data, as a table, as a page."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ckpt_mistral import storage
from dist_ckpt_mistral.checkpoint_config import choose_config, read_embedded
from dist_ckpt_mistral.errors import DistCkptMistralError, FormatError, printable
from dist_ckpt_mistral.formats import common_state, hf_directory, torch_dist
from dist_ckpt_mistral.formats.quantized import Quantized, match_quantized
from dist_ckpt_mistral.mapping import CheckpointMap
from dist_ckpt_mistral.matching import match_checkpoint, match_hf, match_own
from dist_ckpt_mistral.model.config import SLIDING, GivenConfig, MistralConfig, config_file, given_config
from dist_ckpt_mistral.model.stored_entries import model_prefix, why_ignored
from dist_ckpt_mistral.model.tensor_table import tensor_table
from dist_ckpt_mistral.name_ranges import grouped
from dist_ckpt_mistral.own_links import own_shapes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from dist_ckpt_mistral.conversion import Conversion

#: Version of the JSON that ``inspect --json`` prints; fields are only ever added under one version.
JSON_VERSION = 1
#: A table with more rows than this shows tensors of the same kind in one.
_MOST_ROWS = 100
#: No model comes near; of a file of millions of names nobody reads them all.
_END_OF_TABLE = 1000
_TOO_MANY = 100_000


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
    """Look at a checkpoint or a Hugging Face directory without reading tensor data.

    What is wrong with it becomes a problem of the report. Raises FormatError only if ``path`` is neither.
    """
    path, known = Path(path), given_config(config)
    is_hf = hf_directory.is_model_directory(path) or hf_directory.is_own_directory(path)
    return _inspect_hf(path, known) if is_hf else _inspect_megatron(path, known)


def _inspect_hf(path: Path, config: MistralConfig | None) -> Report:
    file_set = hf_directory.read_directory(path)
    stored = list(file_set.tensors())
    problems: list[str] = []
    ignored: dict[str, str] = {}
    is_own = hf_directory.is_own_directory(path)
    hf_names = {} if is_own else {tensor.name: (tensor.name,) for tensor in stored}
    quantized = Quantized()
    try:
        config = config or MistralConfig.from_hf(path)
        table = tensor_table(config)
        if is_own:
            found = match_own(table, {tensor.name: tensor.shape for tensor in stored}, str(path))
            hf_names = {name: (tensor.hf_name,) for tensor in found for name in own_shapes(tensor)}
        else:
            by_name = file_set.by_name(str(path), table.usual_name)
            named = {name: tensor for name, (_, _, tensor) in by_name.items()}
            quantized = match_quantized(file_set.tensors(table.usual_name), config, str(path))
            left = dict(quantized.ignored)
            shapes = {name: tensor.shape for name, tensor in named.items() if name not in left}
            left.update(match_hf(table, shapes, str(path))[1])
            ignored = {named[name].name: reason for name, reason in left.items()}
    except DistCkptMistralError as error:
        problems.append(str(error))
    return Report(
        path=str(path),
        kind="directory of Mistral AI's own files" if is_own else "Hugging Face directory",
        format=f"safetensors, {quantized}" if quantized.weights else "safetensors",
        config_from=str(config_file(path)) if config else None,
        config=_config_values(config),
        tensors=tuple(
            TensorReport(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                num_chunks=1,
                num_bytes=tensor.end - tensor.begin,
                hf_names=() if tensor.name in ignored else hf_names.get(tensor.name, ()),
                ignored=ignored.get(tensor.name),
            )
            for tensor in stored
        ),
        objects=(),
        files={name: file.num_bytes for name, file in file_set.files.items()},
        problems=tuple(problems),
    )


def _inspect_megatron(path: Path, config: MistralConfig | None) -> Report:
    checkpoint = torch_dist.open_torch_dist(path)
    problems: list[str] = []
    config_from, found = None, None
    shapes = {name: tensor.global_shape for name, tensor in checkpoint.tensors.items()}
    try:
        config, config_from = choose_config(checkpoint, config, read_embedded(checkpoint))
        found = match_checkpoint(tensor_table(config), shapes, checkpoint.objects, str(checkpoint.directory))
    except DistCkptMistralError as error:
        problems.append(str(error))
    prefix = model_prefix(shapes)
    files = _file_sizes(checkpoint)
    try:
        checkpoint.require_whole(files)
    except FormatError as error:
        problems.append(str(error))
    return Report(
        path=str(checkpoint.directory),
        kind="Megatron torch_dist checkpoint",
        format=_generation(checkpoint),
        config_from=config_from,
        config=_config_values(config),
        tensors=_tensor_reports(checkpoint, found),
        objects=tuple((name, why_ignored(name, prefix) or "not a tensor") for name in checkpoint.objects),
        files=files,
        problems=tuple(problems),
    )


def _tensor_reports(
    checkpoint: torch_dist.TorchDistCheckpoint, found: CheckpointMap | None
) -> tuple[TensorReport, ...]:
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


def _file_sizes(checkpoint: torch_dist.TorchDistCheckpoint) -> dict[str, int | None]:
    return {
        name: path.stat().st_size if (path := checkpoint.directory / name).is_file() else None
        for name in checkpoint.file_bytes
    }


def _generation(checkpoint: torch_dist.TorchDistCheckpoint) -> str:
    if (checkpoint.directory / common_state.COMMON_FILE).is_file():
        return "torch_dist with common.pt (as megatron-core 0.12 to 0.16 write)"
    if common_state.SHARDED_KEY in checkpoint.objects:
        return "torch_dist with the common state in the shards (as megatron-core 0.17 and newer write)"
    return "torch_dist without common state"


def _config_values(config: MistralConfig | None) -> dict[str, Any] | None:
    return None if config is None else {name: value for name, value in asdict(config).items() if name != "hf_config"}


def render(report: Report) -> RenderableType:
    """The report as a rich renderable."""
    from rich.console import Group  # noqa: PLC0415  (only what is shown needs rich)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report):
        facts.add_row(Text(name, style="bold"), printable(value))
    table = Table("tensor", "dtype", "shape", "chunks", "size", "Hugging Face names", box=None, padding=(0, 2, 0, 0))
    weights = [tensor for tensor in report.tensors if tensor.ignored is None]
    rows = [*(_rows(weights) if len(weights) <= _TOO_MANY else weights)]
    for tensor in rows[:_END_OF_TABLE]:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(
            printable(tensor.name),
            tensor.dtype,
            shape,
            str(tensor.num_chunks),
            human_bytes(tensor.num_bytes),
            printable(_summary(tensor.hf_names)),
        )
    if len(rows) > _END_OF_TABLE:
        table.add_row(f"... and {len(rows) - _END_OF_TABLE} more rows")
    problems = [Text(f"problem: {problem}", style="red") for problem in report.problems]
    return Group(Text(printable(report.path), style="bold"), facts, Text(""), table, *problems)


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
    storage.write_whole(path, console.export_html().encode())


def human_bytes(num_bytes: int) -> str:
    """``14.5 GB``: decimal units, as disks and Hugging Face count."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while size >= 1000 and len(units) > 1:  # noqa: PLR2004  (decimal units)
        size, units = size / 1000, units[1:]
    return f"{num_bytes} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def conversion_line(verb: str, done: Conversion) -> str:
    """What a conversion did, in one line."""
    ignored = f"; {len(done.ignored)} stored entries are not weights and stayed behind" if done.ignored else ""
    size = human_bytes(done.num_bytes)
    return f"{verb} {done.num_tensors} tensors ({size}) in {len(done.files)} files to {done.output}{ignored}"
