"""The report of ``inspect`` in words and as a table: the tensors of a kind in one row, all else in lines above."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dist_ckpt_mistral.analysis.report import Report, TensorReport
from dist_ckpt_mistral.analysis.sheet import sheet
from dist_ckpt_mistral.messages import counted, grouped, human_bytes
from dist_ckpt_mistral.model.config.mistral_config import SLIDING
from dist_ckpt_mistral.model.table.entries import is_optimizer_state

if TYPE_CHECKING:
    from rich.console import RenderableType

#: The table shows more tensors than this in groups: one row for a kind of tensor in all layers and experts.
_MOST_SINGLE: Final = 100
#: The table does not group more tensors than this; no model has so many.
_MOST_GROUPED: Final = 100_000
#: Rows that the table shows.
_MOST_ROWS: Final = 1000


def render(report: Report) -> RenderableType:
    """The report as a rich renderable."""
    weights = [tensor for tensor in report.tensors if tensor.ignored is None]
    rows = [*(_grouped(weights) if _MOST_SINGLE < len(weights) <= _MOST_GROUPED else weights)]
    cells = [_cells(tensor) for tensor in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        cells.append((f"... and {len(rows) - _MOST_ROWS} more rows",))
    return sheet(
        report.path,
        facts(report),
        [(name, "left") for name in ("tensor", "dtype", "shape", "chunks", "size", "Hugging Face names")],
        cells,
        notes=[f"problem: {problem}" for problem in report.problems],
        notes_style="red",
    )


def _cells(tensor: TensorReport) -> tuple[str, ...]:
    shape, size = " x ".join(map(str, tensor.shape)), human_bytes(tensor.num_bytes)
    return tensor.name, tensor.dtype, shape, str(tensor.num_chunks), size, shortened(tensor.hf_names)


def _grouped(tensors: list[TensorReport]) -> Iterator[TensorReport]:
    """One row for the tensors of a kind in all layers and experts, with the sums of their chunks and bytes."""
    by_kind: dict[tuple[str, tuple[int, ...]], dict[str, TensorReport]] = defaultdict(dict)
    for tensor in tensors:
        by_kind[tensor.dtype, tensor.shape][tensor.name] = tensor
    for by_name in by_kind.values():
        for pattern, names in grouped(by_name).items():
            yield replace(
                by_name[names[0]],
                name=pattern,
                num_chunks=sum(by_name[name].num_chunks for name in names),
                num_bytes=sum(by_name[name].num_bytes for name in names),
                hf_names=tuple(hf_name for name in names for hf_name in by_name[name].hf_names),
            )


def facts(report: Report) -> list[tuple[str, str]]:
    """What the report says beside its tables: (subject, value), in words."""
    weights = [tensor for tensor in report.tensors if tensor.ignored is None]
    found = [
        ("kind", f"{report.kind}, {report.format}"),
        ("configuration", report.config_from or "none"),
        ("files", _amount(len(report.files), "file", (size or 0 for size in report.files.values()))),
        ("weights", _amount(len(weights), "tensor", (tensor.num_bytes for tensor in weights))),
    ]
    state = [tensor.num_bytes for tensor in report.tensors if is_optimizer_state(tensor.name)]
    if state:
        found.append(("optimizer", _amount(len(state), "tensor", state)))
    if report.config is not None:
        found.insert(1, ("model", model_line(report.config)))
    if report.saved_at is not None:
        axes = " x ".join(f"{axis} {size}" for axis, size in report.saved_at.items())
        found.insert(-1, ("saved at", axes))
    if len(report.iterations) > 1:
        name = Path(report.path).resolve().name
        found.append(("iterations", f"{', '.join(report.iterations)}; this is {name}"))
    reasons = Counter(tensor.ignored for tensor in report.tensors if tensor.ignored is not None)
    reasons.update(reason for _, reason in report.objects)
    found += [
        ("ignored", f"{counted(count, 'entry', 'entries')}: {reason}") for reason, count in sorted(reasons.items())
    ]
    return found


def _amount(count: int, noun: str, sizes: Iterable[int]) -> str:
    return f"{counted(count, noun)}, {human_bytes(sum(sizes))}"


def model_line(config: dict[str, Any]) -> str:
    """The sizes of a model, from the ``config`` of a report, in one line."""
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
    layers = f" in {config['layer_types'].count(SLIDING)} layers" if window and config["layer_types"] else ""
    parts = [
        *(kind, f"{config['num_hidden_layers']} layers", f"hidden {config['hidden_size']}", mlp),
        *(f"{config['num_attention_heads']} heads {heads}", f"vocabulary {config['vocab_size']}"),
        "tied embeddings" if config["tie_word_embeddings"] else "",
        f"sliding window {window}{layers}" if window else "",
        f"vision tower of {config['vision']['num_hidden_layers']} layers" if config["vision"] else "",
    ]
    return ", ".join(filter(None, parts))


def shortened(names: Sequence[str]) -> str:
    """The first name, and the number of the others."""
    if not names:
        return ""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
