"""YaRN as config.json describes it, against transformers and Megatron, which compute with it."""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral4.modeling_mistral4 import yarn_apply_mscale
from yarn_cases import BASE, CASES, YARN

from dist_ckpt_mistral.errors import ConfigError, UnsupportedModelError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.yarn import YarnScaling


def read(case: str) -> tuple[MistralConfig, YarnScaling]:
    """The configuration of a case, and its YaRN scaling."""
    config = MistralConfig.from_hf(BASE | CASES[case])
    assert config.yarn is not None
    return config, config.yarn


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_transformers(case: str) -> None:
    """What we make of a config.json and what we write back rotate and scale as the original does in transformers."""
    config, yarn = read(case)
    written = {name: value for name, value in BASE.items() if name != "rope_theta"}
    written |= {"rope_theta": config.rope_theta, "rope_scaling": yarn.to_hf()}
    frequencies = []
    for raw in (BASE | CASES[case], json.loads(json.dumps(written))):
        theirs = transformers.MistralConfig(**json.loads(json.dumps(raw)))
        frequencies.append(ROPE_INIT_FUNCTIONS["yarn"](theirs, device=None))
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
        assert theirs.rope_parameters.get("truncate", True) is yarn.truncate
    assert frequencies[0][0].equal(frequencies[1][0])
    assert yarn.attention_scale == frequencies[0][1] == frequencies[1][1]


@pytest.mark.megatron
@pytest.mark.parametrize("case", CASES)
def test_megatron_scales_the_same(case: str) -> None:
    """With the values we give it, Megatron multiplies cosines and sines with what transformers does."""
    _, yarn = read(case)
    theirs = megatron_yarn()._yarn_get_concentration_factor(yarn.factor, *yarn.megatron_mscales)  # noqa: SLF001
    assert theirs == pytest.approx(yarn.attention_scale, rel=1e-15)


@pytest.mark.megatron
@pytest.mark.parametrize("case", CASES)
def test_megatron_scales_latent_attention_the_same(case: str) -> None:
    """With the values for latent attention it also scales what is attended to as transformers' Mistral 4 does."""
    _, yarn = read(case)
    mscale, mscale_all_dim = yarn.latent_mscales
    theirs = megatron_yarn()._yarn_get_concentration_factor(yarn.factor, mscale, mscale_all_dim)  # noqa: SLF001
    assert theirs == pytest.approx(yarn.attention_scale, rel=1e-15)
    scores = megatron_yarn()._yarn_get_mscale(yarn.factor, mscale_all_dim) ** 2  # noqa: SLF001
    assert scores == pytest.approx(yarn_apply_mscale(yarn.to_hf(), 1.0), rel=1e-15)


def megatron_yarn() -> Any:  # noqa: ANN401  (megatron is untyped)
    """The module in which Megatron computes YaRN."""
    with warnings.catch_warnings():  # importing megatron warns of much that is not ours to mend
        warnings.simplefilter("ignore")
        return importlib.import_module("megatron.core.models.common.embeddings.yarn_rotary_pos_embedding")


def test_a_config_without_original_writes_its_own() -> None:
    """A configuration that came from elsewhere writes a config.json that reads back as the same."""
    config, _ = read("mscales")
    bare = {name: getattr(config, name) for name in config.__slots__ if name != "hf_config"}
    assert MistralConfig.from_hf(MistralConfig(**bare).to_hf()) == config


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default", "rope_theta": 5.0}, {"type": "default"}])
def test_plain_embeddings_are_not_scaled(rope: dict[str, Any] | None) -> None:
    """Nothing, an empty object and the default type mean no scaling."""
    assert MistralConfig.from_hf(BASE | {"rope_scaling": rope}).yarn is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "llama3"}}, "rope_type 'llama3'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\]"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type .full_attention."),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": [1]}, r"partial_rotary_factor \[1\]"),
    ],
)
def test_other_rotary_embeddings_are_refused(change: dict[str, Any], message: str) -> None:
    """What no Mistral model has is refused by its name."""
    with pytest.raises(UnsupportedModelError, match=message):
        MistralConfig.from_hf(BASE | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"factor": "8"}, "factor must be a positive number, got '8'"),
        ({"factor": True, "beta_fast": -1}, "factor must be a positive number, got True; beta_fast must be a positive"),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, "beta_fast=1.0 must be at least beta_slow=2.0"),
        ({"mscale": -1.0, "mscale_all_dim": True}, "mscale must be a number .* got -1.0; mscale_all_dim .* got True"),
        ({"attention_factor": "1"}, "attention_factor must be a number of at least 0 or null, got '1'"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings must be a positive integer, got 0"),
        ({"truncate": 1}, "truncate must be true or false, got 1"),
    ],
)
def test_values_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    """Every value is checked, all are reported together, and the message says where they stand."""
    with pytest.raises(ConfigError, match=message + ".*in the given configuration"):
        MistralConfig.from_hf(BASE | {"rope_scaling": YARN | change})


def test_a_factor_is_needed() -> None:
    """Without a factor there is nothing to stretch by; a rope_scaling that is no object is none either."""
    with pytest.raises(ConfigError, match="needs a factor"):
        MistralConfig.from_hf(BASE | {"rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(ConfigError, match="expected an object, got 'yarn'"):
        MistralConfig.from_hf(BASE | {"rope_scaling": "yarn"})


def test_a_scale_that_megatron_cannot_express_is_refused() -> None:
    """Megatron derives the scale from the stretching: without stretching there is none."""
    yarn = YarnScaling(factor=1.0, original_max_position_embeddings=32, attention_factor=1.5)
    with pytest.raises(UnsupportedModelError, match=r"attention_factor=1\.5 with factor=1\.0"):
        _ = yarn.megatron_mscales
    with pytest.raises(UnsupportedModelError, match=r"attention_factor=1\.5 with factor=1\.0"):
        _ = yarn.latent_mscales
