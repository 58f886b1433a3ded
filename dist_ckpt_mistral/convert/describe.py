"""``describe``: the folder ``hf`` in a checkpoint's root, which describes every iteration saved into that root."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.convert.journal import Recipe
from dist_ckpt_mistral.convert.output import DEFAULT_OUTPUT, NewFiles, Output, write_output
from dist_ckpt_mistral.convert.ranks import ALONE
from dist_ckpt_mistral.errors import FormatError, OutputError
from dist_ckpt_mistral.formats import checkpoint_directory, hf_directory, small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet, tensor_spans
from dist_ckpt_mistral.formats.kinds import CONFIG_FILE, INDEX_FILE, Kind
from dist_ckpt_mistral.formats.places import locate, what_is
from dist_ckpt_mistral.formats.safetensors import SafetensorsFile, new_file
from dist_ckpt_mistral.formats.small_files import ASSETS_FOLDER, RECORD_FILE, VISION_FILE
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored
from dist_ckpt_mistral.gather.execute import DEFAULT_EFFORT, Effort
from dist_ckpt_mistral.gather.index import TensorIndex
from dist_ckpt_mistral.gather.parts import Around
from dist_ckpt_mistral.gather.plan import plan_gather
from dist_ckpt_mistral.mapping.configuration import checkpoint_config, directory_config, matched
from dist_ckpt_mistral.mapping.hf_record import to_record
from dist_ckpt_mistral.mapping.source import ModelSource, open_hf
from dist_ckpt_mistral.messages import concise_repr
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, MistralConfig
from dist_ckpt_mistral.model.table.rules import Stage
from dist_ckpt_mistral.model.table.table import tensor_table
from dist_ckpt_mistral.storage import paths
from dist_ckpt_mistral.storage.remote_path import as_path
from dist_ckpt_mistral.storage.sources import Sources

_LOG = logging.getLogger(__name__)
#: What a directory may hold to count as the root of a training that has saved nothing yet.
_OF_NEW_ROOTS: Final = frozenset({ASSETS_FOLDER})
_WAY_OUT: Final = "Give the model that was trained here, or correct the description that is wrong."


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """The result of ``describe``, or of a dry run.

    Args:
        folder: The folder ``hf`` of the checkpoint root.
        files: Name of each file in it -> its size in bytes.
        compared: The iteration whose tensors and descriptions agree with the model; None in a root without one.
    """

    folder: Path
    files: Mapping[str, int]
    compared: Path | None

    __repr__ = concise_repr

    def to_json(self) -> dict[str, Any]:
        """The content of ``describe --json`` that does not change from run to run, in JSON types."""
        compared = None if self.compared is None else str(self.compared)
        return {"output": str(self.folder), "files": dict(self.files), "compared": compared}


def describe(
    hf: str | Path, root: str | Path, *, output: Output = DEFAULT_OUTPUT, effort: Effort = DEFAULT_EFFORT
) -> Described:
    """Leave the description of a Hugging Face model in a checkpoint root, for every iteration saved into that root.

    The folder ``hf`` of the root then has config.json, tokenizer, chat templates, generation config, the layout of the
    original files, and the vision tower and projector that training drops from a multimodal model. ``to_hf`` and all
    other functions find it there. It appears as a whole or not at all; nothing else in the root is touched.

    Args:
        hf: Hugging Face directory or hub id of the model. Weights are needed only for the layout of the original files
            and for the vision tower; those of a hub id are downloaded only for the latter.
        root: An existing checkpoint root, or an empty directory that training will save into.
        output: How to write the folder.
        effort: Threads and memory to use.

    Returns:
        The files that were written, or with ``output.dry_run`` would be, without checksums.

    Raises:
        ConfigError: The model contradicts a description of the latest iteration; the error names every difference.
        TensorMismatchError: The latest iteration holds other tensors than the model.
        FormatError: ``hf`` is no model, ``root`` is no checkpoint root, or one of them is damaged.
        OutputError: The folder exists, or cannot be written.

    Example:
        >>> dist_ckpt_mistral.describe("mistralai/Mistral-7B-v0.3", "ckpt").folder  # doctest: +SKIP
        PosixPath('ckpt/hf')
    """
    require_types(describe, **locals())
    root = as_path(root)
    folder = root / ASSETS_FOLDER
    latest = _latest_iteration(root)
    if folder.is_dir() and paths.leads_outside(folder, root):
        raise OutputError(
            f"{folder} is a link out of {root}, so no command would read what is written there. Remove it."
        )
    paths.require_writable(folder, overwrite=output.overwrite)
    with Sources() as inputs:
        directory, config, source = _opened(hf)
        paths.require_apart(directory, folder)
        inputs.look_at(directory.glob("*"))
        if latest is not None:
            stored = open_stored(latest)
            chosen = ChosenConfig(config=config, source=str(directory))
            known = checkpoint_config(stored, chosen, skip=folder, way_out=_WAY_OUT)
            config = matched(stored, known).agreed.config
    if source is None:
        _LOG.warning("%s has no weights: exports will be divided into files of the usual size", directory)
    copied_files = small_files.small_files(directory)
    inputs.look_at(copied_files.values())
    hf_files = None if source is None else source.hf_files
    texts = description_texts(config, hf_files, copied_files)
    vision = FileSet(files=dict(_vision_file(source)))
    target = vision.tensor_index(folder)
    nothing = TensorIndex(files=(), tensors={})
    plan = plan_gather(nothing, nothing, ()) if source is None else source.plan_into(target)

    heads = [file.head for file in vision.files.values()]

    def complete(staging: Path) -> None:
        small_files.write_small_files(staging, copied_files, texts)

    sizes = {name: file.num_bytes for name, file in vision.files.items()}
    new = NewFiles(
        plan=plan,
        file_bytes=sizes,
        complete=complete,
        around=lambda number: [Around.fixed(0, heads[number])],
        commit=(CONFIG_FILE, RECORD_FILE),
        folder=Path(),
        tensors=tensor_spans(vision),
        recipe=Recipe.of(plan, inputs, {"command": "describe", "configuration": config.to_hf()}),
        copied_files=[*copied_files.values()],
    )
    write_output(folder, new, output=output, effort=effort, ranks=ALONE)
    files = {name: path.stat().st_size for name, path in copied_files.items() if name not in texts}
    files |= sizes | {name: len(text) for name, text in texts.items() if text is not None}
    return Described(folder=folder, files=dict(sorted(files.items())), compared=latest)


def description_texts(
    config: MistralConfig, hf_files: FileSet | None, copied_files: Mapping[str, Path]
) -> dict[str, bytes | None]:
    """The content of the files in a root's folder ``hf`` that are not copied as they are; None for a file left out."""
    record = to_record(config, tensor_table(config), hf_files)
    texts: dict[str, bytes | None] = {RECORD_FILE: (json.dumps(record, indent=1) + "\n").encode()}
    return asset_texts(config, hf_files, copied_files) | texts


def asset_texts(
    config: MistralConfig, hf_files: FileSet | None, copied_files: Mapping[str, Path]
) -> dict[str, bytes | None]:
    """The content of the ``copied_files`` that a checkpoint has otherwise; None for a file left out."""
    texts: dict[str, bytes | None] = {}
    if CONFIG_FILE in copied_files:
        texts[CONFIG_FILE] = hf_directory.config_json(config.to_hf(), copied_files[CONFIG_FILE])
    if hf_files is None:  # there is no record of the original files, so their index is useless
        texts[INDEX_FILE] = None
    return texts


def _latest_iteration(root: Path) -> Path | None:
    """The directory of the latest iteration in ``root``; None in the root of a training that has saved nothing yet.

    Raises FormatError if ``root`` is not a checkpoint root.
    """
    place = what_is(root)
    if place.kind is Kind.OTHER and root.is_dir() and _is_new(root):
        _LOG.warning("%s holds no checkpoint yet: there is nothing to compare the model with", root)
        return None
    place = locate(root, Kind.CHECKPOINT)
    if place.path == root:
        around = checkpoint_directory.root_of(root)
        advice = f"Give the root around it, {around}." if around else "A description belongs into the root around it."
        raise FormatError(f"{root} is not a checkpoint root: it is one iteration. {advice}")
    return place.path


def _is_new(root: Path) -> bool:
    names = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    return names <= _OF_NEW_ROOTS


def _opened(hf: str | Path) -> tuple[Path, MistralConfig, ModelSource | None]:
    """The directory and configuration of a model, and the model itself if its weights are there."""
    place = locate(hf, Kind.HF, Kind.CONSOLIDATED, Kind.WEIGHTLESS)
    if place.kind is not Kind.WEIGHTLESS:
        source = open_hf(place.path)
        return place.path, source.config, source
    config = directory_config(place.path).config
    if config.vision is not None:
        raise FormatError(
            f"{place.path} has no weights, and its vision tower must come along: Megatron trains the language model "
            "alone. Get the weights, too."
        )
    return place.path, config, None


def _vision_file(source: ModelSource | None) -> Iterator[tuple[str, SafetensorsFile]]:
    """Yield the name and header of the file that holds the vision tower and projector of ``source``, if it has any."""
    hf_tensors = {} if source is None else source.table.hf_tensors()
    carried = [tensor for tensor in hf_tensors.values() if tensor.rule.stage is Stage.CARRIED]
    if source is not None and carried:
        yield VISION_FILE, new_file((each.hf_name, source.dtype_of(each), each.shape) for each in carried)
