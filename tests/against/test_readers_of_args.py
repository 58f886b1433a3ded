"""Who reads which fields of a checkpoint's args: all that each reader wants is there, with a value it can take."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Final

import pytest
from family_args import args_of, megatron
from family_models import FAMILY

#: Who reads which fields without a default of its own.
READERS: Final = {
    # megatron/training/checkpointing.py, ``check_checkpoint_args``, 0.16 to 0.19: without --finetune
    "Megatron-LM, going on": ("num_layers", "hidden_size", "num_attention_heads", "add_position_embedding"),
    # megatron/bridge/training/mlm_compat/arguments.py and model.py, training/model_load_save.py, 0.6.2, where there is
    # no run_config.yaml
    "Megatron-Bridge": (
        *("multi_latent_attention", "heterogeneous_layers_config_path", "no_persist_layer_norm", "params_dtype"),
        *("overlap_p2p_comm", "num_experts", "rotary_interleaved", "decoder_first_pipeline_num_layers"),
        *("decoder_last_pipeline_num_layers", "fp8_param_gather", "swiglu", "bias_swiglu_fusion", "bias_gelu_fusion"),
        *("squared_relu", "init_method_xavier_uniform", "group_query_attention", "num_query_groups"),
        *("config_logger_dir", "cp_comm_type", "is_hybrid_model", "moe_grouped_gemm", "qk_layernorm", "qk_l2_norm"),
        *("normalization", "transformer_impl", "mtp_num_layers", "padded_vocab_size", "max_position_embeddings"),
        *("fp16_lm_cross_entropy", "untie_embeddings_and_output_weights", "position_embedding_type"),
        *("rotary_percent", "rotary_base", "use_rope_scaling", "make_vocab_size_divisible_by"),
        *("init_model_with_meta_device", "virtual_pipeline_model_parallel_size", "fp16", "bf16"),
    ),
    # tools/convert_torch_dist_to_hf.py and slime/backends/megatron_utils/megatron_to_hf (__init__.py, llama.py), 2025
    "slime": (
        *("num_layers", "num_experts", "vocab_size", "q_lora_rank", "kv_channels", "hidden_size"),
        *("num_attention_heads", "num_query_groups"),
    ),
}
#: What Megatron-LM's --use-checkpoint-args takes over, and where nothing is said keeps its own value for: fields of
#: other architectures, of how experts are computed, and what belongs to the user's run. ``tokenizer_type`` would win
#: over the user's own --tokenizer-type (``_set_arg(..., force=True)``).
NOT_TOLD: Final = frozenset(
    {
        *("mtp_hybrid_override_pattern", "mtp_use_repeated_layer", "spec"),
        *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
        *("moe_token_dispatcher_type", "moe_single_grouped_weight", "moe_single_grouped_bias"),
        *("tokenizer_model", "tokenizer_type", "tiktoken_pattern", "num_layers_per_virtual_pipeline_stage"),
    }
)
#: What is said of a model with experts only.
OF_EXPERTS: Final = "moe_"
#: None is what Megatron-LM's parser has where queries are not compressed (megatron/training/arguments.py, 0.19), and
#: what ``MLASelfAttention`` looks for (transformer/multi_latent_attention.py), whatever the default of the field is.
MAY_BE_NONE: Final = "q_lora_rank"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", FAMILY)
def test_every_field_that_a_reader_wants_is_there(case: str, reader: str) -> None:
    """None is missing, whatever family the model is of."""
    assert set(READERS[reader]) <= set(args_of(case))


@pytest.mark.megatron
@pytest.mark.parametrize("case", FAMILY)
@pytest.mark.parametrize("name", ["TransformerConfig", "MLATransformerConfig"])
def test_no_field_is_none_where_megatron_has_another_default(case: str, name: str) -> None:
    """Bridge hands every field to the config class of the installed megatron-core, which would compute with None."""
    defaults = {
        field.name: field.default for field in fields(megatron("transformer.transformer_config").__dict__[name])
    }
    nothing = {field for field, value in args_of(case).items() if value is None} - {MAY_BE_NONE}
    assert {field for field in nothing & set(defaults) if defaults[field] not in (None, MISSING)} == set()


@pytest.mark.megatron
@pytest.mark.parametrize("case", FAMILY)
def test_what_megatron_lm_takes_over_is_told_or_known_to_be_left_out(case: str) -> None:
    """Every field of --use-checkpoint-args of the installed Megatron-LM stands in the args, or in the table above."""
    spec = importlib.util.find_spec("megatron.training")
    if spec is None or spec.origin is None:
        pytest.skip("megatron-core up to 0.18 ships no megatron.training")
    source = Path(spec.origin).with_name("checkpointing.py").read_text()
    read = {
        call.args[0].value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_set_arg"
        if isinstance(call.args[0], ast.Constant)
    }
    assert len(read) > 50
    args = args_of(case)
    dense = set() if args["num_experts"] else {field for field in read if str(field).startswith(OF_EXPERTS)}
    assert read - set(args) - dense == NOT_TOLD - dense
    assert not NOT_TOLD & set(args)


def test_the_table_has_all_that_bridge_reads() -> None:
    """Held against the sources of the installed Megatron-Bridge: ``args.NAME`` where no ``getattr`` guards it."""
    spec = importlib.util.find_spec("megatron.bridge") if importlib.util.find_spec("megatron") else None
    if spec is None or spec.origin is None:
        pytest.skip("Megatron-Bridge is not installed")
    guarded = {"kitchen_config_file", "kitchen_recipe_number"}
    guarded |= {"hybrid_override_pattern", "hybrid_layer_pattern", "num_layers"}  # of another architecture
    found: set[str] = set()
    for name in ("arguments.py", "model.py"):
        tree = ast.parse((Path(spec.origin).parent / "training" / "mlm_compat" / name).read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and "hybrid" not in node.name]
        found |= {field for each in functions for field in re.findall(r"(?<!\w)args\.(\w+)", ast.unparse(each))}
    assert len(found) > 40
    assert found - guarded <= set(READERS["Megatron-Bridge"])
