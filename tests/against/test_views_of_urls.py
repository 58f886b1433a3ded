"""Other libraries read a checkpoint in a bucket where it is: the same tensors, bit for bit, from S3 by SeaweedFS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import genuine
import pytest
import torch
import zarr
from object_servers import S3Server, s3_for_tests
from remote_folders import put_folder
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

import dist_ckpt_mistral as dcm

pytest.importorskip("obstore")
tensorstore = pytest.importorskip("tensorstore")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

#: A root of Megatron-LM, experts stacked in one tensor, and the zarr format.
_CASES = ("mlm_0161", "moe_seq_0192", "optzarr_0123")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with the checkpoints in it, for all tests of this module."""
    with s3_for_tests(tmp_path_factory.mktemp("s3")) as server:
        for case in _CASES:
            put_folder(genuine.folder(case) / "checkpoint", f"{server.url}/views/{case}")
        yield server


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("case", _CASES)
def test_mappings_and_torch_dcp(case: str, s3: S3Server) -> None:
    """``open_checkpoint`` and torch's own distributed checkpoint give the tensors of the live model."""
    url, config, truth = f"{s3.url}/views/{case}", genuine.folder(case) / "config.json", genuine.truth(case)
    with dcm.open_checkpoint(url, config=config) as checkpoint:
        assert [name for name, tensor in truth.items() if not _same(checkpoint[name], tensor)] == []
    state = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    dcp_load(state, storage_reader=dcm.HfNamedReader(url, config), no_dist=True)
    assert [name for name, tensor in truth.items() if not _same(state[name], tensor)] == []


@pytest.mark.parametrize("case", _CASES)
def test_zarr_and_tensorstore(case: str, s3: S3Server) -> None:
    """zarr-python reads a weight without an index; with one beside the shards, TensorStore does by itself."""
    url, config, truth = f"{s3.url}/views/{case}", genuine.folder(case) / "config.json", genuine.truth(case)
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = truth[name].view(torch.int16).numpy().tobytes()
    group: Any = zarr.open_group(dcm.zarr_store(url, config=config), mode="r")
    assert group[name][...].tobytes() == expected
    done = dcm.write_index(url, config=config)
    assert dcm.index_problems(url) == ()
    base = {
        "driver": "s3",
        "bucket": "bucket",
        "endpoint": s3.endpoint,
        "aws_region": "us-east-1",
        "path": f"{str(done.directory).partition('://bucket/')[2]}/",
    }
    kvstore = {"driver": "ocdbt", "base": base, "path": f"hf/{name}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    assert array.read().result().tobytes() == expected
