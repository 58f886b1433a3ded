"""Rewrite a checkpoint as ``torch_dist`` with new chunks, for ``reshard`` and ``migrate``."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.convert.conversion import Conversion
from dist_ckpt_mistral.convert.journal import Recipe
from dist_ckpt_mistral.convert.output import (
    NewFiles,
    Output,
    source_directory,
    write_output,
)
from dist_ckpt_mistral.convert.ranks import Ranks
from dist_ckpt_mistral.errors import for_all
from dist_ckpt_mistral.formats import checkpoint_directory, small_files, stored_checkpoint
from dist_ckpt_mistral.formats.checkpoint_directory import BACKEND_FILE, METADATA_FILE, TRAIN_STATE_FILE, read_step
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.formats.ocdbt import INDEX_FILES
from dist_ckpt_mistral.formats.stored_checkpoint import TORCH_DIST, StoredCheckpoint
from dist_ckpt_mistral.formats.torch_dist import common_state, writer
from dist_ckpt_mistral.formats.torch_dist.archive import ArchiveReader
from dist_ckpt_mistral.formats.torch_dist.archive_writer import in_list
from dist_ckpt_mistral.formats.torch_dist.common_state import Entry
from dist_ckpt_mistral.formats.torch_dist.writer import CheckpointLayout, NewChunk, NewObject, object_bytes
from dist_ckpt_mistral.gather.dtypes import Shape
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import whole
from dist_ckpt_mistral.gather.plan import BytePlan, plan_gather
from dist_ckpt_mistral.mapping.checkpoint_map import Ignored
from dist_ckpt_mistral.storage import documents, paths
from dist_ckpt_mistral.storage.local import SourceFiles
from dist_ckpt_mistral.storage.sources import Sources

_LOG = logging.getLogger(__name__)
#: Files that may be links out of the checkpoint, because they are parsed before they are copied.
_PARSED: Final = (common_state.COMMON_FILE, BACKEND_FILE)
_DATA_SUFFIX: Final = ".distcp"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rewriting:
    """A checkpoint, and the content of its new version.

    Args:
        stored: The old checkpoint.
        config_from: Source of the model configuration, in words.
        tensors: The tensors to write.
        chunks: The new chunks of these tensors.
        objects: The objects to write, by the position of their archives in the old checkpoint.
        new_objects: Objects to write that the old checkpoint does not have.
        new_files: Content of the small files in the iteration's directory that the old checkpoint does not have.
        is_adapter: Whether it holds a LoRA adapter.
        ignored: Names of the entries that are left out, and the reasons.
        options: Everything else that determines the output, in JSON types.
    """

    stored: StoredCheckpoint
    config_from: str
    tensors: TensorIndex
    chunks: Sequence[NewChunk]
    objects: Mapping[Entry, NewObject]
    ignored: Ignored
    options: Mapping[str, Any]
    new_objects: Sequence[NewObject] = ()
    new_files: Mapping[str, bytes] = field(default_factory=dict)
    is_adapter: bool = False

    @property
    def step(self) -> Path:
        """The iteration's directory in the output, or the output itself if the old directory has another name."""
        name = self.stored.directory.resolve().name
        return Path(name) if checkpoint_directory.iteration_of(name) is not None else Path()

    def index(self) -> TensorIndex:
        """The source: all tensors, and the copied bytes of each object."""
        numbers = {path: number for number, path in enumerate(self.tensors.files)}
        tensors = dict(self.tensors.tensors)
        for entry, new_object in self.objects.items():
            file = numbers.setdefault(self.stored.directory / entry.file, len(numbers))
            key = new_object.keys[0]
            tensors[key] = object_bytes(key, new_object.copied_bytes, file=file, position=entry.offset)
        return TensorIndex(files=tuple(numbers), tensors=tensors)

    def layout(self) -> CheckpointLayout:
        """The positions of all data in the new files."""
        objects = [*self.objects.values(), *self.new_objects]
        files = {*(chunk.file for chunk in self.chunks), *(new_object.file for new_object in objects)}
        return writer.lay_out(self.chunks, objects, num_files=1 + max(files, default=0))


def rewrite(
    checkpoint: Path,
    target: Path,
    choose: Callable[[StoredCheckpoint], Rewriting],
    *,
    output: Output,
    effort: Effort,
    ranks: Ranks,
) -> Conversion:
    """Write to ``target`` what ``choose`` returns for the opened ``checkpoint``.

    Raises DistCkptMistralError; then nothing is published.
    """

    def find() -> tuple[Path, bytes | None]:
        directory = source_directory(checkpoint, target, output)
        return directory, _train_state(directory)

    def prepare() -> tuple[Sources, Rewriting, CheckpointLayout, BytePlan]:
        with Sources() as inputs:
            inputs.look_at(directory.rglob("*"))
            new = choose(stored_checkpoint.open_stored(directory))
            layout = new.layout()
            target_index = layout.index(new.step)
            links = [whole(tensor.name, tensor.global_shape) for tensor in target_index.tensors.values()]
            return inputs, new, layout, plan_gather(new.index(), target_index, links)

    directory, train_state = ranks.on_first(find)  # once for all ranks: training may save another iteration meanwhile
    inputs, new, layout, plan = ranks.each(prepare)
    copied_files = dict(_files_to_copy(new.stored)) if ranks.is_first else {}
    root_files = small_files.description_of_root(directory) if ranks.is_first and new.step.name else {}

    def complete(staging: Path) -> None:
        small_files.copy_files(copied_files, staging / new.step)
        for name, content in new.new_files.items():
            documents.write_bytes(staging / new.step / name, content)
        if new.stored.backend != TORCH_DIST:
            documents.write_bytes(staging / new.step / BACKEND_FILE, writer.BACKEND_JSON)
        documents.write_bytes(staging / new.step / METADATA_FILE, layout.metadata())
        if root_files:
            (staging / small_files.ASSETS_FOLDER).mkdir()
            small_files.copy_files(root_files, staging / small_files.ASSETS_FOLDER)
        if train_state is not None:
            documents.write_bytes(staging / TRAIN_STATE_FILE, train_state)
        if checkpoint_directory.iteration_of(str(new.step)) is not None:
            checkpoint_directory.write_tracker(staging, str(new.step))

    sizes = layout.file_sizes(new.step)
    files = NewFiles(
        plan=plan,
        file_bytes=sizes,
        complete=complete,
        around=layout.around(plan),
        commit=checkpoint_directory.commit_names(new.step.name),
        folder=new.step,
        recipe=Recipe.of(plan, inputs, new.options),
        copied_files=[*copied_files.values(), *root_files.values()],
    )
    write_output(target, files, output=output, effort=effort, ranks=ranks)
    return Conversion(
        output=target,
        config_from=new.config_from,
        num_tensors=len(new.tensors.tensors),
        num_bytes=plan.num_bytes,
        files=sizes,
        ignored=new.ignored,
        is_adapter=new.is_adapter,
    )


def chunk_boxes(tensor: IndexedTensor) -> list[tuple[Shape, Shape]]:
    """(offset, shape) of every stored chunk, in elements. An empty tensor without chunks counts as one chunk."""
    boxes = zip(tensor.offsets.tolist(), tensor.shapes.tolist(), strict=True)
    empty = (0,) * len(tensor.global_shape), tensor.global_shape
    return [(tuple(offset), tuple(shape)) for offset, shape in boxes] or [empty]


def new_objects(stored: StoredCheckpoint, ignored: Container[str]) -> dict[Entry, NewObject]:
    """The objects to write, by the position of their archives; several keys may share one archive.

    ``ignored`` has the keys that are left out.
    """
    keys: dict[Entry, list[str]] = defaultdict(list)
    for key, entry in stored.objects.items():
        if key not in ignored:
            keys[entry].append(key)
    stored.require_whole({entry.file for entry in keys})
    return dict(zip(keys, for_all(lambda entry: _new_object(stored, entry, tuple(keys[entry])), keys), strict=True))


def _new_object(stored: StoredCheckpoint, entry: Entry, keys: tuple[str, ...]) -> NewObject:
    """An object in the form of ``torch_dist``, which is a list of one.

    An object of ``zarr`` is unpickled, as its readers will do. Raises UnsafePickleError if its pickle asks for anything
    outside the allowlist.
    """
    if stored.backend == TORCH_DIST:
        return NewObject(keys=keys, copied_bytes=entry.num_bytes)
    path = stored.directory / entry.file
    with SourceFiles([path]) as files:
        archive = ArchiveReader(files, 0, entry.offset, entry.num_bytes, str(path))
        archive.object(common_state.allowlist())
        copied_bytes, rest = in_list(archive, str(path))
    return NewObject(keys=keys, copied_bytes=copied_bytes, rest=rest)


def _files_to_copy(old: StoredCheckpoint) -> Iterator[tuple[str, Path]]:
    """The names and paths of all files to copy: common state, Hugging Face files, run configuration and the like.

    Logs a warning for every file that is not copied. Links to directories are not entered.
    """
    own = {
        METADATA_FILE,
        CHECKSUMS_FILE,
        MANIFEST_FILE,
        *INDEX_FILES,
        *([] if old.backend == TORCH_DIST else [BACKEND_FILE]),
    }
    replaced = {*own, *old.file_bytes}
    for path in sorted(old.directory.rglob("*")):
        relative = path.relative_to(old.directory)
        if relative.parts[0] in old.metadata.folders:
            continue
        if path.is_symlink() and path.is_dir():
            _LOG.warning("%s is a link to a directory: it stays behind", relative)
        elif path.is_dir() or str(relative) in replaced:
            continue
        elif not path.is_file() or (path.name not in _PARSED and paths.leads_outside(path, old.directory)):
            _LOG.warning("%s is no file, or a link out of the checkpoint: it stays behind", relative)
        elif path.suffix == _DATA_SUFFIX:
            _LOG.warning("%s stays behind: the checkpoint's metadata does not know it", relative)
        elif small_files.belongs_to_model(relative) and (why := small_files.why_left_behind(path.name)):
            _LOG.warning("%s %s: it stays behind", relative, why)
        else:
            yield relative.as_posix(), path


def _train_state(directory: Path) -> bytes | None:
    """The content of Megatron-Bridge's tracker in the checkpoint root; None if there is none for this iteration."""
    step, path = directory.resolve().name, directory.resolve().parent / TRAIN_STATE_FILE
    if checkpoint_directory.iteration_of(step) is None or not path.is_file():
        return None
    content = documents.read_bytes(path)
    return content if checkpoint_directory.iteration_name(read_step(path)) == step else None
