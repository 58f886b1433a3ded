"""What Megatron-Bridge writes beside the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

#: The model section that a provider leaves (megatron/bridge/models/mistral/mistral_provider.py, 0.6), as far as it
#: matters, for the model of the fixture td_0161.
PROVIDER = """
_target_: megatron.bridge.models.mistral.mistral_provider.MistralModelProvider
activation_func: {_call_: false, _target_: torch.nn.functional.silu}
add_bias_linear: false
add_qkv_bias: false
attention_dropout: 0.0
bf16: true
cp_comm_type: null
ffn_hidden_size: 96
fp16: false
gated_linear_unit: true
hidden_size: 64
kv_channels: 16
layernorm_epsilon: 1.0e-05
layernorm_zero_centered_gamma: false
make_vocab_size_divisible_by: 128
multi_latent_attention: false
normalization: RMSNorm
num_attention_heads: 8
num_layers: 4
num_moe_experts: null
num_query_groups: 4
params_dtype: {_call_: false, _target_: torch.bfloat16}
position_embedding_type: rope
qk_layernorm: false
rope_scaling: false
rope_scaling_factor: 1.0
rotary_base: 10000.0
rotary_interleaved: false
rotary_percent: 1.0
seq_length: 128
share_embeddings_and_output_weights: false
should_pad_vocab: true
vocab_size: 250
window_attn_skip_freq: null
window_size: null
yarn_beta_fast: null
yarn_mscale: null
yarn_rotary_scaling_factor: null
"""


def run_config(**changes: object) -> dict[str, Any]:
    """A run_config.yaml as it is parsed, with changes to its model; a change to ``...`` takes the field away."""
    model = yaml.safe_load(PROVIDER) | changes
    return {"model": {name: value for name, value in model.items() if value is not ...}, "train": {"train_iters": 5}}


def save_train_state(root: Path, step: int) -> None:
    """Save what ``TrainState.state_dict`` gives, as Bridge does (megatron/bridge/training/state.py, 0.6)."""
    counts = ("consumed_train_samples", "step", "skipped_train_samples", "consumed_valid_samples")
    state = {name: torch.tensor(step if name == "step" else 77, dtype=torch.int64) for name in counts}
    state["floating_point_operations_so_far"] = torch.tensor(1e18, dtype=torch.float64)
    state |= {name: torch.tensor(data=True) for name in ("do_train", "do_valid", "do_test")}
    torch.save(state, root / "latest_train_state.pt")
