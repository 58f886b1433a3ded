"""The configuration of a stored model, and whether everything that describes the model agrees with it.

A model may be described several times: by the caller's configuration, config.json or params.json, the record of an
import, Megatron-LM's ``args``, and Megatron-Bridge's ``run_config.yaml``. The first of these is used. All others are
compared with it, value by value. Differences are errors or warnings, never ignored.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from dist_ckpt_mistral.errors import ConfigError, FormatError, TensorMismatchError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.hf_directory import FileSet
from dist_ckpt_mistral.formats.places import CONFIG_FILE, PARAMS_FILE, Kind, what_is
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.matching import match_checkpoint
from dist_ckpt_mistral.model.args.bridge import args_of_run_config, from_run_config, model_fields
from dist_ckpt_mistral.model.args.megatron_args import args_disagreements, from_megatron_args, is_padding
from dist_ckpt_mistral.model.config.agreement import Disagreement, disagreements, listed_disagreements
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, MistralConfig, config_file
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.model.table.table import TensorTable, config_as_stored, tensor_table
from dist_ckpt_mistral.storage import documents, paths

#: The key in ``content_metadata``.
KEY: Final = "dist_ckpt_mistral"
#: Increased when older versions of this package could misread the record.
_VERSION: Final = 1
_LOG = logging.getLogger(__name__)

#: Megatron-Bridge's configuration of a run, beside the shards (training/utils/checkpoint_utils.py, 0.1 to 0.7).
RUN_CONFIG_FILE: Final = "run_config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class HfRecord:
    """What ``from_hf`` records in a checkpoint: the configuration, and the headers of the original files or None."""

    config: MistralConfig
    hf_files: FileSet | None


def to_record(config: MistralConfig, table: TensorTable, files: FileSet | None) -> dict[str, Any]:
    """The record to store under ``KEY``. ``tensor_map`` is for readers without this package."""
    tensor_map = [
        {
            "hf_name": part.hf_name,
            "mcore_key": rule.mcore_key,
            "row_blocks": [part.rows.count, part.rows.stride, part.rows.offset, part.rows.length],
        }
        for rule in table.rules
        for part in rule.parts
    ]
    return {
        "version": _VERSION,
        "hf_config": config.to_hf(),
        "tensor_map": tensor_map,
        "hf_files": None if files is None else files.to_record(),
    }


def from_common_state(common_state: Mapping[str, Any], where: str) -> HfRecord | None:
    """The record in a checkpoint's common state, or None if there is none. Raises FormatError if it is damaged."""
    content = common_state.get("content_metadata")
    record = content.get(KEY) if isinstance(content, Mapping) else None
    if record is None:
        return None
    where = f"content_metadata[{KEY!r}] of {where}"
    if not isinstance(record, Mapping) or record.get("version") != _VERSION:
        found = record.get("version") if isinstance(record, Mapping) else record
        raise FormatError(f"{where} has version {found!r}: this release reads version {_VERSION}. Update it.")
    if not isinstance(record.get("hf_config"), Mapping):
        raise FormatError(f"{where} has no hf_config")
    files = record.get("hf_files")
    return HfRecord(
        config=MistralConfig.from_hf(record["hf_config"], where=f"hf_config in {where}"),
        hf_files=None if files is None else FileSet.from_record(files, where),
    )


class Description(Protocol):
    """One description of a stored model."""

    @property
    def source(self) -> str:
        """The kind and place of the description, in words."""

    def config(self) -> MistralConfig:
        """The configuration of this description alone. Raises ConfigError if it is incomplete."""

    def disagreements(self, config: MistralConfig, names: Collection[str] | None) -> list[Disagreement]:
        """Every value that differs from ``config``. The stored ``names`` decide what the description leaves open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfDescription:
    """A configuration in Hugging Face's terms. ``config`` reads it and raises ConfigError if it is invalid."""

    source: str
    config: Callable[[], MistralConfig]

    def disagreements(self, config: MistralConfig, names: Collection[str] | None) -> list[Disagreement]:
        """Every value that differs from ``config``."""
        described = self.config()
        return disagreements(config, described if names is None else config_as_stored(described, names))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgsDescription:
    """Megatron-LM's args, or Megatron-Bridge's configuration as such args; ``where`` names them in errors.

    ``read`` returns the args, ``config`` the configuration that they describe, with Megatron-LM's defaults for missing
    fields. Both raise FormatError or ConfigError if the file is invalid.
    """

    source: str
    where: str
    config: Callable[[], MistralConfig]
    read: Callable[[], Mapping[str, Any]]

    def disagreements(self, config: MistralConfig, names: Collection[str] | None = None) -> list[Disagreement]:  # noqa: ARG002
        """Every value of the args that differs from ``config``. A missing field agrees."""
        return args_disagreements(config, self.read(), self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The configuration of a stored model, its description, and whether it overrides the other descriptions."""

    config: MistralConfig
    description: Description
    overrides: bool = False

    @property
    def source(self) -> str:
        """The place of the configuration, in words."""
        return self.description.source

    def __reduce__(self) -> tuple[object, ...]:
        """A pickled copy has the configuration, but not the files that it was read from."""
        return _copied, (self.config, self.source, self.overrides)

    def disagreements(self, other: Agreed) -> list[Disagreement]:
        """Every value that differs between two models' configurations, of those that both descriptions give."""
        if isinstance(self.description, ArgsDescription):
            found = self.description.disagreements(other.config)
            return [Disagreement(name=d.name, first=d.second, second=d.first, of_weights=d.of_weights) for d in found]
        if isinstance(other.description, ArgsDescription):
            return other.description.disagreements(self.config)
        return disagreements(self.config, other.config)


def _copied(config: MistralConfig, source: str, overrides: bool) -> Agreed:
    return Agreed(config=config, description=HfDescription(source=source, config=lambda: config), overrides=overrides)


def agreed(
    where: str, chosen: ChosenConfig | None, described: Iterable[Description], names: Collection[str] | None
) -> Agreed:
    """The ``chosen`` configuration, or the first of ``described``; all others are compared with it.

    Args:
        where: The model's place, for messages.
        chosen: The caller's configuration.
        described: The descriptions of the model, the most complete first.
        names: Names of the stored tensors, which decide what config.json leaves open; None if unknown.

    Raises:
        ConfigError: Another description differs in a value that decides how the stored weights are read, and
            ``chosen`` does not override it. Other differences are logged as warnings.
    """
    before: list[Description] = []
    if chosen is not None:
        before.append(HfDescription(source=chosen.source, config=lambda: chosen.config))
    override = chosen is not None and chosen.overrides
    first, *others = [*before, *described]
    described_config = first.config()
    config = described_config if names is None else config_as_stored(described_config, names)
    if config is not described_config:
        _LOG.info(
            "tie_word_embeddings of %s leaves open whether embeddings are tied. The stored tensors have %s head of "
            "their own: it is read and written as %s",
            *(first.source, *(("no", "true") if config.tie_word_embeddings else ("a", "false"))),
        )
    reported: list[Disagreement] = []
    for other in others:
        try:
            found = other.disagreements(config, names)
        except ConfigError as error:
            if not override:
                reason = str(error).rstrip(".")
                raise ConfigError(
                    f"{first.source} and {other.source} do not describe the same model: {reason}. {_WAY_OUT}"
                ) from error
            _LOG.warning("%s is not what %s describes: %s", where, other.source, error)
            continue
        except FormatError as error:
            _LOG.warning("%s is not compared with %s: %s", other.source, first.source, error)
            continue
        severe = [each for each in found if each.of_weights]
        if severe and not override:
            raise ConfigError(
                f"{first.source} and {other.source} disagree about how the weights in {where} are read: "
                f"{listed_disagreements(severe)}. {_WAY_OUT}"
            )
        new = [each for each in found if each not in reported]
        if new:
            _LOG.warning("%s is used; %s says otherwise: %s", first.source, other.source, listed_disagreements(new))
        reported += new
    return Agreed(config=config, description=first, overrides=override)


_WAY_OUT: Final = (
    "Correct the one that is wrong, or give the right config.json with --config and --override-config, "
    "which takes it whatever else is said."
)


def directory_config(
    directory: Path, chosen: ChosenConfig | None = None, names: Collection[str] | None = None
) -> Agreed:
    """The configuration of a Hugging Face or consolidated directory: ``chosen``, or else the directory's own.

    ``names`` are the names of its tensors, None if unknown. Raises ConfigError if there is no configuration or two
    contradict each other, UnsupportedModelError for another model family.
    """
    candidates = dict.fromkeys([config_file(directory), *_params_files(directory)])
    files = [path for path in candidates if path.is_file()] if chosen else [*candidates]
    return agreed(str(directory), chosen, map(_hf_file, files), names)


def _hf_file(path: Path) -> Description:
    return HfDescription(source=str(path), config=lambda: MistralConfig.from_hf(path))


def _params_files(directory: Path) -> list[Path]:
    """The params.json of a consolidated directory. Beside Hugging Face files, params.json describes other files."""
    path = directory / PARAMS_FILE
    return [path] if what_is(directory).kind is Kind.CONSOLIDATED and path.is_file() else []


def read_embedded(checkpoint: StoredCheckpoint) -> HfRecord | None:
    """The record that ``from_hf`` left in the checkpoint, or None if a later save has dropped it."""
    return from_common_state(checkpoint.common_state, str(checkpoint.directory))


def checkpoint_config(checkpoint: StoredCheckpoint, chosen: ChosenConfig | None = None) -> Agreed:
    """The configuration of a Megatron checkpoint: ``chosen``, or else its first description.

    Raises ConfigError if there is no configuration or two contradict each other, UnsupportedModelError for another
    model family.
    """
    described = [*_descriptions(checkpoint)]
    if chosen is None and not described:
        raise ConfigError(
            f"{checkpoint.directory} holds neither a Hugging Face configuration nor Megatron's args nor "
            f"{RUN_CONFIG_FILE}. Give the model's config.json with --config."
        )
    return agreed(str(checkpoint.directory), chosen, described, checkpoint.tensors)


def _descriptions(checkpoint: StoredCheckpoint) -> Iterator[Description]:
    """All descriptions of the model in a checkpoint, the most complete first."""
    record = read_embedded(checkpoint)
    if record is not None:
        source = "the Hugging Face configuration inside the checkpoint"
        yield HfDescription(source=source, config=lambda: record.config)
    hf_file = checkpoint.directory / small_files.ASSETS_FOLDER / CONFIG_FILE
    if hf_file.is_file() and not paths.leads_outside(hf_file, checkpoint.directory):
        yield _hf_file(hf_file)
    yield from _args_descriptions(checkpoint)


def _args_descriptions(checkpoint: StoredCheckpoint) -> Iterator[ArgsDescription]:
    """The descriptions of the model in Megatron's terms."""
    args = checkpoint.common_state.get("args")
    if isinstance(args, Mapping):
        yield ArgsDescription(
            source="the args inside the checkpoint",
            where="the checkpoint's args",
            config=lambda: from_megatron_args(args),
            read=lambda: args,
        )
    path = checkpoint.directory / RUN_CONFIG_FILE
    if path.is_file():
        yield ArgsDescription(
            source=f"{RUN_CONFIG_FILE} inside the checkpoint",
            where=model_fields(str(path)),
            config=lambda: from_run_config(documents.read_yaml(path), str(path)),
            read=lambda: args_of_run_config(documents.read_yaml(path), str(path)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A Megatron checkpoint matched with the tensor table of its configuration.

    ``table`` describes the whole model, ``found.table`` the part of it that the checkpoint holds.
    """

    agreed: Agreed
    table: TensorTable
    found: CheckpointMap


def matched(checkpoint: StoredCheckpoint, known: Agreed, state: ParamState = ParamState.WEIGHTS) -> Matched:
    """Match the stored tensors of a checkpoint with the tensor table of the configuration ``known``.

    ``state`` selects the weights or a state of the optimizer. Raises TensorMismatchError if tensors are missing,
    unknown or of another shape, or if the vocabulary has more rows than padding explains.
    """
    table = tensor_table(known.config)
    shapes = {name: tensor.global_shape for name, tensor in checkpoint.tensors.items()}
    found = match_checkpoint(table, shapes, checkpoint.objects, str(checkpoint.directory), state)
    if not known.overrides:
        _require_padding(checkpoint, known, found)
    return Matched(agreed=known, table=table, found=found)


def _require_padding(checkpoint: StoredCheckpoint, known: Agreed, found: CheckpointMap) -> None:
    """Raise TensorMismatchError if rows beyond the vocabulary are not padding: they may be trained tokens."""
    args: Mapping[str, Any] = {}
    with contextlib.suppress(ConfigError, FormatError):  # agreed() has already reported args that cannot be read
        args = next((each.read() for each in _args_descriptions(checkpoint)), args)
    size = known.config.vocab_size
    for name, rule, _ in found.tensors():
        if not rule.padded_vocabulary:
            continue
        rows, chunks = checkpoint.tensors[name].global_shape[0], checkpoint.tensors[name].num_chunks
        if not is_padding(rows, size, args, most_tp=chunks):
            raise TensorMismatchError(
                f"rows of {name} in {checkpoint.directory}: expected vocab_size={size} ({known.source}), or that "
                f"padded to a multiple of 128 x TP (TP up to {chunks}, the number of chunks), got {rows}. "
                f"The other rows may be trained tokens. {_WAY_OUT}"
            )
