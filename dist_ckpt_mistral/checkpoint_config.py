"""Which configuration a stored model goes by, and whether everything that describes the model agrees with it.

A model may be described several times: by the configuration that the caller gives, by config.json or params.json, by
the record that an import left, by Megatron-LM's ``args``, by Megatron-Bridge's ``run_config.yaml``. The first of them
counts. All others are compared with it, value by value: nothing is taken in silence.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from dist_ckpt_mistral import embedded, paths, strict_yaml
from dist_ckpt_mistral.errors import ConfigError, FormatError, TensorMismatchError, UnsupportedModelError
from dist_ckpt_mistral.formats import hf_directory
from dist_ckpt_mistral.formats.stored_checkpoint import StoredCheckpoint
from dist_ckpt_mistral.mapping import CheckpointMap
from dist_ckpt_mistral.matching import match_checkpoint
from dist_ckpt_mistral.model.agreement import Disagreement, disagreements, listed_disagreements
from dist_ckpt_mistral.model.bridge_config import args_of_run_config, model_fields
from dist_ckpt_mistral.model.config import ChosenConfig, MistralConfig, config_file
from dist_ckpt_mistral.model.megatron_args import args_disagreements, from_megatron_args
from dist_ckpt_mistral.model.megatron_vocabulary import is_padding
from dist_ckpt_mistral.model.params_json import PARAMS_FILE
from dist_ckpt_mistral.model.tensor_rules import ParamState
from dist_ckpt_mistral.model.tensor_table import TensorTable, config_as_stored, tensor_table

_LOG = logging.getLogger(__name__)

#: Megatron-Bridge's configuration of a run, beside the shards (training/utils/checkpoint_utils.py, 0.1 to 0.7).
RUN_CONFIG_FILE: Final = "run_config.yaml"


class Description(Protocol):
    """One thing that says what a stored model is."""

    @property
    def source(self) -> str:
        """What it is and where it is from, in words."""

    def config(self) -> MistralConfig:
        """The configuration as this description alone gives it. Raises ConfigError if it does not give all of it."""

    def disagreements(self, config: MistralConfig) -> list[Disagreement]:
        """Every value that it gives differently than ``config`` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfDescription:
    """A configuration in Hugging Face's terms. ``read`` gives it, and raises ConfigError if it is none.

    ``names`` are those of all stored tensors, which decide what it leaves open; None where no tensors are stored.
    """

    source: str
    read: Callable[[], MistralConfig]
    names: Collection[str] | None

    def config(self) -> MistralConfig:
        """The configuration beside the stored tensors."""
        return self.read() if self.names is None else config_as_stored(self.read(), self.names)

    def disagreements(self, config: MistralConfig) -> list[Disagreement]:
        """Every value that differs."""
        return disagreements(config, self.config())


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgsDescription:
    """Megatron-LM's args, or Megatron-Bridge's configuration in their terms; ``where`` names them in errors.

    ``read`` gives them. It raises FormatError or ConfigError for a file that does not hold them.
    """

    source: str
    where: str
    read: Callable[[], Mapping[str, Any]]

    def config(self) -> MistralConfig:
        """The configuration that the args give, with Megatron-LM's defaults for what they leave out."""
        return from_megatron_args(self.read(), self.where)

    def disagreements(self, config: MistralConfig) -> list[Disagreement]:
        """Every value that the args give differently; what they leave open agrees."""
        return args_disagreements(config, self.read(), self.where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The configuration that a stored model goes by, the description that gave it, and whether it overrides others."""

    config: MistralConfig
    description: Description
    overrides: bool = False

    @property
    def source(self) -> str:
        """Where the configuration is from, in words."""
        return self.description.source

    def disagreements(self, other: Agreed) -> list[Disagreement]:
        """Every value that two models' configurations give differently, as far as both descriptions can tell."""
        if isinstance(self.description, ArgsDescription):
            found = self.description.disagreements(other.config)
            return [Disagreement(name=d.name, first=d.second, second=d.first, of_weights=d.of_weights) for d in found]
        return other.description.disagreements(self.config)


def agreed(where: str, descriptions: Sequence[Description], *, override: bool) -> Agreed:
    """The configuration that the first of ``descriptions`` gives, once all others are compared with it.

    Raises ConfigError where another one says otherwise about how the stored weights are read, unless ``override``. What
    else differs, and what cannot be compared, is logged as a warning.
    """
    first, *others = descriptions
    config = first.config()
    for other in others:
        try:
            found = other.disagreements(config)
        except UnsupportedModelError as error:
            if not override:
                raise ConfigError(
                    f"{first.source} and {other.source} describe different models: {error}. {_WAY_OUT}"
                ) from error
            _LOG.warning("%s is not what %s describes: %s", where, other.source, error)
            continue
        except (ConfigError, FormatError) as error:
            _LOG.warning("%s is not compared with %s: %s", other.source, first.source, error)
            continue
        severe = [each for each in found if each.of_weights]
        if severe and not override:
            raise ConfigError(
                f"{first.source} and {other.source} disagree about how the weights in {where} are read: "
                f"{listed_disagreements(severe)}. {_WAY_OUT}"
            )
        if found:
            listing = listed_disagreements(found)
            _LOG.warning("%s counts, though %s differs: %s", first.source, other.source, listing)
    return Agreed(config=config, description=first, overrides=override)


_WAY_OUT: Final = (
    "Correct the one that is wrong, or give the right config.json with --config and --override-config, "
    "which takes it whatever else is said."
)


def _given(chosen: ChosenConfig | None, names: Collection[str] | None) -> list[Description]:
    return [] if chosen is None else [HfDescription(source=chosen.source, read=lambda: chosen.config, names=names)]


def directory_config(
    directory: Path, chosen: ChosenConfig | None = None, *, names: Collection[str] | None = None
) -> Agreed:
    """The configuration of a Hugging Face directory, or of one of Mistral AI's own files: ``chosen``, else its own.

    ``names`` are those of all tensors in its files, which decide what a configuration leaves open; None is not to look.

    Raises ConfigError where there is none, or where two contradict each other, UnsupportedModelError for another model.
    """
    own = dict.fromkeys([config_file(directory), *_params_files(directory)])
    files = [path for path in own if path.is_file()] if chosen else [*own]
    described = [_hf_file(path, names) for path in files]
    return agreed(str(directory), [*_given(chosen, names), *described], override=chosen is not None and chosen.overrides)


def _hf_file(path: Path, names: Collection[str] | None) -> Description:
    return HfDescription(source=str(path), read=lambda: MistralConfig.from_hf(path), names=names)


def _params_files(directory: Path) -> list[Path]:
    """The params.json that describes Mistral AI's own files beside it; beside Hugging Face's it describes others."""
    path = directory / PARAMS_FILE
    return [path] if hf_directory.is_own_directory(directory) and path.is_file() else []


def read_embedded(checkpoint: StoredCheckpoint) -> embedded.Embedded | None:
    """What an import left in the checkpoint, if training has not dropped it since."""
    return embedded.from_common_state(checkpoint.common_state, str(checkpoint.directory))


def checkpoint_config(checkpoint: StoredCheckpoint, chosen: ChosenConfig | None = None) -> Agreed:
    """The configuration of a Megatron checkpoint: ``chosen``, else the first of those that describe it.

    Raises ConfigError where there is none, or where two contradict each other, UnsupportedModelError for another model.
    """
    described = [*_given(chosen, checkpoint.tensors), *_descriptions(checkpoint)]
    if not described:
        raise ConfigError(
            f"{checkpoint.directory} holds neither a Hugging Face configuration nor Megatron's args nor "
            f"{RUN_CONFIG_FILE}. Give the model's config.json with --config."
        )
    return agreed(str(checkpoint.directory), described, override=chosen is not None and chosen.overrides)


def _descriptions(checkpoint: StoredCheckpoint) -> Iterator[Description]:
    """Everything in a checkpoint that says what the model is, the most telling first."""
    remembered = read_embedded(checkpoint)
    if remembered is not None:
        source = "the Hugging Face configuration inside the checkpoint"
        yield HfDescription(source=source, read=lambda: remembered.config, names=checkpoint.tensors)
    hf_file = checkpoint.directory / embedded.ASSETS_FOLDER / hf_directory.CONFIG_FILE
    if hf_file.is_file() and not paths.leads_outside(hf_file, checkpoint.directory):
        yield _hf_file(hf_file, checkpoint.tensors)
    args = checkpoint.common_state.get("args")
    if isinstance(args, Mapping):
        yield ArgsDescription(source="the args inside the checkpoint", where="the checkpoint's args", read=lambda: args)
    path = checkpoint.directory / RUN_CONFIG_FILE
    if path.is_file():
        yield ArgsDescription(
            source=f"{RUN_CONFIG_FILE} inside the checkpoint",
            where=model_fields(str(path)),
            read=lambda: args_of_run_config(strict_yaml.read_object(path), str(path)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """A Megatron checkpoint matched against the tensor table of the configuration that it goes by.

    ``table`` is that of the whole model; ``found`` has that of the part which the checkpoint holds.
    """

    agreed: Agreed
    table: TensorTable
    found: CheckpointMap


def matched(checkpoint: StoredCheckpoint, known: Agreed, state: ParamState = ParamState.WEIGHTS) -> Matched:
    """Match what a checkpoint stores against the model that its ``checkpoint_config`` describes.

    Raises TensorMismatchError where other tensors are stored, or more rows of the vocabulary than padding explains.
    """
    table = tensor_table(known.config)
    shapes = {name: tensor.global_shape for name, tensor in checkpoint.tensors.items()}
    found = match_checkpoint(table, shapes, checkpoint.objects, str(checkpoint.directory), state)
    if not known.overrides:
        _require_padding(checkpoint, known, found)
    return Matched(agreed=known, table=table, found=found)


def _require_padding(checkpoint: StoredCheckpoint, known: Agreed, found: CheckpointMap) -> None:
    """Raise TensorMismatchError where rows beyond the vocabulary are no padding: they may have been trained."""
    args: Mapping[str, Any] = {}
    with contextlib.suppress(ConfigError, FormatError):  # one that cannot be read was named when all were compared
        args = next((each.read() for each in _descriptions(checkpoint) if isinstance(each, ArgsDescription)), args)
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
