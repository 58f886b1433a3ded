"""How ``from-hf`` stores a LoRA adapter of PEFT: in the form of Megatron-Bridge's LoRA or of its CanonicalLoRA.

PEFT trains an A for each of ``q_proj``, ``k_proj`` and ``v_proj``. Bridge's LoRA has one for all three. An adapter that
Bridge exported has three equal ones, and goes back into that form; any other becomes a CanonicalLoRA.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from dist_ckpt_mistral.errors import UnsupportedModelError
from dist_ckpt_mistral.gather.index import IndexedTensor
from dist_ckpt_mistral.gather.links import whole
from dist_ckpt_mistral.gather.low_rank import ZerosFile
from dist_ckpt_mistral.mapping.checkpoint_map import Twin
from dist_ckpt_mistral.mapping.source import ModelSource
from dist_ckpt_mistral.mapping.twins import twin_differences
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.adapter_config import AdapterConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.adapters import Adapter, Form
from dist_ckpt_mistral.model.table.rules import spell
from dist_ckpt_mistral.model.table.table import TensorTable

_LOG = logging.getLogger(__name__)
_CLASSES: Final = {
    Form.FUSED: "megatron.bridge.peft.lora.LoRA",
    Form.SEPARATE: "megatron.bridge.peft.canonical_lora.CanonicalLoRA",
}


def in_megatron(source: ModelSource, layout: ParallelLayout) -> tuple[ModelSource, TensorTable]:
    """The adapter in ``source``, a directory of PEFT, and its table, as Megatron-Bridge stores it at ``layout``.

    Where PEFT adapts some of the matrices that are one in Megatron, such as ``q_proj`` without ``k_proj``, Bridge's
    CanonicalLoRA still has an adapter of all: the others are zeros, which change nothing and are never trained, because
    the gradients of A and B are products with B and A.

    Raises UnsupportedModelError if Bridge has no adapter like it.
    """
    _require_one_rank(source)
    by_base: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in source.table.adapters:
        by_base[adapter.base.mcore_key].append(adapter)
    absent = [each for adapters in by_base.values() for each in _absent(adapters)]
    if not absent and all(_have_one_a(source, adapters) for adapters in by_base.values()):
        fused = [replace(a[0], form=Form.FUSED, parts=a[0].base.parts) for a in by_base.values()]
        return source, source.table.of_adapters(fused)
    _LOG.info("the adapter has no A in common for what is one matrix in Megatron: it is stored as a CanonicalLoRA")
    if absent:
        _LOG.info(
            "stored as zeros, which change nothing: %s",
            listed([each.parts[0].hf_name.split(".")[-2] for each in absent]),
        )
    separate = [replace(each, row_order_tp=layout.tp) for each in (*source.table.adapters, *absent)]
    if any(each.is_in_rank_order for each in separate):
        _LOG.warning(
            "Megatron-Bridge's CanonicalLoRA stores the rows of adapter_gate and adapter_up in an order that depends "
            "on the tensor parallelism: it loads this checkpoint rightly at tp=%d alone. Import again for another.",
            layout.tp,
        )
    return _with_zeros(source, source.table.of_adapters(absent)), source.table.of_adapters(separate)


def _absent(adapters: Sequence[Adapter]) -> Iterator[Adapter]:
    """Yield adapters of the parts of a matrix that ``adapters`` leave out."""
    first, present = adapters[0], {adapter.parts[0].hf_name for adapter in adapters}
    for part in first.base.parts:
        if part.hf_name not in present:
            yield replace(first, parts=(part,))


def _with_zeros(source: ModelSource, table: TensorTable) -> ModelSource:
    """``source`` with the tensors of ``table`` besides, all zero."""
    number = len(source.index.files) + len(source.index.derived)
    dtype = source.main_dtype
    zeros = {
        name: IndexedTensor.whole(name, dtype, tensor.shape, file=number, position=0)
        for name, tensor in table.hf_tensors().items()
    }
    if not zeros:
        return source
    index = replace(
        source.index, tensors={**source.index.tensors, **zeros}, derived=(*source.index.derived, ZerosFile())
    )
    links = {name: [whole(name, tensor.global_shape)] for name, tensor in zeros.items()}
    return replace(source, index=index, links={**source.links, **links})


def _require_one_rank(source: ModelSource) -> None:
    """Raise UnsupportedModelError unless all modules have one rank, as in Megatron-Bridge."""
    ranks = {adapter.rank for adapter in source.table.adapters}
    if len(ranks) != 1:
        raise UnsupportedModelError(
            f"{source.path} has modules of several ranks ({', '.join(map(str, sorted(ranks)))}): expected one, because "
            "Megatron-Bridge's LoRA has one dim. Merge it into its model first (peft: merge_and_unload), and import "
            "that."
        )


def _have_one_a(source: ModelSource, adapters: Sequence[Adapter]) -> bool:
    """Whether the adapters of one matrix have the same A in every layer, bit for bit."""
    return not any(True for _ in twin_differences(source.index, [*_others(adapters)]))


def _others(adapters: Sequence[Adapter]) -> Iterator[Twin]:
    """Yield every A but the first of each layer, as one that should be equal to the first."""
    first, *others = adapters
    for other in others:
        for index in first.a.indices():
            main, name = (spell(each.a.parts[0].hf_name, index) for each in (first, other))
            link = replace(whole(main, first.a.shape), target=name)
            yield Twin(name=name, main=main, shape=first.a.shape, links=(link,), is_head=False)


def run_config_section(table: TensorTable, config: AdapterConfig) -> dict[str, Any]:
    """The section ``peft`` of run_config.yaml, from which Megatron-Bridge makes the same adapter (peft/*.py, 0.6)."""
    is_separate = any(adapter.form is Form.SEPARATE and len(adapter.base.parts) > 1 for adapter in table.adapters)
    form = Form.SEPARATE if is_separate else Form.FUSED
    rank = table.adapters[0].rank
    return {
        "_target_": _CLASSES[form],
        "alpha": config.scale(rank) * rank if config.use_rslora else config.alpha,  # Bridge divides by the rank
        "dim": rank,
        "dropout": config.dropout,
        "dropout_position": "pre",
        "target_modules": sorted({module for adapter in table.adapters for module in _targets(adapter)}),
    }


def _targets(adapter: Adapter) -> Iterator[str]:
    """Yield Bridge's names of the modules that an adapter is of: ``linear_q`` for ``adapter_q`` of ``linear_qkv``."""
    module = adapter.base.mcore_key.split(".")[-2]
    if len(adapter.base.parts) == 1 or adapter.form is Form.FUSED:
        yield module
        return
    part = adapter.a.mcore_key.split(".")[-3].removeprefix("adapter_")
    yield f"{module}_{part}" if module.endswith("fc1") else f"linear_{part}"
