"""Several descriptions of one model: what they give differently is an error or a warning, never silence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import yaml
from bridge_files import run_config
from command_line import Outcome, refusal, run
from drawn_configs import configs
from family_models import FAMILY, SIZES
from genuine import folder, shards, truth
from hf_models import random_model, saved
from hypothesis import given
from safetensors.torch import load_file
from transformers import AutoConfig

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.model.args.megatron_args import args_disagreements, from_megatron_args, to_megatron_args
from dist_ckpt_mistral.model.config.agreement import disagreements

Change = dict[str, Any]

#: The model of the fixture td_0161.
TRUE: Final = dcm.MistralConfig.from_hf(folder("td_0161"))
#: Changes of a config.json that read the same stored rows as other weights; the fields that an error must name.
OF_WEIGHTS: Final[dict[str, Change]] = {
    "heads of another size": {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8},
    "other groups": {"num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 8},
    "a smaller vocabulary": {"vocab_size": 240},
    "a larger vocabulary": {"vocab_size": 256},
}
#: Changes that compute something else with the same weights.
OF_CONSTANTS: Final[dict[str, Change]] = {
    "rope_theta": {"rope_theta": 5000.0},
    "rms_norm_eps": {"rms_norm_eps": 0.125},
    "sliding_window": {"sliding_window": 7},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "max_position_embeddings": {"max_position_embeddings": 999},
}
#: Commands that open a checkpoint with ``--config`` (``CKPT``, output).
COMMANDS: Final[dict[str, Callable[[Path, Path], tuple[object, ...]]]] = {
    "to-hf": lambda at, out: ("to-hf", at, out),
    "to-hf --dry-run": lambda at, out: ("to-hf", at, out, "--dry-run"),
    "reshard": lambda at, out: ("reshard", at, out),
    "plan": lambda at, _: ("plan", at),
    "megatron-args": lambda at, _: ("megatron-args", at),
    "verify": lambda at, _: ("verify", at, at),
}


def with_record(root: Path) -> Path:
    """A checkpoint that only the record of an import describes."""
    dcm.from_hf(_hf(root), root / "ckpt", iteration=1)
    return _keeping(root / "ckpt" / "iter_0000001", "content_metadata")


def with_hf_file(root: Path) -> Path:
    """A checkpoint that only the config.json in its folder hf describes."""
    iteration = shutil.copytree(shards("td_0161"), root / "iter_0000001")
    (iteration / "hf").mkdir()
    shutil.copy(folder("td_0161") / "config.json", iteration / "hf")
    return iteration


def with_args(root: Path) -> Path:
    """A checkpoint that only Megatron-LM's args describe."""
    dcm.from_hf(_hf(root), root / "ckpt", iteration=1)
    return _keeping(root / "ckpt" / "iter_0000001", "args")


def with_run_config(root: Path) -> Path:
    """A checkpoint that only Megatron-Bridge's run_config.yaml describes."""
    iteration = shutil.copytree(shards("td_0161"), root / "iter_0000001")
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(run_config(seq_length=TRUE.max_position_embeddings)))
    return iteration


SOURCES: Final = {
    "the Hugging Face configuration inside the checkpoint": with_record,
    "hf/config.json": with_hf_file,
    "the args inside the checkpoint": with_args,
    "run_config.yaml inside the checkpoint": with_run_config,
}


def _hf(root: Path) -> Path:
    """The model of td_0161 as a Hugging Face directory."""
    dcm.to_hf(shards("td_0161"), root / "hf", config=folder("td_0161"))
    return root / "hf"


def _keeping(iteration: Path, kept: str) -> Path:
    """Take out of an import what describes the model, but for one key of its common state."""
    state = torch.load(iteration / "common.pt", weights_only=False)
    for key in {"args", "content_metadata"} - {kept}:
        del state[key]
    torch.save(state, iteration / "common.pt")
    (iteration / "run_config.yaml").unlink()
    shutil.rmtree(iteration / "hf")
    shutil.rmtree(iteration.parent / "hf")
    return iteration


def given_json(at: Path, **changes: object) -> Path:
    """The config.json of td_0161 with changes."""
    content = json.loads((folder("td_0161") / "config.json").read_bytes()) | changes
    if "rope_scaling" in changes:
        content.pop("rope_parameters", None)
    if "rope_theta" in changes and "rope_parameters" in content:
        content["rope_parameters"] |= {"rope_theta": changes["rope_theta"]}
    at.write_text(json.dumps(content))
    return at


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of the same model for every way of describing it."""
    return {source: make(tmp_path_factory.mktemp("described")) for source, make in SOURCES.items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", OF_WEIGHTS)
def test_what_reads_rows_otherwise_is_refused(
    change: str, command: str, source: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A --config that reads the stored rows as other weights is refused: every field, both values and both sources."""
    config = given_json(tmp_path / "given.json", **OF_WEIGHTS[change])
    line = refusal(tmp_path, *COMMANDS[command](checkpoints[source], tmp_path / "out"), "--config", config)
    assert source in line
    assert str(config) in line
    assert "--override-config" in line
    for name, value in OF_WEIGHTS[change].items():
        assert f"{name}: {value} and {getattr(TRUE, name)}" in line


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("change", OF_CONSTANTS)
def test_what_computes_otherwise_is_named(
    change: str, source: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Constants of --config that differ from the checkpoint's are named with both values, and the export goes on."""
    config = given_json(tmp_path / "given.json", **OF_CONSTANTS[change])
    outcome = run("to-hf", checkpoints[source], tmp_path / "out", "--config", config)
    assert outcome.code == 0
    [line] = [line for line in outcome.err if "says otherwise" in line]
    assert source in line
    assert f"{change}: " in line
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == json.loads(config.read_bytes())


@pytest.mark.parametrize("source", SOURCES)
def test_descriptions_that_agree_are_silent(source: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The model's own config.json beside any other description gives no warning, and the true tensors."""
    outcome = run("to-hf", checkpoints[source], tmp_path / "out", "--config", folder("td_0161") / "config.json")
    assert (outcome.code, [line for line in outcome.err if "otherwise" in line]) == (0, [])
    exported, true = load_file(tmp_path / "out" / "model.safetensors"), truth("td_0161")
    assert exported.keys() == true.keys()
    assert all(torch.equal(exported[name], true[name]) for name in true)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_override_is_asked_for_and_named(command: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """With --override-config the given configuration counts, and what it overrides is still named."""
    config = given_json(tmp_path / "given.json", **OF_WEIGHTS["heads of another size"])
    arguments = COMMANDS[command](checkpoints["the args inside the checkpoint"], tmp_path / "out")
    outcome = run(*arguments, "--config", config, "--override-config")
    assert outcome.code == 0
    assert any("num_attention_heads: 16 and 8" in line for line in outcome.err)


def test_an_override_needs_a_configuration(tmp_path: Path) -> None:
    """--override-config alone is wrong usage."""
    assert run("to-hf", tmp_path / "a", tmp_path / "b", "--override-config").code == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda at, config, out: dcm.to_hf(at, out, config=config),
        lambda at, config, out: dcm.reshard(at, out, dcm.ParallelLayout(), config=config),
        lambda at, config, _: dcm.plan_reading(at, dcm.ParallelLayout(), config=config),
        lambda at, config, _: dcm.open_checkpoint(at, config=config),
        lambda at, config, _: dcm.compare(at, at, config=config),
        lambda at, config, _: dcm.megatron_args(at, config=config),
    ],
)
def test_the_library_compares_too(
    call: Callable[[Path, object, Path], object], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Every function that takes ``config`` refuses a contradiction, and takes it as a ConfigOverride."""
    config = dcm.MistralConfig.from_hf(
        json.loads(given_json(tmp_path / "given.json", **OF_WEIGHTS["heads of another size"]).read_bytes())
    )
    at = checkpoints["run_config.yaml inside the checkpoint"]
    with pytest.raises(ConfigError, match="num_attention_heads: 16 and 8"):
        call(at, config, tmp_path / "out")
    call(at, dcm.ConfigOverride(config), tmp_path / "out")


@pytest.mark.parametrize("field", ["apply_layernorm_1p", "rotary_interleaved", "add_qkv_bias"])
def test_args_of_another_architecture_stay_refused(field: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """What the args say of weights that no model of the family has is refused with --config as it is without."""
    copied = shutil.copytree(checkpoints["the args inside the checkpoint"], tmp_path / "ckpt")
    state = torch.load(copied / "common.pt", weights_only=False)
    for name in _NAMES[field]:
        setattr(state["args"], name, True)
    torch.save(state, copied / "common.pt")
    config = ("--config", folder("td_0161") / "config.json")
    for more in ((), config):
        assert f"{field}=True" in refusal(tmp_path, "to-hf", copied, tmp_path / "out", *more)
    outcome = run("to-hf", copied, tmp_path / "out", *config, "--override-config")
    assert outcome.code == 0
    assert any(field in line for line in outcome.err)


#: What a field of the args is called in Megatron-LM 0.12 to 0.19.
_NAMES: Final = {
    "apply_layernorm_1p": ("apply_layernorm_1p", "layernorm_zero_centered_gamma"),
    "rotary_interleaved": ("rotary_interleaved",),
    "add_qkv_bias": ("add_qkv_bias",),
}


def test_two_names_of_one_field_must_agree() -> None:
    """Args that give a value under its old and its new name, and differently, are refused with both."""
    args = to_megatron_args(TRUE, dtype="bfloat16", tp=1, pp=1) | {"apply_layernorm_1p": True}
    with pytest.raises(ConfigError, match="layernorm_zero_centered_gamma=False but apply_layernorm_1p=True"):
        from_megatron_args(args)
    with pytest.raises(ConfigError, match="layernorm_zero_centered_gamma=False but apply_layernorm_1p=True"):
        args_disagreements(TRUE, args, "the args")


def test_descriptions_inside_a_checkpoint_are_compared(tmp_path: Path) -> None:
    """Without --config, too: the record of an import and args that say otherwise are an error that names both."""
    dcm.from_hf(saved(random_model(), tmp_path / "hf"), tmp_path / "ckpt")
    common = tmp_path / "ckpt" / "release" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["args"].num_query_groups = 4
    torch.save(state, common)
    line = refusal(tmp_path, "to-hf", tmp_path / "ckpt", tmp_path / "out")
    assert "the Hugging Face configuration inside the checkpoint and the args inside the checkpoint disagree" in line
    assert "num_key_value_heads: 2 and 4" in line


def test_rows_that_no_padding_explains_are_refused(tmp_path: Path) -> None:
    """256 rows in one chunk pad a vocabulary of 250, as at TP1, but not one of 100: the others may be trained."""
    at = dcm.reshard(shards("td_0161"), tmp_path / "ckpt", dcm.ParallelLayout(), config=folder("td_0161")).output
    config = given_json(tmp_path / "given.json", vocab_size=100)
    line = refusal(tmp_path, "to-hf", at, tmp_path / "out", "--config", config)
    assert "embedding.word_embeddings.weight" in line
    assert "vocab_size=100" in line
    with pytest.raises(TensorMismatchError, match="got 256"):
        dcm.open_checkpoint(at, config=config)
    for tp in (1, 2, 4):
        out = dcm.reshard(at, tmp_path / f"tp{tp}", dcm.ParallelLayout(tp=tp), config=folder("td_0161")).output
        dcm.open_checkpoint(out, config=folder("td_0161"))


def test_dropped_rows_are_said(tmp_path: Path) -> None:
    """The summary says which rows of the vocabulary were left out, and why."""
    outcome = run("to-hf", shards("td_0161"), tmp_path / "out", "--config", folder("td_0161"))
    assert "dropped embedding.word_embeddings.weight[250:256], output_layer.weight[250:256]" in outcome.out[0]
    assert outcome.out[0].endswith("rows that pad the vocabulary")


def _pair(tmp_path: Path, **changes: object) -> Outcome:
    """Compare two Hugging Face directories with the same tensors, of which the second has another config.json."""
    hf = _hf(tmp_path)
    other = shutil.copytree(hf, tmp_path / "other")
    given_json(other / "config.json", **changes)
    return run("verify", hf, other)


def test_verify_says_where_configurations_differ(tmp_path: Path) -> None:
    """Equal tensors under another rope_theta are equal, and the value is named; under other heads they are not."""
    outcome = _pair(tmp_path, rope_theta=5000.0)
    assert outcome.code == 0
    assert "the configurations of A and B differ in rope_theta: 10000.0 and 5000.0" in outcome.out


def test_verify_finds_other_heads(tmp_path: Path) -> None:
    """The same bits read as other heads are another model: exit code 3."""
    outcome = _pair(tmp_path, **OF_WEIGHTS["heads of another size"])
    assert outcome.code == 3
    assert "the configurations of A and B differ in num_attention_heads: 8 and 16" in outcome.out
    assert outcome.out[-1].startswith("DIFFERENT in configuration")


@given(config=configs())
def test_args_of_a_configuration_agree_with_it(config: dcm.MistralConfig) -> None:
    """For every configuration that Megatron can express, the args that an import writes agree with it."""
    try:
        args = to_megatron_args(config, dtype="bfloat16", tp=1, pp=1)
    except UnsupportedModelError:
        return
    assert args_disagreements(config, args, "the args") == []
    assert args_disagreements(config, {}, "no args") == []


#: Keys of config.json that are no field of a MistralConfig by that name, with another value.
_BY_KEY: Final[dict[str, Change]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "mistral4": {"n_routed_experts": 8, "norm_topk_prob": False, "routed_scaling_factor": 2.0, "v_head_dim": 16},
    "ministral": {"eos_token_id": 9},
    "ministral3, tied": {"pad_token_id": 3},
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in _BY_KEY.items() for name in names])
def test_values_are_named_as_in_config_json(case: str, name: str) -> None:
    """A value goes by its key in config.json, and once; one that is left out counts as transformers fills it in."""
    content = SIZES | FAMILY[case]
    other = content | {name: _BY_KEY[case][name]}
    filled_in = AutoConfig.for_model(**copy.deepcopy(content)).to_dict()[name]
    [found] = disagreements(*(dcm.MistralConfig.from_hf(each) for each in (content, other)))
    assert str(found) == f"{name}: {'none' if filled_in is None else filled_in} and {other[name]}"


def test_the_sections_of_a_multimodal_configuration_are_compared() -> None:
    """Values inside text_config and vision_config are compared, too, those that are no sizes included."""
    vision = {"model_type": "pixtral", "hidden_size": 16, "image_size": 28}
    text = SIZES | {"model_type": "mistral", "sliding_window": None, "eos_token_id": 2}
    given, other = (
        dcm.MistralConfig.from_hf({"model_type": "mistral3", "text_config": t, "vision_config": v})
        for t, v in ((text, vision), (text | {"eos_token_id": 7}, vision | {"hidden_size": 32, "image_size": 56}))
    )
    assert {str(each) for each in disagreements(given, other)} == {
        "eos_token_id: 2 and 7",
        "vision_config.hidden_size: 16 and 32",
        "vision_config.image_size: 28 and 56",
    }


def test_a_part_that_one_lacks_is_spelled_out() -> None:
    """YaRN in one configuration alone is named with what it says there."""
    plain = SIZES | {"model_type": "mistral", "sliding_window": None}
    scaled = plain | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
    [found] = disagreements(dcm.MistralConfig.from_hf(plain), dcm.MistralConfig.from_hf(scaled))
    assert str(found).startswith("yarn: none and {'factor': 4.0, 'original_max_position_embeddings': 16, ")


@pytest.mark.parametrize("case", FAMILY)
def test_every_value_of_a_family_is_compared(case: str) -> None:
    """A change of any size or constant that a family's config.json has is named, between two of them."""
    content = SIZES | FAMILY[case]
    config = dcm.MistralConfig.from_hf(content)
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            other = dcm.MistralConfig.from_hf(content | {name: 2 * value})
        except ConfigError:
            continue  # the sizes no longer fit each other
        if other != config:
            assert disagreements(config, other), name
