"""Small LoRA adapters in directories of PEFT, written without torch and peft: the same files that peft writes.

``tests/against/test_adapters.py`` has peft load them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

#: Hugging Face's linear modules of a layer, each with those that Megatron keeps in one matrix with it.
MODULES: Final = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "fc1",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
RANK: Final = 4
ALPHA: Final = 6
FloatArray = npt.NDArray[np.float32]


def save_adapter(
    folder: Path,
    model: Path,
    *,
    shared_a: bool,
    modules: tuple[str, ...] = tuple(MODULES),
    dtype: type = np.float32,
    **config: object,
) -> Path:
    """Save an adapter of the model in a directory, with random A and B; ``config`` overrides adapter_config.json.

    With ``shared_a``, modules that are one matrix in Megatron have the same A.
    """
    folder.mkdir()
    random, tensors = np.random.default_rng(1), {}
    weights = load_file(model / "model.safetensors")
    layers = json.loads((model / "config.json").read_bytes())["num_hidden_layers"]
    for layer in range(layers):
        a: dict[str, Any] = {}
        for module in modules:
            rows, columns = weights[f"model.layers.{layer}.{module}.weight"].shape
            key = MODULES[module] if shared_a else module
            a.setdefault(key, random.standard_normal((RANK, columns)).astype(dtype))
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = a[key].copy()
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((rows, RANK)).astype(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {
        "alpha_pattern": {},
        "base_model_name_or_path": str(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps(content | config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text)
    (folder / "README.md").write_text("An adapter.\n")
    return folder


def merged_by_hand(model: Path, adapter: Path, scale: float) -> dict[str, npt.NDArray[Any]]:
    """The model's tensors with W + scale * B A, in float64 and rounded to bfloat16."""
    pairs = load_file(adapter / "adapter_model.safetensors")
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        value = weight.astype(np.float64)
        if f"{module}.lora_A.weight" in pairs:
            a, b = (pairs[f"{module}.lora_{each}.weight"].astype(np.float64) for each in "AB")
            value = value + scale * (b @ a)
        tensors[name] = value.astype(np.float32).astype(ml_dtypes.bfloat16)
    return tensors
