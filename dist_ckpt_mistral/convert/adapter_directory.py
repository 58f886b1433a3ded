"""The directory of a LoRA adapter as PEFT loads it: ``adapter_model.safetensors`` and ``adapter_config.json``.

Source: PEFT 0.21, utils/save_and_load.py and config.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.safetensors import new_file
from dist_ckpt_mistral.mapping.adapter_description import ADAPTER_CONFIG_FILE, ADAPTER_FILE, agreed_adapter
from dist_ckpt_mistral.mapping.merge import ranks_of_modules
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.model.config.adapter_config import AdapterConfig
from dist_ckpt_mistral.model.table.vision import LANGUAGE_PREFIX

#: What names of modules of a multimodal model's language model have, and those of its vision tower have not.
_LANGUAGE: Final = f"{LANGUAGE_PREFIX}layers."


def adapter_of(source: ModelSource, lora_alpha: float | None = None, base: str | None = None) -> AdapterConfig:
    """The configuration of the adapter in ``source``. ``base`` is the name of its model, where nothing else says it.

    Raises TensorMismatchError if ``source`` holds no adapter, ConfigError if nothing says its alpha.
    """
    if not source.table.adapters:
        raise TensorMismatchError(
            f"{source.path} holds no LoRA adapter: expected keys such as *.adapter.linear_in.weight. "
            "Export it without --merge-adapter, --base and --lora-alpha."
        )
    ranks = [adapter.rank for adapter in source.table.adapters]
    config = agreed_adapter(source.adapter_configs, str(source.path), ranks, lora_alpha)
    return replace(config, base_model=config.base_model or base)


def adapter_files(source: ModelSource, dtype: str | None) -> FileSet:
    """The file to write for the adapter of ``source``: the imported one if the tensors still fit it."""
    described = {t.hf_name: (dtype or source.dtype_of(t), t.shape) for t in source.tensors}
    if source.hf_files is not None:
        by_name = source.hf_files.by_name(str(source.path), source.table.usual_name)
        if {name: (tensor.dtype, tensor.shape) for name, (_, _, tensor) in by_name.items()} == described:
            return source.hf_files
    return FileSet(files={ADAPTER_FILE: new_file((name, *each) for name, each in described.items())})


def adapter_texts(source: ModelSource, config: AdapterConfig) -> dict[str, bytes | None]:
    """The content of adapter_config.json, as PEFT writes it."""
    ranks = ranks_of_modules(source.table)
    is_within = source.config.vision is not None and all(_LANGUAGE in name for name in ranks)
    content = config.to_peft(ranks, within=re.escape(_LANGUAGE) if is_within else "")
    return {ADAPTER_CONFIG_FILE: json.dumps(content, indent=2, sort_keys=True).encode()}


def imported_small_files(source: ModelSource, config: AdapterConfig) -> Mapping[str, Path]:
    """The small files that were imported with the adapter. Those of its model are no part of an adapter."""
    folder = source.path / small_files.ASSETS_FOLDER
    return small_files.small_files(folder) if config.peft is not None and folder.is_dir() else {}
