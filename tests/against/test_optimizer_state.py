"""Optimizer state as states of the parameters: read in every format, exported as master weights, refused by name."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from command_line import run
from genuine import folder
from hf_models import megatron_tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch_reading import described, edited_metadata, load_in_own_shapes, read_metadata

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import ConfigError, FormatError, TensorMismatchError
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.gather.index import IndexedTensor, boxes_of_range, unblocked
from dist_ckpt_mistral.mapping.source import open_megatron
from dist_ckpt_mistral.model.config.mistral_config import chosen_config
from dist_ckpt_mistral.model.table.rules import ParamState

#: Genuine checkpoints with readable optimizer state, and what each calls the master weights.
READABLE: Final = {
    "opt_fr_0192": "param",
    "opt_plain_0161": "fp32_param",
    "opt_fsms_0140": "fp32_param",
    "opt_fsms_cut_0140": "fp32_param",
}
SIZES: Final[dict[str, Any]] = {"num_key_value_heads": 4, "head_dim": 16}


def full_state(case: str, name: str) -> dict[str, torch.Tensor]:
    """A state of every parameter as torch's DCP loads it, by the key and in the shape of the parameter."""
    prefix, tensors = f"optimizer.state.{name}.", load_in_own_shapes(folder(case) / "checkpoint")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def real_rows(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same without the rows that pad the vocabulary of 250 tokens to 256, in embedding and head."""
    vocabularies = [key for key in state if key.startswith(("embedding.", "output_layer."))]
    assert [len(state[key]) for key in vocabularies] == [256, 256]
    return state | {key: state[key][:250] for key in vocabularies}


def exported(case: str, to: Path, **options: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  (of to_hf)
    """The tensors of an export."""
    dcm.to_hf(folder(case) / "checkpoint", to, config=folder(case), **options)
    tensors: dict[str, torch.Tensor] = load_file(to / "model.safetensors")
    return tensors


def as_megatron_stores(hf: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    """Exported tensors in Megatron's order of rows, in torch operations."""
    config = dcm.MistralConfig.from_hf(folder(case))
    return megatron_tensors(
        hf, SIZES | {"num_hidden_layers": config.num_hidden_layers, "hidden_size": 64, "tie_word_embeddings": False}
    )


@pytest.mark.parametrize("case", READABLE)
def test_master_weights_are_what_dcp_loads(case: str, tmp_path: Path) -> None:
    """The float32 master weights leave bit for bit as torch's DCP loads them, padding rows aside."""
    hf = exported(case, tmp_path / "hf", weights="master")
    expected = real_rows(full_state(case, READABLE[case]))
    assert {tensor.dtype for tensor in hf.values()} == {torch.float32}
    assert described(as_megatron_stores(hf, case)) == described(expected)
    assert dcm.MistralConfig.from_hf(tmp_path / "hf").dtype == "float32"


@pytest.mark.parametrize("case", READABLE)
def test_master_weights_round_to_the_weights(case: str, tmp_path: Path) -> None:
    """After a step Megatron rounds the master weights to the weights: so do those that were exported."""
    hf = exported(case, tmp_path / "hf", weights="master")
    truth = {name: each for name, each in load_file(folder(case) / "truth.safetensors").items() if "RAW" not in name}
    assert described({name: tensor.bfloat16() for name, tensor in hf.items()}) == described(truth)
    assert any((hf[name] != tensor.float()).any() for name, tensor in truth.items())
    rounded = exported(case, tmp_path / "bf16", weights="master", dtype="bfloat16")
    assert described(rounded) == described(truth)


@pytest.mark.parametrize("case", READABLE)
@pytest.mark.parametrize(("state", "name"), [(ParamState.EXP_AVG, "exp_avg"), (ParamState.EXP_AVG_SQ, "exp_avg_sq")])
def test_moments_are_what_dcp_loads(case: str, state: ParamState, name: str) -> None:
    """The moments are found by the same rules as the weights, whatever the format, in float32."""
    source = open_megatron(folder(case) / "checkpoint", config=chosen_config(folder(case)), state=state)
    with dcm.LazyCheckpoint(source) as moments:
        read = as_megatron_stores(dict(moments), case)
    assert described(read) == described(real_rows(full_state(case, name)))


def test_the_cut_case_is_cut() -> None:
    """In the genuine checkpoint of four data-parallel ranks, tensors are cut in the middle of rows."""
    metadata: Any = read_metadata(folder("opt_fsms_cut_0140") / "checkpoint")
    chunks = metadata.state_dict_metadata["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"].chunks
    assert len(chunks) == 2
    assert chunks[0].sizes[-1] % 96


def test_command_line(tmp_path: Path) -> None:
    """``to-hf --weights master`` exports float32; where there are none it says why, and what to do."""
    case = folder("opt_fr_0192")
    done = run("to-hf", case / "checkpoint", tmp_path / "hf", "--config", case, "--weights", "master")
    assert done.code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.float32}
    case = folder("opt_dr_0161")
    refused = run("to-hf", case / "checkpoint", tmp_path / "no", "--config", case, "--weights", "master")
    assert refused.code == 1
    assert (
        "holds no master weights that can be read: its optimizer state is in the format dp_reshardable"
        in refused.err[-1]
    )
    assert "save with --dist-ckpt-optim-fully-reshardable" in refused.err[-1]
    assert not (tmp_path / "no").exists()


def test_without_master_weights(tmp_path: Path) -> None:
    """No optimizer state, and an optimizer without master weights (of a float32 model), are told apart."""
    with pytest.raises(TensorMismatchError, match="no master weights that can be read: it has no optimizer state"):
        exported("td_0161", tmp_path / "hf", weights="master")
    with pytest.raises(ConfigError, match="weights='masters' is not supported: expected one of model, master"):
        exported("td_0161", tmp_path / "hf", weights="masters")
    directory = shutil.copytree(folder("opt_plain_0161") / "checkpoint", tmp_path / "ckpt")
    with edited_metadata(directory) as metadata:
        for entries in (metadata.state_dict_metadata, metadata.storage_data):
            for key in [key for key in entries if "fp32_param" in getattr(key, "fqn", str(key))]:
                del entries[key]
    with pytest.raises(TensorMismatchError, match=r"no master weights .* its optimizer keeps none"):
        dcm.to_hf(directory, tmp_path / "hf", config=folder("opt_plain_0161"), weights="master")


def test_states_of_several_optimizers(tmp_path: Path) -> None:
    """Megatron may number optimizers before their keys; a state that two of them hold is refused, not chosen."""
    case = folder("opt_plain_0161")
    directory = shutil.copytree(case / "checkpoint", tmp_path / "ckpt")

    def rename(old: str, new: str) -> None:
        with edited_metadata(directory) as metadata:
            listed, stored = metadata.state_dict_metadata, metadata.storage_data
            metadata.state_dict_metadata = {key.replace(old, new): each for key, each in listed.items()}
            metadata.storage_data = {type(i)(i.fqn.replace(old, new), i.offset): each for i, each in stored.items()}

    rename("optimizer.state.", "chained_0.optimizer.state.")
    rename("chained_0.optimizer.state.fp32_param.output", "chained_1.optimizer.state.fp32_param.output")
    dcm.to_hf(directory, tmp_path / "hf", config=case, weights="master")
    expected = exported("opt_plain_0161", tmp_path / "other", weights="master")
    assert described(load_file(tmp_path / "hf" / "model.safetensors")) == described(expected)
    rename("chained_0.optimizer.state.exp_avg_sq.", "chained_0.optimizer.state.param.")
    with pytest.raises(TensorMismatchError, match=r"holds MASTER of '.*' twice: as 'chained_0"):
        dcm.to_hf(directory, tmp_path / "twice", config=case, weights="master")


@given(shape=st.lists(st.integers(0, 5), max_size=4), data=st.data())
def test_ranges_of_a_block_are_boxes(shape: list[int], data: st.DataObject) -> None:
    """The boxes of a range hold its elements in their order, and no axis needs more than two partial rows."""
    elements = np.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, elements.size))
    stop = data.draw(st.integers(start, elements.size))
    boxes = list(boxes_of_range(tuple(shape), start, stop))
    held = [
        elements[tuple(slice(low, low + extent) for low, extent in zip(offset, extents, strict=True))].reshape(-1)
        for offset, extents, _ in boxes
    ]
    assert np.concatenate([[], *held]).tolist() == list(range(start, stop))
    assert [int(each[0]) for each in held] == [at for _, _, at in boxes]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(data=st.data())
def test_tensors_of_blocks_get_their_own_shape(data: st.DataObject) -> None:
    """Any grid of blocks, cut anywhere: every element lies where Megatron's layout puts it."""
    grid = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    block = [data.draw(st.integers(1, 4)) for _ in grid]
    shape, numel = [g * b for g, b in zip(grid, block, strict=True)], math.prod(block)
    chunks: list[Any] = []
    file: list[Any] = []
    for index in itertools.product(*map(range, grid)):
        cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=3))})
        for start, stop in itertools.pairwise(cuts):
            chunks.append(((*index, start), (*(1,) * len(grid), stop - start), 0, 4 * len(file)))
            file += [(*index, at) for at in range(start, stop)]
    stored = IndexedTensor.build("t", "float32", (*grid, numel), chunks)
    own = unblocked(stored, tuple(shape))
    found = np.full((*shape, len(grid) + 1), -1)
    for offset, extents, position in zip(
        own.offsets.tolist(), own.shapes.tolist(), own.positions.tolist(), strict=True
    ):
        here = np.array(file[position // 4 : position // 4 + math.prod(extents)]).reshape(*extents, len(grid) + 1)
        found[tuple(slice(low, low + extent) for low, extent in zip(offset, extents, strict=True))] = here
    expected = np.empty_like(found)
    for where in itertools.product(*map(range, shape)):
        at = np.ravel_multi_index([i % b for i, b in zip(where, block, strict=True)], block)
        expected[where] = [*(i // b for i, b in zip(where, block, strict=True)), at]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ((4, 64, 95), r"\[4, 1, 2, 3072\], which are not equal blocks of \[4, 64, 95\]"),
        ((4, 32, 96), r"not equal blocks of \[4, 32, 96\]"),
        ((4, 6144), r"not equal blocks of \[4, 6144\]"),
        ((4, -64, -96), r"is not sound torch_dist metadata: expected sizes, got \(4, -64, -96\)"),
        ("4", "is not sound torch_dist metadata"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(own: object, message: str, tmp_path: Path) -> None:
    """Metadata whose shape before reformulation does not fit the blocks that are stored is refused with both."""
    directory = shutil.copytree(folder("opt_fsms_0140") / "checkpoint", tmp_path / "ckpt")
    name = "optimizer.state.fp32_param.decoder.layers.mlp.linear_fc2.weight"
    about = vars(read_metadata(directory))["mcore_data"]
    about[name]["nd_reformulated_orig_global_shape"] = own
    with edited_metadata(directory) as metadata:
        metadata.mcore_data = about
    with pytest.raises(FormatError, match=message):
        open_stored(directory).index([name])


@pytest.mark.parametrize("state", [ParamState.MASTER, ParamState.EXP_AVG])
def test_unknown_tensors_are_refused(state: ParamState, tmp_path: Path) -> None:
    """What the table does not know is no weight to leave aside: it is named, whatever state is asked for."""
    case = folder("opt_plain_0161")
    directory = shutil.copytree(case / "checkpoint", tmp_path / "ckpt")
    foreign = ("decoder.layers.self_attention.q_layernorm.weight", "vision_tower.blob")
    with edited_metadata(directory) as metadata:
        listed, stored = metadata.state_dict_metadata, metadata.storage_data
        known = "decoder.final_layernorm.weight"
        (at,) = [index for index in stored if index.fqn == known]
        metadata.state_dict_metadata = listed | dict.fromkeys(foreign, listed[known])
        metadata.storage_data = stored | {type(at)(name, at.offset): stored[at] for name in foreign}
    config = chosen_config(case)
    with pytest.raises(TensorMismatchError, match="2 tensors are unknown to the table: ") as refused:
        open_megatron(directory, config=config, state=state)
    assert all(f"{name} [64]" in str(refused.value) for name in foreign)
    whole = open_megatron(case / "checkpoint", config=config, state=state)
    left = {name for name, reason in whole.ignored if reason == "weights in the precision of training"}
    weights = {name for name in read_metadata(directory).state_dict_metadata if not name.startswith("optimizer.")}
    assert left == {name for name in weights if "_extra_state" not in name} - {*foreign}
