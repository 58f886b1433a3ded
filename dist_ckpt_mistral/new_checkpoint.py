"""A new Megatron checkpoint of a model: its chunks, the way to them, and what lies beside them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_ckpt_mistral.errors import for_all
from dist_ckpt_mistral.formats import checkpoint_directory, hf_directory, small_files
from dist_ckpt_mistral.formats.checkpoint_directory import ITERATION_TRAIN_STATE_FILE, untrained
from dist_ckpt_mistral.formats.places import CONFIG_FILE, INDEX_FILE
from dist_ckpt_mistral.formats.torch_dist import common_state, writer
from dist_ckpt_mistral.formats.torch_dist.writer import CheckpointLayout, NewChunk, NewObject
from dist_ckpt_mistral.gather.links import Link, compose, reverse
from dist_ckpt_mistral.gather.plan import BytePlan, only_dtype, plan_gather
from dist_ckpt_mistral.mapping import configuration
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap, new_checkpoint_map
from dist_ckpt_mistral.mapping.chunking import cuts
from dist_ckpt_mistral.mapping.configuration import RUN_CONFIG_FILE
from dist_ckpt_mistral.mapping.source import ModelSource, require_equal_twins
from dist_ckpt_mistral.model.args.bridge import to_run_config
from dist_ckpt_mistral.model.args.megatron_args import to_megatron_args
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.rules import KeyStyle
from dist_ckpt_mistral.model.table.table import OLD_EXTRA_STATES, TensorTable
from dist_ckpt_mistral.storage import documents


def plan_import(
    source: ModelSource, layout: ParallelLayout, dtype: str | None, step: Path
) -> tuple[CheckpointLayout, BytePlan]:
    """What the new checkpoint's files hold where, and the way there."""
    layout.check(source.config)
    require_equal_twins(source)
    new = new_checkpoint_map(source.table)
    links = [
        link
        for tensor in source.tensors
        if not tensor.is_alias
        for second in map(reverse, new.links(tensor))
        for first in source.links[tensor.hf_name]
        if (link := compose(first, second)) is not None
    ]
    chunks = _chunks(source, new, links, layout, dtype)
    objects = [NewObject.empty(_extra_states(source.table))]
    written = writer.lay_out(chunks, objects, num_files=layout.world_size)
    return written, plan_gather(source.index, written.index(step), links)


def _chunks(
    source: ModelSource, new: CheckpointMap, links: Sequence[Link], layout: ParallelLayout, dtype: str | None
) -> Iterator[NewChunk]:
    """The chunks that the ranks of ``layout`` would save, one file a rank, without vocabulary padding."""
    into: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        into[link.target].append(link)
    dtypes = dict(zip(into, for_all(lambda name: dtype or only_dtype(source.index, into[name]), into), strict=True))
    others = new.also_written()
    for cut in cuts(new, new.shapes(), layout):
        yield NewChunk(
            mcore_key=cut.name,
            dtype=dtypes[cut.name],
            global_shape=cut.global_shape,
            offset=cut.offset,
            shape=cut.shape,
            file=cut.rank,
            other_keys=others.get(cut.name, ()),
        )


def _extra_states(table: TensorTable) -> list[str]:
    """The object keys that models of any layer spec and version look for."""
    shapes = dict.fromkeys(OLD_EXTRA_STATES, (table.num_layers,)) | table.extra_states(KeyStyle.STACKED)
    return [
        writer.object_key(key, index, shape)
        for key, shape in shapes.items()
        for index in itertools.product(*map(range, shape))
    ]


def write_beside_shards(
    directory: Path,
    source: ModelSource,
    carried: Mapping[str, Path],
    layout: ParallelLayout,
    dtype: str,
    iteration: int | None,
) -> None:
    """Write metadata.json, the model's description in several forms, and the small Hugging Face files.

    Megatron-LM reads common.pt, Megatron-Bridge run_config.yaml and train_state.pt. ``.metadata`` comes last and
    elsewhere.
    """
    documents.write_bytes(directory / checkpoint_directory.BACKEND_FILE, writer.BACKEND_JSON)
    written: dict[str, Any] = {"dtype": dtype, "tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
    documents.write_bytes(directory / RUN_CONFIG_FILE, documents.yaml_bytes(to_run_config(source.config, **written)))
    documents.write_bytes(directory / ITERATION_TRAIN_STATE_FILE, untrained(iteration or 0))
    state: dict[str, Any] = {
        "args": to_megatron_args(source.config, **written),
        "checkpoint_version": 3.0,
        "iteration": iteration or 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            configuration.KEY: configuration.to_record(source.config, source.table, source.hf_files),
        },
    }
    documents.write_bytes(directory / common_state.COMMON_FILE, common_state.write(state))
    texts: dict[str, bytes | None] = {}
    if CONFIG_FILE in carried:
        texts[CONFIG_FILE] = hf_directory.config_json(source.config.to_hf(), carried[CONFIG_FILE])
    if source.hf_files is None:  # the files are not remembered, and then an index of them tells nothing
        texts[INDEX_FILE] = None
    (directory / small_files.ASSETS_FOLDER).mkdir()
    small_files.write_small_files(directory / small_files.ASSETS_FOLDER, carried, texts)
