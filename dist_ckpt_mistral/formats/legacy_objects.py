"""The objects of legacy ``zarr`` checkpoints: what is no tensor, each as ``torch.save`` saved it, in ``shard_2_4.pt``.

A directory has the objects of one key: elements of an array, whose index and shape are in the names (mcore
dist_checkpointing/mapping.py ``ShardedObject.unique_key`` and strategies/common.py, 0.12 to 0.15). Elements may be
absent: an array has the shape of all layers, and some layers have no such object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from operator import lt
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.common_state import Entry
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.messages import listed

_NUMBER: Final = r"(?:0|[1-9][0-9]*)"
_NUMBERS: Final = rf"({_NUMBER}(?:\.{_NUMBER})*)"
#: ``shard_INDEX_SHAPE.pt``; of a shape of several axes old writers lost the last number.
_OBJECT: Final = re.compile(rf"shard_{_NUMBERS}_{_NUMBERS}\.pt")


def is_object(name: str) -> bool:
    """Whether a file of this name holds an object."""
    return _OBJECT.fullmatch(name) is not None


def read_objects(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """The objects in ``folder`` by the keys that ``torch_dist`` has for them: ``KEY/shard_2_4``.

    What has the name of an object and is no file counts as empty. Raises FormatError for other names, and for names
    that contradict themselves or each other.
    """
    found = {name: _OBJECT.fullmatch(name) for name in sorted(names)}
    unknown = [name for name, match in found.items() if match is None]
    if unknown:
        raise FormatError(
            f"{folder} holds {listed(unknown)}: expected .zarray and its chunks, or objects (shard_0_1.pt). "
            "Copy the checkpoint again, whole."
        )
    places = {name: (_sizes(match[1]), _sizes(match[2])) for name, match in found.items() if match}
    extent = 1 + max(index[-1] for index, _ in places.values())
    entries: dict[str, Entry] = {}
    for name, (index, given) in places.items():
        shape = given if len(given) == len(index) else (*given, extent)
        if len(shape) != len(index) or not all(map(lt, index, shape)):
            raise FormatError(f"{folder / name}: the object has an index outside of its shape")
        key = f"{folder.name}/shard_{_dotted(index)}_{_dotted(shape)}"
        if key in entries:
            raise FormatError(f"{folder / name}: the object is stored twice, also in {Path(entries[key].file).name}")
        path = folder / name
        entries[key] = Entry(f"{folder.name}/{name}", 0, path.stat().st_size if path.is_file() else 0)
    return entries


def _sizes(dotted: str) -> Shape:
    return tuple(map(int, dotted.split(".")))


def _dotted(sizes: Shape) -> str:
    return ".".join(map(str, sizes))
