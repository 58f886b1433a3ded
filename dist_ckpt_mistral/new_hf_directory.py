"""A new Hugging Face directory: what its files hold, and what lies beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dist_ckpt_mistral import storage
from dist_ckpt_mistral.formats import hf_directory
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.model_source import ModelSource

_LOG = logging.getLogger(__name__)


def hf_files(source: ModelSource, dtype: str | None, max_file_bytes: int) -> FileSet:
    """The files to write: the original ones where they still fit the tensors, else as ``save_pretrained`` would."""
    stored = {tensor.hf_name: (dtype or source.dtype_of(tensor), tensor.shape) for tensor in source.tensors}
    if source.hf_files is not None:
        held = source.hf_files.by_name(str(source.path), source.table.usual_name)
        original = {name: (tensor.dtype, tensor.shape) for name, (_, _, tensor) in held.items()}
        if original == stored:
            return source.hf_files
        _LOG.info("the tensors differ in name or dtype from the original files: the files are laid out anew")
    tensors = [(t.hf_name, *stored[t.hf_name]) for t in source.tensors if not t.is_alias]
    return hf_directory.plan_files(tensors, max_file_bytes=max_file_bytes)


def write_beside_weights(staging: Path, source: ModelSource, files: FileSet, carried: Sequence[Path]) -> None:
    """Everything of a Hugging Face directory that is not weights; the index last."""
    content = _config_json(
        source, files, next((path for path in carried if path.name == hf_directory.CONFIG_FILE), None)
    )
    storage.write_bytes(staging / hf_directory.CONFIG_FILE, content)
    for path in carried:
        if path.name != hf_directory.CONFIG_FILE:
            storage.copy_file(path, staging / path.name)
    if not any(hf_directory.is_tokenizer_file(path.name) for path in carried):
        _LOG.warning("no tokenizer came with the checkpoint: give a Hugging Face directory with --config to add one")
    index_json = files.index_json()
    if index_json is not None:
        storage.write_bytes(staging / hf_directory.INDEX_FILE, index_json)


def _config_json(source: ModelSource, files: FileSet, original: Path | None) -> bytes:
    """config.json: the original text where it is still true, else with the dtype that most of the weights have."""
    sizes: Counter[str] = Counter()
    for file in files.files.values():
        for tensor in file.tensors:
            sizes[tensor.dtype] += tensor.end - tensor.begin
    dtype = sizes.most_common(1)[0][0]
    if source.config.hf_config is None:
        _LOG.warning(
            "config.json is made from %s, which has no bos_token_id, eos_token_id and pad_token_id: transformers takes "
            "its defaults for this family. Give the original Hugging Face directory with --config to keep its own.",
            source.config_from,
        )
    content = source.config.to_hf()
    if source.config.dtype != dtype:
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
    return hf_directory.config_json(content, original)
