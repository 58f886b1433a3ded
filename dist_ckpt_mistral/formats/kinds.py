"""The kinds of places that commands know, and the table that recognises a place by names alone.

One row after another looks at the name of a file, or at the names in a directory. The first that matches says what kind
of place it is, and what to do with it. Nothing is read here.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.formats.checkpoint_directory import BACKEND_FILE, METADATA_FILE, TRACKER_FILE, TRACKERS
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.messages import listed

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
#: The files of Mistral AI's own format, beside ``params.json``.
CONSOLIDATED_FILE: Final = "consolidated.safetensors"
CONSOLIDATED_INDEX_FILE: Final = "consolidated.safetensors.index.json"
CONFIG_FILE: Final = "config.json"
PARAMS_FILE: Final = "params.json"
#: The most names of files that an error lists.
_MOST_NAMES: Final = 5
_HF_WEIGHTS: Final = ((SINGLE_FILE,), (INDEX_FILE,))
_CONSOLIDATED_WEIGHTS: Final = ((CONSOLIDATED_FILE,), (CONSOLIDATED_INDEX_FILE,))
_NO_HF_WEIGHTS: Final = f"it holds neither {SINGLE_FILE} nor {INDEX_FILE}"
_AS_SAFETENSORS: Final = "Get the model's safetensors, or save it anew with transformers (save_pretrained)."
#: The directory's own name, with this prefix, is among the names that rows match.
_ITSELF: Final = "./"


class Kind(Enum):
    """The kinds of places that commands treat differently."""

    HF = "Hugging Face directory"
    CONSOLIDATED = "directory of Mistral AI's own files"
    CHECKPOINT = "Megatron checkpoint"
    ADAPTER = "PEFT directory of an adapter"
    #: A checkpoint or model whose save has not finished, or that is damaged.
    BROKEN = "unfinished checkpoint"
    #: There may be a configuration, but no weights in a format that is read.
    WEIGHTLESS = "directory without weights that are read"
    #: ``places.what_is`` follows the root to its latest iteration.
    ROOT = "root of a Megatron checkpoint"
    MISSING = "nothing"
    OTHER = "something else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What is at ``path``: its kind, a clause for errors that begins with "it" or "there", and advice for the user.

    For a checkpoint root, ``path`` is the directory of its latest iteration; for a hub id, the downloaded snapshot.
    ``is_searched`` says whether an error looks for a model in the folders of this place.
    """

    path: Path
    kind: Kind
    what: str
    advice: str = ""
    is_searched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row of the table: the names by which it recognises a place, and what it says of it.

    ``marks`` are alternatives: each lists patterns, and every pattern must match a name. No name may match ``without``.
    Names of folders end in a slash. In the texts, ``{files}`` stands for the names that matched and ``{parent}`` for
    the directory around the place.
    """

    marks: Sequence[Sequence[str]]
    without: Sequence[str] = ()
    kind: Kind = Kind.OTHER
    what: str
    advice: str = ""
    is_searched: bool = False

    def place(self, path: Path, names: Collection[str]) -> Place | None:
        """The place at ``path`` if this row recognises its ``names``, else None."""
        if any(_matching(names, pattern) for pattern in self.without):
            return None
        for marks in self.marks:
            matches = [_matching(names, pattern) for pattern in marks]
            if all(matches):
                files = listed(sorted({*itertools.chain.from_iterable(matches)})[:_MOST_NAMES])
                what, advice = (text.format(files=files, parent=path.parent) for text in (self.what, self.advice))
                return Place(path=path, kind=self.kind, what=what, advice=advice, is_searched=self.is_searched)
        return None


def _matching(names: Collection[str], pattern: str) -> list[str]:
    """The ``names`` that match ``pattern``. A plain name is looked up: there may be a hundred thousand names."""
    return fnmatch.filter(names, pattern) if set(pattern) & {*"*["} else [pattern] * (pattern in names)


#: Rows for files.
_FILES: Final = (
    _Row(
        marks=(("*.gguf",),),
        what="it is a GGUF file, of quantized weights",
        advice="Give the directory of the original release.",
    ),
    _Row(
        marks=(("*.safetensors",), ("*.safetensors.index.json",)),
        what="it is one file of a model",
        advice="Give the directory around it, {parent}.",
    ),
    _Row(
        marks=((CONFIG_FILE,), (PARAMS_FILE,)),
        what="it is a configuration, which --config takes",
        advice="Give the directory around it, {parent}.",
    ),
    _Row(
        marks=(("*.distcp",), (METADATA_FILE,), (BACKEND_FILE,), ("common.pt",), *((name,) for name in TRACKERS)),
        what="it is one file of a checkpoint",
        advice="Give the directory around it, {parent}.",
    ),
    _Row(
        marks=(("*.nemo",), ("*.tar",), ("*.tar.*",), ("*.tgz",), ("*.zip",)),
        what="it is an archive",
        advice="Unpack it and give the directory that was in it.",
    ),
    _Row(
        marks=(("*.pth",), ("*.pt",), ("*.bin",), ("*.ckpt",), ("*.pkl",)),
        what="it is a file of torch.save, which is a pickle and is not opened",
        advice=_AS_SAFETENSORS,
    ),
    _Row(marks=(("*",),), what="it is a file", advice="Give a directory."),
)

#: Rows for directories. The first that matches counts.
_DIRECTORIES: Final = (
    # ms-swift leaves both in one directory (swift/megatron/trainers/base.py, 4.6).
    _Row(
        marks=[("adapter_config.json", mark) for mark in TRACKERS],
        what="it holds an adapter of PEFT and a checkpoint ({files})",
        advice="Give the directory of one iteration; the PEFT files are the adapter for Hugging Face already.",
    ),
    _Row(
        marks=(("adapter_config.json", "adapter_model.safetensors"),),
        without=(CONFIG_FILE, SINGLE_FILE, INDEX_FILE, CONSOLIDATED_FILE, CONSOLIDATED_INDEX_FILE, BACKEND_FILE),
        kind=Kind.ADAPTER,
        what="it holds an adapter of PEFT, such as LoRA ({files})",
        advice="from-hf makes a Megatron checkpoint of it, if it is a LoRA. Where a whole model is wanted, merge it "
        "into its model first (merge_and_unload and save_pretrained of PEFT) and give that directory.",
    ),
    # transformers 5 loads the adapter too where the directory holds the model it belongs to (integrations/peft.py,
    # maybe_load_adapters).
    _Row(
        marks=(("adapter_config.json", "adapter_model.*"), ("adapter_config.json",), ("adapter_model.*",)),
        what="it holds an adapter of PEFT, such as LoRA ({files})",
        advice="Merge it into its model first (merge_and_unload and save_pretrained of PEFT) and give that directory. "
        "If the weights are merged already, remove {files}.",
    ),
    # swift/megatron/trainers/base.py, save_checkpoint, 4.6
    _Row(
        marks=[(*weights, TRACKER_FILE, "args.json") for weights in _HF_WEIGHTS],
        what="it is a checkpoint of ms-swift that holds the model twice: in Hugging Face's files, and in Megatron's "
        "({files})",
        advice="Give the directory of its iteration, or copy Hugging Face's files into a directory of their own.",
    ),
    _Row(
        marks=[
            (*weights, mark) for weights in _HF_WEIGHTS + _CONSOLIDATED_WEIGHTS for mark in (METADATA_FILE, *TRACKERS)
        ],
        what="it holds a model and a checkpoint ({files})",
        advice="Give the directory of one iteration, or move one of the two elsewhere.",
    ),
    _Row(
        marks=[(*hf, *consolidated) for hf in _HF_WEIGHTS for consolidated in _CONSOLIDATED_WEIGHTS],
        without=(CONFIG_FILE,),
        what=f"it holds two renderings of a model ({{files}}) and no {CONFIG_FILE}",
        advice=f"Get {CONFIG_FILE}, which goes with {SINGLE_FILE}, or move one of the two elsewhere.",
    ),
    # Where both are present, Mistral AI's consolidated files are not read, as in transformers (5.24, modeling_utils.py,
    # _get_resolved_checkpoint_files).
    _Row(
        marks=_HF_WEIGHTS,
        kind=Kind.HF,
        what="it is a Hugging Face directory",
        advice="from-hf makes a checkpoint of it.",
    ),
    _Row(
        marks=_CONSOLIDATED_WEIGHTS,
        kind=Kind.CONSOLIDATED,
        what="it is a directory of Mistral AI's own files",
        advice="from-hf makes a checkpoint of it.",
    ),
    # mcore check_is_distributed_checkpoint (dist_checkpointing/core.py, 0.12 to 0.19)
    _Row(
        marks=((BACKEND_FILE,),),
        kind=Kind.CHECKPOINT,
        what="it is a Megatron checkpoint",
        advice="to-hf makes a Hugging Face directory of it, reshard cuts it anew.",
    ),
    _Row(
        marks=[(name,) for name in TRACKERS],
        kind=Kind.ROOT,
        what="it is the root of a checkpoint ({files})",
    ),
    # Megatron's --ckpt-format torch (training/checkpointing.py, _get_checkpoint_format, 0.19)
    _Row(
        marks=(("mp_rank_*/",),),
        kind=Kind.CHECKPOINT,
        what="it is a checkpoint in Megatron's legacy torch format, with a folder for every rank",
        advice="to-hf makes a Hugging Face directory of it, migrate a torch_dist checkpoint.",
    ),
    _Row(
        marks=(("tp_rank_*/",),),
        what="it is a checkpoint of NeMo 1, with one pickle a rank ({files})",
        advice="Convert it with the NeMo that can load it to NeMo 2, whose checkpoints are torch_dist ones.",
    ),
    # torch_dist writes metadata.json last (mcore dist_checkpointing/serialization.py, save)
    _Row(
        marks=(("*.distcp", "common.pt"), ("*.distcp",), ("common.pt",)),
        without=(METADATA_FILE,),
        kind=Kind.BROKEN,
        what=f"it holds {{files}}, but {METADATA_FILE} and {BACKEND_FILE} are missing, which Megatron writes last: its "
        "save has not finished, or files were not copied, or ms-swift saved the weights around it alone, in Hugging "
        "Face's files (save_safetensors with no_save_optim)",
    ),
    _Row(
        marks=((METADATA_FILE, "common.pt"),),
        kind=Kind.BROKEN,
        what=f"{BACKEND_FILE} is missing, which Megatron writes last: its save has not finished, or it was not copied",
    ),
    _Row(
        marks=((CHECKSUMS_FILE,), (MANIFEST_FILE,)),
        kind=Kind.BROKEN,
        what="it holds {files}, but not the weights or the metadata that it belongs to",
        advice="Copy all files again.",
    ),
    _Row(
        marks=((METADATA_FILE,),),
        kind=Kind.CHECKPOINT,  # what of DCP it is, its content tells: formats/torch_dcp.py
        what=f"{BACKEND_FILE} is missing, so it was saved by torch.distributed.checkpoint (DCP) and not by Megatron's "
        "dist_checkpointing, or the save has not finished",
        advice="to-hf makes a Hugging Face directory of it if Megatron's FSDP saved it (torch_dcp, fsdp_dtensor).",
    ),
    _Row(
        marks=(("zero_to_fp32.py",), ("*_model_states.pt",)),
        what="it is a DeepSpeed checkpoint ({files})",
        advice="Make a Hugging Face directory of it first: its zero_to_fp32.py writes safetensors.",
    ),
    _Row(
        marks=(("weights/", "context/"),),
        what="it is the root of a NeMo 2 checkpoint, whose weights lie in a folder of it",
        is_searched=True,
    ),
    # verl/utils/megatron_utils.py, 0.9: the second version of its layout, and the first
    _Row(
        marks=(("ckpt_contents.json",),),
        what="it is a checkpoint of verl, whose weights lie in its folder model",
        advice="Give model/dist_ckpt, or model/huggingface where verl saved the weights for Hugging Face.",
    ),
    _Row(
        marks=(("dist_ckpt/",), ("huggingface/",)),
        what="it is a checkpoint of verl, whose weights lie in a folder of it",
        is_searched=True,
    ),
    _Row(
        marks=(("snapshots/", "blobs/"),),
        what="it is a repository in the hub's cache",
        is_searched=True,
    ),
    _Row(
        marks=(("iter_*/",), ("release/",)),
        what=f"it has neither {TRACKER_FILE} nor {BACKEND_FILE}, but iterations",
        is_searched=True,
    ),
    _Row(
        marks=(("*.safetensors",),),
        kind=Kind.WEIGHTLESS,
        what=f"{_NO_HF_WEIGHTS}, but other files ({{files}})",
        advice="Get the index of these files too; a single file that is the whole model must be called "
        f"{SINGLE_FILE} (or {CONSOLIDATED_FILE}).",
        is_searched=True,
    ),
    _Row(
        marks=(("*.gguf",),),
        kind=Kind.WEIGHTLESS,
        what=f"{_NO_HF_WEIGHTS}, but GGUF files, of quantized weights ({{files}})",
        advice="Give the directory of the original release.",
    ),
    _Row(
        marks=(("*.bin",), ("*.pth",), ("*.pt",), ("*.ckpt",), ("*.h5",), ("*.msgpack",)),
        kind=Kind.WEIGHTLESS,
        what=f"{_NO_HF_WEIGHTS}, but weights in a format that is not read ({{files}})",
        advice=_AS_SAFETENSORS,
    ),
    _Row(
        marks=((CONFIG_FILE,), (PARAMS_FILE,)),
        kind=Kind.WEIGHTLESS,
        what=f"{_NO_HF_WEIGHTS}, but a configuration alone ({{files}})",
        advice="Get the weights too.",
        is_searched=True,
    ),
    _Row(
        marks=(("./iter_*",), ("./release",)),
        kind=Kind.BROKEN,
        what=f"{BACKEND_FILE} is missing, as where a save was interrupted or still runs",
    ),
    _Row(
        marks=(("[!.]*",), (".[!/]*",)),
        what="it holds no model itself, but {files}",
        is_searched=True,
    ),
    _Row(marks=(("*",),), what="it is empty", advice="Give the directory that has the files."),
)


def of_file(path: Path) -> Place:
    """The place of a file, by its name."""
    return _first(_FILES, path, [path.name])


def of_directory(path: Path, names: Iterable[str]) -> Place:
    """The place of a directory with these ``names``. Of a path such as ``folder/file`` only ``folder/`` counts."""
    tops = {top + slash for top, slash, _ in (name.partition("/") for name in names)}
    return _first(_DIRECTORIES, path, {_ITSELF + path.name, *tops})


def _first(rows: Iterable[_Row], path: Path, names: Collection[str]) -> Place:
    """The place by the first row that recognises it; the last row of a table recognises everything."""
    return next(place for row in rows if (place := row.place(path, names)) is not None)
