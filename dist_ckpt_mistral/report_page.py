"""A report as people look at it: on a terminal, and as a page."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral.messages import grouped, human_bytes
from dist_ckpt_mistral.model.config.mistral_config import SLIDING
from dist_ckpt_mistral.report import Report, TensorReport
from dist_ckpt_mistral.sheet import sheet
from dist_ckpt_mistral.storage import documents

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


#: A table with more rows than this shows tensors of the same kind in one.
_MOST_ROWS: Final = 100
#: No model comes near; of a file of millions of names nobody reads them all.
_END_OF_TABLE: Final = 1000
_TOO_MANY: Final = 100_000


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
