"""How a layout cuts a model, painted by numpy: no Megatron and none of the package's own box arithmetic."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import models

from dist_ckpt_mistral.cli import options
from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.local_tensors import LocalTensor, local_tensors
from dist_ckpt_mistral.model.layout.vocabulary import padded_vocab_size
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.model.table.table import tensor_table

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
) -> list[list[LocalTensor]]:
    """What every rank holds, model chunk after model chunk."""
    layout.check(config)
    table = tensor_table(config)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    return [
        [
            held
            for chunk in layout.model_chunks(table.num_layers, at.pp)
            for held in local_tensors(layout, table, chunk, at, style=style, vocab_rows=vocab_rows)
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
        (
            ParallelLayout(pp=2, pipeline_model_parallel_layout="Et*3|t*4,L"),
            r"the 7 layers of 'Et\*3\|t\*4,L' do not add up to num_hidden_layers=6",
        ),
        (
            ParallelLayout(pp=3, num_layers_in_first_pipeline_stage=1),
            r"num_hidden_layers=6 less those of first and last stage \(5\) is not divisible by 2 pipeline stages",
        ),
        (
            ParallelLayout(pp=2, num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=2),
            r"num_hidden_layers=6 leaves 1 layers for 0 middle stages .*=\(3, 2\)",
        ),
        (
            ParallelLayout(pp=4, num_layers_in_last_pipeline_stage=9),
            "num_hidden_layers=6 leaves -3 layers for 3 middle stages",
        ),
        (
            ParallelLayout(pp=3, account_for_loss_in_pipeline_split=True),
            r"num_hidden_layers=6 with embedding and loss as layers \(7\) is not divisible by 3 pipeline stages",
        ),
        (ParallelLayout(tp=16), "num_attention_heads=8 is not .*; intermediate_size=8 is not divisible by tp=16"),
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
        (
            {"tp": 0, "dp": -1},
            "tp must be a whole number of at least 1, got 0; dp must be a whole number of at least 1, got -1",
        ),
        ({"vpp": 2}, "vpp=2 needs at least two pipeline stages, got pp=1"),
        ({"pp": 2, "vpp": 0}, "vpp=0 needs"),
        ({"pp": 2, "vpp": 2, "pp_layers": (3, 3)}, "pp_layers and vpp cannot be combined"),
        ({"pp": 2, "pp_layers": (6,)}, r"pp_layers must give one layer count for each of 2 stages, got \(6,\)"),
        ({"pp": 2, "pp_layers": (-1, 7)}, "pp_layers must give"),
        ({"num_layers_in_first_pipeline_stage": 0}, "num_layers_in_first_pipeline_stage must be larger than 0, got 0"),
        (
            {"pp": 2, "vpp": 2, "num_layers_in_last_pipeline_stage": 3},
            "num_layers_in_last_pipeline_stage=3 is not divisible by vpp=2",
        ),
        (
            {"pp": 2, "vpp": 2, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2},
            "both first and last stage need pp of at least 3 with vpp=2",
        ),
        (
            {"num_layers_in_first_pipeline_stage": 2, "account_for_loss_in_pipeline_split": True},
            "num_layers_in_first/last_pipeline_stage and account_for_embedding/loss_in_pipeline_split cannot be",
        ),
        (
            {"pp_layers": (6,), "pipeline_model_parallel_layout": "E(t"},
            r"pp_layers and pipeline_model_parallel_layout cannot be combined; .* 'E\(t' has '\(': expected E",
        ),
        (
            {"pp": 2, "pipeline_model_parallel_layout": "t|tLm|"},
            "the 3 stages of .* not divisible by pp=2; the first .* be the embedding E; the last .* L; .* layers m",
        ),
        ({"pp": 2, "pipeline_model_parallel_layout": "EE|LL"}, "the embedding E; .* must be the loss L"),
        ({"pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "Et|tL"}, "vpp=2 conflicts with .* have 1 chunks"),
        ({"pipeline_model_parallel_layout": "Et*10000000000L"}, "repeats 't' 10000000000 times: expected at most 9999"),
        ({"pipeline_model_parallel_layout": "Et|tL"}, "the 2 stages of .* need pp of at least 2, got pp=1"),
        ({"order": "tp-dp-zp"}, "order must name each of tp, cp, ep, dp, pp once with - between them, got 'tp-dp-zp'"),
        ({"order": "tp-tp-dp"}, "order must name each of"),
        ({"cp": 2, "order": "dp-pp"}, "order must name tp, cp, dp, got 'dp-pp'"),
        (
            {"pp": 2, "cp": 2, "order": "tp-cp-ep-pp-dp"},
            "would give dense layers and experts different pipeline stages or, without pp last, different data",
        ),
    ],
)
def test_what_fits_no_model_is_refused(layout: dict[str, Any], reason: str) -> None:
    """A layout that contradicts itself cannot be made; all reasons are told together."""
    with pytest.raises(LayoutError, match=reason):
        ParallelLayout(**layout)


def test_what_follows_is_filled_in() -> None:
    """One chunk per stage is no interleaving, a layout string has its own number of chunks, experts need replicas."""
    assert ParallelLayout(pp=2, vpp=1) == ParallelLayout(pp=2)
    assert ParallelLayout(pp=2, pipeline_model_parallel_layout="E|(tt|)*4L").vpp == 3
    assert ParallelLayout(pp=2, pipeline_model_parallel_layout="Et|tL").vpp is None


def test_a_layout_is_told_by_what_is_not_default() -> None:
    """The text of a layout is short, and makes the same layout."""
    layout = ParallelLayout(pp=2, tp=2, dp=3, order="tp-pp-dp", pp_layers=(3, 5))
    assert repr(ParallelLayout()) == "ParallelLayout()"
    assert repr(layout) == "ParallelLayout(tp=2, pp=2, pp_layers=(3, 5), dp=3, order='tp-pp-dp')"
    assert eval(repr(layout)) == layout  # noqa: S307  (that is what a repr is for)


def test_a_layout_says_itself_in_megatrons_words() -> None:
    """Only what is set becomes a keyword argument of TransformerConfig."""
    names = ("tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size")
    plain = dict.fromkeys((*names, "pipeline_model_parallel_size"), 1)
    assert ParallelLayout().transformer_config_fields() == plain
    layout = ParallelLayout(tp=4, pp=2, vpp=2, cp=3, dp=2, ep=2, etp=1, account_for_loss_in_pipeline_split=True)
    assert layout.transformer_config_fields() == {
        "tensor_model_parallel_size": 4,
        "context_parallel_size": 3,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "account_for_loss_in_pipeline_split": True,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ParallelLayout()),
        ("--tp 2 --pp 4 --vpp 2 --cp 2 --dp 3", ParallelLayout(tp=2, pp=4, vpp=2, cp=2, dp=3)),
        ("--ep 4 --etp 2 --order ep-tp-dp-pp", ParallelLayout(ep=4, etp=2, dp=8, order="ep-tp-dp-pp")),
        ("--pp 2 --pp-layers 3,0", ParallelLayout(pp=2, pp_layers=(3, 0))),
        (
            "--pp 3 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 2",
            ParallelLayout(pp=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=2),
        ),
        (
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
            ParallelLayout(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True),
        ),
        (
            "--pp 2 --pipeline-model-parallel-layout Et*3|tL",
            ParallelLayout(pp=2, pipeline_model_parallel_layout="Et*3|tL"),
        ),
    ],
)
def test_options_describe_a_layout(given: str, expected: ParallelLayout) -> None:
    """Every field of a layout has an option, and a layout says the options that give it."""
    command = argparse.ArgumentParser()
    options.add_layout(command, "to load with")
    assert options.given_layout(command.parse_args(given.split())) == expected
    assert options.given_layout(command.parse_args(expected.options)) == expected


def test_layer_counts_that_are_none_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Only whole numbers with commas between them are layer counts."""
    command = argparse.ArgumentParser()
    options.add_layout(command, "to load with")
    for text in ("3,x", "", "3,", "-1"):
        with pytest.raises(SystemExit):
            command.parse_args([f"--pp-layers={text}"])
        assert "expected a whole number" in capsys.readouterr().err


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


@pytest.mark.parametrize("field", ["tp", "pp", "cp", "dp", "ep", "etp"])
@pytest.mark.parametrize("count", ["2", 2.0, 0, True])
def test_counts_are_whole_numbers(field: str, count: object) -> None:
    """Anything but a whole number of at least 1 is refused by name."""
    with pytest.raises(LayoutError, match=f"^{field} must be a whole number of at least 1, got "):
        ParallelLayout(**{field: count})  # type: ignore[arg-type]
