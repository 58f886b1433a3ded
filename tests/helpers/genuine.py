"""The genuine checkpoints under tests/fixtures/ and their true tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors.torch import load_file

if TYPE_CHECKING:
    import torch

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
#: Likewise, in Megatron's legacy zarr format.
ZARR: Final = {
    "zarr_ckpt": "",
    "optzarr_0123": "",
    "moe_zarr_0153": "iter_0000000",
    "fsms_zarr_0153": "",
    "dpzero_zarr_0153": "",
}


def folder(case: str) -> Path:
    """Everything that belongs to a case."""
    return Path(__file__).parents[1] / "fixtures" / case


def shards(case: str) -> Path:
    """The directory of its iteration."""
    return folder(case) / "checkpoint" / (GENUINE | ZARR)[case]


def truth(case: str) -> dict[str, torch.Tensor]:
    """The tensors of the live model, under Hugging Face names. Those called RAW are not the model's."""
    tensors = load_file(folder(case) / "truth.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("RAW.")}
