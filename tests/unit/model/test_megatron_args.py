"""The args of Megatron-LM and what becomes of them: configurations in both directions, flags, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import logging
import pickle
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import refusal, run
from genuine import folder, shards
from hf_models import random_model, saved
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from yarn_cases import BASE, CASES

from dist_ckpt_mistral.analysis.pretrain_command import megatron_args
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.args.megatron_args import from_megatron_args, to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

LITTLE: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "sliding_window": None,
    "vocab_size": 50,
}

#: Attributes that Megatron-Bridge reads from a checkpoint's args without asking whether they are there, 0.6.0 and the
#: 0.7.0 to come: ``_transformer_config_from_args`` (training/mlm_compat/arguments.py), ``_gpt_provider``,
#: ``_get_transformer_layer_spec`` and ``_get_model`` (training/mlm_compat/model.py), ``build_and_load_model``
#: (training/model_load_save.py).
READ_BY_BRIDGE = (
    *("multi_latent_attention", "heterogeneous_layers_config_path", "no_persist_layer_norm", "params_dtype"),
    *("overlap_p2p_comm", "num_experts", "rotary_interleaved", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "fp8_param_gather", "swiglu", "bias_swiglu_fusion", "bias_gelu_fusion"),
    *("squared_relu", "init_method_xavier_uniform", "group_query_attention", "num_query_groups"),
    *("config_logger_dir", "cp_comm_type", "is_hybrid_model"),
    *("transformer_impl", "moe_grouped_gemm", "qk_layernorm", "qk_l2_norm", "normalization", "mtp_num_layers"),
    *("padded_vocab_size", "max_position_embeddings", "fp16_lm_cross_entropy", "rotary_percent", "rotary_base"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "use_rope_scaling"),
    *("init_model_with_meta_device", "fp16", "bf16", "make_vocab_size_divisible_by"),
)


def args_of(**changes: object) -> dict[str, Any]:
    """The args of a small model, with changes; a change to ``...`` takes the field away."""
    args = to_megatron_args(MistralConfig.from_hf(LITTLE), dtype="bfloat16", tp=1, pp=1) | changes
    return {name: value for name, value in args.items() if value is not ...}


def words(text: str) -> list[str]:
    """What a shell makes of a text behind a command."""
    command = ["sh", "-c", f"printf '%s\\n' {text}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that from_hf wrote from a model with a window."""
    root = tmp_path_factory.mktemp("imported")
    from_hf(saved(random_model(sliding_window=5), root / "hf"), root / "ckpt")
    return root / "ckpt"


def stored_args(checkpoint: Path) -> argparse.Namespace:
    """The args in common.pt as Python's own unpickler and torch's own dtypes make them."""
    with zipfile.ZipFile(checkpoint / "release" / "common.pt") as archive:
        args = pickle.load(io.BytesIO(archive.read("archive/data.pkl")))["args"]  # noqa: S301  (our own)
    assert isinstance(args, argparse.Namespace)
    return args


@pytest.mark.megatron
def test_bridge_finds_every_attribute_that_it_reads(imported: Path) -> None:
    """All of them are in the args of an import, and the TransformerConfig made of them, as Bridge makes it, fits."""
    args = stored_args(imported)
    assert [name for name in READ_BY_BRIDGE if not hasattr(args, name)] == []
    assert (args.params_dtype, args.cp_comm_type, args.layernorm_epsilon) == (torch.bfloat16, ["p2p"], 1e-6)
    with warnings.catch_warnings():  # importing megatron warns of much that is not ours to mend
        warnings.simplefilter("ignore")
        module = importlib.import_module("megatron.core.transformer.transformer_config")
        fields = {field.name for field in dataclasses.fields(module.TransformerConfig) if field.init}
        given = {name: value for name, value in vars(args).items() if name in fields} | {"cp_comm_type": "p2p"}
        config = module.TransformerConfig(**given, gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (2, 24, 20)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 10)
    assert (config.layernorm_epsilon, tuple(config.window_size)) == (1e-6, (4, 0))
    assert (config.normalization, config.add_bias_linear, config.params_dtype) == ("RMSNorm", False, torch.bfloat16)


def test_torch_reads_the_common_state_without_trust(imported: Path) -> None:
    """torch.load takes common.pt with weights_only, as Megatron does from 0.14 on: a Namespace is all that it needs."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(imported / "release" / "common.pt", weights_only=True)
    assert (state["args"].params_dtype, state["iteration"]) == (torch.bfloat16, 0)


def test_names_of_megatron_0_16_and_newer() -> None:
    """There the norm's epsilon has the name of TransformerConfig, which counts before the older one."""
    newer = args_of(norm_epsilon=..., layernorm_epsilon=3e-6, apply_layernorm_1p=...)
    assert from_megatron_args(newer).rms_norm_eps == 3e-6
    older = args_of(norm_epsilon=2e-6, layernorm_epsilon=..., layernorm_zero_centered_gamma=...)
    assert from_megatron_args(older).rms_norm_eps == 2e-6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm'"),
        ({"normalization": ...}, "normalization='LayerNorm'"),
        ({"swiglu": False, "quick_geglu": True}, "swiglu=False, quick_geglu=True"),
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"add_qkv_bias": True}, "add_qkv_bias=True"),
        ({"apply_layernorm_1p": True, "layernorm_zero_centered_gamma": True}, "apply_layernorm_1p=True"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5"),
        ({"use_rope_scaling": True}, "use_rope_scaling=True"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor=4"),
        ({"no_rope_freq": 4}, "no_rope_freq=4"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type='learned_absolute'"),
        ({"qk_layernorm": True, "qk_l2_norm": True}, "qk_l2_norm=True, qk_layernorm=True"),
        ({"attention_output_gate": True}, "attention_output_gate=True"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1"),
        ({"hybrid_layer_pattern": "M*M*"}, "hybrid_layer_pattern='M.M.'"),
        ({"hybrid_layer_pattern": "**--"}, "hybrid_layer_pattern='..--'"),
        ({"hybrid_layer_pattern": "*-*E"}, "hybrid_layer_pattern='.-.E'"),
        ({"hybrid_layer_pattern": "+-+-"}, "hybrid_layer_pattern="),
        ({"hybrid_layer_pattern": "*E*E"}, "hybrid_layer_pattern="),
        ({"hybrid_layer_pattern": "*-*-/*-"}, "hybrid_layer_pattern="),
        ({"hybrid_override_pattern": 7}, "hybrid_override_pattern=7"),
        ({"heterogeneous_layers_config_path": "there"}, "heterogeneous_layers_config_path='there'"),
        ({"window_size": (4, 4)}, r"window_size \(4, 4\)"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], complaint: str) -> None:
    """Whatever would make another model of the same tensors is named."""
    with pytest.raises(UnsupportedModelError, match=complaint):
        from_megatron_args(args_of(**changes))


@pytest.mark.parametrize("skip", [None, 4, [1, 0, 0, 0, 1, 1, 0, 0]])
def test_a_hybrid_model_is_read_as_layers_of_attention_and_mlp(skip: object) -> None:
    """It has two layers for each of transformers', and windows count its own: Megatron's function says which slide."""
    hybrid = {"num_layers": 8, "hybrid_layer_pattern": "*-*-|*-*-", "is_hybrid_model": True, "num_experts": 4}
    config = from_megatron_args(args_of(**hybrid, window_size=(4, 0), window_attn_skip_freq=skip))
    assert (config.num_hidden_layers, config.experts) == (4, None)
    theirs = pytest.importorskip("megatron.core.transformer.utils").is_layer_window_attention
    assert list(config.window_layers) == [theirs((4, 0), skip, number) for number in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_layers": None, "kv_channels": ...}, "lack num_layers, kv_channels. Give the model's config.json"),
        ({"position_embedding_type": ...}, "lack position_embedding_type"),
        (
            {"num_layers": 10**12},
            "num_hidden_layers must be a positive integer of at most 2147483647, got 1000000000000",
        ),
        ({"num_query_groups": ..., "group_query_attention": True}, "num_key_value_heads must be a positive integer"),
        ({"window_size": "4"}, r"window_size in .*: expected \(before, after\), got '4'"),
        ({"window_size": (4.5, 0)}, "window_size"),
        ({"window_size": {"a": 1}}, "window_size"),
        ({"vocab_size": ..., "padded_vocab_size": ...}, "do not tell the vocabulary size"),
        ({"vocab_size": -4}, "vocab_size in .*: expected a positive integer, got -4"),
        ({"norm_epsilon": ..., "layernorm_epsilon": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"position_embedding_type": "yarn", "rotary_scaling_factor": "8"}, "factor must be a positive number"),
        (
            {"position_embedding_type": "yarn", "mscale": "x", "mscale_all_dim": 0.0},
            "mscale and mscale_all_dim must be numbers",
        ),
    ],
)
def test_args_that_do_not_fit_are_told(changes: dict[str, Any], complaint: str) -> None:
    """What is missing, or of the wrong type or size, is told with its name."""
    with pytest.raises(ConfigError, match=complaint):
        from_megatron_args(args_of(**changes))


def test_settings_that_change_nothing_are_accepted() -> None:
    """Absent, None, false and empty are one; a window in all layers is a window; what only training needs is let be."""
    args = args_of(
        window_size="(4095, 0)",
        window_attn_skip_freq=[1, 1],
        mtp_num_layers=0,
        qk_layernorm=...,
        heterogeneous_layers_config_encoded_json="",
        qk_clip=True,
        apply_query_key_layer_scaling=True,
        attention_dropout=0.1,
    )
    assert from_megatron_args(args).sliding_window == 4096
    assert from_megatron_args(args_of(window_size=None, window_attn_skip_freq=4)).sliding_window is None
    assert from_megatron_args(args_of(num_query_groups=..., group_query_attention=...)).num_key_value_heads == 16
    assert from_megatron_args(args_of(num_query_groups=1, group_query_attention=True)).num_key_value_heads == 1
    assert from_megatron_args(args_of(untie_embeddings_and_output_weights=...)).tie_word_embeddings is True


@pytest.mark.parametrize(
    ("changes", "expected", "warning"),
    [
        ({"vocab_size": 250, "padded_vocab_size": 256}, 250, None),
        ({"vocab_size": 250, "padded_vocab_size": ...}, 250, None),
        ({"vocab_size": 250, "padded_vocab_size": 512, "tensor_model_parallel_size": 4}, 250, None),
        ({"vocab_size": 250, "padded_vocab_size": 320, "make_vocab_size_divisible_by": 64}, 320, "all 320 rows"),
        ({"vocab_size": None, "padded_vocab_size": 256}, 256, "all 256 rows"),
        ({"vocab_size": 32000, "padded_vocab_size": 256}, 256, "all 256 rows"),
        ({"vocab_size": 249, "padded_vocab_size": 256, "tokenizer_type": "NullTokenizer"}, 250, None),
        ({"vocab_size": 256, "padded_vocab_size": 256, "tokenizer_type": "NullTokenizer"}, 256, None),
        (
            {"vocab_size": 250, "tokenizer_type": "NullTokenizer", "null_tokenizer_eod_id": 249},
            250,
            None,
        ),
        (
            {
                "vocab_size": 249,
                "padded_vocab_size": 256,
                "tokenizer_type": "NullTokenizer",
                "null_tokenizer_eod_id": None,
            },
            250,
            "250 rows are taken",
        ),
    ],
)
def test_vocabulary_size(
    changes: dict[str, Any], expected: int, warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The size that the user gave counts where it pads to the padded one; else all rows stay, and a warning says so."""
    with caplog.at_level(logging.WARNING):
        assert from_megatron_args(args_of(**changes)).vocab_size == expected
    assert (warning is None) == (caplog.text == "")
    assert warning is None or warning in caplog.text


@pytest.mark.parametrize("case", [case for case in CASES if case != "not stretched"])
def test_yarn_survives_megatrons_args(case: str) -> None:
    """Through Megatron's args and into a new config.json, transformers rotates and scales as with the original."""
    args = to_megatron_args(MistralConfig.from_hf(BASE | CASES[case]), dtype="bfloat16", tp=1, pp=1)
    assert args["position_embedding_type"] == "yarn"
    config = from_megatron_args(args)
    raw = json.loads(json.dumps(config.to_hf()))
    ours, theirs = (
        ROPE_INIT_FUNCTIONS["yarn"](transformers.MistralConfig(**each), device=None)
        for each in (raw, BASE | CASES[case])
    )
    assert ours[0].equal(theirs[0])
    assert ours[1] == pytest.approx(theirs[1], rel=1e-15)


def test_args_without_mscales_scale_as_transformers_does() -> None:
    """One mscale without the other counts for nothing, in Megatron as in transformers."""
    for mscales in ({}, {"mscale": 0.7, "mscale_all_dim": None}, {"mscale": None, "mscale_all_dim": 2.0}):
        args = args_of(position_embedding_type="yarn", rotary_scaling_factor=8.0, **mscales)
        yarn = from_megatron_args(args).yarn
        assert yarn is not None
        assert (yarn.factor, yarn.mscale, yarn.attention_factor) == (8.0, None, None)


def test_the_command_prints_one_text_for_the_shell(imported: Path) -> None:
    """Joined by backslashes, the lines are the flags that the library and --json give."""
    outcome = run("megatron-args", imported, "--tp", "2", "--pp", "2")
    assert outcome.code == 0
    text = "\n".join(outcome.out)
    assert all(line.endswith(" \\") for line in outcome.out[:-1])
    flags = words(text)
    told = json.loads("\n".join(run("megatron-args", imported, "--tp", "2", "--pp", "2", "--json").out))
    assert flags == told["flags"] == megatron_args(imported, layout=ParallelLayout(tp=2, pp=2)).flags
    assert (told["json_version"], told["args"]["num_layers"], told["args"]["window_size"]) == (1, 2, [4, 0])
    loading = ["--load", str(imported), "--finetune", "--no-load-optim", "--no-load-rng"]
    assert flags[-7:] == [*loading, "--ckpt-format", "torch_dist"]
    assert "--tokenizer-type" not in flags
    assert any("add --tokenizer-type" in line for line in outcome.err)


def test_flags_quote_what_a_shell_would_eat(tmp_path: Path) -> None:
    """Paths with spaces and pipeline layouts with bars come through a shell whole."""
    root = tmp_path / "my models"
    hf = saved(random_model(num_hidden_layers=4), root / "hf")
    (hf / "tokenizer.json").write_text("{}")
    command = megatron_args(hf, layout=ParallelLayout(pp=2, pp_layers=(1, 3)))
    flags = words(command.text)
    assert flags == command.flags
    assert flags[flags.index("--tokenizer-model") + 1] == str(hf)
    assert "|" in flags[flags.index("--pipeline-model-parallel-layout") + 1]


def test_a_checkpoint_of_training_goes_on(tmp_path: Path) -> None:
    """With optimizer state nothing is left out; an iteration is named; the vocabulary stays padded as it is."""
    directory = tmp_path / "root" / "iter_0000042"
    shutil.copytree(shards("opt_fr_0192"), directory)
    config = MistralConfig.from_hf(folder("opt_fr_0192"))
    flags = megatron_args(directory, config=config).flags
    assert {"--finetune", "--no-load-optim", "--no-load-rng"}.isdisjoint(flags)
    assert flags[flags.index("--load") + 1 :][:3] == [str(tmp_path / "root"), "--ckpt-step", "42"]
    at = {tp: megatron_args(directory, config=config, layout=ParallelLayout(tp=tp)).args for tp in (1, 4)}
    assert at[1]["padded_vocab_size"] == at[1]["make_vocab_size_divisible_by"] * 2 == 256
    assert at[4]["padded_vocab_size"] == at[4]["make_vocab_size_divisible_by"] * 4 == 256


def test_flat_optimizer_state_is_left_behind_where_megatron_refuses_it(tmp_path: Path) -> None:
    """At another TP or PP than the args in the checkpoint say (or 1): --no-load-optim, and a warning; else neither."""
    directory = shutil.copytree(shards("opt_dr_0161"), tmp_path / "root" / "iter_0000042")
    arguments = ("megatron-args", directory, "--config", folder("opt_dr_0161"))
    state = torch.load(directory / "common.pt", weights_only=False)
    for told, tp, pp in ((None, 1, 1), (None, 2, 1), ((2, 1), 2, 1), ((2, 1), 1, 1), ((2, 1), 2, 2)):
        if told is not None:
            sizes = {f"{axis}_model_parallel_size": n for axis, n in zip(("tensor", "pipeline"), told, strict=True)}
            torch.save(state | {"args": argparse.Namespace(**sizes)}, directory / "common.pt")
        outcome = run(*arguments, "--tp", tp, "--pp", pp)
        text = "\n".join(outcome.out)
        refused = (told or (1, 1)) != (tp, pp)
        assert (outcome.code, "--no-load-optim" in words(text), "--finetune" in text) == (0, refused, False)
        assert any("flat buffers" in line for line in outcome.err) == refused


@pytest.mark.parametrize(("name", "is_tokenizer"), [("tekken.json", True), ("a_tokenizer.model", True), ("x", False)])
def test_a_tokenizer_is_told_by_its_files(name: str, is_tokenizer: bool, tmp_path: Path) -> None:
    """A file of a tokenizer, of transformers or Mistral, makes the flags name its directory; any other does not."""
    hf = saved(random_model(), tmp_path / "hf")
    (hf / name).write_text("{}")
    assert ("--tokenizer-model" in megatron_args(hf).flags) == is_tokenizer


def test_what_has_no_flags_is_refused(tmp_path: Path, imported: Path) -> None:
    """A rope base with a fraction, a layout that does not fit, and a directory that --load could not name."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LITTLE | {"rope_theta": 10000.5, "dtype": "bfloat16"}))
    assert "rope_theta=10000.5 has no flag" in refusal(tmp_path, "megatron-args", tmp_path)
    assert "is not divisible by tp=3" in refusal(tmp_path, "megatron-args", imported, "--tp", "3")
    line = refusal(tmp_path, "megatron-args", imported, "--tp", "2", "--order", "dp-tp-cp-ep-pp")
    assert "order='dp-tp-cp-ep-pp' has no flag: Megatron-LM knows 'tp-cp-ep-dp-pp' and 'tp-cp-ep-pp-dp'" in line
    for name in ("moved", "iter_00000042", "iter_42"):
        moved = shutil.copytree(imported / "release", tmp_path / name)
        assert f"expected iter_0000000 or release in a root, got {name!r}" in refusal(tmp_path, "megatron-args", moved)
