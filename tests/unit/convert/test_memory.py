"""Memory does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_ckpt_mistral.formats import hf_directory
from dist_ckpt_mistral.formats.torch_dist.archive_writer import ArchiveLayout, object_archive
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.table import tensor_table

pytestmark = pytest.mark.slow

#: Private memory that a process of the tool may map, half of it reserved by python, numpy and thread stacks.
_LIMIT_BYTES = 176 << 20

_LIMITED = """
import resource, sys
from dist_ckpt_mistral.cli.main import main
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


def limited(*arguments: object, limit_bytes: int = _LIMIT_BYTES) -> subprocess.CompletedProcess[str]:
    """Run the tool in a process whose private memory is limited by the kernel."""
    command = [sys.executable, "-c", _LIMITED, str(limit_bytes), *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # numpy's own threads and buffers, which nobody needs
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)


_SIZES = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "dtype": "bfloat16",
}
#: A layer's experts, stacked as in a checkpoint, are larger than the limit by far.
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 2816, "num_hidden_layers": 2}


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several times the limit, made of holes; its largest tensors are nearly as large as the limit."""
    folder = tmp_path_factory.mktemp("large") / "hf"
    folder.mkdir()
    config = {"model_type": request.param, **_SIZES, **(_EXPERTS if request.param == "mixtral" else {})}
    tensors = tensor_table(MistralConfig.from_hf(config)).hf_tensors()
    num_bytes = holes(folder, [(name, "bfloat16", tensor.shape) for name, tensor in tensors.items()], config)
    assert num_bytes > 3.4 * _LIMIT_BYTES
    return folder


def holes(folder: Path, tensors: list[tuple[str, str, tuple[int, ...]]], config: dict[str, Any]) -> int:
    """Make a model of zeros that take no space on the disk, and give back the size of its file."""
    (folder / "config.json").write_text(json.dumps(config))
    file = hf_directory.plan_files(tensors, max_file_bytes=1 << 40).files["model.safetensors"]
    with (folder / "model.safetensors").open("wb") as output:
        output.write(file.head)
        output.truncate(file.num_bytes)
    return file.num_bytes


@pytest.fixture(scope="module")
def large_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense one of FP8 numbers, with a scale for every 128 x 128 of them."""
    folder = tmp_path_factory.mktemp("large_fp8") / "hf"
    folder.mkdir()
    config = {"model_type": "mistral", **_SIZES}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, tensor in tensor_table(MistralConfig.from_hf(config)).hf_tensors().items():
        is_quantized = "_proj." in name
        tensors.append((name, "float8_e4m3fn" if is_quantized else "bfloat16", tensor.shape))
        if is_quantized:
            tensors.append((f"{name}_scale_inv", "float32", tuple(size // 128 for size in tensor.shape)))
    told = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert holes(folder, tensors, config | {"quantization_config": told}) > 2.4 * _LIMIT_BYTES
    return folder


def test_conversions_under_a_hard_limit(large: Path, tmp_path: Path) -> None:
    """Whatever reads or writes models and the files beside them takes a fraction of their size, with many workers.

    How ``verify`` reads does not depend on the model: one of them does.
    """
    checkpoint, cut, back = tmp_path / "checkpoint", tmp_path / "cut", tmp_path / "back"
    beside_bytes = 2 * _LIMIT_BYTES
    is_dense = json.loads((large / "config.json").read_text())["model_type"] == "mistral"
    verifications = [
        ("verify", checkpoint, large, "--workers", 4),
        ("verify", cut, "--workers", 4),
        ("verify", back, "--workers", 4),
    ]
    for command in (
        ("from-hf", large, checkpoint, "--tp", 4, "--workers", 4, "--no-sync"),
        ("reshard", checkpoint, cut, "--tp", 2, "--workers", 4, "--no-sync"),
        ("to-hf", cut, back, "--workers", 4, "--no-sync"),
        *(verifications if is_dense else ()),
    ):
        done = limited(*command)
        assert done.returncode == 0, done.stderr
        if command[0] == "from-hf":
            with (checkpoint / "release" / "beside.bin").open("wb") as beside:
                beside.truncate(beside_bytes)
    assert (cut / "release" / "beside.bin").stat().st_size == beside_bytes
    assert (back / "model.safetensors").stat().st_size == (large / "model.safetensors").stat().st_size


def test_a_migration_under_the_same_limit(tmp_path: Path) -> None:
    """Legacy zarr: chunks that are larger than the limit, many small ones, and an object with more than it holds."""
    old = tmp_path / "old"
    large_bytes = 3 * _LIMIT_BYTES // 2
    for key, shape, chunks, num_bytes in (
        ("large", [2, large_bytes], [1, large_bytes], large_bytes),
        ("small", [64, 8, 1 << 20], [1, 8, 1 << 20], 8 << 20),
    ):
        (old / key).mkdir(parents=True)
        plain = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "fill_value": None}
        (old / key / ".zarray").write_text(json.dumps({"shape": shape, "chunks": chunks, "dtype": "|u1", **plain}))
        for number in range(shape[0]):
            name = ".".join([str(number), *["0"] * (len(shape) - 1)])
            with (old / key / name).open("wb") as file:
                file.truncate(num_bytes)
    (old / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    (old / "common.pt").write_bytes(object_archive({"iteration": 7}))
    archive = ArchiveLayout.for_tensor("uint8", (large_bytes,), 0)
    (old / "state").mkdir()
    with (old / "state" / "shard_0_1.pt").open("wb") as file:
        file.write(archive.head)
        file.seek(large_bytes, os.SEEK_CUR)
        file.write(archive.tail(0))
    for command in (("migrate", old, tmp_path / "new", "--workers", 4, "--no-sync"), ("verify", tmp_path / "new")):
        done = limited(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sum(path.stat().st_size for path in (tmp_path / "new").iterdir()) > 3 * large_bytes + (512 << 20)


def test_fp8_under_the_same_limit(large_fp8: Path, tmp_path: Path) -> None:
    """Dequantizing takes no more memory: of FP8 weights only the scales, and a band of values, are ever in memory."""
    checkpoint = tmp_path / "checkpoint"
    for command in (
        ("from-hf", large_fp8, checkpoint, "--tp", 4, "--workers", 4, "--no-sync"),
        ("verify", large_fp8, checkpoint, "--workers", 4),
    ):
        done = limited(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_limit_is_real(large: Path, tmp_path: Path) -> None:
    """The same run fails under a sixteenth of the limit: the kernel does watch."""
    done = limited("from-hf", large, tmp_path / "checkpoint", "--no-sync", limit_bytes=_LIMIT_BYTES // 16)
    assert done.returncode != 0
    assert not (tmp_path / "checkpoint").exists()
