"""What in a Megatron checkpoint describes its LoRA adapter: alpha, rank and the model that it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import checkpoint_directory, small_files
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.mapping.configuration import RUN_CONFIG_FILE
from dist_ckpt_mistral.mapping.hf_record import KEY
from dist_ckpt_mistral.model.config.adapter_config import AdapterConfig, contradictions
from dist_ckpt_mistral.storage import documents, paths

#: The files of an adapter in a directory of PEFT: its weights and its configuration.
ADAPTER_FILE: Final = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"
#: The key of its content in the record of an imported adapter.
RECORD_KEY: Final = "adapter_config"
#: The args of ms-swift, beside the directory of an iteration (swift/megatron/trainers/base.py, 4.6).
_SWIFT_FILE: Final = "args.json"


def adapter_descriptions(checkpoint: StoredCheckpoint) -> tuple[AdapterConfig, ...]:
    """All descriptions of the adapter in a checkpoint, that of an import first.

    Raises ConfigError or UnsupportedModelError if one of them describes no plain LoRA.
    """
    return tuple(_descriptions(checkpoint))


def _descriptions(checkpoint: StoredCheckpoint) -> Iterator[AdapterConfig]:
    metadata = checkpoint.common_state.get("content_metadata")
    record = metadata.get(KEY) if isinstance(metadata, Mapping) else None
    imported = record.get(RECORD_KEY) if isinstance(record, Mapping) else None
    if isinstance(imported, Mapping):
        yield AdapterConfig.from_peft(imported, f"the {ADAPTER_CONFIG_FILE} inside the checkpoint")
    directory = checkpoint.directory
    run_config = directory / RUN_CONFIG_FILE
    if run_config.is_file():
        of_bridge = AdapterConfig.from_bridge(documents.read_yaml(run_config), str(run_config))
        if of_bridge is not None:
            yield of_bridge
    args = checkpoint.common_state.get("args")
    if isinstance(args, Mapping) and (of_swift := AdapterConfig.from_swift(args, "the checkpoint's args")):
        yield of_swift
    root = checkpoint_directory.root_of(directory)
    for folder in filter(None, (directory / small_files.ASSETS_FOLDER, directory, root)):
        yield from _beside(folder)


def _beside(folder: Path) -> Iterator[AdapterConfig]:
    """Yield the descriptions among the files of a folder."""
    adapter, args = folder / ADAPTER_CONFIG_FILE, folder / _SWIFT_FILE
    if adapter.is_file() and not paths.leads_outside(adapter, folder):
        yield AdapterConfig.from_peft(documents.read_json(adapter), str(adapter))
    if args.is_file() and not paths.leads_outside(args, folder):
        of_swift = AdapterConfig.from_swift(documents.read_json(args), str(args))
        if of_swift is not None:
            yield of_swift


def agreed_adapter(
    found: Sequence[AdapterConfig], where: str, ranks: Sequence[int], lora_alpha: float | None = None
) -> AdapterConfig:
    """The first of the descriptions ``found``; with ``lora_alpha``, whatever they say of alpha.

    ``ranks`` are those of the stored tensors. Raises ConfigError if there is no alpha, if two descriptions contradict
    each other, or if none of the stored ranks is the one described.
    """
    if lora_alpha is not None:
        given = AdapterConfig(source="--lora-alpha", alpha=lora_alpha)
        if not found:
            return given
        first = found[0]
        return AdapterConfig(
            source=given.source,
            alpha=lora_alpha,
            use_rslora=first.use_rslora,
            dropout=first.dropout,
            base_model=first.base_model,
        )
    if not found:
        raise ConfigError(
            f"{where} holds a LoRA adapter, but nothing says its alpha, by which it is multiplied: expected a section "
            f"peft in {RUN_CONFIG_FILE} (Megatron-Bridge), args (ms-swift) or {ADAPTER_CONFIG_FILE} (PEFT). Give it "
            "with --lora-alpha."
        )
    differences = [*contradictions(found, ranks[0])]
    if differences:
        raise ConfigError(
            f"the descriptions of the adapter in {where} contradict each other: {'; '.join(differences)}. Correct the "
            "one that is wrong, or give alpha with --lora-alpha."
        )
    config = found[0]
    if config.rank is not None and config.peft is None and config.rank not in ranks:
        raise ConfigError(
            f"the adapter in {where} has rank {', '.join(map(str, sorted(set(ranks))))}: expected {config.rank} "
            f"({config.source}). Correct the description, or give alpha with --lora-alpha."
        )
    return config
