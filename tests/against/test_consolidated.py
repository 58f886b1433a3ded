"""Models in Mistral AI's own rendering (consolidated.safetensors, params.json), against transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from consolidated_models import DENSE, model_of, save_consolidated
from family_models import FAMILY, model_class
from safetensors.torch import load_file
from torch_reading import described
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.analysis.compare import compare
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.model.config.params_json import config_of_params

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]])
CASES = (DENSE, *FAMILY)


MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_7B: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
}
_8B = _7B | {"n_layers": 36, "hidden_dim": 12288, "vocab_size": 131072, "rope_theta": 1e8, "max_seq_len": 32768}
_22B = _7B | {"dim": 6144, "n_layers": 56, "hidden_dim": 16384, "n_heads": 48, "vocab_size": 32768, "rope_theta": 1e6}
_24B = _7B | {"dim": 5120, "n_layers": 40, "hidden_dim": 32768, "vocab_size": 131072, "rope_theta": 1e8}
_YARN = {"factor": 48.0, "original_max_position_embeddings": 8192, "beta": 4.0, "alpha": 1.0, "apply_scale": False}
_SCALING = {"beta": 0.0, "original_max_position_embeddings": 8192}
#: What params.json of releases says -> what else than its sizes transformers' config of the release has.
RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mistral 7B v0.1": (_7B | {"sliding_window": 4096}, {"sliding_window": 4096, "rope_theta": 1e4}),
    "Mistral 7B v0.2": (_7B | {"rope_theta": 1000000.0}, {"sliding_window": None, "rope_theta": 1e6}),
    "Mistral 7B v0.3, Mathstral": (
        _7B | {"vocab_size": 32768, "rope_theta": 1000000.0, "model_type": "transformer"},
        {"sliding_window": None, "rope_theta": 1e6},
    ),
    "Mixtral 8x7B": (_7B | {"moe": MOE | {"num_experts": 8}}, {"rope_theta": 1e6, "num_local_experts": 8}),
    "Mixtral 8x22B": (_22B | {"moe": MOE | {"num_experts": 8}}, {"rope_theta": 1e6, "num_local_experts": 8}),
    "Codestral 22B": (_22B, {"sliding_window": None, "rope_theta": 1e6}),
    "Mistral Nemo": (
        _24B | {"hidden_dim": 14336, "rope_theta": 1e6, "max_seq_len": 128000},
        {"sliding_window": None, "rope_theta": 1e6, "max_position_embeddings": 128000},
    ),
    "Mistral Small 24B": (
        _24B | {"max_seq_len": 32768, "tied_embeddings": False},
        {"sliding_window": None, "rope_theta": 1e8, "max_position_embeddings": 32768},
    ),
    "Devstral, Magistral": (
        _24B | {"rope_theta": 1e9, "max_position_embeddings": 131072, "max_seq_len": 128000, "max_batch_size": 8},
        {"sliding_window": None, "rope_theta": 1e9, "max_position_embeddings": 131072},
    ),
    **{
        f"Ministral 8B, {key}": (
            _8B | {key: [None, 32768, 32768, 32768]},
            {
                "model_type": "ministral",
                "sliding_window": 32768,
                "rope_theta": 1e8,
                "max_position_embeddings": 32768,
                "layer_types": ["full_attention", *["sliding_attention"] * 3] * 9,
            },
        )
        for key in ("sliding_window", "_sliding_window")
    },
    "Devstral 2": (
        _24B
        | {"rope_theta": 1e6, "max_position_embeddings": 393216, "yarn": _YARN, "llama_4_scaling": _SCALING}
        | {"q_lora_rank": None, "moe": None, "vision_encoder": None, "causal": True, "use_biases": False},
        {"model_type": "ministral3", "sliding_window": None, "max_position_embeddings": 393216},
    ),
}


SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}


@pytest.mark.parametrize("release", RELEASES)
def test_params_json_as_releases_spell_it(release: str) -> None:
    """Every key that releases have is read: as transformers reads the config.json that says the same."""
    params, more = RELEASES[release]
    config = dcm.MistralConfig.from_hf(config_of_params(params, "params.json"))
    told = {theirs: params[own] for own, theirs in SIZES.items()} | {"head_dim": 128}
    told |= {"model_type": "mixtral" if params.get("moe") else "mistral"} | more
    theirs = AutoConfig.for_model(**told)
    for name in (*told.keys() - {"rope_theta", "layer_types", "num_local_experts"}, "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    if "rope_theta" in more:
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert list(config.layer_types or ()) == more.get("layer_types", [])


_RIGHT = {"rope_theta": 1e6, "yarn": _YARN, "llama_4_scaling": _SCALING}
UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{key}={value!r}": (f"params.json is not understood: {key}: ", {key: value})
        for key, value in (
            *(("causal", False), ("use_biases", True), ("softcap", 30.0), ("model_type", "mamba")),
            *(("rope_scaling", {"type": "linear", "factor": 2}), ("activation", "gelu")),
            *(("sliding_windows", 8), ("hidden_size", 24), ("", 1)),
        )
    },
    **{
        key: (f"{key} in params.json: ", {key: {"hidden_size": 8}})
        for key in ("quantization_config", "quantization", "vision_encoder", "multimodal", "audio_encoder", "lora")
    },
    "several": ("causal: expected True, got False; x: unknown key, got 1", {"causal": False, "x": 1}),
    "scaled queries alone": ("llama_4_scaling in params.json: no mistral model", {"llama_4_scaling": {"beta": 0.1}}),
    "two windows": ("sliding_window and _sliding_window", {"sliding_window": 8, "_sliding_window": [None, 8]}),
    **{
        f"moe.{key}": (f"moe of params.json is not understood: {key}: ", {"moe": MOE | {key: value}})
        for key, value in (("route_every_n", 2), ("num_shared_experts", 1), ("renorm_strategy", "NONE"), ("x", 1))
    },
    **{
        f"yarn.{key}": (f"yarn of params.json is not understood: {key}: ", _RIGHT | {"yarn": _YARN | {key: 5}})
        for key in ("apply_scale", "mscale")
    },
    "originals differ": (
        "original_max_position_embeddings: expected 8192, got 4096",
        _RIGHT | {"llama_4_scaling": _SCALING | {"original_max_position_embeddings": 4096}},
    ),
    "mixtral with yarn": ("moe and yarn and llama_4_scaling", _RIGHT | {"moe": MOE}),
    "no theta": ("lacks rope_theta", {"yarn": _YARN, "llama_4_scaling": _SCALING}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_keys_that_are_not_understood(case: str) -> None:
    """A key of params.json that is not known, or has a value that would change the model, is an error that names it."""
    named, changes = UNKNOWN[case]
    with pytest.raises(ConfigError, match=re.escape(named)):
        config_of_params(_7B | changes, "params.json")


@pytest.mark.parametrize(
    "changes",
    [
        *({"causal": True, "use_biases": False}, {"softcap": 0.0}, {"max_batch_size": 4, "model_parallel": 8}),
        *({"quantization": None, "quantization_config": {}}, {"activation": "silu", "model_type": "transformer"}),
        {"moe": MOE | {"expert_parallel": 8, "expert_model_parallel": 2, "route_every_n": 1}},
        {"moe": MOE | {"first_k_dense_replace": 0, "num_shared_experts": 0, "routed_scale": 1.0}},
    ],
)
def test_keys_without_effect(changes: dict[str, Any]) -> None:
    """Keys that say what is so in any case, or how a model was run, change nothing."""
    plain = {"moe": MOE} if "moe" in changes else {}
    expected = config_of_params(_7B | plain, "params.json")
    assert config_of_params(_7B | changes, "params.json") == expected


@pytest.mark.parametrize("case", [case for case in CASES if case != "mistral4, groups, plain queries"])
def test_own_files_are_read_as_transformers_converts_them(case: str, tmp_path: Path) -> None:
    """Imported and exported, the model has the tensors and the logits of Hugging Face's rendering of it."""
    model = model_of(case)
    save_consolidated(model, tmp_path / "hf", tmp_path / "own", files=2 if "mixtral" in case else 1)
    dcm.from_hf(tmp_path / "own", tmp_path / "ckpt", tp=2, pp=2)
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", tmp_path / "back"))
    assert described(after) == described(before)
    said = [
        model_class(AutoConfig.from_pretrained(folder))
        .from_pretrained(folder, dtype=torch.float32)
        .eval()(TOKENS)
        .logits
        for folder in (tmp_path / "hf", tmp_path / "back")
    ]
    assert torch.equal(said[0], said[1])


def test_own_files_can_be_looked_at_and_compared(tmp_path: Path) -> None:
    """Tensors are named in Hugging Face's terms too; verify and lazy reading take the files as they are."""
    save_consolidated(model_of(DENSE), tmp_path / "hf", tmp_path / "own")
    report = dcm.inspect(tmp_path / "own")
    assert report.problems == ()
    assert report.kind == "directory of Mistral AI's own files"
    names = {tensor.name: tensor.hf_names for tensor in report.tensors}
    assert names["layers.1.attention.wq.weight"] == ("model.layers.1.self_attn.q_proj.weight",)
    assert compare(tmp_path / "own", tmp_path / "hf").is_equal
    with dcm.open_checkpoint(tmp_path / "own") as stored:
        expected = load_file(tmp_path / "hf" / "model.safetensors")
        assert described(dict(stored)) == described(expected)


@pytest.mark.parametrize("case", [DENSE, "mixtral", "mistral4"])
def test_flags_to_train_them_on(case: str, tmp_path: Path) -> None:
    """megatron-args says of Mistral AI's own files what it says of Hugging Face's rendering of them."""
    save_consolidated(model_of(case), tmp_path / "hf", tmp_path / "own")
    own, hf = (run("megatron-args", tmp_path / name) for name in ("own", "hf"))
    assert (own.code, own.out) == (0, hf.out)


def test_hugging_faces_rendering_wins(tmp_path: Path) -> None:
    """A release that brings both renderings is read in Hugging Face's, and gives those files back."""
    model_of(DENSE).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "consolidated.safetensors").write_bytes(b"never looked at")
    dcm.from_hf(tmp_path / "hf", tmp_path / "ckpt")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "back")
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("hf", "back")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        (DENSE, {"dim": None}, "lacks dim"),
        (DENSE, {"vision_encoder": {"hidden_size": 4}}, "a vision tower"),
        (DENSE, {"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantized weights"),
        (DENSE, {"n_layers": 1}, "9 tensors are unknown to the table: layers.1."),
        (DENSE, {"n_kv_heads": 1}, "shape of layers.0.attention.wk.weight: expected [10, 24], got [20, 24]"),
        (DENSE, {"yarn": {"factor": 2}}, "yarn in"),
        ("ministral3, tied", {"yarn": {"factor": 2}}, "lacks original_max_position_embeddings, beta, alpha"),
        (DENSE, {"yarn": []}, ""),
        (DENSE, {"sliding_window": [1, 2]}, "expected one size"),
        ("mixtral", {"moe": MOE | {"route_every_n": 2}}, "route_every_n: expected 1, got 2"),
        ("mixtral", {"moe": 8}, "moe in"),
    ],
)
def test_what_params_json_cannot_say(case: str, changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """Missing keys, sizes that the files do not have, and what only the other rendering tells are named."""
    save_consolidated(model_of(case), tmp_path / "hf", tmp_path / "own")
    params = json.loads((tmp_path / "own" / "params.json").read_text()) | changes
    (tmp_path / "own" / "params.json").write_text(json.dumps(params))
    if expected:
        assert expected in refusal(tmp_path, "from-hf", tmp_path / "own", tmp_path / "out")
    else:
        dcm.from_hf(tmp_path / "own", tmp_path / "out")
