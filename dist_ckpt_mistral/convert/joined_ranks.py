"""What a ``torch_dist`` checkpoint has beside what a legacy ``torch`` one has, for ``migrate`` and ``reshard``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.formats.stored_metadata import object_key
from dist_ckpt_mistral.formats.torch_dist import writer
from dist_ckpt_mistral.formats.torch_dist.common_state import COMMON_FILE
from dist_ckpt_mistral.formats.torch_dist.writer import NewObject
from dist_ckpt_mistral.gather.dtypes import TorchDtype
from dist_ckpt_mistral.mapping import hf_record
from dist_ckpt_mistral.mapping.checkpoint_map import Ignored
from dist_ckpt_mistral.mapping.configuration import Matched
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.table.entries import why_ignored
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.model.table.table import OLD_EXTRA_STATES, TensorTable

_LOG = logging.getLogger(__name__)
#: Args that say how a checkpoint was saved, and their values for torch_dist (Megatron-LM training/arguments.py).
_OF_FORMAT: Final = {"ckpt_format": "torch_dist", "dist_ckpt_format": "torch_dist", "use_dist_ckpt": True}
#: Types of values that are pickled as they are.
_PLAIN: Final = (type(None), bool, int, float, str)


def left_behind(stored: StoredCheckpoint) -> Ignored:
    """The entries of a legacy ``torch`` checkpoint that stay behind: optimizer and generator states, other files."""
    if not stored.is_of_modules:
        return ()
    from dist_ckpt_mistral.mapping.rank_files import why_not_of_model  # noqa: PLC0415  (most are not: slow imports)

    tensors = {key: why for key in stored.tensors if (why := why_not_of_model(stored, key)) is not None}
    return (*tensors.items(), *((key, why_ignored(key) or "no part of the model") for key in stored.objects))


def empty_extra_states(table: TensorTable) -> NewObject:
    """The extra states that models of any layer spec and version of Megatron look for; all are empty."""
    shapes = dict.fromkeys(OLD_EXTRA_STATES, (table.num_layers,)) | table.extra_states(KeyStyle.STACKED)
    return NewObject.empty(
        object_key(key, index, shape)
        for key, shape in shapes.items()
        for index in itertools.product(*map(range, shape))
    )


def new_common_file(match: Matched) -> dict[str, bytes]:
    """The common state of a legacy ``torch`` checkpoint as a file: what every rank's archive says beside its model.

    Values of classes are left out, with a warning. Without args in the checkpoint, new ones describe the model.
    """
    state, config = dict(match.stored.common_state), match.agreed.config
    args, layout = state.pop("args", None), None if match.ranks is None else match.ranks.layout
    dropped: list[str] = []
    content: dict[str, Any] = dict(_plain_items(state, "", dropped))
    if isinstance(args, Mapping):
        present = dict(_plain_items(args, "args.", dropped))
        content["args"] = present | {name: value for name, value in _OF_FORMAT.items() if name in present}
    else:
        dtype = match.stored.tensors[match.found.names()[0]].dtype
        sizes = {"tp": 1, "pp": 1} if layout is None else {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
        content["args"] = to_megatron_args(config, dtype=dtype, **sizes)
    if dropped:
        _LOG.warning("values in the common state that are no plain ones stay behind: %s", listed(dropped))
    described = {} if isinstance(args, Mapping) else {hf_record.KEY: hf_record.to_record(config, match.table, None)}
    content |= {
        "checkpoint_version": content.get("checkpoint_version", 3.0),
        "iteration": content.get("iteration", 0),
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **described},
    }
    return {COMMON_FILE: writer.common_state(content)}


def _plain_items(values: Mapping[str, Any], prefix: str, dropped: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the items that can be pickled without their classes; adds the names of the others to ``dropped``."""
    for name, value in values.items():
        if _is_plain(value) or (prefix and isinstance(value, TorchDtype)):
            yield name, value
        else:
            dropped.append(f"{prefix}{name}")


def _is_plain(value: Any) -> bool:  # noqa: ANN401  (from a pickle)
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_plain, [*value, *value.values()]))
    return type(value) in _PLAIN or (type(value) in (list, tuple) and all(map(_is_plain, value)))
