"""TensorStore, zarr-python and fsspec read the weights of genuine checkpoints where they are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tensorstore as ts
from command_line import run
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from genuine import GENUINE, ZARR, folder, shards, true_bytes

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.formats.ocdbt import INDEX_FILES, MANIFEST_FILE, SHARDS_FILE, crc32c
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored

CASES = (*GENUINE, *ZARR)


def indexed(case: str, place: Path, **options: Any) -> dcm.WeightIndex:  # noqa: ANN401
    """A copy of a genuine checkpoint with an index."""
    shutil.copytree(folder(case) / "checkpoint", place)
    return dcm.write_index(place, config=folder(case), **options)


def opened(index: dcm.WeightIndex, name: str) -> Any:  # noqa: ANN401
    """An array as TensorStore opens it."""
    return ts.open(f"file://{index.directory}/|ocdbt:{name}/|zarr3:", open=True, read=True).result()


def packed_experts(expected: dict[str, tuple[str, tuple[int, ...], bytes]], name: str) -> bytes:
    """The bytes of the packed experts that transformers calls ``name``, out of those that files have one by one."""
    layer, _, part = name.partition(".mlp.experts.")
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[part]
    experts = f"{layer}.block_sparse_moe.experts."
    count = sum(each.startswith(experts) and each.endswith("w1.weight") for each in expected)
    return b"".join(expected[f"{experts}{number}.{each}.weight"][2] for number in range(count) for each in parts)


@pytest.mark.parametrize("case", CASES)
def test_tensorstore_reads_every_weight(case: str, tmp_path: Path) -> None:
    """By Hugging Face name the bits, shape and dtype of the live model, packed experts and tied heads too."""
    expected = true_bytes(case)
    index = indexed(case, tmp_path / "ckpt")
    names = {name.removeprefix("hf/") for name in index.names if name.startswith("hf/")}
    assert expected.keys() <= names
    assert index.left_out == {}
    for name in names:
        value = np.asarray(opened(index, f"hf/{name}").read().result())
        if name in expected:
            dtype, shape, content = expected[name]
            assert (dcm_dtype(value), value.shape) == (dtype, shape)
            assert value.tobytes() == content, name
        elif ".mlp.experts." in name:
            assert value.tobytes() == packed_experts(expected, name), name
        else:
            assert name == "lm_head.weight"
            assert value.tobytes() == expected["model.embed_tokens.weight"][2]


def dcm_dtype(value: np.ndarray[Any, Any]) -> str:
    """The name of an array's dtype in safetensors."""
    return {"bfloat16": "BF16", "float32": "F32"}[value.dtype.name]


@pytest.mark.parametrize("case", ["td_0192", "opt_fsms_0140", "moe_grouped_0161", "zarr_ckpt"])
def test_tensorstore_reads_by_megatrons_keys(case: str, tmp_path: Path) -> None:
    """By Megatron's key the whole stored tensor, padding of the vocabulary included; rows alone can be read."""
    index = indexed(case, tmp_path / "ckpt")
    stored = open_stored(index.directory)
    keys = [name.removeprefix("megatron/") for name in index.names if name.startswith("megatron/")]
    assert len(keys) > 8
    for key in keys:
        assert opened(index, f"megatron/{key}").shape == stored.tensors[key].global_shape
    embedding = opened(index, "megatron/embedding.word_embeddings.weight")
    assert embedding.shape[0] == 256
    _, shape, content = true_bytes(case)["model.embed_tokens.weight"]
    row_bytes = len(content) // shape[0]
    assert np.asarray(embedding[7].read().result()).tobytes() == content[7 * row_bytes : 8 * row_bytes]
    assert np.asarray(embedding[:250].read().result()).tobytes() == content


def test_the_index_is_small_and_always_the_same(tmp_path: Path) -> None:
    """It has no data of the weights; the same shards give the same index."""
    one, other = (indexed("td_0192", tmp_path / name) for name in ("one", "other"))
    assert one.num_bytes == sum((one.directory / name).stat().st_size for name in INDEX_FILES) < 25_000
    for name in INDEX_FILES:
        assert (one.directory / name).read_bytes() == (other.directory / name).read_bytes()


def test_an_old_index_says_so(tmp_path: Path) -> None:
    """A shard that is longer, was saved again or is gone: ``index``, its ``--check`` and ``verify`` name it."""
    root, config = tmp_path / "ckpt", ["--config", folder("td_0192")]
    assert dcm.index_problems(shutil.copytree(shards("td_0192"), root)) == ()
    result, follows = run("index", root, *config).out
    assert re.fullmatch(rf"wrote an index of 48 arrays \(20\.8 kB\) to {root} in \d+\.\d+ s", result)
    purpose, _, line = follows.partition(": ")
    assert purpose == "open a weight with"
    assert eval(line, {"tensorstore": ts}).shape  # noqa: S307  (what a reader would paste)
    assert run("index", root, "--check").code == 0
    assert dcm.check(root, config=folder("td_0192")).is_sound
    shard = next(root.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content + b"\0")
    (problem,) = dcm.index_problems(root)
    assert problem.startswith(f"{shard.name}: the index was made for")
    shard.write_bytes(content)
    assert dcm.index_problems(root) == ()
    at = content.index(b"PK\1\2") + 16  # the CRC-32 of a record, as another save would have another
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    outcome = run("index", root, "--check")
    assert outcome.code == 3
    assert outcome.out[0].startswith(f"{shard.name}: the index was made for")
    findings = [each for each in dcm.check(root, config=folder("td_0192")).findings if each.file == MANIFEST_FILE]
    assert "out of date, run index again" in findings[0].what
    outcome = run("index", root, *config)
    assert any("out of date" in line and shard.name in line for line in outcome.err)
    assert dcm.index_problems(root) == ()
    shard.unlink()
    assert shard.name in dcm.index_problems(root)[0]


def test_half_an_index_is_told(tmp_path: Path) -> None:
    """A manifest without the sizes of the shards is another program's; other versions are refused."""
    index = indexed("td_0192", tmp_path / "ckpt")
    (index.directory / SHARDS_FILE).write_text(json.dumps({"version": 2, "shards": {}}))
    with pytest.raises(dcm.FormatError, match=r"version in .*: expected 1"):
        dcm.index_problems(index.directory)
    (index.directory / SHARDS_FILE).unlink()
    assert "an index of another program" in dcm.index_problems(index.directory)[0]


def test_copies_of_a_checkpoint_leave_the_index(tmp_path: Path) -> None:
    """``reshard`` writes other shards: the old index does not come along."""
    index = indexed("td_0192", tmp_path / "ckpt")
    dcm.reshard(index.directory, tmp_path / "out", layout=dcm.ParallelLayout(tp=2), config=folder("td_0192"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name in INDEX_FILES]
    assert [path for path in index.directory.iterdir() if path.name in INDEX_FILES]


def test_references_of_kerchunk(tmp_path: Path) -> None:
    """The same ranges as fsspec's reference file system reads them."""
    references = tmp_path / "references.json"
    index = indexed("td_0192", tmp_path / "ckpt", kerchunk=references)
    beside = DirFileSystem(str(index.directory), LocalFileSystem())
    files = fsspec.filesystem("reference", fo=str(references), fs=beside)
    for name, (_, shape, content) in true_bytes("td_0192").items():
        about = json.loads(files.cat(f"hf/{name}/zarr.json"))
        assert tuple(about["shape"]) == shape
        if len(shape) == 1:
            assert files.cat(f"hf/{name}/c/0") == content


def test_the_checksum_is_that_of_rfc_3720() -> None:
    """CRC-32C of the test vectors there (appendix B.4)."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
