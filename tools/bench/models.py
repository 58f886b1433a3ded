"""Make Mistral models and checkpoints of a given size, with random weights, for the benchmarks.

``python tools/bench/models.py CASE BYTES DIRECTORY`` makes DIRECTORY/hf (the case may have another name) and the
checkpoint DIRECTORY/CASE, unless they exist.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.formats import checkpoint_directory, hf_directory, kinds, stored_checkpoint
from dist_ckpt_mistral.formats.pickles.reader import paused_collector
from dist_ckpt_mistral.formats.torch_dist import common_state, writer
from dist_ckpt_mistral.formats.torch_dist.writer import NewChunk
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import local_tensors
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.model.table.table import tensor_table
from dist_ckpt_mistral.storage.local import TargetFile

#: Prefix of the keys of optimizer state -> its dtype, in mcore's fully_reshardable format.
OPTIMIZER = {
    "optimizer.state.param.": "float32",
    "optimizer.state.exp_avg.": "float32",
    "optimizer.state.exp_avg_sq.": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The layout and the keys of a checkpoint.

    With ``is_import``, ``from-hf`` makes it from the directory ``hf``, which has at least ``num_files`` files of
    tensors. Otherwise it has its own random bytes.
    """

    tp: int = 2
    pp: int = 2
    style: KeyStyle = KeyStyle.STACKED
    with_optimizer: bool = False
    is_import: bool = True
    num_files: int = 1
    hf: str = "hf"


CASES = {
    "tp2pp2": Case(),
    "tp8": Case(tp=8, pp=1),
    "tp1": Case(tp=1, pp=1),
    "2-files": Case(num_files=2, hf="hf-2-files"),
    "3-files": Case(num_files=3, hf="hf-3-files"),
    "per-layer": Case(style=KeyStyle.PER_LAYER, is_import=False),
    "optimizer": Case(with_optimizer=True, is_import=False),
}
_LAYER_BYTES = 436_224_000  # one layer of the shape below in bfloat16
_BLOCK_BYTES = 16 << 20
_ROOM_IN_FILES = 1.1  # files end at a whole tensor, below the maximum size


def config_of_size(num_bytes: int) -> MistralConfig:
    """A config like Mistral 7B (hidden 4096, ffn 14336, 32 heads in 8 groups), with layers for ``num_bytes`` bytes."""
    vocabulary_bytes = 2 * 32768 * 4096 * 2
    return MistralConfig.from_hf(
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": max(1, round((num_bytes - vocabulary_bytes) / _LAYER_BYTES)),
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
    )


def make_hf_model(directory: Path, config: MistralConfig, num_files: int) -> None:
    """Write a Hugging Face directory with random bytes for weights."""
    directory.mkdir(parents=True)
    (directory / kinds.CONFIG_FILE).write_text(json.dumps(config.to_hf()))
    (directory / "tokenizer.json").write_text("{}")
    tensors = [(name, "bfloat16", tensor.shape) for name, tensor in tensor_table(config).hf_tensors().items()]
    max_file_bytes = min(5_000_000_000, int(model_bytes(config) / num_files * _ROOM_IN_FILES))
    file_set = hf_directory.plan_files(tensors, max_file_bytes=max_file_bytes)
    for name, file in file_set.files.items():
        with (directory / name).open("wb") as output:
            output.write(file.head)
            for block in _random_blocks(file.num_bytes - len(file.head)):
                output.write(block)
    index = file_set.index_json()
    if index is not None:
        (directory / kinds.INDEX_FILE).write_bytes(index)


def _random_blocks(num_bytes: int) -> Iterator[bytes]:
    """Yield random bytes that no file system can compress or deduplicate by page."""
    noise = np.random.default_rng(0).bytes(_BLOCK_BYTES + 4096)
    for number, start in enumerate(range(0, num_bytes, _BLOCK_BYTES)):
        shift = number * 61 % 4096
        yield noise[shift : shift + min(_BLOCK_BYTES, num_bytes - start)]


def make_checkpoint(directory: Path, hf: Path, config: MistralConfig, case: Case) -> None:
    """Make the checkpoint of a case."""
    if case.is_import:
        from_hf(hf, directory, tp=case.tp, pp=case.pp)
        return
    layout = ParallelLayout(tp=case.tp, pp=case.pp)
    layout.check(config)
    make_sparse_checkpoint(directory, config, layout, style=case.style, with_optimizer=case.with_optimizer)
    fill_holes(directory)


def make_sparse_checkpoint(
    directory: Path,
    config: MistralConfig,
    layout: ParallelLayout,
    *,
    style: KeyStyle,
    with_optimizer: bool,
    weights_only: bool = False,
) -> int:
    """Make a checkpoint whose tensor data are holes in its files. Returns its number of chunks.

    Everything else is as in a real checkpoint. So planning and reading can be measured at any size. With
    ``weights_only`` the archives of optimizer state have no heads either, and only ``.metadata`` describes them.
    """
    directory.mkdir(parents=True)
    prefixes = {"": "bfloat16", **(OPTIMIZER if with_optimizer else {})}
    written = writer.lay_out(_chunks(config, layout, style, prefixes), [], num_files=layout.world_size)
    targets = {number: TargetFile(directory / name, 0) for number, name in enumerate(written.file_names)}
    holes = tuple(OPTIMIZER) if weights_only else ()
    placed = tuple(place for place in written.placed if not place.chunk.mcore_key.startswith(holes))
    for place in placed:
        target = targets[place.chunk.file]
        target.write(place.position, place.archive.head)
        target.write(place.data_position + place.archive.data_bytes, place.archive.tail(0))
    for number, target in targets.items():
        target.close()
        os.truncate(directory / written.file_names[number], written.file_bytes[number])
    args = to_megatron_args(config, dtype="bfloat16", tp=layout.tp, pp=layout.pp)
    (directory / common_state.COMMON_FILE).write_bytes(writer.common_state({"args": args, "iteration": 0}))
    (directory / checkpoint_directory.BACKEND_FILE).write_bytes(writer.BACKEND_JSON)
    (directory / checkpoint_directory.METADATA_FILE).write_bytes(_as_megatron_pickles(written.metadata()))
    return len(written.placed)


def _as_megatron_pickles(metadata: bytes) -> bytes:
    """``.metadata`` as torch and Megatron pickle it: with the plans of all ranks, and a memo entry for each object."""
    from torch.distributed.checkpoint.metadata import MetadataIndex  # noqa: PLC0415  (only this needs torch)
    from torch.distributed.checkpoint.planner import (  # noqa: PLC0415  (likewise)
        SavePlan,
        TensorWriteData,
        WriteItem,
        WriteItemType,
    )

    with paused_collector():
        content: Any = pickle.loads(metadata)  # noqa: S301  (bytes that this package wrote)
        data = {
            (name, chunk.offsets): TensorWriteData(chunk=chunk, properties=tensor.properties, size=tensor.size)
            for name, tensor in content.state_dict_metadata.items()
            for chunk in getattr(tensor, "chunks", ())
        }
        items: dict[str, list[WriteItem]] = defaultdict(list)
        for index, info in content.storage_data.items():
            tensor_data = data.get((index.fqn, index.offset))
            kind = WriteItemType.BYTE_IO if tensor_data is None else WriteItemType.SHARD
            copy = MetadataIndex(index.fqn, index.offset)
            items[info.relative_path].append(WriteItem(index=copy, type=kind, tensor_data=tensor_data))
        content.all_local_plans = [SavePlan(file_items) for file_items in items.values()]
        return pickle.dumps(content)


def _chunks(
    config: MistralConfig, layout: ParallelLayout, style: KeyStyle, prefixes: dict[str, str]
) -> Iterator[NewChunk]:
    """Yield the chunks that the ranks of a layout save, once for each prefix of the keys."""
    table = tensor_table(config)
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        for chunk in layout.model_chunks(config.num_hidden_layers, at.pp):
            for tensor in local_tensors(layout, table, chunk, at, style=style):
                for box in tensor.boxes if tensor.is_main_replica else ():
                    for prefix, dtype in prefixes.items():
                        yield NewChunk(
                            mcore_key=prefix + box.mcore_key,
                            dtype=dtype,
                            global_shape=box.global_shape,
                            offset=box.global_offset,
                            shape=box.shape,
                            file=rank,
                        )


def fill_holes(directory: Path) -> None:
    """Write random bytes into the chunks of a sparse checkpoint. Their checksums stay 0."""
    checkpoint = stored_checkpoint.open_stored(directory)
    index = checkpoint.index(checkpoint.tensors)
    for tensor in index.tensors.values():
        chunk_bytes = tensor.shapes.prod(axis=1) * dtypes.itemsize_bytes(tensor.dtype)
        for file, position, num_bytes in zip(tensor.files, tensor.positions, chunk_bytes.tolist(), strict=True):
            with index.files[file].open("r+b") as output:
                output.seek(position)
                for block in _random_blocks(num_bytes):
                    output.write(block)


def model_bytes(config: MistralConfig) -> int:
    """Size of the weights in bfloat16, in bytes."""
    size = dtypes.itemsize_bytes("bfloat16")
    return sum(math.prod(tensor.shape) * size for tensor in tensor_table(config).hf_tensors().values())


def main() -> None:
    """Make the model and the checkpoint if they do not exist."""
    case, num_bytes, work = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    config, hf = config_of_size(num_bytes), work / CASES[case].hf
    if not hf.exists():
        make_hf_model(hf, config, CASES[case].num_files)
    if not (work / case).exists():
        make_checkpoint(work / case, hf, config, CASES[case])


if __name__ == "__main__":
    main()
