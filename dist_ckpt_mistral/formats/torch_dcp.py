"""Read Megatron's format ``torch_dcp``, and tell it from all else that torch.distributed.checkpoint (DCP) saves.

It is DCP without Megatron's ``metadata.json``: a flattened state dict with the parameters of a model that torch's FSDP2
shards, at tensor and pipeline parallelism 1. ``model.decoder.layers.0.mlp.linear_fc1.weight`` is a whole parameter in
chunks, under the name that it has in the state dict of its module. ``args``, ``iteration`` and the like are objects,
each in an archive of its own. Megatron-FSDP's ``fsdp_dtensor`` is alike, with other names (Megatron-LM
training/checkpointing.py, ``save_checkpoint`` and ``generate_state_dict``, 0.12 to 0.19).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError
from dist_ckpt_mistral.formats.checkpoint_directory import BACKEND_FILE
from dist_ckpt_mistral.formats.stored_metadata import StoredMetadata
from dist_ckpt_mistral.formats.torch_dist import common_state, metadata
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage.local import SourceFiles

#: The prefix of all tensors of the model.
MODEL_PREFIX: Final = "model."
#: The objects that are read: Megatron-LM's args, and the plain values beside them.
_STATE: Final = ("args", "iteration", "checkpoint_version", "num_floating_point_operations_so_far")
#: Keys of Megatron-FSDP: its wrapper's prefix, and the halves into which it cuts gate and up (mcore transformer/
#: fsdp_dtensor_checkpoint.py, ``handle_swiglu_in_state_dict``, 0.15 to 0.19).
_OF_MEGATRON_FSDP: Final = re.compile(r"model\.module\.|model\..*\.linear_fc1\.weight\d*_[wv]$")
_KEYS_SHOWN: Final = 3


def read_stored(directory: Path) -> StoredMetadata:
    """What the ``.metadata`` of an iteration's directory lists, if Megatron saved it in this format.

    Raises FormatError where the save was not finished or the metadata is damaged, UnsupportedFormatError for
    Megatron-FSDP's format and for what others save by DCP, UnsafePickleError where the pickle asks for anything outside
    the allowlist.
    """
    stored = metadata.read_stored(directory)
    if common_state.SHARDED_KEY in stored.objects:
        raise FormatError(
            f"{directory} has no {BACKEND_FILE}, which Megatron writes last: its save has not finished, or it was not "
            "copied"
        )
    if "args" not in stored.objects or not any(name.startswith(MODEL_PREFIX) for name in stored.tensors):
        raise UnsupportedFormatError(
            f"{directory} is not a Megatron checkpoint: {BACKEND_FILE} is missing, so it was saved by "
            "torch.distributed.checkpoint (DCP) and not by Megatron's dist_checkpointing, or the save has not "
            f"finished. It holds {listed(sorted(stored.tensors)[:_KEYS_SHOWN])}. Load it with what saved it, and save "
            "it with Megatron's --ckpt-format torch_dist or as a Hugging Face model (save_pretrained)."
        )
    if fsdp := sorted(filter(_OF_MEGATRON_FSDP.match, stored.tensors)):
        raise UnsupportedFormatError(
            f"{directory} is in Megatron-FSDP's format fsdp_dtensor, which is not read ({listed(fsdp[:_KEYS_SHOWN])}). "
            "Load it in Megatron-LM as it was saved, and save it with --ckpt-convert-format torch_dist and "
            "--ckpt-convert-save DIR."
        )
    return stored


def read_common_state(directory: Path, stored: StoredMetadata) -> dict[str, Any]:
    """The args, and the plain values beside them. Raises as ``read_stored``."""
    state = {}
    for name in _STATE:
        entry = stored.objects.get(name)
        if entry is None:
            continue
        path = directory / entry.file
        with SourceFiles([path]) as files:
            if files.size_bytes(0) < entry.offset + entry.num_bytes:
                raise FormatError(f"{path} is truncated: {name} should end at byte {entry.offset + entry.num_bytes}")
            archive = ArchiveReader(files, 0, entry.offset, entry.num_bytes, f"{name} in {path}")
            state[name] = archive.object(common_state.allowlist())
    return common_state.checked(state, str(directory))
