"""Read Megatron's formats ``torch_dcp`` and ``fsdp_dtensor``, and tell them from all else that DCP saves.

Both are torch.distributed.checkpoint (DCP) without Megatron's ``metadata.json``: a flattened state dict with the
parameters of a model that torch's FSDP2 or Megatron-FSDP shards. ``model.decoder.layers.0.mlp.linear_fc1.weight`` is a
whole parameter in chunks, under the name that it has in the state dict of its module. Megatron-FSDP puts ``module.``
before the name, and cuts ``linear_fc1`` into ``weight_w`` (gate) and ``weight_v`` (up). ``args``, ``iteration`` and the
like are objects, each in an archive of its own (Megatron-LM training/checkpointing.py, ``save_checkpoint`` and
``generate_state_dict``, 0.12 to 0.19; mcore transformer/fsdp_dtensor_checkpoint.py, 0.19).
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

#: The prefixes of all tensors of the model: of torch_dcp, and of fsdp_dtensor.
_MODEL: Final = re.compile(r"model\.(module\.)?")
#: The objects that are read: Megatron-LM's args, and the plain values beside them.
_STATE: Final = ("args", "iteration", "checkpoint_version", "num_floating_point_operations_so_far")
_KEYS_SHOWN: Final = 3


def parameter_name(key: str) -> str | None:
    """The name of a stored tensor in the state dict of the model; None if it is no part of that."""
    match = _MODEL.match(key)
    return None if match is None else key[match.end() :]


def read_stored(directory: Path) -> StoredMetadata:
    """What the ``.metadata`` of an iteration's directory lists, if Megatron saved it in one of these formats.

    Raises FormatError where the save was not finished or the metadata is damaged, UnsupportedFormatError for what
    others save by DCP, UnsafePickleError where the pickle asks for anything outside the allowlist.
    """
    stored = metadata.read_stored(directory)
    if common_state.SHARDED_KEY in stored.objects:
        raise FormatError(
            f"{directory} has no {BACKEND_FILE}, which Megatron writes last: its save has not finished, or it was not "
            "copied"
        )
    if "args" not in stored.objects or not any(map(_MODEL.match, stored.tensors)):
        raise UnsupportedFormatError(
            f"{directory} is not a Megatron checkpoint: {BACKEND_FILE} is missing, so it was saved by "
            "torch.distributed.checkpoint (DCP) and not by Megatron's dist_checkpointing, or the save has not "
            f"finished. It holds {listed(sorted(stored.tensors)[:_KEYS_SHOWN])}. Load it with what saved it, and save "
            "it with Megatron's --ckpt-format torch_dist or as a Hugging Face model (save_pretrained)."
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
