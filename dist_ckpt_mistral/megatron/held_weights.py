"""The memory of a live model's parameters, and the boxes of Hugging Face tensors that belong there.

Both are read off the entries of the model's own ``sharded_state_dict``: nothing is assumed about the layout, the layer
spec or who built the model. Upstream: megatron-core dist_checkpointing/mapping.py, the same in 0.16 and 0.19.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, is_main_replica
from megatron.core.models.gpt.gpt_model import GPTModel

from dist_ckpt_mistral.errors import ConfigError, TensorMismatchError
from dist_ckpt_mistral.gather.dtypes import WEIGHT_DTYPES
from dist_ckpt_mistral.megatron.hf_metadata import HfBox, HfShardedTensor, HfShardedTensorFactory, add_hf_metadata
from dist_ckpt_mistral.megatron.live_model import AnyModel, model_chunks
from dist_ckpt_mistral.megatron.runtime import on_device
from dist_ckpt_mistral.messages import counted, listed
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.table.vision import LANGUAGE_PREFIX

#: A GPTModel, or a multimodal model that has one. Megatron is untyped.
GptModel: TypeAlias = Any
#: The attribute of a multimodal model that is its GPTModel.
_LANGUAGE_MODEL: Final = LANGUAGE_PREFIX.removesuffix(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTensor:
    """One local tensor of an entry: its memory, and the boxes of Hugging Face tensors in it.

    ``values`` are on the device meta if the memory is only a copy. Rows behind ``live_rows`` pad the vocabulary.
    """

    key: str
    values: torch.Tensor
    boxes: tuple[HfBox, ...]
    is_main: bool

    @property
    def num_elements(self) -> int:
        """Number of elements in the boxes."""
        return sum(math.prod(box.shape) for box in self.boxes)

    @property
    def live_rows(self) -> int:
        """Number of rows in the boxes. They come first."""
        return self.num_elements // math.prod(self.values.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldEntry:
    """A whole parameter as its model describes it: one local tensor, or a factory of several.

    Unless ``in_place``, the tensors are copies: GroupedMLP transposes its parameter (moe/experts.py, to 0.16).
    """

    entry: HfShardedTensor | HfShardedTensorFactory
    tensors: tuple[HeldTensor, ...]
    in_place: bool

    @contextlib.contextmanager
    def copies(self) -> Iterator[list[torch.Tensor]]:
        """New copies of the local tensors. What they hold at the end of the block goes into the parameter.

        That is what Megatron's own load does (dist_checkpointing/serialization.py).
        """
        built = _built(self.entry)
        yield [_memory(tensor) for tensor in _sharded_tensors(built)]
        _memory(self.entry).copy_(self.entry.merge_fn(dict_list_map_outplace(_merge_argument, built)))


def _memory(entry: HfShardedTensor | HfShardedTensorFactory) -> torch.Tensor:
    """The memory that an entry of a live model describes."""
    data: Any = entry.data
    memory: torch.Tensor = data.detach()
    return memory


def _merge_argument(entry: object) -> object:
    """What Megatron's load gives to a ``merge_fn`` in place of an entry."""
    if isinstance(entry, LocalNonpersistentObject):
        return entry.unwrap()
    return entry.data if isinstance(entry, HfShardedTensor) else entry


def _built(entry: HfShardedTensor | HfShardedTensorFactory) -> Any:  # noqa: ANN401  (what a build_fn makes)
    """The local tensors of an entry, in nested dicts and lists."""
    return entry.build() if isinstance(entry, HfShardedTensorFactory) else entry


def _sharded_tensors(built: object) -> Iterator[HfShardedTensor]:
    """All local tensors in nested dicts and lists."""
    if isinstance(built, HfShardedTensor):
        yield built
    elif isinstance(built, dict | list):
        for each in built.values() if isinstance(built, dict) else built:
            yield from _sharded_tensors(each)


def gpt_models(model: AnyModel) -> list[GptModel]:
    """The GPTModels in ``model``, out of their wrappers. Raises ConfigError if it holds something else.

    A multimodal model has its GPTModel beside the vision tower (``Ministral3Model`` of Megatron-Bridge,
    models/ministral3/modeling_ministral3.py, 0.6).
    """
    chunks = model_chunks(model)
    for chunk in chunks:
        if not isinstance(getattr(chunk, _LANGUAGE_MODEL, chunk), GPTModel):
            raise ConfigError(f"model: expected a GPTModel, or a list of them, got {type(chunk).__name__}")
    return chunks


def held_entries(chunks: Sequence[GptModel], config: MistralConfig) -> list[HeldEntry]:
    """The entries of all parameters of a rank's model chunks.

    Raises TensorMismatchError, which names all that differs, unless the model is that of ``config``, and the entries
    describe every parameter once.
    """
    entries, problems = list[HeldEntry](), list[str]()
    for chunk in chunks:
        problems += _other_settings(chunk, config)
        parameters = dict(chunk.named_parameters())
        unfit = [f"parameter {name!r} {why}" for name, each in parameters.items() if (why := why_unfit(each))]
        problems += unfit
        if not unfit:
            try:
                described = _described(chunk, parameters, config)
            except TensorMismatchError as error:
                problems.append(str(error))
                continue
            entries += described
            if undescribed := _undescribed(parameters, [_memory(each.entry) for each in described]):
                some = counted(len(undescribed), "parameter has", "parameters have")
                problems.append(f"{some} no entry in the sharded state dict: {listed(undescribed)}")
    if problems:
        raise TensorMismatchError(f"the weights are not this model's: {'; '.join(dict.fromkeys(problems))}")
    return entries


def _described(chunk: GptModel, parameters: Mapping[str, torch.nn.Parameter], config: MistralConfig) -> list[HeldEntry]:
    """The entries of the weights of a model. Raises TensorMismatchError, as ``add_hf_metadata`` does."""
    device = next((each.device for each in parameters.values()), torch.device("cpu"))
    with on_device(device):
        state = add_hf_metadata(chunk.sharded_state_dict(), config)
    return [_held(entry) for entry in state.values() if isinstance(entry, HfShardedTensor | HfShardedTensorFactory)]


def _held(entry: HfShardedTensor | HfShardedTensorFactory) -> HeldEntry:
    built, start = [*_sharded_tensors(_built(entry))], _memory(entry).untyped_storage().data_ptr()
    in_place = all(_memory(tensor).untyped_storage().data_ptr() == start for tensor in built)
    tensors = (
        HeldTensor(
            key=tensor.key,
            values=_memory(tensor) if in_place else torch.empty_like(_memory(tensor), device="meta"),
            boxes=tensor.hf_boxes,
            is_main=is_main_replica(tensor.replica_id),
        )
        for tensor in built
    )
    return HeldEntry(entry=entry, tensors=tuple(tensors), in_place=in_place)


def why_unfit(parameter: torch.Tensor) -> str | None:
    """Why the memory of a parameter cannot be filled, or None."""
    kind, dtype = type(parameter.detach()), str(parameter.dtype).removeprefix("torch.")
    if kind is not torch.Tensor:
        return f"is a {kind.__name__}: expected an ordinary tensor"
    if parameter.device.type not in ("cpu", "cuda"):
        return f"is on the device {parameter.device}: expected cpu or cuda"
    if dtype not in WEIGHT_DTYPES:
        return f"has dtype {dtype}: expected one of {', '.join(WEIGHT_DTYPES)}"
    return None


def _undescribed(parameters: Mapping[str, torch.nn.Parameter], described: Sequence[torch.Tensor]) -> list[str]:
    """The names of parameters that are not among the tensors ``described`` once."""
    ordered = sorted((each.data_ptr(), name) for name, each in parameters.items())
    starts, elements = [start for start, _ in ordered], dict.fromkeys(parameters, 0)
    for tensor in described:
        place = bisect_right(starts, tensor.data_ptr()) - 1
        if place >= 0:
            elements[ordered[place][1]] += tensor.numel()
    return [name for name, count in elements.items() if count != parameters[name].numel()]


def _other_settings(chunk: GptModel, config: MistralConfig) -> Iterator[str]:
    """Yield the settings of a model that differ from ``config`` and change what weights mean, but maybe no shape."""
    expected = {"num_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads}
    if config.latent_attention is None:
        expected |= {"num_query_groups": config.num_key_value_heads, "kv_channels": config.head_dim}
    for name, value in expected.items():
        actual = getattr(chunk.config, name)
        if actual != value:
            yield f"{name}: the weights have {value}, the model has {actual}"
    if chunk.share_embeddings_and_output_weights and not config.tie_word_embeddings:
        yield "the model ties embedding and output layer, the weights do not"
