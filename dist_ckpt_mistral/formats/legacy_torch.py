"""Read Megatron's legacy ``torch`` checkpoints: a folder for every model-parallel rank, with one archive of torch.save.

``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` holds a dict: ``model`` (with virtual stages ``model0``, ``model1``, ...)
is the state dict of the rank's part of the model, and beside it are ``args``, ``iteration``, optimizer and generator
states (Megatron-LM training/checkpointing.py, ``get_checkpoint_name`` and ``generate_state_dict``, 0.4 to 0.19). Only
the directory of each archive and its pickle are read here; tensors become the bytes of the file that hold them. Which
rows of which tensor of the model these are, the names do not tell: mapping/rank_files.py does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Final, NamedTuple

import numpy as np

from dist_ckpt_mistral.errors import FormatError, UnsupportedFormatError, for_all
from dist_ckpt_mistral.formats.pickles import reader
from dist_ckpt_mistral.formats.pickles.tensors import (
    TENSOR_GLOBALS,
    PickledTensor,
    row_major_strides,
    storage_of,
    torch_dtype_name,
)
from dist_ckpt_mistral.formats.rank_optimizer import StatePlace, read_optimizer
from dist_ckpt_mistral.formats.stored_metadata import Archives, StoredMetadata, StoredTensor
from dist_ckpt_mistral.formats.torch_dist import common_state
from dist_ckpt_mistral.formats.torch_dist.archive import LITTLE_ENDIAN, ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.gather import dtypes
from dist_ckpt_mistral.gather.dtypes import Shape, TorchDtype, is_countable
from dist_ckpt_mistral.messages import listed
from dist_ckpt_mistral.storage import paths
from dist_ckpt_mistral.storage.local import SourceFiles

#: The archive in every folder of a rank, and what the distributed optimizer saves beside it.
RANK_FILE: Final = "model_optim_rng.pt"
FLAT_FILE: Final = "distrib_optim.pt"
_FOLDER: Final = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?")
_MODEL: Final = re.compile(r"model(\d{0,3})")
_OPTIMIZER: Final = "optimizer"
_RNG: Final = "rng_state"
#: Levels of dicts in a model: the modules of Megatron-LM before megatron-core nest their state dicts.
_MOST_NESTED: Final = 8
#: The beginning of what torch.save wrote before version 1.6: the pickle of a magic number.
_OLD_SAVE: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class RankFolder(NamedTuple):
    """The folder of a rank: its name, and the numbers in it: tensor parallel rank first, then pipeline, expert."""

    name: str
    numbers: tuple[int, ...]


class RankTensor(NamedTuple):
    """A tensor of a rank: the folder, the number of the model chunk there, and the name in its state dict."""

    folder: str
    chunk: int
    name: str


def rank_folders(directory: Path) -> list[RankFolder]:
    """The folders of ranks in an iteration's directory, by ascending numbers.

    Raises FormatError for names that are like those of such folders and are none, and for two of one rank.
    """
    tops = (name.removesuffix("/") for name in paths.names_in(directory) if name.endswith("/"))
    names = [name for name in tops if name.startswith("mp_rank_")]
    matches = {name: _FOLDER.fullmatch(name) for name in sorted(names)}
    strange = [name for name, match in matches.items() if match is None]
    if strange:
        raise FormatError(f"{directory} holds {listed(strange)}: expected folders called mp_rank_TT[_PPP][_EEE]")
    found = [
        RankFolder(name, tuple(int(number) for number in match.groups() if number is not None))
        for name, match in matches.items()
        if match is not None
    ]
    if len({len(folder.numbers) for folder in found}) > 1:
        raise FormatError(
            f"{directory} holds folders of two checkpoints, {found[0].name} and {found[-1].name}: all must have the "
            "same number of numbers. Move the others elsewhere."
        )
    return sorted(found, key=lambda folder: folder.numbers)


def key_of(tensor: RankTensor) -> str:
    """The key under which a tensor of a rank is listed among the tensors of the checkpoint."""
    return f"{tensor.folder}/{tensor.chunk}/{tensor.name}"


def split_key(key: str) -> RankTensor:
    """The tensor of a rank that is listed under a key."""
    folder, chunk, name = key.split("/", 2)
    return RankTensor(folder, int(chunk), name)


def state_key_of(folder: str, place: StatePlace) -> str:
    """The key under which a parameter's state in a rank's optimizer is listed."""
    return f"optimizer.{folder}/{'/'.join(map(str, place))}"


def split_state_key_of(key: str) -> tuple[str, StatePlace]:
    """The folder and the place of the state that is listed under a key."""
    folder, optimizer, group, parameter, name = key.removeprefix("optimizer.").split("/", 4)
    return folder, StatePlace(int(optimizer), int(group), int(parameter), name)


def read_stored(directory: Path) -> StoredMetadata:
    """All tensors of all ranks, each under a key of its own (``key_of``), with the bytes of the file that hold it.

    So are the states of plain optimizers (``state_key_of``). The objects are what else lies beside the models. Reads
    the pickle of every archive, through the allowlist.

    Raises FormatError, which names all problems, for damaged archives, archives that are missing, and tensors that are
    no contiguous part of their storage; UnsafePickleError where a pickle asks for anything outside the allowlist.
    """
    folders = rank_folders(directory)
    ranks = for_all(lambda folder: _Rank.read(directory, folder.name), folders)
    file_bytes = {rank.file: rank.num_bytes for rank in ranks}
    tensors: dict[str, StoredTensor] = {}
    places: list[tuple[int, int, int]] = []
    for number, rank in enumerate(ranks):
        keys = {key_of(named): tensor for named, tensor in rank.tensors.items()}
        keys |= {state_key_of(rank.folder, place): tensor for place, tensor in rank.states.items()}
        for key, tensor in keys.items():
            itemsize = dtypes.itemsize_bytes(tensor.dtype)
            tensors[key] = _whole(key, tensor, archive=len(places))
            places.append((number, tensor.position, math.prod(tensor.shape) * itemsize))
    objects = {key: entry for rank in ranks for key, entry in _beside(directory, rank)}
    columns = np.array(places, np.int64).reshape(len(places), 3).T
    return StoredMetadata(
        file_bytes=file_bytes | {entry.file: entry.num_bytes for entry in objects.values()},
        tensors=tensors,
        objects=objects,
        archives=Archives(*columns),
        folders=frozenset(folder.name for folder in folders),
    )


def read_common_state(directory: Path) -> dict[str, Any]:
    """What the first rank says besides its model, optimizer and generator states: ``args``, ``iteration`` and such.

    ``optimizer`` is what its plain optimizer has beside the states of parameters, if it has one. Dtypes become
    ``TorchDtype``. Raises as ``read_stored``.
    """
    return _Rank.read(directory, rank_folders(directory)[0].name).state


@dataclass(frozen=True, slots=True, kw_only=True)
class _LocalTensor:
    """A tensor of a rank: torch dtype name, shape in elements, first byte in the file."""

    dtype: str
    shape: Shape
    position: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rank:
    """The content of a rank's archive. ``others`` names what is neither in ``state`` nor in ``states``."""

    folder: str
    file: str
    num_bytes: int
    tensors: Mapping[RankTensor, _LocalTensor]
    states: Mapping[StatePlace, _LocalTensor]
    state: dict[str, Any]
    others: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path, folder: str) -> _Rank:
        """Read the archive in the ``folder`` of a rank."""
        path = directory / folder / RANK_FILE
        if not path.is_file():
            raise FormatError(f"{path} is missing: the save was not finished, or files were not copied")
        if paths.leads_outside(path, directory):
            raise FormatError(f"{path} is a link out of {directory}. Copy its target instead.")
        with SourceFiles([path]) as files:
            num_bytes = files.size_bytes(0)
            if num_bytes >= len(_OLD_SAVE) and files.read(0, 0, len(_OLD_SAVE)) == _OLD_SAVE:
                raise UnsupportedFormatError(
                    f"{path} is in the format that torch.save had before version 1.6, in which tensors cannot be found "
                    "without executing it. Where you trust it, load it with torch and save it again with torch.save."
                )
            archive = ArchiveReader(files, 0, 0, num_bytes, str(path))
            if "byteorder" in archive.names and archive.read("byteorder") != LITTLE_ENDIAN:
                raise FormatError(f"{path} is big-endian, which is not supported")
            content = reader.loads(archive.read("data.pkl"), _allowlist(), str(path), persistent=storage_of)
            if not isinstance(content, dict):
                raise FormatError(f"{path} is not a checkpoint of Megatron: it holds no dict")
            models = _models(content, str(path))
            tensors = for_all(
                lambda item: (RankTensor(folder, item[0], item[1]), _located(archive, item[1], item[2], str(path))),
                [(chunk, name, tensor) for chunk, model in enumerate(models) for name, tensor in _flat(model)],
            )
            optimizer = read_optimizer(
                content.get(_OPTIMIZER), PickledTensor, lambda step: _float(files, archive, step, str(path))
            )
            states = {} if optimizer is None else optimizer.states
            located = for_all(
                lambda item: (item[0], _located(archive, state_key_of(folder, item[0]), item[1], str(path))),
                states.items(),
            )
        others = tuple(name for name in (_OPTIMIZER, _RNG) if content.get(name) is not None)
        rest = {name: value for name, value in content.items() if not _is_apart(name)}
        if optimizer is not None:
            others, rest = tuple(name for name in others if name != _OPTIMIZER), rest | {_OPTIMIZER: optimizer.common}
        return cls(
            folder=folder,
            file=f"{folder}/{RANK_FILE}",
            num_bytes=num_bytes,
            tensors=dict(tensors),
            states=dict(located),
            state=common_state.checked(rest, str(path)),
            others=others,
        )


def _is_apart(name: object) -> bool:
    """Whether an entry of a rank's archive is no common state: models, optimizer and generator states."""
    return name in (_OPTIMIZER, _RNG) or (isinstance(name, str) and _MODEL.fullmatch(name) is not None)


def _models(content: Mapping[Any, Any], where: str) -> list[Any]:
    """The state dicts of the model chunks, in order."""
    numbers = {name: _MODEL.fullmatch(name) for name in content if isinstance(name, str)}
    names = {match[1]: name for name, match in numbers.items() if match is not None}
    expected = [""] if len(names) == 1 and "" in names else [str(number) for number in range(len(names))]
    if not names or {*names} != {*expected}:
        present = listed(sorted(names.values())) or "neither"
        raise FormatError(f"{where} is not a checkpoint of Megatron: expected a model, or model0 and on, got {present}")
    models = [content[names[number]] for number in expected]
    if not all(isinstance(model, dict) for model in models):
        raise FormatError(f"{where} is not a checkpoint of Megatron: its model is no dict")
    return models


def _flat(model: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, PickledTensor]]:
    """Yield (name, tensor) of all tensors in a model's state dict; modules inside modules are joined with dots."""
    if depth > _MOST_NESTED:
        raise FormatError(f"a model has dicts inside dicts at {short(prefix)}: expected at most {_MOST_NESTED} levels")
    for name, value in model.items():
        if not isinstance(name, str) or not paths.is_plain_name(name.replace("/", "")):
            raise FormatError(f"a model has a tensor called {short(name)}: expected a name that can be printed")
        if isinstance(value, PickledTensor):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.", depth + 1)


def _whole(key: str, tensor: _LocalTensor, *, archive: int) -> StoredTensor:
    """The stored tensor that is stored whole, as archive number ``archive``."""
    origin = np.zeros((1, len(tensor.shape)), np.int64)
    return StoredTensor(
        name=key,
        dtype=tensor.dtype,
        global_shape=tensor.shape,
        stored_shape=tensor.shape,
        offsets=origin,
        shapes=np.array([tensor.shape], np.int64).reshape(1, len(tensor.shape)),
        stored_offsets=origin,
        archives=np.array([archive], np.int64),
    )


def _beside(directory: Path, rank: _Rank) -> Iterator[tuple[str, Entry]]:
    """Yield what a rank saves beside its model, under keys that tell what it is: model/table/entries.py knows them."""
    keys = {_OPTIMIZER: f"optimizer.{rank.folder}", _RNG: f"rng_state/{rank.folder}"}
    for name in rank.others:
        yield keys[name], Entry(rank.file, 0, rank.num_bytes)
    for path in sorted((directory / rank.folder).iterdir()):
        if path.name != RANK_FILE and path.is_file():
            file = f"{rank.folder}/{path.name}"
            yield (
                f"optimizer.distributed.{file}" if path.name == FLAT_FILE else file,
                Entry(file, 0, path.stat().st_size),
            )


def _located(archive: ArchiveReader, name: str, tensor: PickledTensor, where: str) -> _LocalTensor:
    """The bytes of a tensor. Raises FormatError unless they are one row-major part of a storage in the archive.

    Several tensors may share a storage: parameters are parts of one buffer where gradients are reduced in buckets.
    """
    shape = tensor.shape
    if not tensor.is_sound or not is_countable((*shape, 1)) or not is_countable((tensor.offset + 1,)):
        raise FormatError(f"{name!r} in {where} is no tensor: {short((shape, tensor.strides, tensor.offset))}")
    dtype = tensor.dtype_name(f"{name!r} in {where}")
    if not tensor.is_row_major:
        raise UnsupportedFormatError(
            f"{name!r} in {where} is a view of a storage with the strides {list(tensor.strides)}: expected "
            f"{list(row_major_strides(shape))} (row by row). Save it again as it is in memory (contiguous())."
        )
    data, itemsize = archive.member(f"data/{tensor.storage.key}"), dtypes.itemsize_bytes(dtype)
    begin, num_bytes = tensor.offset * itemsize, math.prod(shape) * itemsize
    if begin + num_bytes > data.num_bytes:
        raise FormatError(
            f"{name!r} in {where} needs bytes [{begin}, {begin + num_bytes}) of data/{tensor.storage.key}: it has "
            f"{data.num_bytes}. The file is damaged."
        )
    return _LocalTensor(dtype=dtype, shape=shape, position=data.position + begin)


def _float(files: SourceFiles, archive: ArchiveReader, tensor: PickledTensor, where: str) -> float:
    """The value of a float32 scalar. Raises ValueError for another tensor."""
    found = _located(archive, "step", tensor, where)
    if (found.dtype, found.shape) != ("float32", ()):
        raise ValueError(f"a step of {found.dtype} {list(found.shape)}")
    return float(np.frombuffer(files.read(0, found.position, dtypes.itemsize_bytes(found.dtype)), np.float32)[0])


class _StateDict(dict[Any, Any]):
    """Stands in for an ordered dict, whose attributes (a state dict's ``_metadata``) are not needed."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Forget the attributes."""


def _state_dict() -> _StateDict:
    """Stands in for the constructor of an ordered dict, which a pickle fills afterwards."""
    return _StateDict()


def _allowlist() -> Callable[[str, str], Any]:
    """A lookup of what stands in for the names in a rank's archive: tensors as their places, all else inert."""
    inert = common_state.allowlist()
    named: dict[tuple[str, str], Any] = {
        **TENSOR_GLOBALS,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch", "Tensor"): "",
        ("torch.nn.parameter", "Parameter"): "",
        ("collections", "OrderedDict"): _state_dict,
    }

    def find(module: str, name: str) -> Any:  # noqa: ANN401  (stand-ins of any kind)
        if (module, name) in named:
            return named[module, name]
        return TorchDtype(name) if torch_dtype_name(module, name) else inert(module, name)

    return find


def _rebuild_parameter(data: Any, *_: Any) -> Any:  # noqa: ANN401  (from a pickle)
    """Stands in for ``torch._utils._rebuild_parameter``: a parameter is its tensor."""
    return data


def _rebuild_from_type(rebuild: Any, _: Any, args: Any, __: Any) -> Any:  # noqa: ANN401  (from a pickle)
    """Stands in for ``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, which are not needed.

    Master weights have attributes, such as Megatron's ``tensor_model_parallel``.
    """
    if not reader.is_function(rebuild) or type(args) is not tuple:
        raise TypeError("a tensor is made by what is no function")
    return rebuild(*args)
