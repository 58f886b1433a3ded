"""The model of the demo: a small Mistral with random weights and a tokenizer of bytes, made with numpy alone.

Apart from demo.py because nobody who reads the demo's story wants to read how its model is made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from dist_ckpt_mistral.formats import hf_directory, kinds
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.table import tensor_table
from dist_ckpt_mistral.storage import documents

_BEGIN, _END, _UNKNOWN = "<s>", "</s>", "<unk>"
#: As transformers writes it: grouped queries, and a head dimension other than hidden_size / num_attention_heads.
_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "max_position_embeddings": 4096,
    "model_type": "mistral",
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 131072,
}
_MAX_FILE_BYTES: Final = 20_000_000
_SEED: Final = 2


def make_model(directory: Path) -> None:
    """Write a Hugging Face directory: config.json, two files of bfloat16 weights and their index, and a tokenizer."""
    import ml_dtypes

    directory.mkdir()
    documents.write_bytes(directory / kinds.CONFIG_FILE, _json(_CONFIG))
    tensors = tensor_table(MistralConfig.from_hf(_CONFIG)).hf_tensors()
    described = [(name, _CONFIG["dtype"], tensor.shape) for name, tensor in tensors.items()]
    files = hf_directory.plan_files(described, max_file_bytes=_MAX_FILE_BYTES)
    random = np.random.default_rng(_SEED)
    for name, file in files.files.items():
        content = [file.head]
        for tensor in sorted(file.tensors, key=lambda tensor: tensor.begin):
            values = random.standard_normal(tensor.shape, dtype=np.float32)
            values = 1 + 0.1 * values if len(tensor.shape) == 1 else 0.02 * values  # norms are about 1
            content.append(values.astype(ml_dtypes.bfloat16).tobytes())
        documents.write_bytes(directory / name, b"".join(content))
    documents.write_bytes(directory / kinds.INDEX_FILE, files.index_json() or b"")
    for name, described_as in _tokenizer().items():
        documents.write_bytes(directory / name, _json(described_as))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _tokenizer() -> dict[str, Any]:
    """The files of a tokenizer that makes one token of each byte, in the format of the library ``tokenizers`` 0.22."""
    special = [_UNKNOWN, _BEGIN, _END]
    vocabulary = {token: number for number, token in enumerate([*special, *map(_letter, range(256))])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pairs = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    begin = {"SpecialToken": {"id": _BEGIN, "type_id": 0}}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": vocabulary[token], "content": token, **flags} for token in special],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", **pairs},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {_BEGIN: {"id": _BEGIN, "ids": [vocabulary[_BEGIN]], "tokens": [_BEGIN]}},
            },
            "decoder": {"type": "ByteLevel", **pairs},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": [],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BEGIN,
            "eos_token": _END,
            "unk_token": _UNKNOWN,
            "model_max_length": _CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }


def _letter(byte: int) -> str:
    """The letter that stands for a byte in such vocabularies: itself if it is printable in Latin-1, else from 256 on.

    GPT-2 introduced this (openai/gpt-2, src/encoder.py, ``bytes_to_unicode``).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))
