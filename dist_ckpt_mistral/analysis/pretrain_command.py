"""The flags with which Megatron-LM's ``pretrain_gpt.py`` trains a model, for ``megatron-args``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.arguments import require_types
from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import checkpoint_directory, small_files, stored_checkpoint
from dist_ckpt_mistral.formats.kinds import Kind, Place
from dist_ckpt_mistral.formats.places import locate
from dist_ckpt_mistral.mapping.configuration import directory_config
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE
from dist_ckpt_mistral.mapping.source import ModelSource, open_megatron, open_source, require_model
from dist_ckpt_mistral.messages import command_line, concise_repr
from dist_ckpt_mistral.model.args.flags import pretrain_flags
from dist_ckpt_mistral.model.args.hybrid import hybrid_pattern
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.entries import flat_state, is_optimizer_state
from dist_ckpt_mistral.storage import hub
from dist_ckpt_mistral.storage.remote_path import RemotePath, as_path

_LOG = logging.getLogger(__name__)

#: Version of the JSON that ``megatron-args --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
_ONE_RANK: Final = ParallelLayout()


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainCommand:
    """Flags for Megatron-LM's ``pretrain_gpt.py``, as ``megatron_args`` returns them.

    Args:
        config_from: Source of the model configuration, in words.
        args: The values of Megatron-LM's args that the flags set, by name.
        groups: Subject of each group of flags, such as ``tokenizer`` -> its flags and values.
    """

    config_from: str
    args: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]

    __repr__ = concise_repr

    @property
    def flags(self) -> list[str]:
        """All flags and values, as arguments of a program."""
        return [word for group in self.groups.values() for word in group]

    @property
    def text(self) -> str:
        """The flags in shell syntax, one line for each group, to paste after ``pretrain_gpt.py``."""
        return " \\\n".join(command_line(group) for group in self.groups.values())

    def to_json(self) -> dict[str, Any]:
        """The content of ``megatron-args --json``, in JSON types."""
        return {
            "json_version": JSON_VERSION,
            "config_from": self.config_from,
            "args": dict(self.args),
            "flags": self.flags,
        }


def megatron_args(
    path: str | Path, *, config: GivenConfig | None = None, layout: ParallelLayout = _ONE_RANK
) -> PretrainCommand:
    """The flags with which ``pretrain_gpt.py`` builds the model at ``path`` and, if it is a checkpoint, loads it.

    Args:
        path: Megatron checkpoint (root, ``iter_*`` or ``release`` directory), Hugging Face directory, directory of
            Mistral AI's consolidated files, or hub id. A config.json without weights is enough if it has a dtype.
            Otherwise the weights determine what config.json leaves open.
        config: Configuration for a checkpoint that has lost its own.
        layout: The layout to train with.

    Returns:
        The flags.

    Raises:
        DistCkptMistralError: The model cannot be read, or Megatron-LM has no flags for it.

    Example:
        >>> dist_ckpt_mistral.megatron_args("ckpt", layout=ParallelLayout(tp=2)).flags[:2]  # doctest: +SKIP
        ['--num-layers', '32']
    """
    require_types(megatron_args, **locals())
    place = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.WEIGHTLESS, Kind.CHECKPOINT)
    chosen = chosen_config(config)
    if place.kind is not Kind.CHECKPOINT:
        return _for_hf(path, place, chosen, layout)
    source = require_model(open_megatron(place.path, config=chosen))
    args, groups = pretrain_flags(
        source.config, dtype=source.main_dtype, layout=layout, vocab_rows=_vocabulary_rows(source)
    )
    pattern = hybrid_pattern(_args_inside(source))
    if pattern is not None:
        _LOG.warning(
            "%s holds a HybridModel, which Megatron-LM loads only with the script that trains those, and "
            "--hybrid-layer-pattern %r in place of --num-layers. For pretrain_gpt.py, export it with to-hf and import "
            "that with from-hf.",
            *(source.path, pattern),
        )
    groups["checkpoint"] = [
        *_load_flags(as_path(path), source),
        *_flags_without_training_state(source, layout),
        *("--ckpt-format", "torch_dist"),
    ]
    groups["tokenizer"] = _tokenizer_flags(source.tokenizer_places)
    return _command(source.config_from, args, groups)


def _for_hf(name: str | Path, place: Place, chosen: ChosenConfig | None, layout: ParallelLayout) -> PretrainCommand:
    """The flags for a directory or hub id. Weights are read only if they are needed."""
    path, agreed = place.path, directory_config(place.path, chosen)
    config = agreed.config
    if config.dtype is None or (config.left_open and place.kind is not Kind.WEIGHTLESS):
        source = open_source(name, config=chosen)
        config = replace(source.config, dtype=config.dtype or source.main_dtype)
    elif config.left_open:
        tie = "tied" if config.tie_word_embeddings else "not tied"
        _LOG.warning("%s leaves open %s: taken as not quantized, %s", agreed.source, config.left_open, tie)
    args, groups = pretrain_flags(config, dtype=str(config.dtype), layout=layout)
    groups["checkpoint"] = ["--ckpt-format", "torch_dist"]
    groups["tokenizer"] = _tokenizer_flags([path])
    return _command(agreed.source, args, groups)


def _command(config_from: str, args: Mapping[str, Any], groups: Mapping[str, list[str]]) -> PretrainCommand:
    if args.get("position_embedding_type") == "yarn":
        _LOG.info("the flags of YaRN need Megatron-LM 0.19 or newer")
    return PretrainCommand(
        config_from=config_from, args=args, groups={name: group for name, group in groups.items() if group}
    )


def _tokenizer_flags(assets: Sequence[Path]) -> list[str]:
    """The flags for the first directory in ``assets`` that has a tokenizer; a warning and no flags without one."""
    directory = next(filter(small_files.has_tokenizer, assets), None)
    if directory is None:
        _LOG.warning("no tokenizer is stored with the model: add --tokenizer-type and the flags that it needs")
        return []
    name = hub.name_for_libraries(directory)
    if isinstance(directory, RemotePath) and name == str(directory):  # no hub id
        _LOG.warning("Megatron opens no tokenizer in a store: copy %s to a disk, and give --tokenizer-model that", name)
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", name]


def _load_flags(path: Path, source: ModelSource) -> list[str]:
    """``--load`` with the checkpoint root, and ``--ckpt-step`` if ``path`` is one iteration in it.

    Of stores, Megatron-LM reads those of NVIDIA's Multi-Storage Client alone, with --enable-msc (core/msc_utils.py,
    0.16 to 0.19).
    """
    stored_checkpoint.require_loadable(source.path)
    if isinstance(path, RemotePath) and not str(path).startswith("msc://"):
        _LOG.warning(
            "Megatron-LM opens directories, and msc:// with --enable-msc: copy %s to a disk, and give --load that", path
        )
    if path.resolve() != source.path.resolve():
        return ["--load", str(path)]
    root, name = path.resolve().parent, path.resolve().name
    step = checkpoint_directory.iteration_of(name)
    if step is None:
        raise ConfigError(
            f"Megatron-LM's --load cannot use the name of {path}: expected iter_0000000 or release in a root, "
            f"got {name!r}. Move it into one, with a {checkpoint_directory.TRACKER_FILE} beside it."
        )
    return ["--load", str(root), *(["--ckpt-step", step] if step.isdecimal() else [])]


def _flags_without_training_state(source: ModelSource, layout: ParallelLayout) -> list[str]:
    """Flags for state that Megatron-LM must not load: because there is none, or because it does not fit ``layout``.

    Megatron-LM refuses flat optimizer state at another (TP, PP) than the args in the checkpoint have (1 if they have
    none). It then ignores the state of random number generators without a flag (``load_checkpoint`` in
    megatron/training/checkpointing.py, 0.19).
    """
    if not any(is_optimizer_state(name) for name, _ in source.ignored):
        return ["--finetune", "--no-load-optim", "--no-load-rng"]
    flat = sorted({kind for name, _ in source.ignored if (kind := flat_state(name))})
    if not flat:
        return []
    args = _args_inside(source)
    saved = tuple(args.get(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    if saved == (layout.tp, layout.pp):
        return []
    _LOG.warning(
        "--no-load-optim, because Megatron-LM takes the checkpoint for one of tp=%s, pp=%s, not tp=%s, pp=%s: %s",
        *(*saved, layout.tp, layout.pp, FLAT_STATE_ADVICE.format(name=flat[0])),
    )
    return ["--no-load-optim"]


def _args_inside(source: ModelSource) -> Mapping[str, Any]:
    """Megatron-LM's args in a checkpoint; empty without any."""
    args = stored_checkpoint.open_stored(source.path).common_state.get("args")
    return args if isinstance(args, Mapping) else {}


def _vocabulary_rows(source: ModelSource) -> int:
    """The number of stored vocabulary rows, with padding."""
    vocabulary = next(tensor for tensor in source.tensors if tensor.rule.padded_vocabulary)
    return source.index.tensors[source.links[vocabulary.hf_name][0].source].global_shape[0]
