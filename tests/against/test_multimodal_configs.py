"""What config.json says of a multimodal model, as transformers takes it: shapes, ties, leftovers; what is refused."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from multimodal_models import DENSE, MULTIMODAL, VISION, logits
from plain_models import contents
from safetensors.torch import save_file
from torch_reading import hf_tensors
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.model.table.table import tensor_table


@pytest.mark.parametrize(
    ("vision", "more"),
    [
        ({"hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "patch_size": None}, {}),
        ({"num_channels": 1, "patch_size": 5}, {"vision_feature_layer": [-1, -2], "multimodal_projector_bias": True}),
        ({}, {"spatial_merge_size": 3, "vision_feature_layer": -2}),
    ],
    ids=["defaults", "several layers", "merged otherwise"],
)
def test_shapes_follow_the_config(vision: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    """What config.json says or leaves out of the tower and the projector gives the shapes of transformers' model."""
    raw = json.loads((MULTIMODAL[DENSE].save(tmp_path / "hf") / "config.json").read_text()) | more
    told = {name: value for name, value in (raw["vision_config"] | vision).items() if value is not None}
    raw["vision_config"] = {name: value for name, value in told.items() if name != "rope_parameters"}
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(Mistral3Config(**raw))
    expected = {name.removeprefix("model."): tuple(each.shape) for name, each in model.state_dict().items()}
    table = tensor_table(dcm.MistralConfig.from_hf(raw)).hf_tensors()
    assert {name: tensor.shape for name, tensor in table.items() if name.startswith(VISION)} == {
        name: shape for name, shape in expected.items() if name.startswith(VISION)
    }


UNSAID = "unsaid"
TIES = (True, False, UNSAID)
#: All that both levels may say, with a head and without: of one model each, in turn, and each value meets all models.
SAID = [
    ([*MULTIMODAL][(number + number // 3) % len(MULTIMODAL)], outer, inner, has_head)
    for number, (has_head, outer, inner) in enumerate(itertools.product((True, False), TIES, TIES))
]


def save_saying(folder: Path, case: str, outer: object, inner: object, *, has_head: bool) -> Path:
    """A model of a case, with or without a head of its own, whose config.json says this of its ties on both levels."""
    replace(MULTIMODAL[case], tied=not has_head, unsaid=()).save(folder)
    config = json.loads((folder / "config.json").read_text())
    for level, said in ((config, outer), (config["text_config"], inner)):
        level["tie_word_embeddings"] = said
        if said is UNSAID:
            del level["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("case", "outer", "inner", "has_head"), SAID)
def test_embeddings_are_tied_as_transformers_runs_them(
    case: str, outer: object, inner: object, has_head: bool, tmp_path: Path
) -> None:
    """Whatever both levels say of ties: import, flags and export give the model that transformers runs, or refuse.

    Refused are a head that config.json asks for and that is not there, and one that it says twice is none.
    """
    hf = save_saying(tmp_path / "hf", case, outer, inner, has_head=has_head)
    model, info = Mistral3ForConditionalGeneration.from_pretrained(hf, output_loading_info=True)
    is_tied = model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()
    if info["missing_keys"]:
        assert (outer, has_head) == (False, False)
        assert "1 tensor is missing: language_model.lm_head.weight" in refusal(tmp_path, "from-hf", hf, tmp_path / "ck")
        return
    if has_head and outer is not False and inner is True:
        line = refusal(tmp_path, "from-hf", hf, tmp_path / "ck")
        assert "'language_model.lm_head.weight'" in line
        assert "contradicts itself" in line
        assert "The configuration ties them" in line
        return
    assert is_tied is not has_head
    dcm.from_hf(hf, tmp_path / "ck")
    for path in (hf, tmp_path / "ck"):
        flags = dcm.megatron_args(path).flags
        assert ("--untie-embeddings-and-output-weights" in flags) is has_head
        assert dcm.inspect(path).problems == ()
    for number, config in enumerate((None, hf, hf / "config.json")):
        dcm.to_hf(tmp_path / "ck", tmp_path / f"out{number}", config=config)
        assert torch.equal(logits(tmp_path / f"out{number}"), logits(hf))
    written = json.loads((tmp_path / "out0" / "config.json").read_text())
    if written != json.loads((hf / "config.json").read_text()):
        assert [level["tie_word_embeddings"] for level in (written, written["text_config"])] == [is_tied, is_tied]


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        *((False, inner, False) for inner in TIES),
        *((outer, inner, inner) for outer in (True, UNSAID) for inner in (True, False)),
        (True, UNSAID, True),
        (UNSAID, UNSAID, False),
    ],
)
def test_what_config_json_alone_says_of_ties(*, outer: object, inner: object, tied: bool, tmp_path: Path) -> None:
    """Without weights the text model's own value counts beside an outer true, which transformers 5 writes by itself."""
    hf = save_saying(tmp_path / "hf", "ministral 3", outer, inner, has_head=True)
    (hf / "model.safetensors").unlink()
    assert dcm.MistralConfig.from_hf(hf).tie_word_embeddings is tied
    assert ("--untie-embeddings-and-output-weights" in dcm.megatron_args(hf).flags) is not tied


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantization_left_over_inside(key: str, tmp_path: Path) -> None:
    """What text_config of a merged model still says of quantization goes, and the weights are read as they are."""
    hf = MULTIMODAL[DENSE].save(tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    inside = config | {"text_config": config["text_config"] | {key: {"quant_method": "bitsandbytes"}}}
    (hf / "config.json").write_text(json.dumps(inside))
    dcm.from_hf(hf, tmp_path / "ckpt")
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_ties_that_transformers_5_only_claims(tmp_path: Path) -> None:
    """Resaved by transformers 5, Mistral Small 3.1 claims ties that its files do not have: it is what it was."""
    original = MULTIMODAL[DENSE].save(tmp_path / "original")
    Mistral3ForConditionalGeneration.from_pretrained(original).save_pretrained(tmp_path / "resaved")
    config = json.loads((tmp_path / "resaved" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    dcm.from_hf(tmp_path / "resaved", tmp_path / "ckpt")
    assert dcm.compare(tmp_path / "ckpt", original).is_equal
    dcm.to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "resaved")


BAD_TENSORS: dict[str, tuple[dict[str, tuple[int, ...] | None], str]] = {
    "missing": ({"vision_tower.ln_pre.weight": None}, "1 tensor is missing: vision_tower.ln_pre.weight"),
    "unknown": ({"vision_tower.ln_post.weight": (16,)}, "1 tensor is unknown to the table: vision_tower.ln_post"),
    "another shape": (
        {"multi_modal_projector.linear_1.weight": (24, 17)},
        "shape of multi_modal_projector.linear_1.weight: expected [24, 16], got [24, 17]",
    ),
    "a bias too many": ({"multi_modal_projector.linear_2.bias": None}, "multi_modal_projector.linear_2.bias"),
    "twice": ({"model.vision_tower.ln_pre.weight": (16,)}, "the same tensor as 'model.vision_tower.ln_pre.weight'"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_vision_that_does_not_fit(case: str, tmp_path: Path) -> None:
    """Missing, unknown and misshapen tensors of the tower and the projector are errors, as of the language model."""
    changes, expected = BAD_TENSORS[case]
    tensors = hf_tensors(MULTIMODAL[DENSE].save(tmp_path / "hf"))
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert expected in refusal(tmp_path, "from-hf", tmp_path / "hf", tmp_path / "ckpt")
    assert expected in str(dcm.inspect(tmp_path / "hf").problems)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vision_config": None}, "has no vision_config"),
        ({"text_config": None}, "has no text_config"),
        ({"vision_config": {"model_type": "siglip"}}, "model_type 'siglip' in vision_config of "),
        ({"vision_config": {"hidden_size": "16", "patch_size": 0}}, "hidden_size must be a positive integer, got '16'"),
        ({"spatial_merge_size": -1}, "merged_patches must be a positive integer, got -1"),
        ({"multimodal_projector_bias": 1}, "projector_bias must be true or false, got 1"),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """A config.json whose tower or projector does not fit is refused with its reason."""
    path = MULTIMODAL[DENSE].save(tmp_path / "hf") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert expected in refusal(tmp_path, "from-hf", tmp_path / "hf", tmp_path / "out")
