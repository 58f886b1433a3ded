"""Any layout against Megatron itself: its parallel state, its split of layers, and real GPTModels, all in one process.

Each example plays one rank of up to some hundred, over torch's process groups that do not communicate.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Final

import layouts
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ckpt_mistral.errors import LayoutError
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.layout.pipeline import PipelineLayout, parse_pipeline_layout
from dist_ckpt_mistral.model.table.rules import KeyStyle

#: Megatron warns of much that is not ours to mend.
pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore")]

#: How Megatron says no.
_REFUSALS: Final = (AssertionError, RuntimeError, ValueError, LookupError, ZeroDivisionError)
#: ``megatron`` holds nothing that an example changes for the next one.
_SHARED_FIXTURE: Final = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)


@pytest.fixture(scope="module")
def megatron() -> Iterator[SimpleNamespace]:
    """What the tests need of Megatron and of the helpers that import it; on a machine without CUDA, as on one with."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(torch.Tensor, "cuda", torch.Tensor.cpu)
        core, ours = "megatron.core.", "dist_ckpt_mistral.megatron."
        names = {
            core + "parallel_state": "state",
            core + "transformer.transformer_config": "transformer_config",
            core + "transformer.transformer_block": "block",
            core + "transformer.transformer_layer": "layer",
            core + "transformer.pipeline_parallel_layer_layout": "layout",
            ours + "sharded_state_dict": "factory",
            ours + "runtime": "runtime",
            "gpt_stage": "gpt_stage",
            "megatron_ranks": "ranks",
        }
        yield SimpleNamespace(**{short: importlib.import_module(name) for name, short in names.items()})


class AsRank:
    """Megatron's parallel state as one rank of a layout sees it."""

    def __init__(self, megatron: SimpleNamespace, rank: int, world_size: int, **sizes: Any) -> None:  # noqa: ANN401
        """Lay out ``world_size`` ranks with the keyword arguments of Megatron's ``initialize_model_parallel``."""
        self.megatron, self.rank, self.world_size, self.sizes = megatron, rank, world_size, sizes

    def __enter__(self) -> None:
        """Join the ranks."""
        dist.init_process_group("fake", rank=self.rank, world_size=self.world_size, store=FakeStore())
        try:
            self.megatron.state.initialize_model_parallel(**self.sizes, create_gloo_process_groups=False)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        """Leave them."""
        self.megatron.state.destroy_model_parallel()
        dist.destroy_process_group()


def as_rank(megatron: SimpleNamespace, layout: ParallelLayout, rank: int) -> AsRank:
    """Megatron's parallel state as a rank of ``layout`` sees it."""
    return AsRank(
        megatron,
        rank,
        layout.world_size,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        order=layout.order,
    )


#: Those of a GPTModel.
GPT_STYLES = [style for style in KeyStyle if style is not KeyStyle.HYBRID]


@settings(suppress_health_check=_SHARED_FIXTURE)
@given(layouts.models() | layouts.family(), st.sampled_from(GPT_STYLES), st.data())
def test_entries_equal_those_of_a_real_model(
    megatron: SimpleNamespace, model: tuple[MistralConfig, ParallelLayout], style: KeyStyle, data: st.DataObject
) -> None:
    """On any rank of any layout the factory makes what GPTModel makes, before and after factories are applied."""
    config, layout = model
    rank = data.draw(st.integers(0, layout.world_size - 1))
    with as_rank(megatron, layout, rank):
        stage = megatron.gpt_stage.Stage(config, layout)
        real = stage.sharded_state_dict(style)
        made = megatron.factory.sharded_state_dict(config, layout, rank, data=stage.state_dict(), style=style)
        assert megatron.ranks.difference(megatron.ranks.described(real), megatron.ranks.described(made)) == []
        for entries in (real, made):
            megatron.ranks.apply_factories(entries)
        assert megatron.ranks.difference(megatron.ranks.described(real), megatron.ranks.described(made)) == []


@st.composite
def any_ranks(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of all axes of parallelism and an order, which may fit or not."""
    sizes: dict[str, Any] = {axis: draw(st.integers(1, 3)) for axis in ("tp", "cp", "dp", "pp")}
    sizes |= {"ep": draw(st.sampled_from([1, 1, 2, 3])), "etp": draw(st.none() | st.integers(1, 3))}
    order = draw(st.permutations(["tp", "cp", "ep", "dp", "pp"]))
    left_out = draw(st.sets(st.sampled_from(["cp", "ep", "dp", "pp"]))) if draw(st.booleans()) else set()
    return {**sizes, "order": "-".join(axis for axis in order if axis not in left_out)}


@settings(suppress_health_check=_SHARED_FIXTURE, max_examples=200)
@given(any_ranks(), st.data())
def test_ranks_count_as_megatron_counts(megatron: SimpleNamespace, ranks: dict[str, Any], data: st.DataObject) -> None:
    """Every rank stands where Megatron's parallel state puts it, experts too; what that refuses is refused."""
    world_size = ranks["tp"] * ranks["cp"] * ranks["dp"] * ranks["pp"]
    rank = data.draw(st.integers(0, world_size - 1))
    try:
        with AsRank(
            megatron,
            rank,
            world_size,
            tensor_model_parallel_size=ranks["tp"],
            pipeline_model_parallel_size=ranks["pp"],
            context_parallel_size=ranks["cp"],
            expert_model_parallel_size=ranks["ep"],
            expert_tensor_parallel_size=ranks["etp"],
            order=ranks["order"],
        ):
            expected = {
                "tp": megatron.state.get_tensor_model_parallel_rank(),
                "cp": megatron.state.get_context_parallel_rank(),
                "dp": megatron.state.get_data_parallel_rank(),
                "pp": megatron.state.get_pipeline_model_parallel_rank(),
                "dp_cp": megatron.state.get_data_parallel_rank(with_context_parallel=True),
                "etp": megatron.state.get_expert_tensor_parallel_rank(),
                "ep": megatron.state.get_expert_model_parallel_rank(),
                "edp": megatron.state.get_expert_data_parallel_rank(),
            }
            copies = megatron.state.get_expert_data_parallel_world_size()
    except _REFUSALS:
        with pytest.raises(LayoutError):
            ParallelLayout(**ranks)
        return
    layout = ParallelLayout(**ranks)
    at = layout.coordinates(rank)
    assert (layout.world_size, layout.expert_dp) == (world_size, copies)
    assert {axis: getattr(at, axis) for axis in expected} == expected


def set_up_for(megatron: SimpleNamespace, rank: int, there: ParallelLayout, wanted: ParallelLayout) -> None:
    """Ask for ``wanted`` where Megatron's parallel state is that of ``there``."""
    with as_rank(megatron, there, rank):
        megatron.runtime.initialize_megatron(wanted, device="cpu")


@pytest.mark.parametrize(
    ("there", "wanted", "message"),
    [
        ({"tp": 2, "dp": 2, "order": "dp-tp-cp-ep-pp"}, {"tp": 2}, "tp group of rank .: expected ranks"),
        ({"cp": 2, "dp": 2, "order": "tp-dp-cp-pp"}, {"cp": 2}, "cp group of rank .: expected ranks"),
        ({"pp": 2, "dp": 2, "order": "tp-cp-ep-pp-dp"}, {"pp": 2}, "pp group of rank .: expected ranks"),
        ({"ep": 4, "dp": 4}, {"ep": 2}, "ep: expected 2, got 4"),
        ({"tp": 2, "dp": 2, "etp": 1}, {"tp": 2}, "etp: expected 2, got 1"),
        ({"tp": 4}, {"tp": 2}, "tp: expected 2, got 4, dp: expected 2, got 1"),
    ],
)
def test_a_parallel_state_of_another_layout_is_refused(
    megatron: SimpleNamespace, there: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    """Other sizes, or the same in another rank order, are refused on every rank; the layout's own are accepted."""
    layout = ParallelLayout(**there)
    for rank in range(layout.world_size):
        set_up_for(megatron, rank, layout, layout)
        with pytest.raises(LayoutError, match=message):
            set_up_for(megatron, rank, layout, ParallelLayout(**wanted))


@settings(suppress_health_check=_SHARED_FIXTURE)
@given(layouts.models() | layouts.family(), st.data())
def test_its_own_parallel_state_is_accepted(
    megatron: SimpleNamespace, model: tuple[MistralConfig, ParallelLayout], data: st.DataObject
) -> None:
    """Whatever the layout is: the groups of its parallel state are those that it expects, on any rank."""
    layout = model[1]
    with as_rank(megatron, layout, data.draw(st.integers(0, layout.world_size - 1))):
        there = megatron.state.get_tensor_model_parallel_group()
        megatron.runtime.initialize_megatron(layout, device="cpu")
        assert megatron.state.get_tensor_model_parallel_group() is there  # it was taken, and none made in its place


def test_dp_is_by_default_the_fewest_that_experts_allow() -> None:
    """Without experts there is one replica; else the fewest whose ranks make up whole expert grids."""
    assert (ParallelLayout(tp=2).dp, ParallelLayout(tp=2, ep=2).dp, ParallelLayout(tp=2, ep=2, etp=1).dp) == (1, 2, 1)
    assert (ParallelLayout(ep=6, cp=4).dp, ParallelLayout(ep=6, cp=4).world_size) == (3, 12)
    assert ParallelLayout(tp=2, pp=3, ep=8, etp=1, dp=8).expert_dp == 2
    with pytest.raises(LayoutError, match=r"6 ranks .*, 4 for an expert .*: dp must be a multiple of 2, got 3"):
        ParallelLayout(tp=2, ep=2, dp=3)


Stages = list[list[tuple[list[int], bool, bool]]]


def split_by_megatron(megatron: SimpleNamespace, fields: dict[str, Any], num_layers: int) -> Stages | None:
    """For every stage and chunk its layers, and whether it is the first, the last; None where Megatron fails."""
    try:
        config = megatron.transformer_config.TransformerConfig(
            num_layers=num_layers, hidden_size=8, num_attention_heads=1, pipeline_dtype=torch.float, **fields
        )
        pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
        sizes = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp}
        stages = []
        for rank in range(pp):
            with AsRank(megatron, rank, pp, **sizes):
                stages.append([chunk_by_megatron(megatron, config, vpp and each) for each in range(vpp or 1)])
    except _REFUSALS:
        return None
    in_order = [layer for chunk in range(vpp or 1) for stage in stages for layer in stage[chunk][0]]
    return stages if in_order == list(range(num_layers)) else None  # Megatron lets some pass that leave out layers


def chunk_by_megatron(megatron: SimpleNamespace, config: Any, vp_stage: int | None) -> tuple[list[int], bool, bool]:  # noqa: ANN401
    """The layers of one model chunk of this rank, and whether it is the first, the last."""
    pp_rank = megatron.state.get_pipeline_model_parallel_rank()
    layers = megatron.block.get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    first = megatron.layer.get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    ends = {"ignore_virtual": False, "vp_stage": vp_stage}
    return (
        list(range(first, first + layers)),
        megatron.state.is_pipeline_first_stage(**ends),
        megatron.state.is_pipeline_last_stage(**ends),
    )


_END_COUNTS: Final = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_PIECES: Final = ("E", "t", "tt", "L", "|", "t*2", "t|*3", "(tt|)*2", "(t|", ")*2", ",", "m", "x", "*2", "||")
_LAYOUT_TEXTS: Final = st.lists(st.sampled_from(_PIECES), max_size=9).map("".join)


@st.composite
def any_pipelines(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Pipeline fields and a number of layers that fit, or did before something was changed."""
    fields, num_layers = draw(layouts.pipelines().filter(lambda each: "pp_layers" not in each[0]))
    if fields["vpp"] == 1:
        fields["vpp"] = None  # the same to Megatron-LM (arguments.py), while initialize_model_parallel refuses some
    layers = st.none() | st.integers(-1, 6)
    changes = {
        "pp": st.integers(1, 4),
        "vpp": st.none() | st.integers(2, 3),
        **dict.fromkeys(_END_COUNTS, layers),
        "account_for_embedding_in_pipeline_split": st.booleans(),
        "account_for_loss_in_pipeline_split": st.booleans(),
        "pipeline_model_parallel_layout": st.none() | _LAYOUT_TEXTS | _LAYOUT_TEXTS.map("E{}L".format),
    }
    for name in draw(st.lists(st.sampled_from(sorted(changes)), max_size=2)):
        fields[name] = draw(changes[name])
    # Of one stage that is the first and the last, Megatron takes the second count: meant or not, it is refused here.
    assume(fields["pp"] > 1 or not set(_END_COUNTS) <= set(fields))
    return fields, draw(st.just(num_layers) | st.integers(1, 12))


@settings(suppress_health_check=_SHARED_FIXTURE, max_examples=300)
@given(any_pipelines())
@example(({"pp": 2, "vpp": 2, **dict.fromkeys(_END_COUNTS, 2)}, 4))
@example(({"pp": 1, "vpp": None, "pipeline_model_parallel_layout": ""}, 1))
def test_layers_are_spread_as_megatron_spreads_them(
    megatron: SimpleNamespace, pipeline: tuple[dict[str, Any], int]
) -> None:
    """Every model chunk has the layers that Megatron builds in it; what it refuses, or splits wrongly, is refused."""
    fields, num_layers = pipeline
    names = {"pp": "pipeline_model_parallel_size", "vpp": "virtual_pipeline_model_parallel_size"}
    theirs = {names.get(name, name): value for name, value in fields.items()}
    expected = split_by_megatron(megatron, theirs, num_layers)
    if expected is None:
        with pytest.raises(LayoutError):
            reject_misfits(ParallelLayout(**fields), num_layers)
        return
    layout = ParallelLayout(**fields)
    assert list(layout.misfits(num_layers)) == []
    chunks = [layout.model_chunks(num_layers, rank) for rank in range(layout.pp)]
    assert [[(list(each.layers), each.is_first, each.is_last) for each in stage] for stage in chunks] == expected
    assert split_by_megatron(megatron, layout.transformer_config_fields(), num_layers) == expected


def reject_misfits(layout: PipelineLayout, num_layers: int) -> None:
    """Raise as ``check`` does."""
    if problems := list(layout.misfits(num_layers)):
        raise LayoutError("; ".join(problems))


@settings(suppress_health_check=_SHARED_FIXTURE)
@given(st.integers(1, 5).flatmap(lambda pp: st.lists(st.integers(0, 3), min_size=pp, max_size=pp).filter(any)))
def test_layer_counts_become_a_layout_string(megatron: SimpleNamespace, counts: list[int]) -> None:
    """Megatron has no ``pp_layers``, but builds the same stages from what its TransformerConfig is told instead."""
    layout = ParallelLayout(pp=len(counts), pp_layers=tuple(counts))
    stages = split_by_megatron(megatron, layout.transformer_config_fields(), sum(counts))
    starts = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
    assert stages is not None
    assert [stage[0][0] for stage in stages] == [list(range(*bounds)) for bounds in pairwise(starts)]


@settings(suppress_health_check=_SHARED_FIXTURE, max_examples=200)
@given(_LAYOUT_TEXTS | st.text("Et|L,()*12m", max_size=12))
def test_layout_strings_are_read_as_megatron_reads_them(megatron: SimpleNamespace, text: str) -> None:
    """Megatron's own parser finds the same layers in the same stages, or an unknown letter."""
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    ours: tuple[str, ...] | None = None
    try:
        ours = parse_pipeline_layout(text)
    except LayoutError as error:
        assume("repeats" not in str(error))  # Megatron would fill the memory
    try:
        stages = megatron.layout.PipelineParallelLayerLayout.parse_str_to_list(text)
    except AssertionError:
        assert ours is None
    else:
        assert ours == tuple("".join(letters[layer.name] for layer in stage) for stage in stages)


@settings(suppress_health_check=_SHARED_FIXTURE, max_examples=100)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 3))
def test_sizes_are_refused_as_megatron_refuses_them(
    megatron: SimpleNamespace, groups: int, queries: int, tp: int, ffn: int, head_dim: int
) -> None:
    """A real model of these sizes can be built at this tensor parallelism exactly if the layout passes its check."""
    config = MistralConfig(
        vocab_size=10,
        hidden_size=2,
        intermediate_size=ffn,
        num_hidden_layers=1,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=head_dim,
    )
    layout = ParallelLayout(tp=tp)
    try:
        with as_rank(megatron, layout, 0):
            megatron.gpt_stage.Stage(config, layout)
    except _REFUSALS:
        with pytest.raises(LayoutError, match="Megatron cannot lay out this model"):
            layout.check(config)
    else:
        layout.check(config)
