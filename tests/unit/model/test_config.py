"""Configurations of real Mistral models, read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.args.megatron_args import from_megatron_args, to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig

#: The config.json of models on the hub: what matters of it.
FIRST: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
THIRD = FIRST | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
WIDER = {"head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "vocab_size": 131072}
MODELS: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": FIRST | {"tie_word_embeddings": False},
    "Mistral-7B-v0.3": THIRD,
    "Mistral-Nemo-2407": THIRD | WIDER | {"max_position_embeddings": 131072},
    "Mistral-Small-24B-2501": THIRD | WIDER | {"intermediate_size": 32768, "rope_theta": 100000000.0},
    "as transformers 5 saves": {
        "head_dim": 6,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 31000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "dtype": "float16",
        "vocab_size": 50,
    },
    "as little as possible": {
        "hidden_size": 64,
        "intermediate_size": 24,
        "num_attention_heads": 16,
        "num_hidden_layers": 2,
        "sliding_window": None,
        "vocab_size": 50,
    },
}
LITTLE = {"model_type": "mistral", **MODELS["as little as possible"]}
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "sliding_window"),
    "tie_word_embeddings",
)


def values(config: Any) -> dict[str, Any]:  # noqa: ANN401  (ours or that of transformers)
    """The values that both know, under one name."""
    return {name: getattr(config, name) for name in SAME}


@pytest.mark.parametrize("model", MODELS)
def test_configs_of_real_models(model: str, tmp_path: Path) -> None:
    """Sizes, constants and what is filled in where config.json says nothing: as transformers has them."""
    raw = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **MODELS[model]}
    theirs = transformers.MistralConfig(**raw)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    for source in (raw, path, str(tmp_path)):
        ours = MistralConfig.from_hf(source)
        assert values(ours) == values(theirs)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))
        assert ours.to_hf() == raw


@pytest.mark.parametrize("model", MODELS)
def test_configs_survive_megatrons_args(model: str) -> None:
    """Through Megatron's args and into a new config.json: transformers reads the same sizes from it as before."""
    raw = {"model_type": "mistral", **MODELS[model]}
    args = to_megatron_args(MistralConfig.from_hf(raw), dtype="bfloat16", tp=2, pp=1)
    again = from_megatron_args(args).to_hf()
    before, after = transformers.MistralConfig(**raw), transformers.MistralConfig(**json.loads(json.dumps(again)))
    assert values(after) == values(before)
    assert after.rope_parameters["rope_theta"] == before.rope_parameters["rope_theta"]
    assert (str(after.dtype), after.architectures) == ("torch.bfloat16", ["MistralForCausalLM"])
    assert args["padded_vocab_size"] == -(-raw["vocab_size"] // 256) * 256


def test_no_window_is_invented() -> None:
    """A config that says nothing of a window has none; transformers would fill in the 4096 of its first model."""
    raw = {name: value for name, value in LITTLE.items() if name != "sliding_window"}
    assert transformers.MistralConfig(**raw).sliding_window == 4096
    config = MistralConfig.from_hf(raw)
    assert (config.sliding_window, config.window_size) == (None, None)
    args = to_megatron_args(config, dtype="bfloat16", tp=1, pp=1)
    assert args["window_size"] is None
    assert from_megatron_args(args).to_hf()["sliding_window"] is None


@pytest.mark.parametrize(
    ("window_size", "sliding_window"), [((4095, 0), 4096), ([0, 0], 1), ((-1, 0), None), ((-1, -1), None), (None, None)]
)
def test_windows_in_megatrons_terms(window_size: object, sliding_window: int | None) -> None:
    """Megatron counts the tokens before a token, Hugging Face the token itself too; -1 is no bound."""
    args = to_megatron_args(MistralConfig.from_hf(LITTLE), dtype="float32", tp=1, pp=1)
    assert from_megatron_args(args | {"window_size": window_size}).sliding_window == sliding_window


def test_heads_in_megatrons_terms() -> None:
    """Without grouped queries every head has its own keys; NullTokenizer adds a token to the vocabulary."""
    args = to_megatron_args(MistralConfig.from_hf(LITTLE), dtype="float16", tp=1, pp=1)
    assert from_megatron_args(args).num_key_value_heads == 8
    assert from_megatron_args(args | {"group_query_attention": False}).num_key_value_heads == 16
    assert from_megatron_args(args).dtype == "float16"
    assert from_megatron_args(args | {"tokenizer_type": "NullTokenizer"}).vocab_size == 51


def test_a_config_made_by_hand_is_checked_too() -> None:
    """The record itself refuses what does not fit, all of it together."""
    config = MistralConfig.from_hf(LITTLE)
    with pytest.raises(
        ConfigError, match="hidden_size must be a positive integer, got 0; rope_theta must be a positive"
    ):
        MistralConfig(**{name: getattr(config, name) for name in SAME} | {"hidden_size": 0, "rope_theta": -1.0})
