"""``dist_checkpointing.load`` out of any model that this package opens: ``load``, and the same as a load strategy.

Upstream: megatron-core dist_checkpointing/serialization.py and strategies/torch.py, 0.16 and 0.19.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.conversion import LossPolicy, names_of_sources
from dist_ckpt_mistral.errors import TensorMismatchError, UnsupportedModelError, for_all
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE
from dist_ckpt_mistral.mapping.source import ModelSource, open_megatron, open_source, with_padding_rows
from dist_ckpt_mistral.mapping.twins import require_equal_twins
from dist_ckpt_mistral.megatron.held_weights import HeldEntry, HeldTensor, why_unfit
from dist_ckpt_mistral.megatron.hf_metadata import (
    HfBox,
    ShardedStateDict,
    StoredIndex,
    annotated_tensor,
    stored_index,
)
from dist_ckpt_mistral.megatron.load_weights import Filling, overwriting
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.entries import flat_state, is_extra_state, split_state_key
from dist_ckpt_mistral.model.table.rules import KeyStyle, ParamState

_LOG = logging.getLogger(__name__)
#: The number of a layer in a key.
_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")
#: Opens the stored tensors of a state of the parameters: the weights, or a state of the optimizer.
_Opener = Callable[[ParamState], ModelSource]


def load(
    sharded_state_dict: ShardedStateDict,
    source: str | Path,
    *,
    config: GivenConfig | None = None,
    allow_lossy: bool = False,
    effort: Effort = DEFAULT_EFFORT,
) -> ShardedStateDict:
    """Load what a sharded state dict describes, as Megatron's ``dist_checkpointing.load`` does, from any stored model.

    The source may be a Hugging Face directory, or a checkpoint of any version, backend and parallelism. Only the bytes
    of this rank's tensors are read. The call is not collective, and needs no process group: any rank may load at any
    time.

    As in Megatron's load, tensors that have data are filled in place and the others are allocated on the CPU; values
    are converted to their dtype; rows that pad the vocabulary are those that the checkpoint has, and zeros where it has
    none. What Megatron's load adds from the common state of a checkpoint, such as the iteration, is not part of the
    result. Extra state of Transformer Engine is None. Optimizer state comes from checkpoints that store it in the
    shapes of the model (``dcm.optimizer_state_dict``).

        state = dcm.load(dcm.sharded_state_dict(config, dcm.ParallelLayout(tp=2, pp=4), rank=3), "hf_dir")
        model.load_state_dict(dcm.load(model.sharded_state_dict(), "ckpt"))

    Args:
        sharded_state_dict: A sharded state dict of a Mistral model: from ``dcm.sharded_state_dict`` or a live model,
            nested or not, with factories or the entries that they build. It is not changed, except that tensors with
            data are filled.
        source: A Hugging Face directory, a hub id, or a Megatron checkpoint (root or iteration directory).
        config: Configuration of a checkpoint that has none: a MistralConfig, a config.json, or a directory or hub id
            with one. Shapes are compared with it. What no shape shows, such as the number of heads of equal size, is
            not, because a sharded state dict does not tell it: ``load_weights`` asks the model.
        allow_lossy: Warn, instead of raising an error, if a conversion of dtypes makes finite values infinite or other
            values zero.
        effort: Number of threads and size of the copy buffers.

    Returns:
        The state dict with tensors in place of the sharded entries.

    Raises:
        TensorMismatchError: Entries are not those of the stored model: other keys, shapes or places. All are named.
        UnsupportedModelError: There are entries that are no tensors of the model, such as random number state.
        OutputError: A conversion of dtypes destroys values.
        DistCkptMistralError: The source cannot be read.
    """
    require_types(load, **locals())
    state, result, factories = load_preprocess(sharded_state_dict)
    state, others = extract_sharded_base(state)
    if others:
        _LOG.warning(
            "entries that are not sharded belong to the common state and are left out: %s", listed([*_paths(others)])
        )
    merge(
        result,
        _loaded(
            state, partial(_opened, source, config), LossPolicy(allowed=allow_lossy, names_of=names_of_sources), effort
        ),
    )
    loaded: ShardedStateDict = apply_factory_merges(result, factories)
    return loaded


class LoadStrategy:
    """Lets Megatron's own ``dist_checkpointing.load`` take the tensors from any model that this package opens.

    Megatron reads the common state of the directory that it is given, validates, and merges; the tensors come from
    ``source`` as ``dcm.load`` reads them. So the weights of Hugging Face files can go into a run that resumes. Megatron
    only calls the strategy's methods, in 0.16 and 0.19; its default ``strict`` alone is supported.

    Args:
        source: Where the tensors come from, as for ``dcm.load``; by default the directory that Megatron loads.
        config: As for ``dcm.load``.
        allow_lossy: As for ``dcm.load``.
        effort: Number of threads and size of the copy buffers.

    Example:
        ``dist_checkpointing.load(state, "ckpt/iter_0000500", dcm.LoadStrategy("hf_dir"))``
    """

    #: Megatron then gives the strategy the entries that are objects, too (0.16).
    can_handle_sharded_objects: Final = True

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        config: GivenConfig | None = None,
        allow_lossy: bool = False,
        effort: Effort = DEFAULT_EFFORT,
    ) -> None:
        """Read nothing yet."""
        require_types(LoadStrategy.__init__, **locals())
        self._source, self._config = source, config
        self._losses, self._effort = LossPolicy(allowed=allow_lossy, names_of=names_of_sources), effort

    def load(
        self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path, async_strategy: str | None = None
    ) -> ShardedStateDict:
        """Load entries whose factories were applied; what Megatron calls.

        Args:
            sharded_state_dict: The entries.
            checkpoint_dir: The directory that Megatron loads; the source if the strategy was made without one.
            async_strategy: Ignored: nothing here is asynchronous.

        Returns:
            The tensors in place of the entries.

        Raises:
            DistCkptMistralError: As ``dcm.load`` does.
        """
        del async_strategy
        source = checkpoint_dir if self._source is None else self._source
        return _loaded(sharded_state_dict, partial(_opened, source, self._config), self._losses, self._effort)

    def check_backend_compatibility(self, loaded_backend: object) -> None:
        """Accept any backend: the source decides."""

    def check_version_compatibility(self, loaded_version: object) -> None:
        """Accept any version: the source decides."""

    def load_tensors_metadata(self, checkpoint_dir: str | Path, metadata: object = None) -> NoReturn:
        """Refuse: only a ``strict`` other than the default asks for it. Raises UnsupportedModelError."""
        del checkpoint_dir, metadata
        raise UnsupportedModelError(
            "dcm.LoadStrategy supports strict='assume_ok_unexpected' alone, the default of load"
        )

    load_sharded_metadata = load_tensors_metadata


def _opened(path: str | Path, config: GivenConfig | None, state: ParamState) -> ModelSource:
    """Open ``state`` of the model in ``path``."""
    if state is ParamState.WEIGHTS:
        source = open_source(path, config=chosen_config(config), dtype="float32")  # FP8 values are rounded once
    else:
        source = open_megatron(locate(path, Kind.CHECKPOINT).path, config=chosen_config(config), state=state)
    require_equal_twins(source)
    return with_padding_rows(source)


def _loaded(state: ShardedStateDict, opened: _Opener, losses: LossPolicy, effort: Effort) -> ShardedStateDict:
    """The tensors of ``state``, a nested dict of ShardedTensors and ShardedObjects."""
    entries = [*nested_values(state)]
    _require_readable(entries)
    held: dict[int, HeldEntry] = {}
    by_state: dict[ParamState, list[ShardedTensor]] = {}
    for entry in entries:
        if isinstance(entry, ShardedTensor):
            by_state.setdefault(_state_of(entry.key), []).append(entry)
    fillings = []
    for which, tensors in by_state.items():
        source = opened(which)
        find = _Finder(source, which, tensors)
        new = dict(zip(map(id, tensors), for_all(find.held, tensors), strict=True))
        fillings.append(Filling.of([*new.values()], source))
        held |= new
    overwrites = any(isinstance(entry, ShardedTensor) and entry.data is not None for entry in entries)
    with overwriting() if overwrites else contextlib.nullcontext():
        for filling in fillings:
            filling.run(losses, effort)

    def value(entry: object) -> torch.Tensor | None:
        return held[id(entry)].tensors[0].values if id(entry) in held else None

    loaded: ShardedStateDict = dict_list_map_outplace(value, state)
    return loaded


def _state_of(key: str) -> ParamState:
    """The state of the parameters that an entry of this key is a part of."""
    called, _ = split_state_key(key) or ("", "")
    return next((state for state in ParamState if called in state.value), ParamState.WEIGHTS)


def _require_readable(entries: list[Any]) -> None:
    """Raise UnsupportedModelError if there are entries of which only Megatron knows what they are."""
    flat = sorted({name for entry in entries if (name := flat_state(entry.key)) is not None})
    if flat:
        raise UnsupportedModelError(FLAT_STATE_ADVICE.format(name=flat[0]))
    objects = [entry.key for entry in entries if isinstance(entry, ShardedObject) and not is_extra_state(entry.key)]
    if objects:
        raise UnsupportedModelError(
            f"the sharded state dict has objects, which only Megatron's own load reads: {listed(sorted({*objects}))}. "
            "Load the tensors alone: leave these entries out."
        )


class _Finder:
    """Finds the boxes of Hugging Face tensors in the entries of one state."""

    def __init__(self, source: ModelSource, state: ParamState, tensors: list[ShardedTensor]) -> None:
        """Find the prefix that the keys of all ``tensors`` share. Raises TensorMismatchError if there are several."""
        self._source, self._state = source, state
        self._index: StoredIndex = stored_index(source.table)
        hybrid = stored_index(source.table, KeyStyle.HYBRID)
        self._known = {key for key, _ in (*self._index, *hybrid)}
        if _is_hybrid({self._parts(tensor.key)[1] for tensor in tensors}, self._index, hybrid):
            self._index = hybrid
        prefixes = {self._parts(tensor.key)[0] for tensor in tensors}
        if len(prefixes) > 1:
            quoted = listed(sorted(map(repr, prefixes)))
            raise TensorMismatchError(f"the keys have several prefixes: expected those of one model, got {quoted}")

    def _parts(self, key: str) -> tuple[str, str]:
        """The prefix of a key, such as ``language_model.`` in Megatron-Bridge, and the key in the table."""
        parameter = key if self._state is ParamState.WEIGHTS else (split_state_key(key) or ("", key))[1]
        parts = parameter.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        end = next((end for end in ends if end in self._known), parameter)
        return parameter.removesuffix(end), end

    def held(self, tensor: ShardedTensor) -> HeldEntry:
        """The memory of an entry, and its boxes. Raises TensorMismatchError for what is no part of the stored model."""
        _, parameter = self._parts(tensor.key)
        annotated = annotated_tensor(self._index, tensor.key.removesuffix(parameter), tensor)
        values = _memory(tensor)
        if (why := why_unfit(values)) is not None:
            raise TensorMismatchError(f"the data of {tensor.key!r} {why}")
        boxes = annotated.hf_boxes
        layer = self._index.get((parameter, ()))
        if layer is not None and layer.rule.padded_vocabulary:
            boxes = self._rows(layer.hf_tensors[0][0].hf_name, tensor)
        held = HeldTensor(key=tensor.key, values=values, boxes=boxes, is_main=True)
        return HeldEntry(entry=annotated, tensors=(held,), in_place=True)

    def _rows(self, hf_name: str, tensor: ShardedTensor) -> tuple[HfBox, ...]:
        """The box of a part of the vocabulary: all of its rows that are stored, padding too."""
        (link,) = self._source.links[hf_name]
        first, columns = tensor.global_offset[0], tensor.local_shape[1]
        rows = max(0, min(tensor.local_shape[0], link.shape[0] - first))
        box = HfBox(
            hf_name=hf_name,
            hf_shape=(link.shape[0], columns),
            hf_offset=(first, 0),
            shape=(rows, columns),
            local_offset=(0, 0),
        )
        return (box,) if rows else ()


def _is_hybrid(keys: set[str], gpt: StoredIndex, hybrid: StoredIndex) -> bool:
    """Whether keys are those of a HybridModel, in which attention and MLP have layer numbers of their own.

    Raises TensorMismatchError where the keys of a part of a model fit it and a GPTModel, for other layers.
    """
    layers = {key: int(number[1]) for key in keys if (number := _LAYER.search(key))}
    of_gpt = keys <= {key for key, _ in gpt}
    if not keys <= {key for key, _ in hybrid} or (of_gpt and not layers):
        return False
    if of_gpt and len({layer % 2 for layer in layers.values()}) == 1:
        names = listed(sorted(layers))
        raise TensorMismatchError(
            f"the keys may be those of a GPTModel or of a HybridModel, which mean other layers: {names}. "
            "Load whole layers, or the whole model."
        )
    return True


def _memory(tensor: ShardedTensor) -> torch.Tensor:
    """The memory to fill: that of the entry, or new memory on the CPU, where Megatron allocates it, too."""
    data: torch.Tensor | None = tensor.data
    return torch.empty(tensor.local_shape, dtype=tensor.dtype) if data is None else data.detach()


def _paths(state: Mapping[str, Any] | list[Any], path: str = "") -> Iterator[str]:
    """Yield the places of the values in nested dicts and lists."""
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, dict | list):
            yield from _paths(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"
