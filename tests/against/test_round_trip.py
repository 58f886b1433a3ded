"""Real Hugging Face models to Megatron and back: the same bytes, and on the way what torch says they should be."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from genuine import shards
from hf_models import logits, megatron_tensors, random_model, saved
from plain_models import SIZES, contents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save
from torch_reading import described, hf_tensors, load_tensors, raw_bytes, read_metadata
from transformers import MistralConfig

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.output import Output
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import TensorMismatchError

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to send on the journey: how it is made, how its files and its chunks are cut."""

    dtype: torch.dtype
    max_shard_size: int = 5_000_000_000
    tp: int = 1
    pp: int = 1
    sizes: dict[str, Any]


MODELS = {
    "plain": Model(dtype=torch.float32, sizes={}),
    "many files, TP2 PP2": Model(dtype=torch.bfloat16, max_shard_size=3000, tp=2, pp=2, sizes={}),
    "MHA, tied, window, TP4": Model(
        dtype=torch.float16, tp=4, sizes={"num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 5}
    ),
    "GQA 8, window, PP3": Model(
        dtype=torch.bfloat16,
        pp=3,
        sizes={
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "sliding_window": 4096,
            "head_dim": 4,
        },
    ),
    "tied, many files, TP2": Model(
        dtype=torch.float32, max_shard_size=5000, tp=2, sizes={"tie_word_embeddings": True, "head_dim": 6}
    ),
    "odd sizes, 1 layer": Model(
        dtype=torch.float16,
        max_shard_size=2000,
        sizes={"vocab_size": 37, "hidden_size": 18, "intermediate_size": 7, "num_hidden_layers": 1, "head_dim": 2},
    ),
    "a vocabulary beyond one padding, TP4 PP2": Model(
        dtype=torch.bfloat16, tp=4, pp=2, sizes={"vocab_size": 700, "num_attention_heads": 8, "num_key_value_heads": 4}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A model's journey: saved by transformers, imported, exported."""

    original: Path
    checkpoint: Path
    exported: Path
    model: Model

    @property
    def sizes(self) -> dict[str, Any]:
        """All sizes of the model."""
        return SIZES | self.model.sizes

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The original tensors, as the safetensors library reads them."""
        return hf_tensors(self.original)


@pytest.fixture(scope="module", params=MODELS)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trip:
    """Every model, there and back."""
    model, where = MODELS[request.param], tmp_path_factory.mktemp("trip")
    original = saved(random_model(model.dtype, **model.sizes), where / "original", max_shard_size=model.max_shard_size)
    from_hf(original, where / "checkpoint", tp=model.tp, pp=model.pp)
    to_hf(where / "checkpoint", where / "exported")
    return Trip(original=original, checkpoint=where / "checkpoint", exported=where / "exported", model=model)


def test_every_file_comes_back_byte_for_byte(trip: Trip) -> None:
    """Weights, index, config.json and generation_config.json are what they were, and nothing else is there."""
    original = contents(trip.original)
    assert {"config.json", "generation_config.json"} < set(original)
    assert (len(original) > 3) == (trip.model.max_shard_size < 10_000)
    assert contents(trip.exported) == original


def test_torch_loads_the_import(trip: Trip) -> None:
    """Plain DCP of torch finds every tensor, with queries, keys, values, gate and up where Megatron has them."""
    assert described(load_tensors(trip.checkpoint / "release")) == described(megatron_tensors(trip.tensors, trip.sizes))


def test_every_archive_is_sound(trip: Trip) -> None:
    """Each entry is a whole zip archive with right checksums that torch.load takes, and entries fill the files."""
    directory = trip.checkpoint / "release"
    metadata: Any = read_metadata(directory)
    spans: dict[str, set[tuple[int, int]]] = {}
    for index, at in metadata.storage_data.items():
        entry = (directory / at.relative_path).read_bytes()[at.offset : at.offset + at.length]
        with zipfile.ZipFile(io.BytesIO(entry)) as archive:
            assert archive.testzip() is None
        loaded = torch.load(io.BytesIO(entry), weights_only=True)
        described_as = metadata.state_dict_metadata[index.fqn]
        if isinstance(described_as, TensorStorageMetadata):
            sizes = next(chunk.sizes for chunk in described_as.chunks if chunk.offsets == index.offset)
            assert (loaded.shape, loaded.dtype) == (sizes, described_as.properties.dtype)
            assert loaded.is_contiguous()
        else:
            assert loaded == [None]
        spans.setdefault(at.relative_path, set()).add((at.offset, at.offset + at.length))
    assert {path.name for path in directory.glob("*.distcp")} == set(spans)
    for name, found in spans.items():
        starts, ends = zip(*sorted(found), strict=True)
        assert [*starts, (directory / name).stat().st_size] == [0, *ends]


def test_logits_are_those_of_the_original(trip: Trip, tmp_path: Path) -> None:
    """Also when the files are cut anew, transformers loads the export and computes exactly the same."""
    to_hf(trip.checkpoint, tmp_path / "again", config=trip.original / "config.json")
    for exported in (trip.exported, tmp_path / "again"):
        assert torch.equal(logits(trip.original, TOKENS), logits(exported, TOKENS))


def test_the_window_reaches_megatron_and_returns(trip: Trip, tmp_path: Path) -> None:
    """W becomes (W - 1, 0) in args, None stays None; exported from nothing but these args the model is the same."""
    window = trip.sizes["sliding_window"]
    common_file = trip.checkpoint / "release" / "common.pt"
    common = torch.load(common_file, weights_only=False)
    assert isinstance(common["args"], Namespace)
    assert common["args"].window_size == (None if window is None else (window - 1, 0))
    shutil.copytree(trip.checkpoint, tmp_path / "trained")
    torch.save({"args": common["args"], "iteration": 1}, tmp_path / "trained" / "release" / "common.pt")
    for name in ("hf/config.json", "run_config.yaml"):
        (tmp_path / "trained" / "release" / name).unlink()
    shutil.rmtree(tmp_path / "trained" / "hf")
    done = to_hf(tmp_path / "trained", tmp_path / "exported")
    assert done.config_from == "the args inside the checkpoint"
    before, after = (MistralConfig.from_pretrained(each) for each in (trip.original, tmp_path / "exported"))
    same = [*SIZES, "rms_norm_eps", "rope_parameters", "hidden_act", "dtype"]
    assert {name: getattr(after, name) for name in same} == {name: getattr(before, name) for name in same}
    assert torch.equal(logits(trip.original, TOKENS), logits(tmp_path / "exported", TOKENS))


def test_what_travels_in_the_common_state(trip: Trip) -> None:
    """The common state holds Megatron's args and, in plain JSON types, the HF config and which rows go where."""
    common = torch.load(trip.checkpoint / "release" / "common.pt", weights_only=False)
    sizes, model = trip.sizes, trip.model
    args = common["args"]
    assert (common["iteration"], common["checkpoint_version"]) == (0, 3.0)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size, args.num_attention_heads) == (
        sizes["num_hidden_layers"],
        sizes["hidden_size"],
        sizes["intermediate_size"],
        sizes["num_attention_heads"],
    )
    assert (args.num_query_groups, args.kv_channels, args.vocab_size, args.max_position_embeddings) == (
        sizes["num_key_value_heads"],
        sizes["head_dim"],
        sizes["vocab_size"],
        sizes["max_position_embeddings"],
    )
    assert args.untie_embeddings_and_output_weights is not sizes["tie_word_embeddings"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (model.tp, model.pp)
    assert (args.bf16, args.fp16) == (model.dtype == torch.bfloat16, model.dtype == torch.float16)
    assert (args.normalization, args.swiglu, args.rotary_base, args.norm_epsilon) == ("RMSNorm", True, 10000, 1e-6)
    record = common["content_metadata"]["dist_ckpt_mistral"]
    assert json.loads(json.dumps(record)) == record
    assert record["hf_config"] == json.loads((trip.original / "config.json").read_bytes())
    stored = load_tensors(trip.checkpoint / "release")
    for entry in record["tensor_map"]:
        layers = range(sizes["num_hidden_layers"]) if "{layer}" in entry["hf_name"] else [None]
        for layer in layers:
            tensor = stored[entry["mcore_key"].replace("{layer}.", "")]
            tensor = tensor if layer is None else tensor[layer]
            count, stride, offset, length = entry["row_blocks"]
            rows = [
                row
                for block in range(count)
                for row in range(block * stride + offset, block * stride + offset + length)
            ]
            assert torch.equal(tensor[rows], trip.tensors[entry["hf_name"].format(layer=layer)])


@pytest.mark.parametrize(
    ("before", "after"),
    [(a, b) for a in ("float32", "bfloat16", "float16") for b in ("float32", "bfloat16", "float16")],
)
def test_dtypes_are_converted_as_torch_does(before: str, after: str, tmp_path: Path) -> None:
    """All bfloat16 and float16 patterns, and float32 ties, overflows, subnormals and noise: every bit as ``Tensor.to``.

    Of a NaN only that it is one: torch itself gives different ones in vectors and in scalars. Values that become
    infinite or zero are counted, in both directions.
    """
    values = special_values(getattr(torch, before)).view(512, 128)
    sizes = SIZES | {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = random_model(getattr(torch, before), **sizes)
    original = saved(model, tmp_path / "original")
    tensors = load_file(original / "model.safetensors") | {"model.embed_tokens.weight": values}
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    first = from_hf(original, tmp_path / "converted first", dtype=after, allow_lossy=True)
    to_hf(tmp_path / "converted first", tmp_path / "first")
    from_hf(original, tmp_path / "as it is")
    last = to_hf(tmp_path / "as it is", tmp_path / "last", dtype=after, allow_lossy=True)
    expected = {name: tensor.to(getattr(torch, after)) for name, tensor in tensors.items()}
    converted = expected["model.embed_tokens.weight"]
    counts = int((values.isfinite() & ~converted.isfinite()).sum()), int(((values != 0) & (converted == 0)).sum())
    for losses in (first.losses, last.losses):
        told = {loss.tensors: (loss.overflowed, loss.vanished) for loss in losses}
        assert told == ({("model.embed_tokens.weight",): counts} if any(counts) else {})
    for exported in (tmp_path / "first", tmp_path / "last"):
        assert json.loads((exported / "config.json").read_bytes())["dtype"] == after
        found = load_file(exported / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].isnan(), tensor.isnan())
            assert raw_bytes(found[name].nan_to_num(0.0)) == raw_bytes(tensor.nan_to_num(0.0))


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """65536 values of ``dtype``: all there are, or of float32 those that rounding finds hard, and noise."""
    patterns = torch.arange(65536, dtype=torch.int32)
    if dtype is not torch.float32:
        return patterns.to(torch.uint16).view(dtype)
    noise = torch.randint(-(2**31), 2**31, (65536,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = noise.view(torch.float32).clone()
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.996, 65520.0, 3.3895e38, 3.4028235e38, 1e-45]
    values[: len(edges)] = torch.tensor(edges)
    exponents = torch.arange(100, 160, dtype=torch.int32) << 23
    for at, low_bits in ((1000, 16), (3000, 13), (5000, 14), (7000, 20)):  # ties of bfloat16, float16, its subnormals
        odd_and_even = torch.tensor([1, 3, 5, 7], dtype=torch.int32) << (low_bits - 1)
        ties = (exponents[:, None] | odd_and_even[None]).reshape(-1)
        near = torch.cat([ties - 1, ties, ties + 1])
        values[at : at + len(near)] = near.view(torch.float32)
    return values


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_bytes", [1, 2000, 3001, 4096, 10_000_000])
def test_files_are_split_as_transformers_splits_them(max_bytes: int, tied: bool, tmp_path: Path) -> None:
    """A float32 model exported as bfloat16 is, in every byte of every file, what transformers saves of it."""
    from_hf(saved(random_model(torch.float32, tie_word_embeddings=tied), tmp_path / "original"), tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "exported", dtype="bfloat16", output=Output(max_file_bytes=max_bytes))
    expected = saved(random_model(tie_word_embeddings=tied), tmp_path / "expected", max_shard_size=max_bytes)
    assert contents(tmp_path / "exported") == contents(expected)


def test_original_files_larger_than_asked_for_are_cut(tmp_path: Path) -> None:
    """A chosen maximum size counts for a model in its original dtypes, too; where its files fit, they come back."""
    original = saved(random_model(), tmp_path / "original", max_shard_size=10_000)
    largest = max(path.stat().st_size for path in original.glob("*.safetensors"))
    from_hf(original, tmp_path / "ckpt")
    expected = {largest: original, 3001: saved(random_model(), tmp_path / "expected", max_shard_size=3001)}
    for max_bytes, directory in expected.items():
        to_hf(tmp_path / "ckpt", tmp_path / f"{max_bytes}", output=Output(max_file_bytes=max_bytes))
        assert contents(tmp_path / f"{max_bytes}") == contents(directory)


@pytest.mark.parametrize("tied", [False, True])
def test_what_plain_torch_saves_is_exported(tied: bool, tmp_path: Path) -> None:
    """Megatron's tensors, put together by torch and saved whole by plain DCP, export to what transformers saves."""
    original = saved(random_model(tie_word_embeddings=tied), tmp_path / "original")
    tensors = megatron_tensors(load_file(original / "model.safetensors"), SIZES | {"tie_word_embeddings": tied})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save(tensors, storage_writer=FileSystemWriter(tmp_path / "ckpt"), no_dist=True)
    shutil.copy(shards("td_0192") / "metadata.json", tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "exported", config=original)
    assert contents(tmp_path / "exported") == contents(original)


def test_a_file_may_hold_tied_weights_twice(tmp_path: Path) -> None:
    """Files in which lm_head.weight repeats the tied embedding come back whole; an lm_head of its own is an error."""
    original = saved(random_model(tie_word_embeddings=True), tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    words = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": words.clone()}, original / "model.safetensors", metadata={"format": "pt"})
    from_hf(original, tmp_path / "ckpt", tp=2)
    to_hf(tmp_path / "ckpt", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(original)
    other = words.clone()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorMismatchError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        from_hf(original, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def rewritten(path: Path, order: list[str], *, pad: int, metadata: dict[str, str] | None) -> None:
    """Write a safetensors file again with its data in another order and another header layout."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in order}
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = raw_bytes(tensor)
        span = [len(data), len(data) + len(raw)]
        header[name] = {"data_offsets": span, "dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        data += raw
    text = json.dumps(dict(sorted(header.items())), indent=1).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_files_of_other_writers_come_back_too(tmp_path: Path) -> None:
    """Data in any order and spacing, no metadata, mixed dtypes, a wrong index: the same bytes come back."""
    original = saved(random_model(), tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    floats = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    name = "model-00001-of-00001.safetensors"
    save_file(floats, original / name)
    (original / "model.safetensors").unlink()
    rewritten(original / name, sorted(floats, reverse=True), pad=3, metadata=None)
    assert described(load_file(original / name)) == described(floats)
    index: dict[str, dict[str, Any]] = {
        "metadata": {"total_size": 1, "made_by": "hand"},
        "weight_map": dict.fromkeys(sorted(floats), name),
    }
    (original / "model.safetensors.index.json").write_text(json.dumps(index))
    from_hf(original, tmp_path / "ckpt", tp=2, pp=2)
    to_hf(tmp_path / "ckpt", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(original)


def test_frequencies_of_old_files_stay_behind(tmp_path: Path) -> None:
    """rotary_emb.inv_freq, which old files carry, is no weight: it is listed and left out, and the rest is exported."""
    original = saved(random_model(), tmp_path / "original")
    tensors = load_file(original / "model.safetensors")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {old: torch.ones(3)}, original / "model.safetensors", metadata={"format": "pt"})
    done = from_hf(original, tmp_path / "ckpt")
    assert done.ignored == ((old, "recomputed from rope_theta by every reader"),)
    to_hf(tmp_path / "ckpt", tmp_path / "exported")
    assert described(load_file(tmp_path / "exported" / "model.safetensors")) == described(tensors)
