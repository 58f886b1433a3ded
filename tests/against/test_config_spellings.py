"""Every spelling of a config.json is read as transformers reads it, or a warning names the difference.

The oracle is the configuration class of transformers: what it makes of a config.json must be what it makes of the one
that we write from what we read.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, run
from family_models import FAMILY, family_model
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Mistral3Config, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.config.families import FAMILIES

BASE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
_LATENT: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
#: What config.json of a family must say to us.
REQUIRED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": {},
    "ministral3": {},
    "mistral4": _LATENT,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
#: Keys, and what they may say in the files of transformers 4 and 5.
SPELLINGS: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (4,),
    "head_dim": (None, 10),
    "rms_norm_eps": (1e-3,),
    "max_position_embeddings": (128,),
    "tie_word_embeddings": (True, False),
    "sliding_window": (None, 7),
    "layer_types": (None, ["sliding_attention", "full_attention"]),
    "rope_theta": (123.0,),
    "rope_scaling": (
        *(None, {}, {"type": "default"}, YARN, YARN | {"rope_theta": 77.0, "llama_4_scaling_beta": 0.2}),
        *({"type": "yarn", "factor": 2.0}, YARN | {"factor": None}),
    ),
    "rope_parameters": (
        *(None, {}, {"rope_theta": 66.0}, {"rope_type": "default", "rope_theta": 55.0, "llama_4_scaling_beta": 0.3}),
        *(YARN | {"rope_theta": 88.0, "llama_4_scaling_beta": 0.2}, YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    ),
    "original_max_position_embeddings": (32,),
    "dtype": (None, "float16"),
    "torch_dtype": (None, "bfloat16"),
    "num_experts": (6,),
    "num_local_experts": (8,),
    "n_group": (2,),
    "norm_topk_prob": (False,),
    "routed_scaling_factor": (2.5,),
    "q_lora_rank": (None, 8),
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "per_layer_config": (None,),
    "use_cache": (False,),
    "transformers_version": ("4.57.1", "5.24.0"),
}
#: Key that is missing or ignored -> of which families transformers makes something else of it, so that we must name it.
NAMED: dict[str, tuple[str, ...]] = {"sliding_window": ("mistral", "ministral")}
IGNORED: dict[str, tuple[str, ...]] = {
    "layer_types": ("mistral", "mixtral", "ministral3", "mistral4"),
    "sliding_window": ("mistral4",),
}
_PLAIN = ("hidden_size", "num_hidden_layers", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
#: What only some families look at.
_OWN: dict[str, tuple[str, ...]] = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "mistral4": (
        *("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob"),
        *("routed_scaling_factor", "q_lora_rank", "moe_intermediate_size"),
    ),
}


def as_run(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers runs a language model of this config.json with."""
    config: Any = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    rope, layers, family = config.rope_parameters, config.num_hidden_layers, config.model_type
    found = {name: getattr(config, name) for name in (*_PLAIN, *_OWN.get(family, ()))}
    if rope["rope_type"] != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device=None)
        if family == "mistral4" and 2 * len(frequencies) != config.qk_rope_head_dim:
            raise ValueError("beside rope_scaling transformers forgets which part of a head it rotates")
        found |= {"frequencies": frequencies.tolist(), "scale": scale}
    if family in ("ministral3", "mistral4"):  # the others do not look at it: get_llama_4_attn_scale
        beta = rope.get("llama_4_scaling_beta") or None
        found |= {"beta": beta, "beta counts in": beta and rope["original_max_position_embeddings"]}
    window = None if family == "mistral4" else config.sliding_window  # modeling_mistral4.py does not look at it
    types = config.layer_types if family == "ministral" else ["sliding_attention"] * layers
    if family != "mistral4":  # latent attention has no groups
        found["num_key_value_heads"] = config.num_key_value_heads
        found["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    return found | {
        "windows": [window if kind == "sliding_attention" else None for kind in types],
        "rope_theta": rope["rope_theta"],
        "dtype": config.dtype,
    }


def read(raw: Mapping[str, Any]) -> tuple[dcm.MistralConfig, list[str]]:
    """What we read, and the warnings on the way."""
    handler = logging.handlers.BufferingHandler(capacity=100)
    logger = logging.getLogger("dist_ckpt_mistral")
    logger.addHandler(handler)
    try:
        return dcm.MistralConfig.from_hf(raw), [record.getMessage() for record in handler.buffer]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("family", REQUIRED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_spelling_is_read_as_transformers_reads_it(family: str, data: st.DataObject) -> None:
    """Keys that are missing, null, under an old name or two: the model is the same, or a warning names the key."""
    said = data.draw(
        st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in SPELLINGS.items()})
    )
    raw = {"model_type": family, **BASE, **REQUIRED[family], **said}
    try:
        expected = as_run(raw)
    except (
        TypeError,
        KeyError,
        ValueError,
        StrictDataclassError,
    ):  # what transformers cannot run, such as null heads of a Mixtral with YaRN
        reject()
    if family == "ministral" and raw.get("layer_types") and raw.get("sliding_window") is None:
        with pytest.raises(ConfigError, match="layer_types name sliding_attention, but sliding_window is null"):
            dcm.MistralConfig.from_hf(raw)
        return
    config, told = read(raw)
    if "sliding_window" not in raw and family in NAMED["sliding_window"]:
        assert expected["windows"] == [4096, 4096]
        expected["windows"] = [None, None]
        assert any(": sliding_window is missing" in line for line in told)
    for key, families in IGNORED.items():
        assert any(f": {key} is ignored" in line for line in told) is (raw.get(key) is not None and family in families)
    written = replace(config, hf_config=None).to_hf()
    assert as_run(written) == expected


#: What a config.json says besides, and what the warning says.
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "no window": ({"sliding_window": "missing"}, "sliding_window is missing and read as null"),
    "layer types": ({"layer_types": ["full_attention"] * 2}, "layer_types is ignored, as transformers does for model"),
    "scaled queries": (
        {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta is ignored, as transformers does for model_type 'mistral': got 0.1",
    ),
    "two dtypes": (
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        "torch_dtype is ignored beside dtype, as transformers 5 does: got 'bfloat16' beside 'float16'",
    ),
    "two scalings": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5.0}},
        "rope_parameters is ignored beside rope_scaling, as transformers 5 does",
    ),
    "two thetas": (
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}},
        "rope_theta is ignored beside rope_theta of rope_parameters, as transformers 5 does: got 7.0 beside 5.0",
    ),
    "two original contexts": (
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        "original_max_position_embeddings of rope_scaling is ignored beside original_max_position_embeddings",
    ),
    "two counts of experts": (
        {"model_type": "mixtral", **REQUIRED["mixtral"], "num_experts": 6},
        "num_local_experts is ignored beside num_experts, as transformers 5 does: got 4 beside 6",
    ),
    "a window of Mistral 4": (
        {"model_type": "mistral4", **_LATENT, "sliding_window": 7},
        "sliding_window is ignored, as transformers does for model_type 'mistral4': got 7",
    ),
    "code of its own": (
        {"auto_map": {"AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM"}},
        "auto_map names code of its own, which is not run: the model is read as MistralForCausalLM",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_what_is_not_read_as_it_stands_is_named(case: str) -> None:
    """One line for each, and none for a config.json that transformers 4 or 5 writes."""
    changes, expected = DIFFERENCES[case]
    raw = {"model_type": "mistral", **BASE, "sliding_window": None, **changes}
    raw = {name: value for name, value in raw.items() if value != "missing"}
    (line,) = read(raw)[1]
    assert line.startswith(f"the given configuration: {expected}")


@pytest.mark.parametrize("case", FAMILY)
def test_nothing_is_named_where_nothing_differs(case: str, tmp_path: Path) -> None:
    """What transformers saves is read without a warning, and so is what we write of it."""
    family_model(case).save_pretrained(tmp_path)
    config, told = read(json.loads((tmp_path / "config.json").read_text()))
    assert told == read(replace(config, hf_config=None).to_hf())[1] == []


@pytest.mark.parametrize("outer", [{}, {"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": None}])
@pytest.mark.parametrize("inner", [{}, {"dtype": "float32"}, {"dtype": None, "torch_dtype": "float32"}])
def test_the_dtype_of_a_multimodal_model(outer: dict[str, Any], inner: dict[str, Any]) -> None:
    """The outer level decides, under either name, as in transformers; where it says nothing, the inner one does."""
    text = {"model_type": "mistral", **BASE, "sliding_window": None}
    theirs = Mistral3Config(text_config={**text, **inner}, **outer)
    raw = {"model_type": "mistral3", "text_config": {**text, **inner}, "vision_config": {}, **outer}
    expected = theirs.dtype or theirs.text_config.dtype
    assert dcm.MistralConfig.from_hf(raw).dtype == (None if expected is None else str(expected).removeprefix("torch."))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"is_causal": False}, "is_causal=False in the given configuration is not supported: expected True"),
        ({"per_layer_config": {"1": {"hidden_size": 32}}}, "per_layer_config="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_transformers_runs_and_megatron_does_not(changes: dict[str, Any], expected: str) -> None:
    """Keys of any family that transformers acts upon, and that change the model, are refused by name."""
    raw = {"model_type": "mistral", **BASE, "sliding_window": None, **changes}
    with pytest.raises(UnsupportedModelError) as caught:
        dcm.MistralConfig.from_hf(raw)
    assert expected in str(caught.value)


def test_a_head_dim_that_latent_attention_contradicts() -> None:
    """Mistral 4 rotates a part of ``head_dim``: one that is not the sum of both parts is an error."""
    raw = {"model_type": "mistral4", **BASE, **_LATENT}
    assert dcm.MistralConfig.from_hf(raw | {"head_dim": 10}).head_dim == 10
    with pytest.raises(ConfigError, match=r"head_dim: expected 10 \(qk_nope_head_dim \+ qk_rope_head_dim\), got 16"):
        dcm.MistralConfig.from_hf(raw | {"head_dim": 16})


@pytest.mark.parametrize("case", ["mixtral", "ministral3, tied"])
@pytest.mark.parametrize(
    ("named", "is_read"),
    [
        *((given, True) for given in (None, [], "missing", ["MistralForCausalLM"], ["FSDPMixtralForCausalLM"])),
        *(([f"Mistral{head}"], False) for head in ("ForSequenceClassification", "ForTokenClassification", "Model")),
        *((given, False) for given in (["LlamaForCausalLM"], ["MistralForCausalLM", "Other"], "RewardModel", [3])),
    ],
)
def test_only_language_models_are_read(case: str, named: object, is_read: bool, tmp_path: Path) -> None:
    """``architectures`` with another head is refused by its name; nothing, or a class of the family, is read."""
    model = family_model(case)
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    own = config.pop("architectures")[0]
    path.write_text(json.dumps(config | ({} if named == "missing" else {"architectures": named})))
    if is_read:
        assert run("from-hf", tmp_path / "hf", tmp_path / "ckpt").code == 0
        return
    for arguments in (("from-hf", tmp_path / "hf", tmp_path / "ckpt"), ("megatron-args", tmp_path / "hf")):
        line = refusal(tmp_path, *arguments)
        assert f"architectures in {path}: expected {own} (" in line
        assert repr(named[-1] if isinstance(named, list) else named) in line
        assert line.endswith("Give the language model that it was made from.")


def test_every_family_is_held_against_transformers() -> None:
    """A family that is added needs spellings here."""
    assert set(REQUIRED) == set(FAMILIES)
    for name, family in FAMILIES.items():
        config: Any = AutoConfig.for_model(name)
        assert isinstance(config, PreTrainedConfig)
        assert family.renamed == {key: value for key, value in config.attribute_map.items() if "expert" in key}
