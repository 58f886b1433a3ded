"""A new Hugging Face directory: what its files hold, and what lies beside them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.formats import hf_directory
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.places import CONFIG_FILE, INDEX_FILE
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.model.config.quantization import described_method

_LOG = logging.getLogger(__name__)


def hf_files(source: ModelSource, dtype: str | None, max_file_bytes: int) -> FileSet:
    """The files to write: the original ones where they still fit the tensors, else as ``save_pretrained`` would."""
    known = source.table.hf_tensors()

    def stored(names: Iterable[str]) -> dict[str, tuple[str, Shape]]:
        return {name: (dtype or source.dtype_of(known[name]), known[name].shape) for name in names}

    if source.hf_files is not None:
        held = source.hf_files.by_name(str(source.path), source.table.usual_name)
        original = {name: (tensor.dtype, tensor.shape) for name, (_, _, tensor) in held.items()}
        is_whole = original.keys() <= source.links.keys() and not source.table.spelling(original).missing
        if is_whole and original == stored(original):
            return source.hf_files
        _LOG.info("the tensors differ in name or dtype from the original files: the files are laid out anew")
    usual = stored(tensor.hf_name for tensor in source.tensors if not tensor.is_alias)
    tensors = [(name, *each) for name, each in usual.items()]
    return hf_directory.plan_files(tensors, max_file_bytes=max_file_bytes)


def texts(source: ModelSource, files: FileSet, carried: Mapping[str, Path]) -> dict[str, bytes | None]:
    """What describes the weights in ``files``, by name: the text in ``carried`` where it is true of them; None is none.

    The index comes last, as it makes a model in several files visible.
    """
    if method := described_method(source.config.hf_config or {}):
        _LOG.info("%s describes quantized weights (%s): that is left out, these are not quantized", CONFIG_FILE, method)
    return {
        CONFIG_FILE: _config_json(source, files, carried.get(CONFIG_FILE)),
        INDEX_FILE: files.index_json(carried.get(INDEX_FILE)),
    }


def _config_json(source: ModelSource, files: FileSet, original: Path | None) -> bytes:
    """config.json: the original text where it is still true, else with the dtype that most of the weights have.

    A text is true that says no dtype. So is one that says another than the weights have, if it came with these very
    weights.
    """
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
    text = hf_directory.text_of(original, content)
    if text is not None and (source.config.dtype in {None, dtype} or _is_imported(source, files, content)):
        return text
    if source.config.dtype != dtype:
        content["dtype" if "dtype" in content else "torch_dtype"] = dtype
    return hf_directory.config_json(content, original)


def _is_imported(source: ModelSource, files: FileSet, content: Mapping[str, Any]) -> bool:
    """Whether configuration and files are those that an import left in the checkpoint."""
    left = [folder / CONFIG_FILE for folder in source.assets if (folder / CONFIG_FILE).is_file()]
    return files is source.hf_files and any(hf_directory.text_of(path, content) for path in left)
