"""The names of a layer's tensors, in both worlds: attention, MLP or experts, norms. Upstream: see tensor_table.py."""

from __future__ import annotations

import re
from typing import Final

from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import Experts, LatentAttention
from dist_ckpt_mistral.model.table.row_blocks import RowBlocks
from dist_ckpt_mistral.model.table.rules import HfPart, ModuleTensor, OwnRows, Place, TensorRule

_HERE: Final = "decoder.layers.{layer}."
_OWN: Final = "layers.{layer}."
_NO_PARTS: Final[tuple[HfPart, ...]] = ()
_EXPERT_KEY: Final = "mlp.experts.experts.{expert}."
#: Other parts of Mixtral's names that transformers 5.24 takes (conversion_mapping.py), and what stands for them here.
#: It renames the block whatever follows, and then packs the experts that are single.
OTHER_EXPERT_NAMES: Final = (
    (re.compile(r"\.mlp\.(?=gate\.|experts\.\d+\.)"), ".block_sparse_moe."),
    (re.compile(r"\.block_sparse_moe\.(?=experts\.(gate_up_proj|down_proj)$)"), ".mlp."),
)


def whole(hf_name: str, rows: int, *own_names: str) -> tuple[HfPart, ...]:
    """A tensor in place. In Mistral AI's own files it is ``own_names``, one below the other."""
    each = rows // len(own_names)
    own = tuple(OwnRows(name=name, first_row=number * each, rows=each) for number, name in enumerate(own_names))
    return (HfPart(hf_name=hf_name, rows=RowBlocks.identity(rows), own=own),)


def _gate_and_up(names: tuple[str, str], own_names: tuple[str, str], ffn: int) -> tuple[HfPart, ...]:
    """The two halves of a ``linear_fc1``."""
    return tuple(
        HfPart(
            hf_name=name,
            rows=RowBlocks(count=1, stride=2 * ffn, offset=half * ffn, length=ffn),
            own=(OwnRows(name=own_name, first_row=0, rows=ffn),),
        )
        for half, (name, own_name) in enumerate(zip(names, own_names, strict=True))
    )


def state_beside(mcore_key: str, name: str) -> tuple[str, str]:
    """Key and name of the object beside a weight; ``name`` is that of a module's weight."""
    return mcore_key.removesuffix("weight") + "_extra_state", name.removesuffix("weight") + "_extra_state"


def layer_rules(config: MistralConfig, hf_prefix: str) -> tuple[TensorRule, ...]:
    """The tensors of all layers; ``hf_prefix`` stands before the names of the language model in Hugging Face files."""
    return _Layer(config, hf_prefix).rules()


class _Layer:
    """The tensors of a layer. Names of methods' arguments: Megatron's are relative to the layer, as are the others."""

    def __init__(self, config: MistralConfig, hf_prefix: str) -> None:
        self._config = config
        self._there = hf_prefix + "model.layers.{layer}."

    def rules(self) -> tuple[TensorRule, ...]:
        """All of them, in the order of Hugging Face's modules: attention, MLP, norms."""
        config = self._config
        latent, experts = config.latent_attention, config.experts
        return (
            *(self._attention() if latent is None else self._latent_attention(latent)),
            *(self._mlp() if experts is None else self._experts(experts)),
            self._input_norm(fused=latent is None),
            self._norm_before_mlp(fused=experts is None, as_fused=latent is None),
        )

    def _attention(self) -> tuple[TensorRule, ...]:
        config = self._config
        groups, queries, dim = config.num_key_value_heads, config.queries_per_group, config.head_dim
        group_rows = (queries + 2) * dim  # one group: its query heads, then one key head, then one value head
        heads = (("q", 0, queries), ("k", queries, 1), ("v", queries + 1, 1))
        parts = tuple(
            HfPart(
                hf_name=f"{self._there}self_attn.{name}_proj.weight",
                rows=RowBlocks(count=groups, stride=group_rows, offset=first * dim, length=count * dim),
                own=(
                    OwnRows(
                        name=f"{_OWN}attention.w{name}.weight",
                        first_row=0,
                        rows=groups * count * dim,
                        rotated_rows=0 if name == "v" else dim,
                    ),
                ),
            )
            for name, first, count in heads
        )
        qkv = self._linear("self_attention.linear_qkv", (groups * group_rows, config.hidden_size), 0, parts)
        return (qkv, self._attention_output(config.num_attention_heads * dim))

    def _attention_output(self, columns: int) -> TensorRule:
        hidden = self._config.hidden_size
        parts = whole(self._there + "self_attn.o_proj.weight", hidden, _OWN + "attention.wo.weight")
        return self._linear("self_attention.linear_proj", (hidden, columns), 1, parts)

    def _latent_attention(self, latent: LatentAttention) -> tuple[TensorRule, ...]:
        """MLA: no rows are reordered (proved by logits)."""
        config, heads = self._config, self._config.num_attention_heads
        query_rows, kv_rows = heads * latent.qk_head_dim, heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        if latent.q_lora_rank is None:
            queries: tuple[TensorRule, ...] = (
                self._same("linear_q_proj", "q_proj", "wq", (query_rows, config.hidden_size)),
            )
        else:
            queries = (
                self._down("linear_q_down_proj", "q_a_proj", "wq_a", latent.q_lora_rank),
                self._latent_norm("q_layernorm", "linear_q_up_proj", "q_a_layernorm", "q_a_norm", latent.q_lora_rank),
                self._same("linear_q_up_proj", "q_b_proj", "wq_b", (query_rows, latent.q_lora_rank)),
            )
        return (
            *queries,
            self._down(
                "linear_kv_down_proj",
                "kv_a_proj_with_mqa",
                "wkv_a_with_mqa",
                latent.kv_lora_rank + latent.qk_rope_head_dim,
            ),
            self._latent_norm("kv_layernorm", "linear_kv_up_proj", "kv_a_layernorm", "kv_a_norm", latent.kv_lora_rank),
            self._same("linear_kv_up_proj", "kv_b_proj", "wkv_b", (kv_rows, latent.kv_lora_rank)),
            self._attention_output(heads * latent.v_head_dim),
        )

    def _same(self, module: str, hf_module: str, own: str, shape: Shape) -> TensorRule:
        parts = self._of_attention(hf_module, own, shape[0])
        return self._linear(f"self_attention.{module}", shape, 0, parts)

    def _of_attention(self, hf_module: str, own: str, rows: int) -> tuple[HfPart, ...]:
        return whole(f"{self._there}self_attn.{hf_module}.weight", rows, f"{_OWN}attention.{own}.weight")

    def _down(self, module: str, hf_module: str, own: str, rows: int) -> TensorRule:
        """A down-projection: the local spec cuts its rows, Transformer Engine's has it whole on every rank."""
        name = f"{_HERE}self_attention.{module}.weight"
        local, te = (
            ModuleTensor(mcore_key=name, name=name, tp_axis=axis, extra_state=state_beside(name, name))
            for axis in (0, None)
        )
        parts = self._of_attention(hf_module, own, rows)
        return self._rule(local, te, (rows, self._config.hidden_size), parts)

    def _latent_norm(self, local: str, fused_into: str, hf_module: str, own: str, rows: int) -> TensorRule:
        """The norm of a latent: Transformer Engine fuses it into the projection behind it."""
        parts = self._of_attention(hf_module, own, rows)
        local_name = f"{_HERE}self_attention.{local}.weight"
        te_name = f"{_HERE}self_attention.{fused_into}.layer_norm_weight"
        return self._norm(local_name, local_name, te_name, te_name, parts)

    def _mlp(self) -> tuple[TensorRule, ...]:
        return self._feed_forward("mlp", "feed_forward", self._config.intermediate_size)

    def _feed_forward(self, module: str, own: str, ffn: int) -> tuple[TensorRule, ...]:
        hidden, there, own = self._config.hidden_size, f"{self._there}{module}.", f"{_OWN}{own}."
        names = (there + "gate_proj.weight", there + "up_proj.weight")
        halves = _gate_and_up(names, (own + "w1.weight", own + "w3.weight"), ffn)
        down = whole(there + "down_proj.weight", hidden, own + "w2.weight")
        return (
            self._linear(module + ".linear_fc1", (2 * ffn, hidden), 0, halves),
            self._linear(module + ".linear_fc2", (hidden, ffn), 1, down),
        )

    def _experts(self, experts: Experts) -> tuple[TensorRule, ...]:
        """The router, the experts and the shared ones.

        On disk, Mixtral's experts are single, Mistral 4's packed; in the memory of transformers 5 all are packed.
        """
        ffn, hidden = experts.intermediate_size, self._config.hidden_size
        there = self._there + ("mlp." if experts.packed else "block_sparse_moe.")
        own = _OWN if experts.packed else _OWN + "feed_forward."
        w1, w2, w3 = (f"{own}experts.{{expert}}.{name}.weight" for name in ("w1", "w2", "w3"))
        fc1 = whole(self._there + "mlp.experts.gate_up_proj", 2 * ffn, w1, w3)
        fc2 = whole(self._there + "mlp.experts.down_proj", hidden, w2)
        other_fc1 = other_fc2 = _NO_PARTS
        if not experts.packed:
            each, other_fc1, other_fc2 = there + "experts.{expert}.", fc1, fc2
            fc1 = _gate_and_up((each + "w1.weight", each + "w3.weight"), (w1, w3), ffn)
            fc2 = whole(each + "w2.weight", hidden, w2)
        router = f"{_HERE}mlp.router.weight"
        module = ModuleTensor(mcore_key=router, name=router, tp_axis=None)
        parts = whole(there + "gate.weight", experts.num_experts, own + "gate.weight")
        shared = experts.shared_intermediate_size
        return (
            self._expert_linear("linear_fc1", experts, (2 * ffn, hidden), 0, fc1, other_fc1),
            self._expert_linear("linear_fc2", experts, (hidden, ffn), 1, fc2, other_fc2),
            self._rule(module, module, (experts.num_experts, hidden), parts),
            *(self._feed_forward("mlp.shared_experts", "shared_experts", shared) if shared else ()),
        )

    def _expert_linear(
        self,
        module: str,
        experts: Experts,
        shape: Shape,
        tp_axis: int,
        parts: tuple[HfPart, ...],
        other_parts: tuple[HfPart, ...],
    ) -> TensorRule:
        key = f"{_HERE}{_EXPERT_KEY}{module}.weight"
        sequential = f"{_HERE}mlp.experts.local_experts.{{expert}}.{module}.weight"
        grouped = f"{_HERE}mlp.experts.{module}."
        return self._rule(
            ModuleTensor(mcore_key=key, name=sequential, tp_axis=tp_axis, extra_state=state_beside(key, sequential)),
            ModuleTensor(
                mcore_key=key,
                name=grouped + "weight{expert}",
                tp_axis=tp_axis,
                extra_state=(state_beside(key, "")[0], grouped + "_extra_state{nth_expert}"),
            ),
            shape,
            parts,
            num_experts=experts.num_experts,
            other_parts=other_parts,
        )

    def _input_norm(self, *, fused: bool) -> TensorRule:
        """The norm before attention, with ``fused`` a part of ``linear_qkv``."""
        parts = self._of_hidden("input_layernorm", "attention_norm")
        plain, within = _HERE + "input_layernorm.weight", _HERE + "self_attention.linear_qkv.layer_norm_weight"
        if fused:
            return self._norm(within, plain, within, within, parts, plain)
        return self._norm(plain, plain, plain, plain, parts)

    def _norm_before_mlp(self, *, fused: bool, as_fused: bool) -> TensorRule:
        """The norm before the MLP, with ``fused`` a part of ``linear_fc1``.

        Before experts it is none. The local spec still saves it as if (``as_fused``), except with latent attention.
        """
        parts = self._of_hidden("post_attention_layernorm", "ffn_norm")
        plain, within = _HERE + "pre_mlp_layernorm.weight", _HERE + "mlp.linear_fc1.layer_norm_weight"
        if fused:
            return self._norm(within, plain, within, within, parts, plain)
        return self._norm(within if as_fused else plain, plain, plain, plain, parts)

    def _of_hidden(self, hf_module: str, own: str) -> tuple[HfPart, ...]:
        return whole(f"{self._there}{hf_module}.weight", self._config.hidden_size, f"{_OWN}{own}.weight")

    def _norm(
        self, local_key: str, local_name: str, te_key: str, te_name: str, parts: tuple[HfPart, ...], *other_keys: str
    ) -> TensorRule:
        is_module = te_name.endswith("layernorm.weight")
        local = ModuleTensor(mcore_key=local_key, name=local_name, tp_axis=None)
        extra_state = state_beside(te_key, te_name) if is_module else None
        te = ModuleTensor(mcore_key=te_key, name=te_name, tp_axis=None, extra_state=extra_state)
        return self._rule(local, te, (parts[0].rows.hf_rows,), parts, other_keys=other_keys)

    def _linear(self, module: str, shape: Shape, tp_axis: int, parts: tuple[HfPart, ...]) -> TensorRule:
        name = f"{_HERE}{module}.weight"
        held = ModuleTensor(mcore_key=name, name=name, tp_axis=tp_axis, extra_state=state_beside(name, name))
        return self._rule(held, held, shape, parts)

    def _rule(
        self,
        local: ModuleTensor,
        te: ModuleTensor,
        shape: Shape,
        parts: tuple[HfPart, ...],
        *,
        num_experts: int | None = None,
        other_keys: tuple[str, ...] = (),
        other_parts: tuple[HfPart, ...] = (),
    ) -> TensorRule:
        return TensorRule(
            local=local,
            te=te,
            shape=shape,
            lead=(self._config.num_hidden_layers, *([] if num_experts is None else [num_experts])),
            place=Place.LAYER,
            parts=parts,
            glu_halves=2 if local.mcore_key.endswith("linear_fc1.weight") else 1,
            other_keys=other_keys,
            other_parts=other_parts,
        )
