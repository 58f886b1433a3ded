"""The layout that saved a checkpoint of Megatron's legacy ``torch`` format: by its folders, args and tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError
from dist_ckpt_mistral.formats.legacy_torch import RankFolder
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.config.parts import is_positive_int
from dist_ckpt_mistral.model.layout.layout import ParallelLayout, RankCoordinates
from dist_ckpt_mistral.model.table.layers import EMBEDDING_KEY

#: The axes of a layout in the names of folders, and their names in Megatron-LM's args.
_AXES: Final = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
#: A layer's number in the name of a tensor.
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.")


def layout_of(
    folders: Sequence[RankFolder],
    names: Mapping[str, list[dict[str, str]]],
    args: Mapping[str, Any],
    config: MistralConfig,
    where: str,
) -> ParallelLayout:
    """The layout that saved the checkpoint: sizes by its args and its folders, layers of stages by their tensors."""
    in_args = {axis: args.get(f"{name}_model_parallel_size") for axis, name in _AXES.items()}
    said = {axis: size for axis, size in in_args.items() if is_positive_int(size)}
    numbers = [{folder.numbers[place] for folder in folders} for place in range(len(folders[0].numbers))]
    axes = ["tp", *_further_axes(folders, names, said, config, where)]
    sizes = dict.fromkeys(_AXES, 1) | {axis: len(each) for axis, each in zip(axes, numbers, strict=True)}
    if {axis: sizes[axis] for axis in said} != said or any({*range(len(each))} != each for each in numbers):
        by_args = ", ".join(f"{axis}={size}" for axis, size in said.items()) or "a layout"
        raise FormatError(
            f"folders of ranks in {where}: expected those of {by_args} (its args), got "
            f"{listed([folder.name for folder in folders])}. Copy the checkpoint again, whole."
        )
    etp = args.get("expert_tensor_parallel_size")
    return ParallelLayout(
        tp=sizes["tp"],
        ep=sizes["ep"],
        etp=etp if is_positive_int(etp) and config.experts is not None else None,
        **_pipeline(folders, names, sizes["pp"], None if "pp" not in axes else axes.index("pp"), where),
    )


def _further_axes(
    folders: Sequence[RankFolder],
    names: Mapping[str, list[dict[str, str]]],
    sizes: Mapping[str, Any],
    config: MistralConfig,
    where: str,
) -> list[str]:
    """The axes that the second and the third number in a folder's name count.

    A single number counts pipeline stages or, where there is one stage, experts: every folder then has an embedding.
    """
    numbers = len(folders[0].numbers) - 1
    if numbers != 1:
        return ["pp", "ep"][:numbers]
    if config.experts is None or sizes.get("pp", 1) > 1:
        return ["pp"]
    if sizes.get("ep", 1) > 1:
        return ["ep"]
    with_embedding = [
        folder.name
        for folder in folders
        if any(name.endswith(EMBEDDING_KEY) for name in names.get(folder.name, [{}])[0])
    ]
    if not with_embedding:
        raise FormatError(f"no rank in {where} holds an embedding. Copy the checkpoint again, whole.")
    return ["ep" if len(with_embedding) == len(folders) > 1 else "pp"]


def _pipeline(
    folders: Sequence[RankFolder],
    names: Mapping[str, list[dict[str, str]]],
    pp: int,
    place: int | None,
    where: str,
) -> dict[str, Any]:
    """The fields of a layout for ``pp`` stages, by the layers in each stage's model chunks.

    ``place`` is that of the stage's number in the names of folders. Raises FormatError if ranks of a stage differ.
    """
    layers: dict[int, tuple[int, ...]] = {}
    for folder in folders:
        stage = 0 if place is None else folder.numbers[place]
        counts = tuple(_num_layers(chunk) for chunk in names.get(folder.name, [{}]))
        if layers.setdefault(stage, counts) != counts:
            raise FormatError(
                f"{folder.name} in {where} has {list(counts)} layers in its model chunks: expected "
                f"{list(layers[stage])}, as another rank of its pipeline stage. Copy the checkpoint again, whole."
            )
    stages = [layers.get(stage, ()) for stage in range(pp)]
    chunks = max(map(len, stages))
    if {*map(len, stages)} != {chunks}:
        raise FormatError(
            f"pipeline stages in {where} have {[*map(len, stages)]} model chunks: expected the same number for each of "
            f"{pp}. Copy the checkpoint again, whole."
        )
    if pp == 1:
        if chunks != 1:
            raise FormatError(f"{where} has {chunks} model chunks in one pipeline stage: expected one")
        return {}
    if chunks == 1:
        return {"pp": pp, "pp_layers": tuple(counts[0] for counts in stages)}
    text = "|".join("t" * counts[chunk] for chunk in range(chunks) for counts in stages)
    return {"pp": pp, "vpp": chunks, "pipeline_model_parallel_layout": f"E{text}L"}


def _num_layers(names: Mapping[str, str]) -> int:
    """Number of layers that the tensors of a model chunk belong to."""
    return len({match[1] for name in names if (match := _LAYER.search(name)) is not None})


def coordinates_of(folders: Sequence[RankFolder], layout: ParallelLayout, where: str) -> dict[str, RankCoordinates]:
    """Folder -> the coordinates of a rank that saves into it.

    Raises FormatError if folders are missing, UnsupportedFormatError if ranks with other experts save into one.
    """
    has = {axis: getattr(layout, axis) > 1 for axis in ("pp", "ep")}
    by_numbers: dict[tuple[int, ...], RankCoordinates] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        numbers = (at.tp, *([at.pp] if has["pp"] else []), *([at.ep] if has["ep"] else []))
        if by_numbers.setdefault(numbers, at).etp != at.etp:
            raise UnsupportedFormatError(
                f"{where} was saved at {layout.text}: ranks with different parts of an expert save into one folder. "
                "Save it anew with --ckpt-format torch_dist."
            )
    width = len(folders[0].numbers)
    present = {folder.numbers: folder.name for folder in folders}
    # One stage may be numbered, too, as tools/checkpoint does.
    padded = {numbers + (0,) * (width - len(numbers)): at for numbers, at in by_numbers.items()}
    if absent := [numbers for numbers in padded if numbers not in present]:
        called = ["_".join(["mp_rank", f"{first:02d}", *(f"{n:03d}" for n in rest)]) for first, *rest in absent]
        raise FormatError(f"folders in {where} are missing: {listed(called)}. Copy the checkpoint again, whole.")
    if strange := [name for numbers, name in present.items() if numbers not in padded]:
        raise FormatError(
            f"{where} holds {listed(strange)}, which no rank of {layout.text or 'one rank'} saves. Move them elsewhere."
        )
    return {present[numbers]: at for numbers, at in padded.items()}
