"""``PipelineLayout``: how the layers of a model are spread over pipeline stages, in all of Megatron's ways.

Sources, equal in megatron-core 0.16 and 0.19, in transformer/: transformer_config.py (``__post_init__`` refuses
layouts), transformer_block.py (``get_num_layers_to_build``), transformer_layer.py (``get_transformer_layer_offset``),
pipeline_parallel_layer_layout.py (layout strings).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dist_ckpt_mistral.errors import LayoutError

#: The letters of a layout string: embedding, decoder layer, multi-token prediction, loss.
_LETTERS: Final = frozenset("EtmL")
#: Most digits of a number of repetitions.
_MOST_DIGITS: Final = 4
#: Most letters of an unrolled layout string, far beyond every model.
_MOST_LETTERS: Final = 100_000
#: Repetitions in a layout string, in the order in which Megatron unrolls them: ``(...)*n``, then ``x*n``.
_REPEATS: Final = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChunk:
    """One virtual pipeline stage of one rank.

    Args:
        layers: The numbers of its layers in the whole model, from 0.
        is_first: Whether it has the embedding.
        is_last: Whether it has the final norm and the output layer.
    """

    layers: tuple[int, ...]
    is_first: bool
    is_last: bool


def _are_counts(values: Sequence[object], length: int) -> bool:
    """Whether ``values`` are ``length`` whole numbers of at least 0."""
    return len(values) == length and all(type(value) is int and value >= 0 for value in values)


def parse_pipeline_layout(text: str) -> tuple[str, ...]:
    """The stages of a layout string, with one letter per layer: ``Et*2|(tt|)*2,L`` gives Ett, tt, tt and L.

    Raises LayoutError for letters that Megatron does not know, and for more repetitions than any model has layers.
    """

    def unroll(repeat: re.Match[str]) -> str:
        if len(repeat[2]) > _MOST_DIGITS:
            most = 10**_MOST_DIGITS - 1
            raise LayoutError(
                f"pipeline_model_parallel_layout repeats {repeat[1]!r} {repeat[2]} times: expected at most {most}"
            )
        return repeat[1] * int(repeat[2])

    unrolled = text.replace(",", "")  # commas are decoration
    for pattern in _REPEATS:
        letters = sum(len(repeat[1]) * int(repeat[2][-_MOST_DIGITS:]) for repeat in pattern.finditer(unrolled))
        if letters > _MOST_LETTERS:
            raise LayoutError(f"pipeline_model_parallel_layout has {letters} layers: expected at most {_MOST_LETTERS}")
        unrolled = pattern.sub(unroll, unrolled)
    unknown = sorted(set(unrolled) - _LETTERS - {"|"})
    if unknown:
        raise LayoutError(
            f"pipeline_model_parallel_layout {text!r} has {', '.join(map(repr, unknown))}: expected "
            "E (embedding), t (decoder layer), L (loss), | between stages, commas, (...)*n and x*n"
        )
    return tuple(unrolled.split("|"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLayout:
    """The pipeline part of a ``ParallelLayout``, which explains the fields and checks them."""

    pp: int = 1
    vpp: int | None = None
    pp_layers: tuple[int, ...] | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None

    def model_chunks(self, num_layers: int, pp_rank: int) -> tuple[ModelChunk, ...]:
        """The model chunks of a pipeline stage: one, or ``vpp`` of them.

        Layers count up through the first chunks of all stages, then through the second chunks. Embedding and loss are
        always in the very first and last chunk, even if a layout string has empty stages before or after them.
        """
        sizes = self.chunk_sizes(num_layers)
        chunks = len(sizes[pp_rank])
        firsts = [
            sum(sum(stage[:chunk]) for stage in sizes) + sum(stage[chunk] for stage in sizes[:pp_rank])
            for chunk in range(chunks)
        ]
        return tuple(
            ModelChunk(
                layers=tuple(range(first, first + size)),
                is_first=pp_rank == 0 and chunk == 0,
                is_last=pp_rank == self.pp - 1 and chunk == chunks - 1,
            )
            for chunk, (first, size) in enumerate(zip(firsts, sizes[pp_rank], strict=True))
        )

    def chunk_sizes(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """For each pipeline stage, the number of layers in each of its model chunks."""
        chunks = self.vpp or 1
        if self.pipeline_model_parallel_layout is not None:
            counts = [stage.count("t") for stage in parse_pipeline_layout(self.pipeline_model_parallel_layout)]
            return tuple(tuple(counts[pp_rank :: self.pp]) for pp_rank in range(self.pp))
        sizes = [[size // chunks] * chunks for size in self._stage_sizes(num_layers)]
        sizes[0][0] -= self.account_for_embedding_in_pipeline_split
        sizes[-1][-1] -= self.account_for_loss_in_pipeline_split
        return tuple(map(tuple, sizes))

    def pipeline_fields(self) -> dict[str, Any]:
        """The keyword arguments of Megatron's ``TransformerConfig`` for the pipeline, without those that are not set.

        Megatron has no ``pp_layers``: they become the equivalent ``pipeline_model_parallel_layout``.
        """
        layout = self.pipeline_model_parallel_layout
        if self.pp_layers is not None:
            layout = "E" + "|".join(f"t*{layers}" for layers in self.pp_layers) + "L"
        fields = {
            "virtual_pipeline_model_parallel_size": self.vpp,
            "num_layers_in_first_pipeline_stage": self.num_layers_in_first_pipeline_stage,
            "num_layers_in_last_pipeline_stage": self.num_layers_in_last_pipeline_stage,
            "account_for_embedding_in_pipeline_split": self.account_for_embedding_in_pipeline_split or None,
            "account_for_loss_in_pipeline_split": self.account_for_loss_in_pipeline_split or None,
            "pipeline_model_parallel_layout": layout,
        }
        set_fields = {name: value for name, value in fields.items() if value is not None}
        return {"pipeline_model_parallel_size": self.pp, **set_fields}

    def contradictions(self) -> Iterator[str]:
        """Yield each reason why these fields fit no model. ``pp`` must be positive."""
        if self.vpp is not None and (self.vpp < 1 or (self.vpp > 1 and self.pp == 1)):
            yield f"vpp={self.vpp} needs at least two pipeline stages, got pp={self.pp}"
        ways = {
            "pp_layers": self.pp_layers is not None,
            "num_layers_in_first/last_pipeline_stage": bool(self._ends),
            "account_for_embedding/loss_in_pipeline_split": bool(self._places),
            "pipeline_model_parallel_layout": self.pipeline_model_parallel_layout is not None,
        }
        used = [name for name, is_used in ways.items() if is_used]
        if len(used) > 1:
            yield f"{' and '.join(used)} cannot be combined"
        if self.pp_layers is not None and (self.vpp or 1) > 1:
            yield "pp_layers and vpp cannot be combined"
        if self.pp_layers is not None and not _are_counts(self.pp_layers, self.pp):
            yield f"pp_layers must give one layer count for each of {self.pp} stages, got {self.pp_layers}"
        yield from self._bad_ends()
        if self.pipeline_model_parallel_layout is not None:
            yield from self._bad_layout(self.pipeline_model_parallel_layout)

    def misfits(self, num_layers: int) -> Iterator[str]:
        """Yield each reason why this layout does not fit ``num_layers`` layers. It must have no ``contradictions``."""
        if self.pipeline_model_parallel_layout is not None or self.pp_layers is not None:
            if (total := sum(map(sum, self.chunk_sizes(num_layers)))) != num_layers:
                layout = self.pipeline_model_parallel_layout
                what = f"pp_layers={self.pp_layers} do" if layout is None else f"the {total} layers of {layout!r} do"
                yield f"{what} not add up to num_hidden_layers={num_layers}"
            return
        stages, layers = self._middle(num_layers)
        if layers < 0 or bool(layers) != bool(stages):
            yield (
                f"num_hidden_layers={num_layers} leaves {layers} layers for {stages} middle stages "
                f"(num_layers_in_first/last_pipeline_stage={self._ends})"
            )
        elif stages and layers % (stages * (self.vpp or 1)):
            middle = f" less those of first and last stage ({layers})" if self._ends else ""
            counted = f" with embedding and loss as layers ({layers})" if self._places else ""
            yield (
                f"num_hidden_layers={num_layers}{middle}{counted} is not divisible by "
                f"{stages * (self.vpp or 1)} pipeline stages"
            )

    @property
    def _ends(self) -> tuple[int, ...]:
        """The layer counts that are given for the first and the last stage."""
        ends = (self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage)
        return tuple(end for end in ends if end is not None)

    @property
    def _places(self) -> int:
        """How many of embedding and loss count as layers: 0, 1 or 2."""
        return self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split

    def _middle(self, num_layers: int) -> tuple[int, int]:
        """(number of stages without a given layer count, number of layers and places that they share)."""
        return self.pp - len(self._ends), num_layers - sum(self._ends) + self._places

    def _stage_sizes(self, num_layers: int) -> list[int]:
        """Number of layers of each stage over all its chunks; places for embedding and loss count as layers."""
        if self.pp_layers is not None:
            return list(self.pp_layers)
        stages, layers = self._middle(num_layers)
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        middle = [layers // stages] * stages if stages else []
        return [*([] if first is None else [first]), *middle, *([] if last is None else [last])]

    def _bad_ends(self) -> Iterator[str]:
        """Yield each problem of the layer counts of the first and the last stage."""
        chunks = max(1, self.vpp or 1)
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            layers = getattr(self, name)
            if layers is not None and layers < 1:
                yield f"{name} must be larger than 0, got {layers}"
            elif layers is not None and layers % chunks:
                yield f"{name}={layers} is not divisible by vpp={self.vpp}"
        # Megatron lets these pass and then builds a part of the model, or divides by the number of middle stages.
        least = 3 if chunks > 1 else 2
        if len(self._ends) > 1 and self.pp < least:
            yield f"layer counts for both first and last stage need pp of at least {least} with vpp={self.vpp}"

    def _bad_layout(self, layout: str) -> Iterator[str]:
        """Yield each problem for which Megatron's ``PipelineParallelLayerLayout`` refuses a layout string."""
        try:
            stages = parse_pipeline_layout(layout)
        except LayoutError as error:
            yield str(error)
            return
        if len(stages) % self.pp:
            yield f"the {len(stages)} stages of pipeline_model_parallel_layout are not divisible by pp={self.pp}"
        elif self.vpp not in (None, len(stages) // self.pp):
            chunks = len(stages) // self.pp
            yield f"vpp={self.vpp} conflicts with pipeline_model_parallel_layout, whose stages have {chunks} chunks"
        elif len(stages) > self.pp == 1:
            yield f"the {len(stages)} stages of pipeline_model_parallel_layout need pp of at least 2, got pp=1"
        letters = "".join(stages)
        if letters[:1] != "E" or letters.count("E") != 1:
            yield "the first layer of pipeline_model_parallel_layout, and no other, must be the embedding E"
        if letters[-1:] != "L" or letters.count("L") != 1:
            yield "the last layer of pipeline_model_parallel_layout, and no other, must be the loss L"
        if "m" in letters:
            yield "pipeline_model_parallel_layout has multi-token prediction layers m, which Mistral models do not have"
