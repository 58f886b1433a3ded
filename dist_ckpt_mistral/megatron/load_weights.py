"""Fill live models with stored weights of any format, in place: ``load_weights``, and what ``load_model`` shares.

The weights are copied by a ``BytePlan``, as in a conversion. Megatron's own reader is not used, because it reads only
checkpoints of similar versions of torch and Megatron.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import torch
from megatron.core import parallel_state

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.conversion import LossPolicy, names_of_sources
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import ConfigError, DistCkptMistralError, TensorMismatchError
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Copied, Effort, MemoryTarget, execute
from dist_ckpt_mistral.gather.links import Link, compose
from dist_ckpt_mistral.gather.plan import BytePlan
from dist_ckpt_mistral.mapping.rank_plan import HeldArray, plan_arrays
from dist_ckpt_mistral.mapping.source import ModelSource, open_source
from dist_ckpt_mistral.mapping.twins import require_equal_twins
from dist_ckpt_mistral.megatron.held_weights import GptModel, HeldEntry, HeldTensor, gpt_models, held_entries
from dist_ckpt_mistral.megatron.live_model import AnyModel
from dist_ckpt_mistral.megatron.live_ranks import LiveRanks
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import GivenConfig, chosen_config
from dist_ckpt_mistral.model.table.rules import Stage
from dist_ckpt_mistral.model.table.table import TensorTable

Given = TypeVar("Given", bound=AnyModel)

#: Host memory through which parameters are filled that are on a GPU, or not contiguous.
_STAGING_BYTES: Final = 128 << 20
#: Tensors begin at multiples of it in that memory: every dtype may.
_ALIGNMENT_BYTES: Final = 64


def load_weights(
    model: Given,
    source: str | Path,
    *,
    config: GivenConfig | None = None,
    allow_lossy: bool = False,
    effort: Effort = DEFAULT_EFFORT,
    timeout: timedelta = timedelta(minutes=30),
) -> Given:
    """Fill a live Megatron model with the weights in ``source``, in place, whoever built it and at whatever layout.

    Every rank of the job makes the same call and reads only the bytes of its own parameters, straight from the stored
    files. Which these are follows from the model's own ``sharded_state_dict``. Parameters keep their dtype and device;
    weights are converted to it, rounding to nearest even. Rows that only pad the vocabulary become zeros. Everything is
    checked on all ranks before the first value is written.

    An optimizer that exists already keeps its own float32 copy of the weights. Call ``optimizer.reload_model_params()``
    afterwards, as Megatron-LM does when it loads a model without its optimizer (megatron/training/checkpointing.py;
    megatron-core optimizer/optimizer.py). A model that is filled before its optimizer is made needs no such call.

        dcm.load_weights(model, "hf_dir")  # on every rank

    Args:
        model: This rank's GPTModel, or with virtual pipeline stages the list of them, wrapped in Float16Module or
            DistributedDataParallel or not. A single stage of several may be filled alone, on all ranks at a time.
        source: A Hugging Face directory, a hub id, or a Megatron checkpoint (root or iteration directory).
        config: Configuration of a checkpoint that has none: a MistralConfig, a config.json, or a directory or hub id
            with one.
        allow_lossy: Warn, instead of raising an error, if a conversion of dtypes makes finite values infinite or other
            values zero. Warning and error count the values.
        effort: Number of threads and size of the copy buffers.
        timeout: How long the ranks wait for one another at most, before they write and after it.

    Returns:
        The given ``model``.

    Raises:
        ConfigError: ``model`` is no GPTModel, or ranks read different configurations.
        TensorMismatchError: Parameters, stored tensors or the ranks' parts do not fit. The error names all tensors.
        LostRankError: A rank did not come within ``timeout``, or has ended. The error names it.
        DistCkptMistralError: The source cannot be read. An error on one rank is raised on all ranks; if values were
            written before, it says so.
    """
    require_types(load_weights, **locals())

    def opened() -> ModelSource:
        return open_source(source, config=chosen_config(config), dtype="float32")  # FP8 values are rounded once

    together = LiveRanks(timeout).ranks
    filling = planned(model, opened, together)
    with overwriting():
        together.each(lambda: filling.run(LossPolicy(allowed=allow_lossy, names_of=names_of_sources), effort))
    return model


@contextlib.contextmanager
def overwriting() -> Iterator[None]:
    """Errors in the block say that parameters may hold new values."""
    try:
        yield
    except DistCkptMistralError as error:
        raise type(error)(
            f"{error} Parameters were overwritten, perhaps not all: fill the model again before you use it."
        ) from error


def planned(model: AnyModel, opened: Callable[[], ModelSource], together: Ranks) -> Filling:
    """Check and plan on all ranks how to fill a rank's model, and write nothing. One rank's failure fails all."""
    fillings: list[Filling] = []

    def plan() -> tuple[str, bool, Counter[str]]:
        chunks, source = gpt_models(model), opened()
        require_equal_twins(source)
        fillings.append(Filling.planned(chunks, source))
        is_whole = len(chunks) >= (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1)
        return repr(asdict(source.config)), is_whole, fillings[0].main_elements

    configs, whole, shares = zip(*together.together(plan), strict=True)
    if len(set(configs)) > 1:
        other = next(rank for rank, config in enumerate(configs) if config != configs[0])
        raise ConfigError(f"the ranks read different models: rank 0 {configs[0]}, rank {other} {configs[other]}")
    _require_all(fillings[0].table, sum(shares, Counter()), is_whole=any(whole))
    return fillings[0]


def _require_all(table: TensorTable, found: Counter[str], *, is_whole: bool) -> None:
    """Raise TensorMismatchError unless the main replicas of all ranks hold every Hugging Face tensor once.

    ``found`` are the elements that they hold of each. Unless ``is_whole``, those of other stages may be absent. A model
    holds all of a vision tower and projector or, like Megatron's own, nothing of them.
    """
    wrong = []
    has_vision = any(found[part.hf_name] for rule in table.carried for part in rule.parts)
    for name, tensor in table.hf_tensors().items():
        is_elsewhere = tensor.is_alias or (tensor.rule.stage is Stage.CARRIED and not has_vision)
        expected = 0 if is_elsewhere else math.prod(tensor.shape)
        if found[name] != expected and (found[name] or is_whole):
            wrong.append(f"{name} ({found[name]} of {expected} elements)")
    if wrong:
        raise TensorMismatchError(
            f"the ranks do not hold the model once: {listed(wrong)}. Give all model chunks of this rank, on every rank "
            "of the job."
        )


class _Piece(NamedTuple):
    """Rows ``[low, high)`` of a local tensor of an entry, by the number of the tensor."""

    tensor: int
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """How a rank's parameters are filled.

    Args:
        table: The tensor table of the model.
        entries: The entries of all parameters.
        pieces: For each entry, what to read into it: the number of the segment of ``plan`` -> the rows that it fills.
        plan: The copies of all pieces.
    """

    table: TensorTable
    entries: tuple[HeldEntry, ...]
    pieces: tuple[Mapping[int, _Piece], ...]
    plan: BytePlan

    @classmethod
    def planned(cls, chunks: Sequence[GptModel], source: ModelSource) -> Filling:
        """Plan to fill ``chunks`` from ``source``. Raises TensorMismatchError, which names all that differs."""
        return cls.of(held_entries(chunks, source.config), source)

    @classmethod
    def of(cls, entries: Sequence[HeldEntry], source: ModelSource) -> Filling:
        """Plan to fill the memory of ``entries`` from ``source``."""
        arrays, pieces = list[HeldArray](), list[Mapping[int, _Piece]]()
        for entry in entries:
            of_entry = [*_pieces(entry)]
            pieces.append(dict(enumerate(of_entry, len(arrays))))
            arrays += [_array(entry.tensors[piece.tensor], piece, number) for number, piece in pieces[-1].items()]
        return cls(table=source.table, entries=tuple(entries), pieces=tuple(pieces), plan=plan_arrays(source, arrays))

    @property
    def main_elements(self) -> Counter[str]:
        """How many elements of each Hugging Face tensor this rank holds as the main replica."""
        found: Counter[str] = Counter()
        for tensor in itertools.chain.from_iterable(entry.tensors for entry in self.entries):
            for box in tensor.boxes if tensor.is_main else ():
                found[box.hf_name] += math.prod(box.shape)
        return found

    @torch.no_grad()
    def run(self, losses: LossPolicy, effort: Effort) -> None:
        """Read the weights into the parameters."""
        effort.progress.phase("load", self.plan.num_bytes)
        copied: dict[int, Copied] = {}
        in_place: dict[int, torch.Tensor] = {}
        for entry, pieces in zip(self.entries, self.pieces, strict=True):
            if entry.in_place:
                in_place |= _memory_of(pieces, [tensor.values for tensor in entry.tensors])
                for tensor in entry.tensors:
                    tensor.values[tensor.live_rows :] = 0
                continue
            with entry.copies() as copies:
                copied |= self._read(_memory_of(pieces, copies), effort)
        copied |= self._read(in_place, effort)
        losses.accept(self.plan, copied)

    def _read(self, places: Mapping[int, torch.Tensor], effort: Effort) -> dict[int, Copied]:
        """Read segments of the plan into ``places`` (number of the segment -> memory), and return what was copied."""
        direct = {number: MemoryTarget(_bytes_of(place)) for number, place in places.items() if _is_host_array(place)}
        copied = self._execute(direct, effort)
        staged = {number: place for number, place in places.items() if number not in direct}
        if not staged:
            return copied
        on_gpu = any(place.is_cuda for place in staged.values())
        batches = [*_batches(staged)]
        staging = torch.empty(max(end for _, end in batches), dtype=torch.uint8, pin_memory=on_gpu)
        for batch, _ in batches:
            halfway = {
                number: staging[start : start + place.nbytes].view(place.dtype).view(place.shape)
                for number, (start, place) in batch.items()
            }
            copied |= self._execute({number: MemoryTarget(_bytes_of(each)) for number, each in halfway.items()}, effort)
            for number, (_, place) in batch.items():
                place.copy_(halfway[number], non_blocking=on_gpu)
            for device in {place.device for _, place in batch.values() if place.is_cuda}:
                torch.cuda.current_stream(device).synchronize()  # before the next batch overwrites the staging memory
        return copied

    def _execute(self, targets: Mapping[int, MemoryTarget], effort: Effort) -> dict[int, Copied]:
        """Copy the segments that ``targets`` are for."""
        return execute(self.plan, targets, effort=effort, numbers=[*targets], checksums=False) if targets else {}


def _pieces(entry: HeldEntry) -> Iterator[_Piece]:
    """What to read into an entry: all rows but vocabulary padding, in pieces that fit into the staging memory."""
    for number, tensor in enumerate(entry.tensors):
        step = max(1, tensor.live_rows)
        if not _is_host_array(tensor.values):
            step = max(1, _STAGING_BYTES // tensor.values[0].nbytes)
        for low in range(0, tensor.live_rows, step):
            yield _Piece(number, low, min(low + step, tensor.live_rows))


def _array(tensor: HeldTensor, piece: _Piece, number: int) -> HeldArray:
    """A piece of a local tensor as an array of a plan, in which it has a ``number``."""
    name, shape = f"{tensor.key} ({number})", (piece.high - piece.low, *tensor.values.shape[1:])
    origin = (0,) * len(shape)
    rows = Link(source=name, source_offset=(piece.low, *origin[1:]), target=name, target_offset=origin, shape=shape)
    boxes = (
        Link(
            source=box.hf_name,
            source_offset=box.hf_offset,
            target=name,
            target_offset=box.local_offset,
            shape=box.shape[-min(len(box.hf_offset), len(box.local_offset)) :],
        )
        for box in tensor.boxes
    )
    links = tuple(link for box in boxes if (link := compose(box, rows)) is not None)
    dtype = str(tensor.values.dtype).removeprefix("torch.")
    return HeldArray(name=name, dtype=dtype, shape=shape, links=links)


def _memory_of(pieces: Mapping[int, _Piece], tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The memory of each of the ``pieces`` of an entry with the local ``tensors``."""
    return {number: tensors[piece.tensor][piece.low : piece.high] for number, piece in pieces.items()}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor that is a host array."""
    memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return memory


def _is_host_array(place: torch.Tensor) -> bool:
    """Whether the processor can write a tensor as one row-major array."""
    return place.is_cpu and place.is_contiguous()


def _batches(
    places: Mapping[int, torch.Tensor],
) -> Iterator[tuple[dict[int, tuple[int, torch.Tensor]], int]]:
    """Share ``places`` among batches that fit into the staging memory, or have one place each.

    Yields each batch (number -> first byte in the staging memory, place) and its size in bytes.
    """
    batch: dict[int, tuple[int, torch.Tensor]] = {}
    end = 0
    for number, place in places.items():
        start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if batch and start + place.nbytes > _STAGING_BYTES:
            yield batch, end
            batch, start = {}, 0
        batch[number] = start, place
        end = start + place.nbytes
    yield batch, end
