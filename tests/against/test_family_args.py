"""Experts, latent attention and windows on some layers in Megatron's args, against Megatron and transformers."""

from __future__ import annotations

import json
import logging
import warnings
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import run
from drawn_configs import configs, experts_of_any_router
from family_args import args_of, config_of, megatron
from family_models import FAMILY, family_model
from genuine import folder, truth
from hypothesis import given, settings
from safetensors.torch import load_file
from torch_reading import described
from transformers import AutoConfig
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter

from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.gather.dtypes import TorchDtype
from dist_ckpt_mistral.model.args.bridge import from_run_config, to_run_config
from dist_ckpt_mistral.model.args.layers import expert_args
from dist_ckpt_mistral.model.args.megatron_args import from_megatron_args, to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts
from dist_ckpt_mistral.model.config.yarn import YarnScaling
from dist_ckpt_mistral.storage import documents

LATENT = ["mistral4", "mistral4, groups, plain queries"]


@settings(max_examples=200, deadline=None)
@given(configs())
def test_every_model_survives_megatrons_args(config: MistralConfig) -> None:
    """Of whatever family and sizes, args give the model back, and so do its config.json and run_config.yaml."""
    args = to_megatron_args(config, dtype="bfloat16", tp=1, pp=1)
    again = from_megatron_args(args)
    run_config = documents.yaml_bytes(to_run_config(config, dtype="bfloat16", tp=1, pp=1, ep=1))
    assert from_run_config(yaml.safe_load(run_config), "run_config.yaml") == again
    scales = [1.0 if each.yarn is None else each.yarn.attention_scale for each in (config, again)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-12)
    if config.latent_attention is not None:  # there it scales scores too
        assert config.yarn is not None
        assert again.yarn is not None
        assert (again.yarn.mscale_all_dim or 0) == (config.yarn.mscale_all_dim or 0)
    assert unscaled(again) == unscaled(config)
    assert MistralConfig.from_hf(json.loads(json.dumps(again.to_hf()))) == again


def unscaled(config: MistralConfig) -> MistralConfig:
    """Without the numbers in which Megatron and transformers say how YaRN scales; they differ where it is the same."""
    if config.yarn is None:
        return config
    return replace(config, yarn=replace(config.yarn, mscale=None, mscale_all_dim=None, attention_factor=None))


@pytest.mark.megatron
@pytest.mark.parametrize("case", FAMILY)
def test_the_installed_megatron_core_knows_every_field(case: str) -> None:
    """A TransformerConfig made of the args, as Megatron-LM and Bridge do, has the sizes that transformers reads."""
    config = config_of(case)
    args = to_megatron_args(config, dtype="bfloat16", tp=1, pp=1)
    module = megatron("transformer.transformer_config")
    made = module.MLATransformerConfig if args["multi_latent_attention"] else module.TransformerConfig
    known = {field.name for field in fields(made) if field.init}
    given = {name: value for name, value in args.items() if name in known} | {"cp_comm_type": "p2p"}
    given |= {"params_dtype": torch.bfloat16, "num_moe_experts": args["num_experts"], "gated_linear_unit": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = made(**given, activation_func=torch.nn.functional.silu)
    theirs = Namespace(**config.to_hf())
    assert told.window_attn_skip_freq == ([1, 0, 0, 1] if case == "ministral" else None)
    if config.experts is not None:
        count = theirs.num_local_experts if case == "mixtral" else theirs.n_routed_experts
        assert (told.num_moe_experts, told.moe_router_topk) == (count, theirs.num_experts_per_tok)
        size = theirs.intermediate_size if case == "mixtral" else theirs.moe_intermediate_size
        assert (told.moe_ffn_hidden_size, told.moe_layer_freq) == (size, 1)
    if config.latent_attention is not None:
        rope = theirs.rope_parameters
        assert (told.q_lora_rank, told.kv_lora_rank) == (theirs.q_lora_rank, theirs.kv_lora_rank)
        assert (told.qk_head_dim, told.qk_pos_emb_head_dim) == (theirs.qk_nope_head_dim, theirs.qk_rope_head_dim)
        assert (told.v_head_dim, told.num_query_groups, told.qk_layernorm) == (theirs.v_head_dim, 4, True)
        assert (told.rope_type, told.rotary_base) == ("yarn", rope["rope_theta"])
        assert (told.rotary_scaling_factor, told.original_max_position_embeddings) == (rope["factor"], 16)
        assert told.moe_shared_expert_intermediate_size == theirs.n_shared_experts * theirs.moe_intermediate_size
    unknown = {"llama_4_scaling_beta", "num_experts"} if config.experts else {"llama_4_scaling_beta"}
    new_in_0_19 = {"moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size"}
    assert {name for name in args if name.startswith("moe_")} - known <= new_in_0_19 | unknown


@pytest.mark.megatron
@settings(max_examples=100, deadline=None)
@given(experts_of_any_router())
def test_megatron_chooses_the_experts_that_transformers_chooses(experts: Experts) -> None:
    """Told by the args, Megatron's router gives every expert the probability that transformers' gives it.

    What is refused is another router indeed: for some of many tokens the two disagree.
    """
    logits = torch.randn(512, experts.num_experts, generator=torch.Generator().manual_seed(1))
    args: dict[str, Any] = {"moe_router_pre_softmax": not experts.normalized, "moe_router_topk_scaling_factor": None}
    args |= {"moe_router_num_groups": experts.num_groups, "moe_router_group_topk": experts.groups_per_token}
    try:
        args = {field.name: value for field, value in expert_args(experts)}
        refused = False
    except UnsupportedModelError:
        refused = True
        if experts.experts_per_token == 1 and experts.normalized:
            return  # Megatron's own TransformerConfig refuses it
        args["moe_router_topk_scaling_factor"] = experts.routed_scaling_factor
    probabilities, _ = megatron("transformer.moe.moe_utils").topk_routing_with_score_function(
        logits,
        experts.experts_per_token,
        use_pre_softmax=args["moe_router_pre_softmax"],
        num_groups=args["moe_router_num_groups"],
        group_topk=args["moe_router_group_topk"],
        scaling_factor=args["moe_router_topk_scaling_factor"],
    )
    assert torch.allclose(probabilities, transformers_router(experts, logits), atol=1e-6) != refused


def transformers_router(experts: Experts, logits: torch.Tensor) -> torch.Tensor:
    """What transformers' router makes of logits: the probability of every expert, 0 where it is not chosen."""
    router = Mistral4TopkRouter(
        Namespace(
            num_experts_per_tok=experts.experts_per_token,
            num_local_experts=experts.num_experts,
            hidden_size=experts.num_experts,
            routed_scaling_factor=experts.routed_scaling_factor,
            n_group=experts.num_groups,
            topk_group=experts.groups_per_token,
            norm_topk_prob=experts.normalized,
        )
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts.num_experts))
        _, weights, chosen = router(logits)
    return torch.zeros_like(logits).scatter(1, chosen, weights)


def test_genuine_args_of_experts_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Megatron-LM's own args of a Mixtral are the configuration: it exports to the live model, with its config.json."""
    case = folder("mlm_moe_0192")
    with caplog.at_level(logging.WARNING):
        done = to_hf(case / "checkpoint", tmp_path / "hf")
    assert done.config_from == "the args inside the checkpoint"
    assert "all 256 rows are taken" in caplog.text  # these args tell only the padded size
    exported, expected = load_file(tmp_path / "hf" / "model.safetensors"), truth("mlm_moe_0192")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        exported[name] = exported[name][:250]
    assert described(exported) == described(expected)
    written, true = (json.loads((path / "config.json").read_bytes()) for path in (tmp_path / "hf", case))
    other = {"vocab_size": 256, "dtype": None, "bos_token_id": None, "eos_token_id": None}
    assert {key: written.get(key) for key in true} == true | other
    assert AutoConfig.from_pretrained(tmp_path / "hf").num_local_experts == 4


@pytest.mark.parametrize(
    ("case", "changes", "complaint"),
    [
        ("mixtral", {"moe_shared_expert_intermediate_size": 8}, "intermediate_size=8 without multi_latent_attention"),
        ("mixtral", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax=True without multi_latent"),
        ("mixtral", {"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor=2.5 without"),
        ("mixtral", {"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "moe_router_group_topk=1 without"),
        ("mixtral", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True"),
        ("mixtral", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
        ("mixtral", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("mixtral", {"moe_layer_freq": [1, 1, 1, 0]}, r"moe_layer_freq=\[1, 1, 1, 0\]"),
        ("mixtral", {"moe_mlp_glu_interleave_size": 32}, "moe_mlp_glu_interleave_size=32"),
        ("mixtral", {"moe_latent_size": 8}, "moe_latent_size=8"),
        ("mixtral", {"moe_shared_expert_gate": True}, "moe_shared_expert_gate=True"),
        ("mixtral", {"moe_router_load_balancing_type": "sinkhorn"}, "load_balancing_type='sinkhorn'"),
        ("mixtral", {"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]}, "load_balancing_type"),
        ("mixtral", {"qk_layernorm": True}, "qk_layernorm=True with multi_latent_attention=False"),
        ("mixtral", {"mtp_num_layers": 1}, "mtp_num_layers=1"),
        ("mixtral", {"window_size": (4, 0), "window_attn_skip_freq": 2}, "layer_types=.* otherwise mixtral"),
        ("mixtral", {"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta=0.1 in a model that is otherwise mixtral"),
        ("ministral", {"llama_4_scaling_beta": 0.1}, "otherwise ministral"),
        ("mistral4", {"num_experts": None}, "multi_latent_attention=True without num_experts"),
        ("mistral4", {"qk_layernorm": False}, "qk_layernorm=False with multi_latent_attention=True"),
        ("mistral4", {"position_embedding_type": "yarn"}, "position_embedding_type='yarn'"),
        ("mistral4", {"rope_type": "other"}, "rope_type='other'"),
        ("mistral4", {"window_size": (4, 0)}, r"window_size=\(4, 0\) with multi_latent_attention"),
        ("mistral4", {"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "groups_per_token=1 of num_groups=2"),
        ("mistral4", {"moe_shared_expert_intermediate_size": 24}, "intermediate_size=24, no multiple of 16"),
        ("mistral4", {"experimental_attention_variant": "dsa"}, "experimental_attention_variant='dsa'"),
    ],
)
def test_what_no_family_has_is_refused_by_name(case: str, changes: dict[str, Any], complaint: str) -> None:
    """Whatever would make another model of the same tensors is named."""
    with pytest.raises(UnsupportedModelError, match=complaint):
        from_megatron_args(args_of(case, **changes))


@pytest.mark.parametrize(
    ("case", "changes", "complaint"),
    [
        ("mixtral", {"moe_router_topk": 5}, "experts_per_token=5 of num_experts=4"),
        ("mixtral", {"num_experts": "four"}, "num_experts must be a positive integer, got 'four'"),
        ("mixtral", {"moe_ffn_hidden_size": -1}, "intermediate_size must be a positive integer, got -1"),
        ("ministral", {"window_attn_skip_freq": [1, 0]}, r"0 or 1 for each of 4, got \[1, 0\]"),
        ("ministral", {"window_attn_skip_freq": [1, 0, 2, 1]}, "0 or 1 for each of 4"),
        ("ministral", {"window_attn_skip_freq": 0}, "expected a number of layers.* got 0"),
        ("mistral4", {"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer, got 0"),
        ("mistral4", {"mscale": "x"}, "mscale and mscale_all_dim must be numbers"),
    ],
)
def test_args_that_do_not_fit_are_told(case: str, changes: dict[str, Any], complaint: str) -> None:
    """What is of the wrong type or size is told with its name."""
    with pytest.raises(ConfigError, match=complaint):
        from_megatron_args(args_of(case, **changes))


def test_settings_that_change_nothing_are_accepted() -> None:
    """How experts are computed, balanced and stored is no part of the model; nor is what stands for nothing."""
    same = {"moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall", "moe_use_legacy_grouped_gemm": True}
    same |= {"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [0.01], "moe_z_loss_coeff": 0.1}
    same |= {"moe_layer_freq": [1] * 4, "moe_router_num_groups": 4, "moe_router_dtype": "fp32"}
    assert from_megatron_args(args_of("mixtral", **same)) == config_of("mixtral")
    assert from_megatron_args(args_of("mixtral", moe_ffn_hidden_size=None)) == config_of("mixtral")
    none = {"num_experts": 0, "moe_ffn_hidden_size": None}
    assert from_megatron_args(args_of("mixtral", **none)).model_type == "mistral"
    spelled = {"kv_channels": ..., "rope_type": None, "num_query_groups": 1, "mla_down_proj_fusion": True}
    assert from_megatron_args(args_of("mistral4", **spelled)) == config_of("mistral4")


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("skip", "model_type", "layers"),
    [
        (None, "mistral", None),
        (5, "mistral", None),
        (2, "ministral", ["sliding_attention", "full_attention"] * 2),
        (3, "ministral", [*["sliding_attention"] * 2, "full_attention", "sliding_attention"]),
        (1, "mistral", None),
    ],
)
def test_every_nth_layer_has_no_window(skip: int | None, model_type: str, layers: list[str] | None) -> None:
    """Megatron's own function says of each layer what the configuration does; without any window there is none."""
    config = from_megatron_args(args_of("ministral", window_attn_skip_freq=skip))
    own = megatron("transformer.utils").is_layer_window_attention
    assert config.window_layers == tuple(own((4, 0), skip, number) for number in range(1, 5))
    assert (config.model_type, config.to_hf().get("layer_types")) == (model_type, layers)
    assert (config.sliding_window is None) == (skip == 1)


def test_windows_are_where_transformers_has_them() -> None:
    """Only Ministral's layers differ, whatever layer_types another model names; latent attention has no window."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    named = {"sliding_window": 5, "layer_types": kinds}
    assert config_of("ministral", **named).window_layers == (False, False, False, True)
    assert config_of("ministral", **named, model_type="mistral").window_layers == (True,) * 4
    assert config_of("mistral4", sliding_window=5).window_layers == (False,) * 4


@pytest.mark.megatron
def test_latent_attention_without_sizes_has_those_of_the_parser() -> None:
    """Absent args are those that pretrain_gpt.py would have, YaRN's the defaults of MLATransformerConfig."""
    names = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "q_lora_rank")
    yarn = ("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "mscale", "mscale_all_dim")
    config = from_megatron_args(args_of("mistral4", **dict.fromkeys((*names, *yarn), ...)))
    latent = config.latent_attention
    assert latent is not None
    assert (latent.kv_lora_rank, latent.qk_head_dim, latent.v_head_dim, latent.q_lora_rank) == (32, 192, 128, None)
    assert config.yarn == YarnScaling(factor=1.0, original_max_position_embeddings=4096)
    defaults = megatron("transformer.transformer_config").MLATransformerConfig
    assert (defaults.original_max_position_embeddings, defaults.beta_fast, defaults.beta_slow) == (4096, 32, 1)


def test_a_model_that_transformers_runs_comes_of_args_without_scaling(caplog: pytest.LogCaptureFixture) -> None:
    """Megatron has no llama-4 scaling: a Mistral 4 without any says so, and transformers runs its config.json."""
    for rope_type in ("yarn", "rope"):
        with caplog.at_level(logging.WARNING):
            config = from_megatron_args(args_of("mistral4", llama_4_scaling_beta=..., rope_type=rope_type))
        assert "do not tell llama_4_scaling_beta" in caplog.text
        raw = config.to_hf()
        model = type(family_model("mistral4"))(AutoConfig.for_model(**raw)).eval()
        assert torch.isfinite(model(torch.arange(40)[None]).logits).all()
        assert MistralConfig.from_hf(raw) == config


def test_what_has_no_flag_is_said(tmp_path: Path) -> None:
    """One warning for what Megatron-LM has no flag for, one for what it does not compute, each with its numbers."""
    said = {}
    for case in FAMILY:
        family_model(case).save_pretrained(tmp_path / case)
        said[case] = "\n".join(run("megatron-args", tmp_path / case).err)
    scaled = "(llama_4_scaling_beta=0.3): up to 16 tokens the model is exact"
    assert [case for case in FAMILY if scaled in said[case]] == ["ministral3, tied", *LATENT]
    no_flag = "no flag for original_max_position_embeddings=16, not 4096: set it in the args"
    assert [case for case in FAMILY if no_flag in said[case]] == LATENT
    assert [case for case in FAMILY if "norm before linear_q_proj" in said[case]] == ["mistral4, groups, plain queries"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"experts": {"experts_per_token": 1}}, "one expert per token"),
        ({"experts": {"num_groups": 2}}, "groups_per_token=1 of num_groups=2"),
        ({"yarn": {"truncate": False}}, "truncate=False"),
        ({"yarn": {"factor": 1.0, "attention_factor": 1.5}}, "attention_factor=1.5 with factor=1.0"),
    ],
)
def test_what_megatron_cannot_express_is_refused(changes: dict[str, dict[str, Any]], complaint: str) -> None:
    """A model of Hugging Face that no args make is refused with the reason."""
    config = config_of("mistral4")
    changed = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    with pytest.raises(UnsupportedModelError, match=complaint):
        to_megatron_args(replace(config, **changed), dtype="bfloat16", tp=1, pp=1)


def test_args_tell_the_layout_that_was_written() -> None:
    """Tensor, pipeline and expert parallelism are what Megatron-LM assumes with --use-mp-args-from-checkpoint-args."""
    args = to_megatron_args(config_of("mixtral"), dtype="float16", tp=2, pp=4, ep=2)
    axes = ("tensor", "pipeline", "expert")
    assert [args[f"{axis}_model_parallel_size"] for axis in axes] == [2, 4, 2]
    assert args["params_dtype"] == TorchDtype("float16")
