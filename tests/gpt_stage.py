"""A rank's share of a real GPTModel, and what its parameters must hold to be a given Hugging Face model.

This is the oracle of the multi-rank tests: it uses neither the tensor table nor the boxes of the package, but says the
same again in torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.parallel_layout import ParallelLayout, padded_vocab_size
from dist_ckpt_mistral.model.tensor_rules import KeyStyle

HfTensors = Mapping[str, torch.Tensor]

_STYLE_METADATA: Final = {
    KeyStyle.STACKED: {},
    KeyStyle.PER_LAYER: {"non_homogeneous_layers": True},
    KeyStyle.SINGLETON: {"singleton_local_shards": True},
}


def set_parallel_state(layout: ParallelLayout, **options: object) -> None:
    """Have Megatron lay out the ranks of the process group."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order=layout.order,
        **options,
    )


class Stage:
    """A rank's real model: one GPTModel for each of its model chunks, in bfloat16 as Float16Module makes it."""

    def __init__(self, config: MistralConfig, layout: ParallelLayout) -> None:
        """Build the model. The parallel state must be that of ``layout``."""
        self.config = config
        self.vocab_rows = padded_vocab_size(config.vocab_size, layout.tp)
        self.tp, self.tp_rank = layout.tp, parallel_state.get_tensor_model_parallel_rank()
        self.chunks = [self._chunk(layout, number) for number in range(layout.vpp or 1)]

    def _chunk(self, layout: ParallelLayout, number: int) -> GPTModel:
        vp_stage = number if layout.vpp else None
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        return GPTModel(
            _transformer_config(self.config, layout),
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=self.vocab_rows,
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=self.config.tie_word_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=vp_stage,
        ).bfloat16()

    def nested(self, per_chunk: list[Any]) -> dict[str, Any]:
        """Nest what each chunk gave as Megatron-LM does."""
        if len(per_chunk) == 1:
            return dict(per_chunk[0])
        return {f"model{number}": each for number, each in enumerate(per_chunk)}

    def sharded_state_dict(self, style: KeyStyle = KeyStyle.STACKED) -> dict[str, Any]:
        """Megatron's own sharded state dict."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"dp_cp_group": group, **_STYLE_METADATA[style]}
        return self.nested([chunk.sharded_state_dict(metadata=metadata) for chunk in self.chunks])

    def state_dict(self) -> dict[str, Any]:
        """The plain state dict."""
        return self.nested([chunk.state_dict(keep_vars=True) for chunk in self.chunks])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state dict, every name of it."""
        for number, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[f"model{number}"] if len(self.chunks) > 1 else state)

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter, int | None]]:
        """Every parameter with its name in the whole model and its global layer number."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                layer = None
                if name.startswith("decoder.layers."):
                    layer = chunk.decoder.layers[int(name.split(".")[2])].layer_number - 1
                yield name, parameter, layer

    @torch.no_grad()
    def fill(self, hf: HfTensors) -> None:
        """Give every parameter its values; vocabulary padding gets zeros."""
        for name, parameter, layer in self.parameters():
            parameter.copy_(hf_rows(hf, self, name, layer))

    def differences(self, hf: HfTensors) -> list[str]:
        """Names of parameters that do not hold their values. What vocabulary padding holds is not compared, but NaN."""
        wrong = []
        for name, parameter, layer in self.parameters():
            expected, actual = hf_rows(hf, self, name, layer).to(parameter.dtype), parameter.detach()
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                live = max(0, min(len(actual), self.config.vocab_size - self.tp_rank * len(actual)))
                expected = torch.cat([expected[:live], actual[live:]])
            if actual.isnan().any() or not torch.equal(expected, actual):
                wrong.append(f"{name} (layer {layer})")
        return wrong


def _transformer_config(config: MistralConfig, layout: ParallelLayout) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        # Megatron's own attention refuses context parallelism, which does not change what weights a rank holds.
        **layout.transformer_config_fields() | {"context_parallel_size": 1},
    )


def hf_rows(hf: HfTensors, stage: Stage, name: str, layer: int | None) -> torch.Tensor:
    """What the parameter ``name`` of a rank must hold, from the Hugging Face tensors."""
    if layer is not None:
        return _layer_rows(hf, stage, name.split(".", 3)[3], layer)
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    embeds = name == "embedding.word_embeddings.weight" or stage.config.tie_word_embeddings
    words = hf["model.embed_tokens.weight" if embeds else "lm_head.weight"]
    padding = words.new_zeros(stage.vocab_rows - len(words), words.shape[1])
    return _part(torch.cat([words, padding]), 0, stage)


def _part(tensor: torch.Tensor, axis: int, stage: Stage) -> torch.Tensor:
    size = tensor.shape[axis] // stage.tp
    return tensor.narrow(axis, stage.tp_rank * size, size)


def _layer_rows(hf: HfTensors, stage: Stage, name: str, layer: int) -> torch.Tensor:
    def whole(part: str) -> torch.Tensor:
        return hf[f"model.layers.{layer}.{part}.weight"]

    def qkv() -> torch.Tensor:
        hidden = stage.config.hidden_size
        heads = (stage.config.num_key_value_heads, -1, stage.config.head_dim, hidden)
        groups = torch.cat([whole(f"self_attn.{each}_proj").view(heads) for each in "qkv"], 1)
        return _part(groups.reshape(-1, hidden), 0, stage)

    def fc1() -> torch.Tensor:
        return torch.cat([_part(whole(f"mlp.{each}_proj"), 0, stage) for each in ("gate", "up")])

    rows: dict[str, Callable[[], torch.Tensor]] = {
        "input_layernorm.weight": lambda: whole("input_layernorm"),
        "pre_mlp_layernorm.weight": lambda: whole("post_attention_layernorm"),
        "self_attention.linear_qkv.weight": qkv,
        "self_attention.linear_proj.weight": lambda: _part(whole("self_attn.o_proj"), 1, stage),
        "mlp.linear_fc1.weight": fc1,
        "mlp.linear_fc2.weight": lambda: _part(whole("mlp.down_proj"), 1, stage),
    }
    return rows[name]()
