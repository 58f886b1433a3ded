"""Which keys of a checkpoint are those of a LoRA adapter, and which adapters are refused by name."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from peft_adapters import ALPHA, RANK
from plain_models import SIZES, save_model

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.formats.torch_dist import writer
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk
from dist_ckpt_mistral.storage import documents
from dist_ckpt_mistral.storage.local import TargetFile

LAYERS, HIDDEN, FFN = SIZES["num_hidden_layers"], SIZES["hidden_size"], SIZES["intermediate_size"]
QKV, HEADS = (4 + 2 * 2) * 10, 4 * 10
#: The matrices of a layer in Megatron: rows and columns.
MATRICES: Final = {
    "self_attention.linear_qkv": (QKV, HIDDEN),
    "self_attention.linear_proj": (HIDDEN, HEADS),
    "mlp.linear_fc1": (2 * FFN, HIDDEN),
    "mlp.linear_fc2": (HIDDEN, FFN),
}
ARGS: Final = {"tuner_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "model": "org/base"}
Arrays = Mapping[str, npt.NDArray[np.float32]]


def store(
    folder: Path,
    tensors: Arrays,
    *,
    row_cuts: Mapping[str, int] | None = None,
    args: Mapping[str, object] | None = None,
) -> Path:
    """A torch_dist checkpoint of these tensors; ``row_cuts`` says into how many chunks their rows are cut."""
    chunks, values = [], []
    for key, array in tensors.items():
        pieces = np.split(array, (row_cuts or {}).get(key, 1), axis=-2) if array.ndim > 1 else [array]
        row = 0
        for piece in pieces:
            offset = (*(0,) * (array.ndim - 2), row, 0) if array.ndim > 1 else (0,)
            chunks.append(
                NewChunk(
                    mcore_key=key, dtype="float32", global_shape=array.shape, offset=offset, shape=piece.shape, file=0
                )
            )
            values.append((key, offset, piece))
            row += piece.shape[-2] if array.ndim > 1 else 0
    layout = writer.lay_out(chunks, [], num_files=1)
    folder.mkdir()
    index = layout.index(folder)
    (name, num_bytes), *_ = layout.file_sizes(folder).items()
    file, sums = TargetFile(Path(name), num_bytes), {}
    for key, offset, piece in values:
        tensor = index.tensors[key]
        position = int(tensor.positions[tensor.offsets.tolist().index([*offset])])
        data = np.ascontiguousarray(piece).tobytes()
        file.write(position, data)
        sums[0, position] = zlib.crc32(data)
    layout.write_around({0: file}, sums)
    file.close()
    documents.write_bytes(folder / ".metadata", layout.metadata())
    documents.write_bytes(folder / "metadata.json", writer.BACKEND_JSON)
    documents.write_bytes(folder / "common.pt", writer.common_state({"checkpoint_version": 3.0, "args": args or {}}))
    return folder


def swift(random: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """A and B of every matrix, by the keys of ms-swift, rows in the order of the table."""
    tensors = {}
    for module, (rows, columns) in MATRICES.items():
        key = f"decoder.layers.{module}.lora_"
        tensors[f"{key}A.default.weight"] = random.standard_normal((LAYERS, RANK, columns)).astype(np.float32)
        tensors[f"{key}B.default.weight"] = random.standard_normal((LAYERS, rows, RANK)).astype(np.float32)
    return tensors


def as_bridge(tensors: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    """The same under the keys of Megatron-Bridge's LoRA."""
    names = {"lora_A.default": "adapter.linear_in", "lora_B.default": "adapter.linear_out"}
    return {key.replace(old, new): array for key, array in tensors.items() for old, new in names.items() if old in key}


@pytest.fixture
def tensors() -> dict[str, npt.NDArray[np.float32]]:
    """An adapter by the keys of ms-swift."""
    return swift(np.random.default_rng(3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model that is adapted."""
    return save_model(tmp_path / "model")


def spelled(tensors: Arrays, style: str) -> dict[str, npt.NDArray[np.float32]]:
    """The same adapter in the keys of another run."""
    bridge = as_bridge(tensors)
    if style == "module.":
        return {f"module.{key}": array for key, array in bridge.items()}
    if style == "per layer":
        return {
            key.replace("layers.", f"layers.{layer}."): array[layer]
            for key, array in bridge.items()
            for layer in range(LAYERS)
        }
    return bridge if style == "bridge" else dict(tensors)


@pytest.mark.parametrize("style", ["bridge", "module.", "per layer", "ms-swift"])
def test_spellings(style: str, tensors: Arrays, model: Path, tmp_path: Path) -> None:
    """One adapter exports alike, whoever named its tensors; alpha is where that run leaves it."""
    by_table = store(tmp_path / "bridge", as_bridge(tensors))
    ckpt = store(tmp_path / "ckpt", spelled(tensors, style), args=ARGS if style == "ms-swift" else None)
    assert dcm.compare(by_table, ckpt, config=model / "config.json").is_equal
    alpha = None if style == "ms-swift" else 1.0
    to_hf(ckpt, tmp_path / "out", config=model / "config.json", lora_alpha=alpha)
    assert dcm.compare(tmp_path / "out", by_table, config=model / "config.json").is_equal
    if style == "ms-swift":
        content = documents.read_json(tmp_path / "out" / "adapter_config.json")
        assert (content["lora_alpha"], content["base_model_name_or_path"]) == (ALPHA, "org/base")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rows_in_the_order_of_ranks(tp: int, tensors: Arrays, model: Path, tmp_path: Path) -> None:
    """ms-swift stores the rows [gate; up] of one rank after another: they are exported in Hugging Face's order."""
    key = "decoder.layers.mlp.linear_fc1.lora_B.default.weight"
    gate, up = np.split(tensors[key], 2, axis=1)
    ranks = zip(np.split(gate, tp, axis=1), np.split(up, tp, axis=1), strict=True)
    stored = {**tensors, key: np.concatenate([rows for pair in ranks for rows in pair], axis=1)}
    ckpt = store(tmp_path / "ckpt", stored, row_cuts={key: tp}, args=ARGS)
    expected = store(tmp_path / "expected", as_bridge(tensors))
    assert dcm.compare(ckpt, expected, config=model / "config.json").is_equal


def test_a_model_inside_wrappers(tensors: Arrays, model: Path, tmp_path: Path) -> None:
    """Weights of the model under ``to_wrap`` are merged like any others; under two keys they are an error."""
    base = {
        "embedding.word_embeddings.weight": (SIZES["vocab_size"], HIDDEN),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (SIZES["vocab_size"], HIDDEN),
        **{f"decoder.layers.{module}.to_wrap.weight": (LAYERS, *shape) for module, shape in MATRICES.items()},
    }
    random = np.random.default_rng(4)
    weights = {key: random.standard_normal(shape).astype(np.float32) for key, shape in base.items()}
    config = model / "config.json"
    plain = {key.replace("to_wrap.", ""): array for key, array in weights.items()}
    ckpt = store(tmp_path / "ckpt", {**as_bridge(tensors), **weights})
    to_hf(ckpt, tmp_path / "merged", config=config, merge_adapter=True, lora_alpha=1.0)
    apart = store(tmp_path / "apart", as_bridge(tensors))
    alone = store(tmp_path / "alone", plain)
    to_hf(alone, tmp_path / "alone hf", config=config)
    to_hf(apart, tmp_path / "again", config=config, merge_adapter=True, base=tmp_path / "alone hf", lora_alpha=1.0)
    assert dcm.compare(tmp_path / "merged", tmp_path / "again").is_equal
    assert not dcm.compare(tmp_path / "merged", tmp_path / "alone hf").is_equal
    key = "decoder.layers.mlp.linear_fc2.weight"
    twice = store(tmp_path / "twice", {**as_bridge(tensors), **weights, key: plain[key]})
    with pytest.raises(TensorMismatchError, match=r"holds 'decoder\.layers\.mlp\.linear_fc2\.weight' twice"):
        to_hf(twice, tmp_path / "never", config=config, merge_adapter=True, lora_alpha=1.0)


def test_the_master_weights(tensors: Arrays, model: Path, tmp_path: Path) -> None:
    """An optimizer has the state of the adapter alone; its float32 copy is exported with --weights master."""
    bridge = as_bridge(tensors)
    masters = {f"optimizer.state.fp32_param.{key}": 2 * array for key, array in bridge.items()}
    moments = {f"optimizer.state.exp_avg.{key}": 3 * array for key, array in bridge.items()}
    frozen = {"embedding.word_embeddings.weight": np.ones((SIZES["vocab_size"], HIDDEN), np.float32)}
    ckpt = store(tmp_path / "ckpt", {**bridge, **masters, **moments, **frozen})
    to_hf(ckpt, tmp_path / "out", config=model / "config.json", weights="master", lora_alpha=1.0)
    twice = store(tmp_path / "twice", {key: 2 * array for key, array in bridge.items()})
    assert dcm.compare(tmp_path / "out", twice, config=model / "config.json").is_equal


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("decoder.layers.self_attention.linear_proj.adapter.weight_magnitude", "DoRA"),
        ("decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_in.weight", "adapters of experts"),
        ("decoder.layers.mlp.router.adapter.linear_in.weight", "an adapter of a router"),
        ("embedding.word_embeddings.lora_embedding_A.default", "an adapter of the embedding"),
        ("output_layer.modules_to_save.default.weight", "whole modules that PEFT saved"),
        ("decoder.layers.self_attention.linear_proj.lora_B.default.bias", "an adapter with biases"),
        ("decoder.layers.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight", "adapters of NeMo 1"),
        ("decoder.layers.self_attention.linear_proj.adapter.linear_up.weight", "a form that is not known"),
    ],
)
def test_other_adapters_are_refused(key: str, what: str, tensors: Arrays, model: Path, tmp_path: Path) -> None:
    """Anything but a LoRA of linear modules is refused by its name, beside one, with what to do."""
    ckpt = store(tmp_path / "ckpt", {**as_bridge(tensors), key: np.ones((LAYERS, 4, 4), np.float32)})
    with pytest.raises(UnsupportedModelError, match=rf"{what}.*merge_and_unload"):
        to_hf(ckpt, tmp_path / "out", config=model / "config.json")
    (problem,) = dcm.inspect(ckpt, config=model / "config.json").problems
    assert what in problem


def test_what_is_wrong_is_named(tensors: Arrays, model: Path, tmp_path: Path) -> None:
    """A missing B, an A of another shape, two adapters, and an alpha that nothing says or two say otherwise."""
    config = model / "config.json"
    key = "decoder.layers.mlp.linear_fc2.adapter.linear_out.weight"
    bridge = as_bridge(tensors)
    lacking = store(tmp_path / "lacking", {name: array for name, array in bridge.items() if name != key})
    with pytest.raises(TensorMismatchError, match=rf"1 tensor is missing: {key}"):
        to_hf(lacking, tmp_path / "out", config=config, lora_alpha=1.0)
    shaped = store(tmp_path / "shaped", {**bridge, key: np.ones((LAYERS, 7, RANK), np.float32)})
    with pytest.raises(TensorMismatchError, match=rf"shape of {key}: expected \[2, 24, 4\], got \[2, 7, 4\]"):
        to_hf(shaped, tmp_path / "out", config=config, lora_alpha=1.0)
    two = {name.replace("default", other): array for name, array in tensors.items() for other in ("a", "b")}
    with pytest.raises(UnsupportedModelError, match="several adapters: expected one, got a, b"):
        to_hf(store(tmp_path / "two", two, args=ARGS), tmp_path / "out", config=config)
    with pytest.raises(ConfigError, match=r"nothing says its alpha.*--lora-alpha"):
        to_hf(store(tmp_path / "unsaid", bridge), tmp_path / "out", config=config)
    ckpt = store(tmp_path / "iter_0000005", tensors, args=ARGS)
    documents.write_bytes(tmp_path / "args.json", b'{"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 7}')
    with pytest.raises(ConfigError, match=r"contradict each other: B A times 1\.5 by the checkpoint's args and B A"):
        to_hf(ckpt, tmp_path / "out", config=config)
