"""What one rank does in tests of Megatron-LM itself: ``python megatron_lm_ranks.py``, as in megatron_ranks.py.

Arguments, configuration, model, loading and saving are those of ``megatron.training``, which megatron-core's wheels
ship from 0.19 on. Of the package ``load_weights`` and ``export_weights`` have a part in it, where a result says so.
"""

from __future__ import annotations

import json
import os
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import forked_ranks
import torch
import torch.distributed as dist
import yaml
from gpt_stage import Stage
from megatron.core import parallel_state
from megatron.core.models.hybrid import hybrid_block
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.post_training.modelopt.hybrid import model_specs
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import destroy_rerun_state_machine, initialize_rerun_state_machine
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.training import checkpointing
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron.training.config.container import ConfigContainerBase
from megatron.training.config.yaml_utils import safe_yaml_representers
from megatron.training.global_vars import set_args
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.models.hybrid import HybridModelBuilder
from megatron_ranks import _hf_tensors, _pretend_cuda

from dist_ckpt_mistral.megatron.export_weights import export_weights
from dist_ckpt_mistral.megatron.load_weights import load_weights
from dist_ckpt_mistral.megatron.runtime import destroy_parallel_state
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

#: What a machine without CUDA needs, and what pretrain_gpt.py demands beside a model.
_HERE: Final = (
    *("--use-cpu-initialization", "--distributed-backend", "gloo", "--transformer-impl", "local"),
    *("--attention-backend", "unfused", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion", "--no-gradient-accumulation-fusion"),
    *("--micro-batch-size", "1", "--lr", "1e-4", "--train-iters", "1", "--exit-on-missing-checkpoint"),
)
_SIZES: Final = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("layernorm_epsilon", "window_size", "normalization", "gated_linear_unit", "add_bias_linear"),
    *("attention_dropout", "hidden_dropout", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage"),
    "num_layers_in_last_pipeline_stage",
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "context_parallel_size"),
    *("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
    *("yarn_mscale", "yarn_mscale_all_dim", "yarn_correction_range_round_to_int"),
    *("window_attn_skip_freq", "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"),
    *("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_score_function", "moe_layer_freq", "multi_latent_attention", "qk_layernorm", "q_lora_rank"),
    *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_scaling_factor"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_OTHER_ARGS: Final = (
    *("rotary_base", "rotary_percent", "position_embedding_type", "max_position_embeddings", "seq_length"),
    *("vocab_size", "make_vocab_size_divisible_by", "padded_vocab_size", "untie_embeddings_and_output_weights"),
    *("use_tp_pp_dp_mapping", "ckpt_format", "load", "tokenizer_type", "tokenizer_model"),
)


class Trained(Stage):
    """A rank's GPTModel as Megatron-LM's own arguments describe it."""

    def __init__(self, args: Namespace, config: MistralConfig) -> None:
        """Build the model; the parallel state must be that of ``args``."""
        self.config = config
        self.vocab_rows = args.padded_vocab_size
        self.take_place()
        model = self._built(args)
        self.chunks = [model.bfloat16() if args.bf16 else model]

    def _built(self, args: Namespace) -> Any:  # noqa: ANN401  (megatron is untyped)
        return GPTModelBuilder(gpt_config_from_args(args)).build_model(ProcessGroupCollection.use_mpu_process_groups())


class TrainedHybrid(Trained):
    """The same as a HybridModel: attention and MLP are layers of their own, and --hybrid-layer-pattern orders them.

    Its layers are Megatron's own for ModelOpt, which need nothing of Transformer Engine but the norm.
    """

    def _built(self, args: Namespace) -> Any:  # noqa: ANN401  (megatron is untyped)
        hybrid_block.TENorm = model_specs.Norm = WrappedTorchNorm
        config = hybrid_config_from_args(args)
        config.hybrid_stack_spec = model_specs.get_hybrid_stack_modelopt_spec(
            local_core_attention=True, remap_te_layernorm=True
        )
        return HybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter, int | None]]:
        """Every parameter, with the name and the number of the layer that it has in a GPTModel."""
        for name, parameter, layer in super().parameters():
            yield name.replace(".final_norm.", ".final_layernorm."), parameter, None if layer is None else layer // 2


def parse(*, flags: list[str], more: dict[str, Any]) -> dict[str, Any]:
    """What Megatron-LM's own parser and checks make of flags, as its TransformerConfig and args hold it."""
    args = _arguments(flags, more)
    config = core_transformer_config_from_args(args)
    return {
        **{name: getattr(config, name, None) for name in _SIZES},
        **{name: getattr(args, name) for name in _OTHER_ARGS},
        "activation_func": config.activation_func.__name__,
        "params_dtype": str(config.params_dtype),
        "layers_here": _layers_here(config),
    }


def _layers_here(config: TransformerConfig) -> list[int] | None:
    """The layer counts of a custom pipeline layout, by stage."""
    layout = config.pipeline_model_parallel_layout
    return None if layout is None else [sum(part.name == "decoder" for part in stage[0]) for stage in layout.layout]


def load(
    *,
    flags: list[str],
    more: dict[str, Any],
    config: dict[str, Any],
    hf: str,
    save: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint with Megatron-LM as pretrain_gpt.py does; tell what the model then holds wrongly.

    With ``save``, save the model again with Megatron-LM, as iteration 11, generator states included. ``more`` are args
    that have no flag, ``defaults`` the ``args_defaults`` of ``pretrain``. ``exported`` are the names that
    ``export_weights`` yields of the model, ``wrongly_exported`` those of tensors that are not the ones of ``hf``.
    ``wrongly_filled`` is what the model holds wrongly after ``load_weights`` from ``hf``.
    """
    args = _arguments([*flags, *(["--save", save, "--save-interval", "1"] if save else [])], more, defaults)
    args.sequence_parallel = False  # torch's norms refuse it; what weights a rank holds does not depend on it
    is_hybrid = args.hybrid_layer_pattern is not None
    stage = _stage(args, MistralConfig.from_hf(config))
    stage.forget()
    iteration, _ = checkpointing.load_checkpoint(stage.chunks, None, None)
    if save:
        checkpointing.save_checkpoint(11, stage.chunks, None, None, 0)
    original = _hf_tensors(hf)
    told = {"differences": stage.differences(original), "iteration": iteration}
    if is_hybrid:
        return told
    exported = dict(export_weights(stage.chunks, MistralConfig.from_hf(config), to=0, bucket_bytes=1 << 16))
    unequal = [
        name
        for name, tensor in exported.items()
        if tensor.dtype != original[name].dtype or not torch.equal(tensor, original[name])
    ]
    stage.forget()
    load_weights(stage.chunks, hf)
    return told | {
        "exported": sorted(exported),
        "wrongly_exported": unequal,
        "wrongly_filled": stage.differences(original),
    }


@torch.no_grad()
def say(*, flags: list[str], more: dict[str, Any], config: dict[str, Any], tokens: list[int]) -> list[list[float]]:
    """The logits of a checkpoint that Megatron-LM loads into one stage, for every token of a prompt."""
    args = _arguments(flags, more)
    stage = _stage(args, MistralConfig.from_hf(config))
    checkpointing.load_checkpoint(stage.chunks, None, None)
    count = len(tokens)
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)[None, None]
    logits = stage.chunks[0].eval()(torch.tensor([tokens]), torch.arange(count)[None], hidden)
    return cast("list[list[float]]", logits[0, :, : stage.config.vocab_size].tolist())


def dump_run_configs(*, flags: list[str], more: dict[str, Any], to: str) -> None:
    """Write the model as Megatron-Bridge's run_config.yaml has it, in both forms, with the serializer that it uses.

    Bridge's own classes add to Megatron's: a GPTModelConfig the name of its activation function, a provider the fields
    of GPTModelConfig and YaRN (megatron/bridge/models/gpt/model_config.py and gpt_provider.py, 0.7).
    """
    args = _arguments(flags, more)
    args.padded_vocab_size = None  # Bridge keeps the true size and pads it when it builds the model
    model = gpt_config_from_args(args)
    config = model.transformer
    nested = model.as_dict()
    nested["transformer"]["activation_func"] = "silu"
    yarn = {name: getattr(config, name, None) for name in _SIZES if name.startswith("yarn")}
    outer = {name: value for name, value in nested.items() if name != "transformer"}
    flat = outer | ConfigContainerBase._convert_value_to_dict(config) | yarn  # noqa: SLF001  (what to_yaml calls)
    if dist.get_rank() == 0:
        Path(to).mkdir(parents=True)
        with safe_yaml_representers():
            for name, form in (("nested", nested | {"transformer": nested["transformer"] | yarn}), ("flat", flat)):
                (Path(to) / f"{name}.yaml").write_text(yaml.safe_dump({"model": form}))


def _arguments(flags: list[str], more: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Namespace:
    """Megatron-LM's args for flags, through its own parser, the checkpoint if it is asked for, and its own checks."""
    sys.argv = ["pretrain_gpt.py", *flags, *_HERE]
    args = parse_args()
    if args.use_checkpoint_args:
        checkpointing.load_args_from_checkpoint(args)
    vars(args).update(more)
    validate_args(args, defaults or {})
    return cast("Namespace", args)


def _stage(args: Namespace, config: MistralConfig) -> Trained:
    """What pretrain_gpt.py sets up before it loads, and the model."""
    set_args(args)
    destroy_parallel_state()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    destroy_rerun_state_machine()
    initialize_rerun_state_machine()
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    return (Trained if args.hybrid_layer_pattern is None else TrainedHybrid)(args, config)


def _let_local_attention_be_latent() -> None:
    """Latent attention tells the sizes of keys and values, which Megatron's local attention does not take (to 0.19)."""
    original = DotProductAttention.__init__

    def init(
        self: DotProductAttention,
        *args: object,
        k_channels: object = None,
        v_channels: object = None,
        **options: object,
    ) -> None:
        del k_channels, v_channels
        original(self, *args, **options)

    DotProductAttention.__init__ = init


def _pretend_more_cuda() -> None:
    """What megatron.training asks CUDA for; the devices that it names become the CPU."""
    _pretend_cuda()
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(  # type: ignore[assignment]
        major=9, minor=0, multi_processor_count=1, total_memory=1 << 34
    )
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None  # noqa: ARG005
    torch.cuda.get_rng_state = lambda *_: torch.zeros(8, dtype=torch.uint8)


class _CudaIsCpu(torch.overrides.TorchFunctionMode):
    """Tensors that are asked for on CUDA are made on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        _: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Call ``func`` with another device."""
        given = dict(kwargs or {})
        if str(given.get("device", "")).startswith("cuda"):
            given["device"] = "cpu"
        return func(*args, **given)


_TASKS: Final[Mapping[str, Callable[..., Any]]] = {task.__name__: task for task in (parse, load, say, dump_run_configs)}


def main(folder: Path) -> None:
    """Run the jobs in FOLDER/jobs.json."""
    _pretend_more_cuda()
    _let_local_attention_be_latent()
    dist.init_process_group("gloo")
    results = {}
    with _CudaIsCpu():
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            print("job", name, flush=True)  # noqa: T201  (into the rank's log, which a failure shows)
            results[name] = _TASKS[job.pop("task")](**job)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # Megatron's writers would hold up an ordinary exit


if __name__ == "__main__":
    forked_ranks.serve(main)
