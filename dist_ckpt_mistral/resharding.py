"""Resharding: a checkpoint again, all of it, with its chunks cut for another layout.

Every rank of the layout then reads whole chunks, of the weights and of the optimizer's states of them. What is no
tensor of the model keeps its bytes, and so does the common state.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_ckpt_mistral import paths, storage
from dist_ckpt_mistral.checkpoint_config import choose_config, read_embedded
from dist_ckpt_mistral.chunking import Cut, cuts
from dist_ckpt_mistral.conversion import Conversion
from dist_ckpt_mistral.errors import TensorMismatchError
from dist_ckpt_mistral.formats import common_state, torch_dist, torch_dist_writer
from dist_ckpt_mistral.formats.common_state import Entry
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.formats.torch_dist import TorchDistCheckpoint
from dist_ckpt_mistral.formats.torch_dist_writer import CheckpointLayout, NewChunk, NewObject, object_bytes
from dist_ckpt_mistral.formats.train_state import TRAIN_STATE_FILE, read_step
from dist_ckpt_mistral.gather.executor import Effort
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.gather.tensor_index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.journal import Recipe
from dist_ckpt_mistral.manifest import NewManifest
from dist_ckpt_mistral.mapping import CheckpointMap, Ignored
from dist_ckpt_mistral.matching import FLAT_STATE_ADVICE, match_checkpoint
from dist_ckpt_mistral.model.config import GivenConfig, MistralConfig, given_config
from dist_ckpt_mistral.model.parallel_layout import ParallelLayout
from dist_ckpt_mistral.model.stored_entries import flat_state, is_optimizer_state, model_prefix, split_state_key
from dist_ckpt_mistral.model.tensor_table import tensor_table
from dist_ckpt_mistral.ranks import Ranks
from dist_ckpt_mistral.stamps import Stamps, stamps
from dist_ckpt_mistral.storage import TargetFile
from dist_ckpt_mistral.writing import Checksums, write_output

_LOG = logging.getLogger(__name__)
_DEFAULT_EFFORT: Final = Effort()
_ALONE: Final = Ranks()
#: Files that were read and understood, wherever links lead.
_PARSED: Final = (common_state.COMMON_FILE, torch_dist.BACKEND_FILE)
_DATA_SUFFIX: Final = ".distcp"


def reshard(
    checkpoint: str | Path,
    output: str | Path,
    layout: ParallelLayout,
    *,
    config: GivenConfig | None = None,
    weights_only: bool = False,
    manifest: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    effort: Effort = _DEFAULT_EFFORT,
    ranks: Ranks = _ALONE,
) -> Conversion:
    """Write a checkpoint again, cut so that every rank of ``layout`` reads only whole chunks.

    Weights and optimizer state keep keys, shapes and bits; the common state, all objects and the small files come
    along byte for byte. ``config`` is for checkpoints that do not tell theirs. With ``weights_only`` all optimizer
    state stays behind, as it must where it lies in flat buffers. ``manifest`` adds integrity.json, which tells of the
    new files what an old one told of the old. ``resume`` goes on with what a run that was killed or failed has copied.
    Raises DistCkptMistralError; then nothing is published.
    """
    checkpoint, output = Path(checkpoint), Path(output)

    def prepare() -> tuple[Stamps, _Old, CheckpointLayout, BytePlan]:
        paths.require_apart(checkpoint, output)
        paths.require_writable(output, overwrite=overwrite)
        inputs = stamps(torch_dist.resolve_directory(checkpoint).rglob("*"))
        old = _open(checkpoint, config, layout, weights_only=weights_only)
        chunks = [*old.chunks()]
        written = torch_dist_writer.lay_out(chunks, old.objects.values(), num_files=1 + max(c.file for c in chunks))
        target = written.index(old.step)
        links = [_identity(tensor) for tensor in target.tensors.values()]
        return inputs, old, written, plan_gather(old.index(), target, links)

    inputs, old, written, plan = ranks.each(prepare)
    beside = [*_beside(old.stored)] if ranks.is_first else []

    def complete(staging: Path, targets: Mapping[int, TargetFile], checksums: Checksums) -> None:
        written.finish(targets, plan, checksums)
        _copy_beside(old.stored.directory, beside, staging / old.step)
        storage.write_bytes(staging / old.step / torch_dist.METADATA_FILE, written.metadata())
        _write_root(old, staging)

    sizes = written.file_sizes(old.step)
    options = {"layout": repr(layout), "--weights-only": weights_only, "configuration": old.config.to_hf()}
    write_output(
        output,
        plan,
        sizes,
        complete=complete,
        manifest=NewManifest(folder=old.step) if manifest else None,
        checksums=True,
        recipe=Recipe.of(plan, inputs, {"command": "reshard", **options}),
        beside_bytes=storage.total_bytes(beside),
        overwrite=overwrite,
        resume=resume,
        effort=effort,
        ranks=ranks,
    )
    return Conversion.of(output, plan, sizes, old, num_tensors=len(old.tensors.tensors))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Old:
    """The checkpoint to reshard.

    ``tensors`` are those that come along, ``cuts`` the new chunks of those that the model has, by name; ``objects`` are
    archives to take as they are, ``ignored`` is what stays behind. ``step`` is the directory to write, in the output,
    and ``train_state`` what Megatron-Bridge keeps beside it, if that names it.
    """

    stored: TorchDistCheckpoint
    config: MistralConfig
    config_from: str
    tensors: TensorIndex
    cuts: Mapping[str, list[Cut]]
    objects: Mapping[Entry, NewObject]
    ignored: Ignored
    step: Path
    train_state: Path | None

    def index(self) -> TensorIndex:
        """The tensors, and the objects as bytes."""
        files = [*self.tensors.files]
        number = {path.name: i for i, path in enumerate(files)}
        tensors = dict(self.tensors.tensors)
        for entry, each in self.objects.items():
            if entry.file not in number:
                number[entry.file] = len(files)
                files.append(self.stored.directory / entry.file)
            key, file = each.keys[0], number[entry.file]
            tensors[key] = object_bytes(key, entry.num_bytes, file=file, position=entry.offset)
        return TensorIndex(files=tuple(files), tensors=tensors)

    def chunks(self) -> Iterator[NewChunk]:
        """The new chunks, in a file for every rank that saves any. What is not the model's stays cut as it is."""
        ranks = sorted({cut.rank for group in self.cuts.values() for cut in group})
        file_of = {rank: file for file, rank in enumerate(ranks)}
        for name, tensor in self.tensors.tensors.items():
            as_block = self.stored.tensors[name].stored_shape != tensor.global_shape
            if name in self.cuts:
                boxes = [(cut.offset, cut.shape, file_of[cut.rank]) for cut in self.cuts[name]]
            else:
                columns = (tensor.offsets.tolist(), tensor.shapes.tolist())
                boxes = [(tuple(offset), tuple(shape), 0) for offset, shape in zip(*columns, strict=True)]
            if as_block and len({shape for _, shape, _ in boxes}) > 1:  # only equal blocks can be stored so
                boxes = [((0,) * len(tensor.global_shape), tensor.global_shape, boxes[0][2])]
            for offset, shape, file in boxes:
                yield NewChunk(
                    mcore_key=name,
                    dtype=tensor.dtype,
                    global_shape=tensor.global_shape,
                    offset=offset,
                    shape=shape,
                    file=file,
                    as_block=as_block,
                )


def _open(path: Path, config: GivenConfig | None, layout: ParallelLayout, *, weights_only: bool) -> _Old:
    stored = torch_dist.open_torch_dist(path)
    where = str(stored.directory)
    known, config_from = choose_config(stored, given_config(config), read_embedded(stored))
    _LOG.info("configuration: %s", config_from)
    layout.check(known)
    shapes = {name: tensor.global_shape for name, tensor in stored.tensors.items()}
    found = match_checkpoint(tensor_table(known), shapes, stored.objects, where)
    names = [*stored.tensors, *stored.objects]
    if weights_only:
        left = {name: "optimizer state, which was not asked for" for name in names if is_optimizer_state(name)}
    else:
        left = {}
        _require_no_flat_state(names, where)
    kept = [name for name in stored.tensors if name not in left]
    return _Old(
        stored=stored,
        config=known,
        config_from=config_from,
        tensors=stored.index(kept),
        cuts=_cuts(found, {name: shapes[name] for name in kept}, layout, where),
        objects=_archives(stored, left),
        ignored=tuple(left.items()),
        step=_step(stored.directory),
        train_state=_train_state(stored.directory),
    )


def _require_no_flat_state(names: list[str], where: str) -> None:
    flat = sorted({name for name in map(flat_state, names) if name is not None})
    if flat:
        advice = FLAT_STATE_ADVICE.format(name=flat[0])
        raise TensorMismatchError(f"{where} cannot be resharded as it is: {advice} That is what --weights-only does.")


def _cuts(
    found: CheckpointMap, shapes: Mapping[str, tuple[int, ...]], layout: ParallelLayout, where: str
) -> dict[str, list[Cut]]:
    """The new chunks of all weights, and of all states of them: those are cut as their weights are."""
    of_weights: dict[str, list[Cut]] = defaultdict(list)
    for cut in cuts(found, shapes, layout):
        of_weights[cut.name.removeprefix(found.prefix)].append(cut)
    by_name = {group[0].name: group for group in of_weights.values()}
    states = {name: split[1] for name in shapes if (split := split_state_key(name)) is not None}
    prefix = model_prefix(states.values()) or found.prefix
    for name, key in states.items():
        group = of_weights.get(key.removeprefix(prefix), [])
        if not group or group[0].global_shape != shapes[name]:
            expected = f"{list(group[0].global_shape)}, as its parameter" if group else "a state of a parameter"
            raise TensorMismatchError(
                f"cannot reshard {name!r} {list(shapes[name])} in {where}: expected {expected}. "
                "Reshard the weights alone with --weights-only."
            )
        by_name[name] = group
    return by_name


def _archives(stored: TorchDistCheckpoint, left: Mapping[str, str]) -> dict[Entry, NewObject]:
    """The objects that come along, by where they lie: several keys may share one archive."""
    keys: dict[Entry, list[str]] = defaultdict(list)
    for key, entry in stored.objects.items():
        if key not in left:
            keys[entry].append(key)
    stored.require_whole({entry.file for entry in keys})
    return {entry: NewObject(keys=tuple(names), num_bytes=entry.num_bytes) for entry, names in keys.items()}


def _step(directory: Path) -> Path:
    """The iteration's directory in the output; the output itself for one that stands alone, under a name of its own."""
    name = directory.resolve().name
    return Path(name) if torch_dist.iteration_of(name) is not None else Path()


def _train_state(directory: Path) -> Path | None:
    """Megatron-Bridge's own tracker beside the iteration's directory, if there is one, and it names this iteration."""
    path, name = directory.resolve().parent / TRAIN_STATE_FILE, str(_step(directory))
    if torch_dist.iteration_of(name) is None or not path.is_file():
        return None
    return path if torch_dist.iteration_name(read_step(path)) == name else None


def _identity(tensor: IndexedTensor) -> Link:
    origin, shape = (0,) * len(tensor.global_shape), tensor.global_shape
    return Link(source=tensor.name, source_offset=origin, target=tensor.name, target_offset=origin, shape=shape)


def _beside(old: TorchDistCheckpoint) -> Iterator[Path]:
    """What lies beside the shards and comes along: common state, Hugging Face files, run configuration and the like."""
    for path in sorted(old.directory.rglob("*")):
        relative = path.relative_to(old.directory)
        if path.is_symlink() and path.is_dir():
            _LOG.warning("%s is a link to a directory: it stays behind", relative)
        elif path.is_dir() or str(relative) in {*old.file_bytes, torch_dist.METADATA_FILE, MANIFEST_FILE}:
            continue
        elif not path.is_file() or (path.name not in _PARSED and paths.leads_outside(path, old.directory)):
            _LOG.warning("%s is no file, or a link out of the checkpoint: it stays behind", relative)
        elif path.suffix == _DATA_SUFFIX:
            _LOG.warning("%s stays behind: the checkpoint's metadata does not know it", relative)
        else:
            yield path


def _copy_beside(directory: Path, beside: Sequence[Path], target: Path) -> None:
    for path in beside:
        copy = target / path.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        storage.copy_file(path, copy)


def _write_root(old: _Old, root: Path) -> None:
    """What stands beside the iteration's directory, if there is one: the tracker, and what Megatron-Bridge adds."""
    iteration = torch_dist.iteration_of(str(old.step))
    if iteration is None:
        return
    storage.write_bytes(root / torch_dist.TRACKER_FILE, iteration.encode())
    if old.train_state is not None:
        storage.copy_file(old.train_state, root / TRAIN_STATE_FILE)
