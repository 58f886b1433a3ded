"""A rank's share of a real GPTModel, and what its parameters must hold to be a given Hugging Face model.

This is the oracle of the multi-rank tests: it uses neither the tensor table nor the boxes of the package, but says the
same again in torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import experts as moe_experts
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from dist_ckpt_mistral.megatron.build_model import layer_spec
from dist_ckpt_mistral.megatron.runtime import destroy_parallel_state
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.vocabulary import padded_vocab_size
from dist_ckpt_mistral.model.table.rules import KeyStyle

HfTensors = Mapping[str, torch.Tensor]

_STYLE_METADATA: Final = {
    KeyStyle.STACKED: {},
    KeyStyle.PER_LAYER: {"non_homogeneous_layers": True},
    KeyStyle.SINGLETON: {"singleton_local_shards": True},
}


def set_parallel_state(layout: ParallelLayout, **options: object) -> None:
    """Have Megatron lay out the ranks of the process group."""
    destroy_parallel_state()
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

    def __init__(self, config: MistralConfig, layout: ParallelLayout, *, grouped: bool = False) -> None:
        """Build the model. The parallel state must be that of ``layout``.

        Experts are a SequentialMLP; with ``grouped`` a GroupedMLP, which megatron-core 0.16 has.
        """
        self.config, self.grouped = config, grouped
        self.take_place()
        self.vocab_rows = padded_vocab_size(config.vocab_size, layout.tp)
        self.chunks = [self._chunk(layout, number) for number in range(layout.vpp or 1)]

    def take_place(self) -> None:
        """Note where this rank stands, as the parallel state has it."""
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.etp = parallel_state.get_expert_tensor_parallel_world_size()
        self.etp_rank = parallel_state.get_expert_tensor_parallel_rank()
        self.ep = parallel_state.get_expert_model_parallel_world_size()
        self.ep_rank = parallel_state.get_expert_model_parallel_rank()

    def _chunk(self, layout: ParallelLayout, number: int) -> GPTModel:
        vp_stage = number if layout.vpp else None
        with mock.patch.object(moe_experts, "gg", mock.Mock(unsafe=True), create=True):  # kernels
            return self._gpt_model(layout, vp_stage)

    def _gpt_model(self, layout: ParallelLayout, vp_stage: int | None) -> GPTModel:
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        return GPTModel(
            _transformer_config(self.config, layout),
            self._spec(),
            vocab_size=self.vocab_rows,
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=self.config.tie_word_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=vp_stage,
        ).bfloat16()

    def _spec(self) -> Any:  # noqa: ANN401  (megatron is untyped)
        if self.config.latent_attention is not None:
            return layer_spec(self.config)  # Megatron's own, but that it can be built without Transformer Engine
        experts = self.config.experts and self.config.experts.num_experts
        return get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=self.grouped, normalization="RMSNorm")

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

    @torch.no_grad()
    def fill_alike(self) -> None:
        """Give every parameter the same value, so that its memory is there."""
        for _, parameter, _ in self.parameters():
            parameter.fill_(0.5)

    @torch.no_grad()
    def forget(self) -> None:
        """Fill every parameter with NaN."""
        for _, parameter, _ in self.parameters():
            parameter.fill_(torch.nan)

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
    experts, latent = config.experts, config.latent_attention
    more: dict[str, Any] = {}
    if experts is not None:
        more = {
            "num_moe_experts": experts.num_experts,
            "moe_ffn_hidden_size": experts.intermediate_size,
            "moe_shared_expert_intermediate_size": experts.shared_intermediate_size or None,
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,
        }
    if latent is not None:
        more |= {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "q_lora_rank": latent.q_lora_rank,
            "kv_lora_rank": latent.kv_lora_rank,
            "qk_head_dim": latent.qk_nope_head_dim,
            "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
            "v_head_dim": latent.v_head_dim,
            "rope_type": "rope",  # with YaRN it would want pinned memory for context parallelism
        }
    return (TransformerConfig if latent is None else MLATransformerConfig)(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads if latent is None else config.num_attention_heads,
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
        apply_rope_fusion=False,
        **more,
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
    return _cut(tensor, axis, stage.tp_rank, stage.tp)


def _cut(tensor: torch.Tensor, axis: int, rank: int, ways: int) -> torch.Tensor:
    size = tensor.shape[axis] // ways
    return tensor.narrow(axis, rank * size, size)


def _layer_rows(hf: HfTensors, stage: Stage, name: str, layer: int) -> torch.Tensor:
    if name.startswith("mlp.experts."):
        return _expert_rows(hf, stage, name, layer)

    def whole(part: str) -> torch.Tensor:
        return hf[f"model.layers.{layer}.{part}.weight"]

    def qkv() -> torch.Tensor:
        hidden = stage.config.hidden_size
        heads = (stage.config.num_key_value_heads, -1, stage.config.head_dim, hidden)
        groups = torch.cat([whole(f"self_attn.{each}_proj").view(heads) for each in "qkv"], 1)
        return _part(groups.reshape(-1, hidden), 0, stage)

    def fc1(mlp: str) -> torch.Tensor:
        return torch.cat([_part(whole(f"{mlp}.{each}_proj"), 0, stage) for each in ("gate", "up")])

    router = "mlp" if stage.config.latent_attention else "block_sparse_moe"
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "input_layernorm.weight": lambda: whole("input_layernorm"),
        "pre_mlp_layernorm.weight": lambda: whole("post_attention_layernorm"),
        "self_attention.linear_qkv.weight": qkv,
        "self_attention.linear_proj.weight": lambda: _part(whole("self_attn.o_proj"), 1, stage),
        "self_attention.linear_q_down_proj.weight": lambda: _part(whole("self_attn.q_a_proj"), 0, stage),
        "self_attention.linear_q_proj.weight": lambda: _part(whole("self_attn.q_proj"), 0, stage),
        "self_attention.q_layernorm.weight": lambda: whole("self_attn.q_a_layernorm"),
        "self_attention.linear_q_up_proj.weight": lambda: _part(whole("self_attn.q_b_proj"), 0, stage),
        "self_attention.linear_kv_down_proj.weight": lambda: _part(whole("self_attn.kv_a_proj_with_mqa"), 0, stage),
        "self_attention.kv_layernorm.weight": lambda: whole("self_attn.kv_a_layernorm"),
        "self_attention.linear_kv_up_proj.weight": lambda: _part(whole("self_attn.kv_b_proj"), 0, stage),
        "mlp.linear_fc1.weight": lambda: fc1("mlp"),
        "mlp.linear_fc2.weight": lambda: _part(whole("mlp.down_proj"), 1, stage),
        "mlp.router.weight": lambda: whole(f"{router}.gate"),
        "mlp.shared_experts.linear_fc1.weight": lambda: fc1("mlp.shared_experts"),
        "mlp.shared_experts.linear_fc2.weight": lambda: _part(whole("mlp.shared_experts.down_proj"), 1, stage),
    }
    return rows[name]()


def _expert_rows(hf: HfTensors, stage: Stage, name: str, layer: int) -> torch.Tensor:
    """What a rank holds of one expert; of all its experts, side by side and transposed, where they are grouped."""
    share = stage.config.experts.num_experts // stage.ep  # type: ignore[union-attr]  # it has experts
    if ".local_experts." in name:
        return _expert(hf, stage, name.split(".")[-2], layer, stage.ep_rank * share + int(name.split(".")[3]))
    which = {"weight1": "linear_fc1", "weight2": "linear_fc2"}[name.rpartition(".")[2]]
    own = torch.stack([_expert(hf, stage, which, layer, stage.ep_rank * share + number).T for number in range(share)])
    hidden = stage.config.hidden_size
    return own.reshape(hidden, -1) if which == "linear_fc1" else own.reshape(-1, hidden)


def _expert(hf: HfTensors, stage: Stage, which: str, layer: int, expert: int) -> torch.Tensor:
    """What a rank holds of one matrix of one expert, as a linear module has it."""
    if stage.config.latent_attention:
        there = f"model.layers.{layer}.mlp.experts."
        gate, up = hf[there + "gate_up_proj"][expert].chunk(2)
        down = hf[there + "down_proj"][expert]
    else:
        there = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
        gate, up, down = (hf[f"{there}{each}.weight"] for each in ("w1", "w3", "w2"))
    if which == "linear_fc2":
        return _cut(down, 1, stage.etp_rank, stage.etp)
    return torch.cat([_cut(half, 0, stage.etp_rank, stage.etp) for half in (gate, up)])
