"""Everything that Megatron-LM's ``pretrain_gpt.py`` must be told to train on from a checkpoint or a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats import checkpoint_directory, small_files, stored_checkpoint
from dist_ckpt_mistral.formats.places import Kind, Place, locate
from dist_ckpt_mistral.mapping.configuration import directory_config
from dist_ckpt_mistral.mapping.matching import FLAT_STATE_ADVICE
from dist_ckpt_mistral.mapping.source import ModelSource, open_megatron, open_source
from dist_ckpt_mistral.messages import command_line
from dist_ckpt_mistral.model.args.flags import pretrain_flags
from dist_ckpt_mistral.model.config.mistral_config import ChosenConfig, GivenConfig, chosen_config
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.model.table.entries import flat_state, is_optimizer_state

_LOG = logging.getLogger(__name__)

#: Version of the JSON that ``megatron-args --json`` prints; fields are only ever added under one version.
JSON_VERSION: Final = 1
_ONE_RANK: Final = ParallelLayout()


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainCommand:
    """Flags for ``pretrain_gpt.py``, in groups of one subject, and the args of the model that they set, by name."""

    config_from: str
    args: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]

    @property
    def flags(self) -> list[str]:
        """All flags and values, as a program gets them."""
        return [word for group in self.groups.values() for word in group]

    @property
    def text(self) -> str:
        """What can be pasted into a shell behind ``pretrain_gpt.py``: one group a line."""
        return " \\\n".join(command_line(group) for group in self.groups.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, stable within ``JSON_VERSION``."""
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

    ``path`` is a Megatron checkpoint (its root or one iteration), a directory in Mistral AI's own rendering, a Hugging
    Face directory or a hub id, of which config.json is enough if it says its dtype; weights are looked at for what it
    leaves open. ``config`` comes before the configurations that a checkpoint brings along; ``layout`` is the one to
    train with. Raises DistCkptMistralError.
    """
    place = locate(path, Kind.HF, Kind.CONSOLIDATED, Kind.WEIGHTLESS, Kind.CHECKPOINT, weights=False)
    known = chosen_config(config)
    if place.kind is not Kind.CHECKPOINT:
        return _for_hf(path, place, known, layout)
    source = open_megatron(place.path, config=known)
    args, groups = pretrain_flags(
        source.config,
        dtype=source.main_dtype,
        layout=layout,
        vocab_rows=_vocabulary_rows(source),
    )
    groups["checkpoint"] = [*_load(Path(path), source), *_left_out(source, layout), "--ckpt-format", "torch_dist"]
    groups["tokenizer"] = _tokenizer(source.assets)
    return _command(source.config_from, args, groups)


def _for_hf(name: str | Path, place: Place, chosen: ChosenConfig | None, layout: ParallelLayout) -> PretrainCommand:
    """For a directory that may hold no weights yet where ``name`` is a hub id."""
    path, known = place.path, directory_config(place.path, chosen)
    config = known.config
    if config.dtype is None or (config.left_open and place.kind is not Kind.WEIGHTLESS):
        source = open_source(name, config=chosen)
        config = replace(source.config, dtype=config.dtype or source.main_dtype)
    elif config.left_open:
        tie = "tied" if config.tie_word_embeddings else "not tied"
        _LOG.warning("%s leaves open %s: taken as not quantized, %s", known.source, config.left_open, tie)
    args, groups = pretrain_flags(config, dtype=str(config.dtype), layout=layout)
    groups["checkpoint"] = ["--ckpt-format", "torch_dist"]
    groups["tokenizer"] = _tokenizer([path])
    return _command(known.source, args, groups)


def _command(config_from: str, args: Mapping[str, Any], groups: Mapping[str, list[str]]) -> PretrainCommand:
    if args.get("position_embedding_type") == "yarn":
        _LOG.info("the flags of YaRN need Megatron-LM 0.19 or newer")
    return PretrainCommand(
        config_from=config_from, args=args, groups={name: group for name, group in groups.items() if group}
    )


def _tokenizer(assets: Sequence[Path]) -> list[str]:
    """The first tokenizer that lies beside the model, if it is one that transformers loads."""
    place = next(filter(small_files.has_tokenizer, assets), None)
    if place is None:
        _LOG.warning("no tokenizer lies beside the model: add --tokenizer-type and what it needs")
        return []
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(place)]


def _load(path: Path, source: ModelSource) -> list[str]:
    """Where to load from; Megatron-LM takes a checkpoint root, and the number of an iteration other than the latest."""
    stored_checkpoint.require_loadable(source.path)
    if path.resolve() != source.path.resolve():
        return ["--load", str(path)]
    root, name = path.resolve().parent, path.resolve().name
    step = checkpoint_directory.iteration_of(name)
    if step is None:
        raise ConfigError(
            f"{path} is not named as Megatron-LM's --load needs it: expected iter_0000000 or release in a root, "
            f"got {name!r}. Move it into one, with a {checkpoint_directory.TRACKER_FILE} beside it."
        )
    return ["--load", str(root), *(["--ckpt-step", step] if step.isdecimal() else [])]


def _left_out(source: ModelSource, layout: ParallelLayout) -> list[str]:
    """What training must do without: all but the weights where there is nothing else, or what cannot be laid out anew.

    Megatron-LM refuses flat optimizer state at another (TP, PP) than the args in the checkpoint say, which are 1 where
    they don't; by itself it ignores the state of random number generators then (``load_checkpoint`` in
    megatron/training/checkpointing.py, 0.19).
    """
    if not any(is_optimizer_state(name) for name, _ in source.ignored):
        return ["--finetune", "--no-load-optim", "--no-load-rng"]
    flat = sorted({kind for name, _ in source.ignored if (kind := flat_state(name))})
    if not flat:
        return []
    args = stored_checkpoint.open_stored(source.path).common_state.get("args")
    told = args if isinstance(args, Mapping) else {}
    saved = tuple(told.get(f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline"))
    if saved == (layout.tp, layout.pp):
        return []
    _LOG.warning(
        "--no-load-optim, because Megatron-LM takes the checkpoint for one of tp=%s, pp=%s, not tp=%s, pp=%s: %s",
        *(*saved, layout.tp, layout.pp, FLAT_STATE_ADVICE.format(name=flat[0])),
    )
    return ["--no-load-optim"]


def _vocabulary_rows(source: ModelSource) -> int:
    """The rows of the stored vocabulary, those that pad it too."""
    vocabulary = next(tensor for tensor in source.tensors if tensor.rule.padded_vocabulary)
    return source.index.tensors[source.links[vocabulary.hf_name][0].source].global_shape[0]
