"""``dcm.load`` on any rank without a process group, against what torch reads of genuine checkpoints."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from genuine import folder, shards
from plain_models import save_model
from safetensors.torch import load_file, save_file
from torch_reading import load_tensors

import dist_ckpt_mistral as dcm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mapping = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    for name in ("load", "LoadStrategy", "sharded_state_dict", "optimizer_state_dict"):
        getattr(dcm, name)

pytestmark = pytest.mark.megatron
#: Every rank of these is loaded.
LAYOUTS = (dcm.ParallelLayout(tp=2, pp=2), dcm.ParallelLayout(tp=8, pp=2), dcm.ParallelLayout(pp=2, vpp=2))


def flat(state: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dicts and lists, by their places."""
    if isinstance(state, dict | list):
        for key, each in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(each, f"{path}/{key}")
    else:
        yield path, state


def entries_of(state: dict[str, Any]) -> dict[str, Any]:
    """The ShardedTensors of a state dict whose factories are applied, by their places."""
    return {path: each for path, each in flat(state) if isinstance(each, mapping.ShardedTensor)}


def config_of(case: str) -> dcm.MistralConfig:
    """The configuration of a genuine case."""
    return dcm.MistralConfig.from_hf(folder(case))


def is_loaded(entry: Any, value: torch.Tensor, stored: torch.Tensor) -> bool:  # noqa: ANN401  (of Megatron)
    """Whether a tensor has the values of the stored tensor in the box of its entry, and zeros behind its end."""
    box = stored[entry.global_slice()].to(entry.dtype)
    expected = torch.zeros(entry.local_shape, dtype=entry.dtype)
    expected[tuple(map(slice, box.shape))] = box
    return value.dtype == entry.dtype and torch.equal(value, expected)


@pytest.mark.parametrize("case", ["td_0192", "tied_tp2pp2_0161", "optzarr_0123"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp} pp{layout.pp} vpp{layout.vpp}")
def test_every_rank_of_layouts_that_were_never_saved(case: str, layout: dcm.ParallelLayout) -> None:
    """Every entry has the bits of the stored tensor: stored padding, and zeros where a larger vocabulary has none."""
    config = config_of(case)
    stored = load_tensors(shards(case)) if "zarr" not in case else stored_by_us(case)
    for rank in range(layout.world_size):
        state = dcm.sharded_state_dict(config, layout, rank, dtype="float32")
        mapping.apply_factories(state)
        loaded = dict(flat(dcm.load(state, shards(case), config=config)))
        entries = entries_of(state)
        assert entries
        assert [path for path, entry in entries.items() if not is_loaded(entry, loaded[path], stored[entry.key])] == []
        assert all(value is None for path, value in loaded.items() if path not in entries)


def stored_by_us(case: str) -> dict[str, torch.Tensor]:
    """The tensors of a zarr checkpoint, which torch does not read: as TensorStore reads them."""
    ts = pytest.importorskip("tensorstore")
    found = {}
    for folder_of_key in shards(case).iterdir():
        if (folder_of_key / ".zarray").exists():
            array = ts.open({"driver": "zarr", "kvstore": f"file://{folder_of_key}/"}, open=True).result()
            found[folder_of_key.name] = torch.from_numpy(array.read().result().astype("float32"))
    return found


@pytest.mark.parametrize(("case", "distributed"), [("opt_plain_0161", False), ("opt_fr_0192", True)])
def test_optimizer_state_comes_from_checkpoints(case: str, distributed: bool) -> None:
    """Master weights and both moments, in the formats that have the shapes of the model."""
    stored, config = load_tensors(shards(case)), config_of(case)
    for rank in range(4):
        state = dcm.optimizer_state_dict(config, dcm.ParallelLayout(tp=2, pp=2), rank, distributed=distributed)
        mapping.apply_factories(state)
        loaded = dict(flat(dcm.load(state, shards(case), config=config)))
        entries = entries_of(state)
        assert len({entry.key.split(".")[2] for entry in entries.values()}) == 3
        assert [path for path, entry in entries.items() if not is_loaded(entry, loaded[path], stored[entry.key])] == []


def test_what_has_data_is_filled_in_place(tmp_path: Path) -> None:
    """Tensors that are given are the ones that come back, also where they are parts of others; factories merge."""
    hf = save_model(tmp_path / "hf")
    config, expected = dcm.MistralConfig.from_hf(hf), load_file(hf / "model.safetensors")
    layout = dcm.ParallelLayout(tp=2)
    empty = dcm.load(dcm.sharded_state_dict(config, layout, 0), hf)
    data = {name: torch.full_like(value, torch.nan) for name, value in empty.items() if isinstance(value, torch.Tensor)}
    embedding = "embedding.word_embeddings.weight"
    rows, columns = data[embedding].shape
    data[embedding] = torch.full((rows, 2 * columns), torch.nan, dtype=data[embedding].dtype)[:, ::2]
    assert not data[embedding].is_contiguous()
    loaded = dcm.load(dcm.sharded_state_dict(config, layout, 0, data=data), hf)
    for name, value in data.items():
        assert torch.equal(value, empty[name]), name
        assert torch.equal(loaded[name], value), name
    assert loaded[embedding].data_ptr() == data[embedding].data_ptr()
    assert torch.equal(data[embedding][: config.vocab_size], expected["model.embed_tokens.weight"])
    assert not data[embedding][config.vocab_size :].any()


def test_keys_with_a_prefix(tmp_path: Path) -> None:
    """A model inside another one, as Megatron-Bridge has them, on ranks with and without the embedding."""
    hf = save_model(tmp_path / "hf")
    config, layout = dcm.MistralConfig.from_hf(hf), dcm.ParallelLayout(pp=2)
    utils = importlib.import_module("megatron.core.dist_checkpointing.utils")
    for rank in range(2):
        state = dcm.sharded_state_dict(config, layout, rank)
        expected = dcm.load(state, hf)
        mapping.apply_factories(state)
        plain = dict(flat(dcm.load(state, hf)))
        utils.add_prefix_for_sharding(state, "language_model.")
        prefixed = dict(flat(dcm.load(state, hf)))
        assert expected.keys()
        assert all(torch.equal(prefixed[path], plain[path]) for path in plain if plain[path] is not None)
        entries_of(state).popitem()[1].key = "model.decoder.final_layernorm.weight"
        with pytest.raises(dcm.TensorMismatchError, match=r"several prefixes: .*'language_model\.', 'model\.'"):
            dcm.load(state, hf)


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("style", [style for style in dcm.KeyStyle if style is not dcm.KeyStyle.STACKED])
def test_every_spelling_of_the_keys(style: dcm.KeyStyle, pp: int, tmp_path: Path) -> None:
    """Keys by layer, by expert and of a HybridModel, which uses the same keys for other layers: the same tensors."""
    hf = save_model(tmp_path / "hf", num_hidden_layers=4)
    config, layout = dcm.MistralConfig.from_hf(hf), dcm.ParallelLayout(pp=pp)
    for rank in range(pp):
        expected = dcm.load(dcm.sharded_state_dict(config, layout, rank), hf)
        loaded = dcm.load(dcm.sharded_state_dict(config, layout, rank, style=style), hf)
        tensors = {name: value for name, value in expected.items() if value is not None}
        assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
        assert tensors.keys() == {name for name, value in loaded.items() if value is not None}


def test_keys_of_two_models_are_not_guessed(tmp_path: Path) -> None:
    """The attention of layer 2 alone may be that of a HybridModel's second layer."""
    hf = save_model(tmp_path / "hf", num_hidden_layers=4)
    config, name = dcm.MistralConfig.from_hf(hf), "decoder.layers.2.self_attention.linear_qkv.weight"
    state = dcm.sharded_state_dict(config, dcm.ParallelLayout(), 0, style=dcm.KeyStyle.PER_LAYER)
    with pytest.raises(dcm.TensorMismatchError, match=r"GPTModel or of a HybridModel.*decoder\.layers\.2\."):
        dcm.load({name: state[name]}, hf)
    names = state[name].hf_names
    assert {each.split(".")[2] for each in names} == {"2"}


def test_what_is_not_of_the_model_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other shapes, other keys, objects, flat optimizer state and plain values: all by name, before a byte is read."""
    hf = save_model(tmp_path / "hf")
    config, layout = dcm.MistralConfig.from_hf(hf), dcm.ParallelLayout()
    other = save_model(tmp_path / "other", intermediate_size=48)
    with pytest.raises(dcm.TensorMismatchError, match=r"shape mismatch for 'decoder\.layers\.mlp\.linear_fc1\.weight'"):
        dcm.load(dcm.sharded_state_dict(config, layout, 0), other)
    extra = mapping.ShardedTensor.from_rank_offsets("decoder.layers.other.weight", torch.zeros(4))
    with pytest.raises(dcm.TensorMismatchError, match=r"unknown tensor 'decoder\.layers\.other\.weight'"):
        dcm.load({"other": extra}, hf)
    for key in ("rng_state", "optimizer.param_groups"):
        with pytest.raises(dcm.UnsupportedModelError, match=f"objects, which only Megatron's own load reads: {key}"):
            dcm.load({"object": mapping.ShardedObject(key, None, (1,), (0,))}, hf)
    flat_key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.param"
    with pytest.raises(dcm.UnsupportedModelError, match="format dp_reshardable"):
        dcm.load({"flat": mapping.ShardedTensor.from_rank_offsets(flat_key, torch.zeros(4))}, hf)
    with pytest.raises(dcm.FormatError, match="Megatron checkpoint"):
        dcm.load(dcm.optimizer_state_dict(config, layout, 0), hf)
    with caplog.at_level(logging.WARNING):
        loaded = dcm.load({"model": dcm.sharded_state_dict(config, layout, 0), "iteration": 3, "args": [1]}, hf)
    assert loaded.keys() == {"model"}
    assert "left out: iteration, args.0" in caplog.text
    with pytest.raises(dcm.UnsupportedModelError, match="strict='assume_ok_unexpected' alone"):
        dcm.LoadStrategy(hf).load_sharded_metadata(tmp_path)


def test_lossy_conversions_are_refused(tmp_path: Path) -> None:
    """Values that the dtype of the entries cannot hold are counted, and let through if one says so."""
    hf = save_model(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e30)
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    config = dcm.MistralConfig.from_hf(hf)
    state = dcm.sharded_state_dict(config, dcm.ParallelLayout(), 0, dtype="float16")
    with pytest.raises(dcm.OutputError, match=r"model\.norm\.weight"):
        dcm.load(state, hf)
    loaded = dcm.load(state, hf, allow_lossy=True)
    assert loaded["decoder.final_layernorm.weight"].isinf().all()
