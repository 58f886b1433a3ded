"""How a layout cuts a model, painted by numpy: no Megatron and none of the package's own box arithmetic."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import models

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.parallel_layout import HeldTensor, ParallelLayout, padded_vocab_size
from dist_ckpt_mistral.model.tensor_table import KeyStyle, tensor_table

CONFIG = MistralConfig(
    vocab_size=10,
    hidden_size=6,
    intermediate_size=8,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=2,
)


def held_by_ranks(
    config: MistralConfig, layout: ParallelLayout, style: KeyStyle, vocab_rows: int | None = None
) -> list[list[HeldTensor]]:
    """What every rank holds, model chunk after model chunk."""
    layout.check(config)
    table = tensor_table(config)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    return [
        [
            held
            for chunk in layout.model_chunks(table.num_layers, at.pp)
            for held in layout.held_tensors(table, chunk, at, style=style, vocab_rows=vocab_rows)
        ]
        for at in places
    ]


@given(models(), st.sampled_from(KeyStyle), st.sampled_from([None, 1, 2]))
def test_main_replicas_tile_every_tensor_once(
    model: tuple[MistralConfig, ParallelLayout], style: KeyStyle, spare: int | None
) -> None:
    """Painting the box of every main replica of every rank leaves each element of each tensor painted exactly once."""
    config, layout = model
    vocab_rows = None if spare is None else layout.tp * (-(-config.vocab_size // layout.tp) + spare)
    painted: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
    for held in (held for rank in held_by_ranks(config, layout, style, vocab_rows) for held in rank):
        for box in held.boxes:
            canvas = painted.setdefault(box.mcore_key, np.zeros(box.global_shape, dtype=np.int64))
            assert canvas.shape == box.global_shape
            pixels = canvas[tuple(map(slice, box.global_offset, np.add(box.global_offset, box.shape)))]
            assert pixels.shape == box.shape
            assert tuple(np.multiply(box.fragments, box.shape)) == box.global_shape
            pixels += not any(held.replica_id)
    assert all((canvas == 1).all() for canvas in painted.values())
    assert sum(canvas.size for canvas in painted.values()) == element_count(config, vocab_rows, layout.tp)


def element_count(config: MistralConfig, vocab_rows: int | None, tp: int) -> int:
    """Number of parameters of a Mistral model, by the textbook."""
    rows = -(-config.vocab_size // (128 * tp)) * 128 * tp if vocab_rows is None else vocab_rows
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size + 2)
    words = rows * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + words + config.hidden_size


@given(models(), st.sampled_from(KeyStyle))
def test_replicas_tell_themselves_apart(model: tuple[MistralConfig, ParallelLayout], style: KeyStyle) -> None:
    """No two ranks hold the same box under the same replica_id, and all copies of a box have the same main replica."""
    replicas = defaultdict(list)
    for rank in held_by_ranks(*model, style):
        for held in rank:
            for box in held.boxes:
                replicas[box.mcore_key, box.global_offset].append(held.replica_id)
    for ids in replicas.values():
        assert len(set(ids)) == len(ids)
        assert (0, 0, 0) in ids


@given(models())
def test_pipeline_stages_share_out_the_layers(model: tuple[MistralConfig, ParallelLayout]) -> None:
    """Model chunk by model chunk, then stage by stage, layers count up from first to last without gaps."""
    config, layout = model
    stages = [layout.model_chunks(config.num_hidden_layers, pp_rank) for pp_rank in range(layout.pp)]
    in_order = [stage[chunk] for chunk in range(layout.vpp or 1) for stage in stages]
    assert [layer for chunk in in_order for layer in chunk.layers] == list(range(config.num_hidden_layers))
    assert [chunk.is_first for chunk in in_order] == [True] + [False] * (len(in_order) - 1)
    assert [chunk.is_last for chunk in in_order] == [False] * (len(in_order) - 1) + [True]


@given(st.integers(1, 10_000), st.integers(1, 16))
def test_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, tp: int) -> None:
    """The padded vocabulary is the smallest multiple of 128 tp that holds the vocabulary."""
    multiples = range(0, 200_000, 128 * tp)
    assert next(above for below, above in pairwise(multiples) if below < vocab_size <= above) == padded_vocab_size(
        vocab_size, tp
    )


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (ParallelLayout(tp=3), "num_attention_heads=8 is not divisible by tp=3; intermediate_size=8 is"),
        (ParallelLayout(tp=3), r"num_key_value_heads \(num_query_groups\)=4 is not divisible by tp=3, nor tp by it"),
        (ParallelLayout(pp=4), "num_hidden_layers=6 is not divisible by 4 pipeline stages"),
        (ParallelLayout(pp=2, vpp=2), "num_hidden_layers=6 is not divisible by 4 pipeline stages"),
        (ParallelLayout(pp=2, pp_layers=(2, 3)), r"pp_layers=\(2, 3\) do not add up to num_hidden_layers=6"),
        (ParallelLayout(ep=2), "ep=2 needs experts, and a dense model has none"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(layout: ParallelLayout, reason: str) -> None:
    """A layout that Megatron would refuse for this model is refused with the reason, all reasons together."""
    with pytest.raises(LayoutError, match=reason):
        layout.check(CONFIG)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"tp": 0, "dp": -1}, "tp must be at least 1, got 0; dp must be at least 1, got -1"),
        ({"vpp": 2}, "vpp=2 needs at least two pipeline stages, got pp=1"),
        ({"pp": 2, "vpp": 0}, "vpp=0 needs"),
        ({"pp": 2, "vpp": 2, "pp_layers": (3, 3)}, "pp_layers and vpp cannot be combined"),
        ({"pp": 2, "pp_layers": (6,)}, r"pp_layers must give one layer count for each of 2 stages, got \(6,\)"),
        ({"pp": 2, "pp_layers": (-1, 7)}, "pp_layers must give"),
    ],
)
def test_what_fits_no_model_is_refused(layout: dict[str, int], reason: str) -> None:
    """A layout that contradicts itself cannot be made."""
    with pytest.raises(LayoutError, match=reason):
        ParallelLayout(**layout)  # type: ignore[arg-type]  # None of these is well-formed


def test_ranks_outside_the_layout_are_refused() -> None:
    """Ranks count from 0 to below the world size; odd vocabulary paddings and small ones are refused."""
    layout = ParallelLayout(tp=2, pp=3, dp=2)
    assert layout.world_size == 12
    for rank in (-1, 12):
        with pytest.raises(LayoutError, match=f"rank {rank} is outside a layout of 12 ranks"):
            layout.coordinates(rank)
    for rows in (8, 11):
        with pytest.raises(LayoutError, match=f"padded vocabulary size {rows} must be a multiple of tp=2, at least 10"):
            held_by_ranks(CONFIG, layout, KeyStyle.STACKED, rows)


def test_ranks_count_as_megatron_does() -> None:
    """Tensor parallelism counts fastest, then data, then pipeline parallelism (tp-cp-ep-dp-pp)."""
    layout = ParallelLayout(tp=2, pp=2, dp=2)
    at = [layout.coordinates(rank) for rank in range(8)]
    assert [(each.pp, each.dp, each.tp) for each in at] == list(np.ndindex(2, 2, 2))


def test_an_empty_stage_is_possible() -> None:
    """A pipeline stage without layers still embeds or ends the model."""
    config = replace(CONFIG, tie_word_embeddings=True)
    first, last = held_by_ranks(config, ParallelLayout(pp=2, pp_layers=(0, 6)), KeyStyle.STACKED)
    assert [held.module_name for held in first] == ["embedding.word_embeddings.weight"]
    assert last[0].replica_id == (1, 0, 0)
