"""The genuine checkpoints under tests/fixtures/ and their true tensors."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import tarfile
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import safetensors

if TYPE_CHECKING:
    import torch

#: Data type, shape and bytes of a tensor.
Described = tuple[str, tuple[int, ...], bytes]

_FIXTURES: Final = Path(__file__).parents[1] / "fixtures"
#: Case -> where its iteration lies.
GENUINE: Final = {
    "td_0123": "",
    "td_0161": "",
    "td_0192": "",
    "tied_tp2pp2_0161": "",
    "vpp_0161": "",
    "nonhomog_0192": "",
    "singleton_0161": "",
    "common_0192": "",
    "fullpar_0192": "",
    "mlm_0161": "iter_0000000",
    "moe_seq_0192": "",
    "moe_grouped_0161": "",
    "te_moe_0192": "",
    "mlm_moe_0192": "iter_0000000",
    "mistral4_0192": "",
    "opt_fr_0192": "",
    "opt_dr_0161": "",
    "opt_plain_0161": "",
    "opt_fsms_0140": "",
    "bridge_0062": "iter_0000000",
}
#: Likewise, what Megatron-Bridge's training saves. They are not in the list above: they hold optimizer state, and some
#: a vision tower.
BRIDGE: Final = dict.fromkeys(("bridge_train_0062", "bridge_ministral3_0062", "bridge_frozen_0062"), "iter_0000007")
#: Likewise, in Megatron's legacy zarr format.
ZARR: Final = {
    "zarr_ckpt": "",
    "optzarr_0123": "",
    "moe_zarr_0153": "iter_0000000",
    "fsms_zarr_0153": "",
    "dpzero_zarr_0153": "",
}
#: Likewise, in Megatron's legacy torch format, with an archive for every rank.
LEGACY: Final = dict.fromkeys(
    (
        *("legacy_tp2pp2_0192", "legacy_vpp_tied_0192", "legacy_moe_0192", "legacy_plain_0192", "legacy_distrib_0192"),
        *("legacy_old_0080", "legacy_old_tied_0080"),
    ),
    "iter_0000007",
)
#: Likewise, in Megatron's formats torch_dcp and fsdp_dtensor.
FSDP: Final = {"dcp_0192": "iter_0000007", "fsdp_0192": "iter_0000007"}
#: Adapters on a model like bridge_0062, of Megatron-Bridge and of ms-swift. Their truth has the names of PEFT.
ADAPTERS: Final = {
    "lora_0062": "iter_0000005",
    "canonical_0062": "iter_0000005",
    "both_0062": "iter_0000005",
    "swift_0192": "iter_0000005",
}


def folder(case: str) -> Path:
    """Everything that belongs to a case; of a case that is one archive, a copy that lasts as long as this process."""
    packed = _FIXTURES / f"{case}.tar.xz"
    return _unpacked(packed) if packed.exists() else _FIXTURES / case


@cache
def _unpacked(archive: Path) -> Path:
    target = _place_to_unpack() / archive.name.partition(".")[0]
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target


@cache
def _place_to_unpack() -> Path:
    place, process = Path(tempfile.mkdtemp(prefix="genuine-")), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # and not a fork of it
            shutil.rmtree(place, ignore_errors=True)  # the session has removed it with all others, if it is over

    atexit.register(remove)
    return place


def shards(case: str) -> Path:
    """The directory of its iteration."""
    return folder(case) / "checkpoint" / (GENUINE | ZARR | LEGACY | FSDP | BRIDGE)[case]


def shards_of_adapter(case: str) -> Path:
    """The iteration of one of ADAPTERS."""
    return folder(case) / "checkpoint" / ADAPTERS[case]


def truth(case: str) -> dict[str, torch.Tensor]:
    """The tensors of the live model, under Hugging Face names. Those called RAW are not the model's."""
    load_file = importlib.import_module("safetensors.torch").load_file  # needs torch; the rest of this module does not
    tensors = load_file(folder(case) / "truth.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("RAW.")}


@lru_cache(maxsize=2)  # tests ask for one tensor after another of the same case
def true_bytes(case: str) -> dict[str, Described]:
    """The same, without torch."""
    tensors = described_file(folder(case) / "truth.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("RAW.")}


def described_file(path: Path) -> dict[str, Described]:
    """Every tensor of a file, as the safetensors library reads it."""
    found = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    return {name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in found}
