"""run_config.yaml as the configuration: its fields are those of Bridge and Megatron, and mean what they mean there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from bridge_files import run_config
from family_args import config_of, megatron
from family_models import FAMILY
from genuine import folder, shards

from dist_ckpt_mistral.errors import ConfigError, FormatError, UnsupportedModelError
from dist_ckpt_mistral.model.args.bridge import from_run_config, to_run_config
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.storage import documents

#: What ``_validate_target_prefix`` lets pass (megatron/bridge/utils/instantiate_utils.py, 0.6.2): names below these, no
#: part of them private.
ALLOWED = ("megatron.", "torch.", "nvidia.", "transformers.", "numpy.", "nemo.")
#: Fields that Bridge has since 0.7 only (models/ministral3/model_config.py); 0.6 leaves them out with a warning.
NEWER = {"llama_4_scaling_beta"}


def targets(value: object) -> list[str]:
    """Whatever a configuration wants to be imported."""
    if not isinstance(value, dict):
        return []
    inner = [target for each in value.values() for target in targets(each)]
    return [*([value["_target_"]] if "_target_" in value else []), *inner]


@pytest.mark.megatron
@pytest.mark.parametrize("case", FAMILY)
def test_run_config_is_what_bridge_takes(case: str) -> None:
    """Each field is one of the genuine save or of Megatron's latent attention, each target on Bridge's allowlist."""
    config = config_of(case)
    written = yaml.safe_load(documents.yaml_bytes(to_run_config(config, dtype="bfloat16", tp=2, pp=4, ep=1)))
    genuine = yaml.safe_load((shards("bridge_0062") / "run_config.yaml").read_text())
    latent = {field.name for field in fields(megatron("transformer.transformer_config").MLATransformerConfig)}
    known = {*genuine["model"], *(latent if config.latent_attention else ())}
    assert set(written["model"]) - known <= NEWER
    assert set(written) <= set(genuine)
    assert written["checkpoint"].items() <= (genuine["checkpoint"] | {"fully_parallel_save": False}).items()
    assert (written["model"]["tensor_model_parallel_size"], written["model"]["pipeline_model_parallel_size"]) == (2, 4)
    assert len(targets(written)) == 4
    for target in targets(written):
        assert target.startswith(ALLOWED)
        assert not any(part.startswith("_") for part in target.split("."))


def test_names_and_meanings_of_bridge() -> None:
    """A window, tied embeddings, YaRN, heads without groups and no head dimension mean what Bridge means with them."""
    changed = from_run_config(
        run_config(
            window_size=[4095, 0],
            share_embeddings_and_output_weights=True,
            num_query_groups=None,
            kv_channels=None,
            layernorm_epsilon=3e-6,
            position_embedding_type="yarn",
            yarn_rotary_scaling_factor=16.0,
            yarn_original_max_position_embeddings=16,
            yarn_beta_fast=20.0,
            yarn_mscale=0.7,
            yarn_mscale_all_dim=1.3,
            yarn_correction_range_round_to_int=False,
            bf16=False,
            fp16=True,
        ),
        "run_config.yaml",
    )
    assert (changed.sliding_window, changed.tie_word_embeddings, changed.num_key_value_heads) == (4096, True, 8)
    assert (changed.head_dim, changed.rms_norm_eps, changed.dtype, changed.vocab_size) == (8, 3e-6, "float16", 250)
    assert changed.yarn is not None
    assert (changed.yarn.factor, changed.yarn.original_max_position_embeddings) == (16.0, 16)
    assert (changed.yarn.beta_fast, changed.yarn.beta_slow, changed.yarn.truncate) == (20.0, 1.0, False)
    assert (changed.yarn.mscale, changed.yarn.mscale_all_dim) == (0.7, 1.3)


#: What a provider with experts and latent attention adds (megatron/bridge/models/mla_provider.py, 0.6): fields of an
#: MLATransformerConfig, beside which those for YaRN without latent attention say nothing, set or not.
LATENT = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 80,
    "moe_shared_expert_intermediate_size": 160,
    "moe_layer_freq": [1, 1, 1, 1],
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "num_query_groups": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_head_dim": 12,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_experts_and_latent_attention_of_bridge() -> None:
    """A provider of Mistral Small 4's kind says what the config.json of a genuine model does, and its own YaRN."""
    true = MistralConfig.from_hf(folder("mistral4_0192"))
    for others in ({"yarn_rotary_scaling_factor": None}, {"yarn_rotary_scaling_factor": 1.0, "yarn_mscale": 0.0}):
        config = from_run_config(run_config(**LATENT, **others), "run_config.yaml")
        assert (config.model_type, config.latent_attention, config.head_dim) == ("mistral4", true.latent_attention, 20)
        assert true.experts is not None
        assert config.experts == replace(true.experts, shared_intermediate_size=160)
        assert config.yarn is not None
        assert (config.yarn.factor, config.yarn.original_max_position_embeddings) == (40, 64)
        assert (config.yarn.mscale, config.yarn.mscale_all_dim) == (1.0, 1.0)


def test_llama_4_scaling_of_bridge() -> None:
    """Bridge's own Ministral 3 scales queries by position, and says so (models/ministral3/model_config.py, 0.7)."""
    yarn = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 16.0}
    found = [
        from_run_config(run_config(**yarn, llama_4_scaling_beta=beta), "run_config.yaml") for beta in (0.1, 0.0, None)
    ]
    assert [config.model_type for config in found] == ["ministral3", "mistral", "mistral"]
    assert [config.llama_4_scaling_beta for config in found] == [0.1, None, None]


def test_both_forms_of_the_model_section() -> None:
    """A GPTModelConfig around a transformer section says the same as a provider."""
    flat = run_config()["model"]
    outer = ["vocab_size", "seq_length", "share_embeddings_and_output_weights", "position_embedding_type"]
    outer += ["rotary_base", "rotary_percent", "rope_scaling", "make_vocab_size_divisible_by", "should_pad_vocab"]
    inner = {name: value for name, value in flat.items() if name not in outer} | {"activation_func": "silu"}
    nested = {name: flat[name] for name in outer} | {
        "_builder_": "megatron.training.models.gpt.GPTModelBuilder",
        "_target_": "megatron.training.models.gpt.GPTModelConfig",
        "transformer": inner | {"_target_": "megatron.core.transformer.transformer_config.TransformerConfig"},
    }
    assert from_run_config({"model": nested}, "here") == from_run_config({"model": flat}, "here")


def test_sections_that_contradict_each_other_are_refused() -> None:
    """A field in both sections must have one value: otherwise it and both values are named, and no section wins."""
    flat = run_config()["model"]
    same = {"model": flat | {"transformer": {"num_layers": 4, "_target_": "TransformerConfig", "kv_channels": 16}}}
    assert from_run_config(same, "here") == from_run_config({"model": flat}, "here")
    other = {"model": flat | {"transformer": {"num_layers": 6, "hidden_size": 64, "kv_channels": None}}}
    told = (
        r"model and model.transformer of here differ about kv_channels \(16 and None\), num_layers \(4 and 6\)\. Give"
    )
    with pytest.raises(ConfigError, match=told):
        from_run_config(other, "here")


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"num_moe_experts": 8, "moe_latent_size": 8}, UnsupportedModelError, "moe_latent_size=8"),
        ({"normalization": "LayerNorm"}, UnsupportedModelError, "normalization='LayerNorm'"),
        ({"rope_scaling": True}, UnsupportedModelError, "use_rope_scaling=True"),
        ({"gated_linear_unit": False}, UnsupportedModelError, "swiglu=False"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, UnsupportedModelError, "swiglu=False"),
        ({"seq_len_interpolation_factor": 2.0}, UnsupportedModelError, "interpolation_factor=2.0"),
        ({"window_size": [4095, 0], "window_attn_skip_freq": [1, 0]}, ConfigError, "window_attn_skip_freq"),
        ({"layernorm_zero_centered_gamma": True}, UnsupportedModelError, "apply_layernorm_1p=True"),
        ({"activation_func": ...}, ConfigError, "lacks activation_func"),
        ({"vocab_size": None, "num_layers": ...}, ConfigError, "lacks num_layers, vocab_size"),
        ({"share_embeddings_and_output_weights": ...}, ConfigError, "lacks share_embeddings"),
        ({"ffn_hidden_size": None}, ConfigError, "lack ffn_hidden_size"),
        ({"num_layers": "four"}, ConfigError, "num_hidden_layers must be a positive integer, got 'four'"),
        ({"num_attention_heads": [8]}, ConfigError, r"num_attention_heads must be a positive integer, got \[8\]"),
        ({"layernorm_epsilon": float("nan")}, ConfigError, "rms_norm_eps must be a positive number"),
        ({"num_layers": 10**15}, ConfigError, "num_hidden_layers must be a positive integer of at most"),
        ({"num_layers": 10**5}, ConfigError, "num_layers=100000: expected at most 10000"),
        ({"hidden_size": {"a": {"b": 1}}}, ConfigError, "hidden_size must be a positive integer, got 'a mapping'"),
    ],
)
def test_run_configs_of_other_models_are_refused(
    changes: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    """What makes it another model, and what is missing or does not fit, is named."""
    with pytest.raises(error, match=complaint):
        from_run_config(run_config(**changes), "run_config.yaml")


def test_the_size_is_looked_at_before_reading(tmp_path: Path) -> None:
    """A file that no memory could hold is refused for its size."""
    with (tmp_path / "run_config.yaml").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(FormatError, match="too large: expected at most 131072 bytes, got 4398046511104"):
        documents.read_yaml(tmp_path / "run_config.yaml")


def test_yaml_is_imported_for_bridge_alone() -> None:
    """An export that needs no run_config.yaml does not import PyYAML."""
    modules = "dist_ckpt_mistral.convert.to_hf, dist_ckpt_mistral.mapping.configuration"
    script = f"import sys, {modules}; print('yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
