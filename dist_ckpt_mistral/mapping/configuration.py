"""The configuration of a stored model, and whether everything that describes the model agrees with it.

A model may be described several times. A checkpoint is described by the caller's configuration; the record that is
stored in it; config.json and the record in its folder ``hf``, in that of the root, which describes all iterations, and
in that of a release beside it; Megatron-Bridge's ``run_config.yaml``; the config.json beside the tokenizer that
Megatron-LM's ``args`` name; and these ``args``. The first of these is used. All others are compared with it, value by
value. Differences are errors or warnings, never ignored.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from dist_ckpt_mistral.errors import ConfigError, FormatError, SourceError, TensorMismatchError
from dist_ckpt_mistral.formats import small_files
from dist_ckpt_mistral.formats.kinds import CONFIG_FILE, PARAMS_FILE, Kind
from dist_ckpt_mistral.formats.places import what_is
from dist_ckpt_mistral.formats.small_files import NamedTokenizer
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.mapping.adapters import holds_adapter, holds_base, match_adapter
from dist_ckpt_mistral.mapping.checkpoint_map import CheckpointMap
from dist_ckpt_mistral.mapping.hf_record import HfRecord, embedded_records, record_in_folder
from dist_ckpt_mistral.mapping.matching import match_checkpoint
from dist_ckpt_mistral.model.args.bridge import args_of_run_config, from_run_config, hf_config_of, model_fields
from dist_ckpt_mistral.model.args.megatron_args import args_disagreements, from_megatron_args, is_padding
from dist_ckpt_mistral.model.config.agreement import Disagreement, disagreements, listed_disagreements
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, MistralConfig, config_file
from dist_ckpt_mistral.model.table.rules import ParamState
from dist_ckpt_mistral.model.table.table import TensorTable, config_as_stored, tensor_table
from dist_ckpt_mistral.storage import documents, paths

if TYPE_CHECKING:
    from dist_ckpt_mistral.mapping.rank_files import RankFiles

_LOG = logging.getLogger(__name__)

#: Megatron-Bridge's configuration of a run, beside the shards (training/utils/checkpoint_utils.py, 0.1 to 0.7).
RUN_CONFIG_FILE: Final = "run_config.yaml"


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


_WAY_OUT: Final = (
    "Correct the one that is wrong, or give the right config.json with --config and --override-config, "
    "which takes it whatever else is said."
)


def agreed(
    where: str,
    chosen: ChosenConfig | None,
    described: Iterable[Description],
    names: Collection[str] | None,
    *,
    way_out: str = _WAY_OUT,
) -> Agreed:
    """The ``chosen`` configuration, or the first of ``described``; all others are compared with it.

    Args:
        where: The model's place, for messages.
        chosen: The caller's configuration.
        described: The descriptions of the model, the most complete first.
        names: Names of the stored tensors, which decide what config.json leaves open; None if unknown.
        way_out: What to do about a contradiction, as a sentence.

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
    contradictions: list[str] = []
    besides: list[str] = []
    reported: list[Disagreement] = []
    for other in others:
        try:
            found = other.disagreements(config, names)
        except ConfigError as error:
            reason = str(error).rstrip(".")
            contradictions.append(f"{first.source} and {other.source} do not describe the same model: {reason}")
            continue
        except SourceError as error:
            _LOG.warning("%s is not compared with %s: %s", other.source, first.source, error)
            continue
        if severe := [] if override else [each for each in found if each.of_weights]:
            contradictions.append(
                f"{first.source} and {other.source} disagree about how the weights in {where} are read: "
                f"{listed_disagreements(severe)}"
            )
        if new := [each for each in found if each not in reported and each not in severe]:
            besides.append(f"{first.source} is used; {other.source} says otherwise: {listed_disagreements(new)}")
        reported += new
    if contradictions and not override:
        raise ConfigError(f"{'; '.join([*contradictions, *besides])}. {way_out}")
    for difference in (*contradictions, *besides):
        _LOG.warning("%s", difference)
    return Agreed(config=config, description=first, overrides=override)


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


def named_tokenizer(checkpoint: StoredCheckpoint) -> NamedTokenizer | None:
    """The directory with a tokenizer that ``tokenizer_model`` in the checkpoint's args names, if it exists here.

    It may be that of another model, or of none. Its config.json describes this model only if it agrees with the args;
    otherwise a warning names the differences. A relative path is not followed: the args do not say what it starts from.
    """
    args = checkpoint.common_state.get("args")
    name = args.get("tokenizer_model") if isinstance(args, Mapping) else None
    if not isinstance(args, Mapping) or not isinstance(name, str):
        return None
    directory = Path(name)
    is_here = directory.is_absolute() and paths.is_directory(directory)
    if not is_here or not small_files.has_tokenizer(directory):
        return None
    path = directory / CONFIG_FILE
    if not path.is_file():
        return NamedTokenizer(directory=directory, is_of_model=False)
    try:
        why = listed_disagreements(args_disagreements(MistralConfig.from_hf(path), args, "the checkpoint's args"))
    except (ConfigError, SourceError) as error:
        why = str(error)
    if why:
        _LOG.warning("%s is not used, because the checkpoint's args describe another model: %s", path, why)
    return NamedTokenizer(directory=directory, is_of_model=not why)


def checkpoint_config(
    checkpoint: StoredCheckpoint,
    chosen: ChosenConfig | None = None,
    *,
    skip: Path | None = None,
    way_out: str = _WAY_OUT,
) -> Agreed:
    """The configuration of a Megatron checkpoint: ``chosen``, or else its first description.

    The descriptions in the folder ``skip`` do not count. ``way_out`` is for errors, as in ``agreed``.

    Raises ConfigError if there is no configuration or two contradict each other, UnsupportedModelError for another
    model family.
    """
    described = [*_descriptions(checkpoint, skip)]
    if chosen is None and not described:
        raise ConfigError(
            f"{checkpoint.directory} holds neither a Hugging Face configuration nor Megatron's args nor "
            f"{RUN_CONFIG_FILE}. Give the model's config.json with --config, or leave it in the checkpoint root for "
            "all iterations with describe."
        )
    return agreed(str(checkpoint.directory), chosen, described, _table_names(checkpoint), way_out=way_out)


def _table_names(checkpoint: StoredCheckpoint) -> Collection[str] | None:
    """The names that tell whether embeddings are tied; None where they do not.

    An adapter alone does not show it. Of parameters of modules only the args do: the last stage of a tied model has a
    head all the same.
    """
    return None if checkpoint.is_of_modules or not holds_base(checkpoint.tensors) else checkpoint.tensors


def _descriptions(checkpoint: StoredCheckpoint, skip: Path | None = None) -> Iterator[Description]:
    """All descriptions of the model in a checkpoint, the most complete first; not those in the folder ``skip``."""
    for record in embedded_records(checkpoint):
        yield _recorded(record)
    for folder in small_files.hf_folders(checkpoint.directory):
        if folder != skip:
            yield from _described_in(folder)
    yield from _run_config(checkpoint)
    named = named_tokenizer(checkpoint)
    if named is not None and named.is_of_model:
        yield _hf_file(named.directory / CONFIG_FILE)
    yield from _args(checkpoint)


def _run_config(checkpoint: StoredCheckpoint) -> Iterator[Description]:
    """Yield the descriptions in Megatron-Bridge's configuration of the run, if the checkpoint has one.

    That of a multimodal model holds its Hugging Face configuration besides.
    """
    path = checkpoint.directory / RUN_CONFIG_FILE
    if path.is_file():
        source = f"{RUN_CONFIG_FILE} inside the checkpoint"
        raw = None
        with contextlib.suppress(FormatError):  # the next description raises it
            raw = hf_config_of(documents.read_yaml(path), str(path))
        if raw is not None:
            where = f"hf_config in {source}"
            yield HfDescription(source=where, config=partial(MistralConfig.from_hf, raw, where=where))
        yield ArgsDescription(
            source=source,
            where=model_fields(str(path)),
            config=lambda: from_run_config(documents.read_yaml(path), str(path)),
            read=lambda: args_of_run_config(documents.read_yaml(path), str(path)),
        )


def _args(checkpoint: StoredCheckpoint) -> Iterator[ArgsDescription]:
    """Yield the description in Megatron-LM's args, if the checkpoint has them."""
    args = checkpoint.common_state.get("args")
    if isinstance(args, Mapping):
        yield ArgsDescription(
            source="the args inside the checkpoint",
            where="the checkpoint's args",
            config=lambda: from_megatron_args(args),
            read=lambda: args,
        )


def _recorded(record: HfRecord) -> Description:
    return HfDescription(source=record.source, config=lambda: record.config)


def _described_in(folder: Path) -> Iterator[Description]:
    """Yield the descriptions in a folder of Hugging Face files: config.json, and the record of the import."""
    hf_file = folder / CONFIG_FILE
    if hf_file.is_file() and not paths.leads_outside(hf_file, folder):
        yield _hf_file(hf_file)
    record = record_in_folder(folder)
    if record is not None:
        yield _recorded(record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A Megatron checkpoint matched with the tensor table of its configuration.

    ``table`` describes the whole model, ``found.table`` the part of it that the checkpoint holds, and the adapter.
    ``stored`` is the checkpoint with the tensors that ``found`` names. Where parameters of modules were stored,
    ``ranks`` tells how they make these up.
    """

    agreed: Agreed
    table: TensorTable
    found: CheckpointMap
    stored: StoredCheckpoint
    ranks: RankFiles | None = None


def matched(checkpoint: StoredCheckpoint, known: Agreed, state: ParamState = ParamState.WEIGHTS) -> Matched:
    """Match the stored tensors of a checkpoint with the tensor table of the configuration ``known``.

    ``state`` selects the weights or a state of the optimizer. Raises TensorMismatchError if tensors are missing,
    unknown or of another shape, or if the vocabulary has more rows than padding explains.
    """
    table = tensor_table(known.config)
    ranks = None
    if checkpoint.is_of_modules:
        from dist_ckpt_mistral.mapping.rank_files import joined_ranks  # noqa: PLC0415  (most checkpoints are not)

        ranks = joined_ranks(checkpoint, known.config, table)
    stored = checkpoint if ranks is None else ranks.stored
    if holds_adapter(stored.tensors):
        found = match_adapter(table, stored, state)
        has_base = state is ParamState.WEIGHTS and holds_base(stored.tensors)
        table = (table.with_adapters if has_base else table.of_adapters)(found.table.adapters)
    else:
        shapes = {name: tensor.global_shape for name, tensor in stored.tensors.items()}
        found = match_checkpoint(table, shapes, stored.objects, str(stored.directory), state)
    if not known.overrides:
        _require_padding(stored, known, found)
    return Matched(agreed=known, table=table, found=found, stored=stored, ranks=ranks)


def _require_padding(checkpoint: StoredCheckpoint, known: Agreed, found: CheckpointMap) -> None:
    """Raise TensorMismatchError if rows beyond the vocabulary are not padding: they may be trained tokens."""
    args: Mapping[str, Any] = {}
    with contextlib.suppress(ConfigError, SourceError):  # agreed() has already reported args that cannot be read
        described = chain(_args(checkpoint), _run_config(checkpoint))
        args = next((each.read() for each in described if isinstance(each, ArgsDescription)), args)
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
