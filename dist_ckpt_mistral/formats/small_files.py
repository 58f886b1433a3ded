"""The small files beside the weights of a model: which travel with it, and why the others stay behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.formats.places import INDEX_FILE, PARAMS_FILE
from dist_ckpt_mistral.storage import documents, paths

_LOG = logging.getLogger(__name__)

#: Beside the shards of a checkpoint: the folder of the small files that an import took along, and the tokenizer that
#: Megatron-Bridge saves (``save_tokenizer_assets`` in training/checkpointing.py, 0.6.2; later Megatron-LM's, too).
ASSETS_FOLDER: Final = "hf"
_TOKENIZER_FOLDER: Final = "tokenizer"
#: The same of NeMo 2, beside the folder ``weights`` that holds the shards.
_NEMO_FOLDERS: Final = ("context/tokenizer", "context/nemo_tokenizer")
#: The folder with the chat templates of a tokenizer or processor besides its default one, and the only one that they
#: have (transformers 5.24, CHAT_TEMPLATE_DIR in utils/hub.py).
_OWNED_FOLDER: Final = "additional_chat_templates"
#: transformers applies the adapter that this describes to the model beside it (integrations/peft.py), if it has peft.
_ADAPTER_FILE: Final = "adapter_config.json"

_QUANTIZED: Final = "describes quantized weights, and those that are written are not quantized"
_OTHER_FILES: Final = "describes weights in other files or another format"
_TRAINING: Final = "is state of a training, which is no part of the model"
_ADAPTER: Final = "belongs to an adapter, which is no part of the model"
#: Patterns of names, of which the first that matches counts, and why such a file stays behind: in silence where it is
#: empty, and not at all where it is None. No file that is written is quantized or in another format than safetensors.
_LEFT_BEHIND: Final[Mapping[str, str | None]] = {
    INDEX_FILE: None,  # written again where it is still true
    ".*": "",  # git's, and of tools
    MANIFEST_FILE: "",  # the output gets its own
    _ADAPTER_FILE: _ADAPTER,
    "adapter_model.*": _ADAPTER,
    "*quant*.json": _QUANTIZED,  # hf_quant_config (ModelOpt), quantize_config (GPTQ), quant_config (AWQ), ...
    "*quant*.y*ml": _QUANTIZED,
    "recipe.yaml": _QUANTIZED,  # llm-compressor
    "smash_config.json": _QUANTIZED,  # Pruna
    "kv_cache_scales.json": _QUANTIZED,  # vLLM
    "*.index.json": _OTHER_FILES,  # pytorch_model.bin, consolidated.safetensors, ...
    "*.index.*.json": _OTHER_FILES,  # with transformers' variant, such as model.safetensors.index.fp16.json
    "ndarray-cache.json": _OTHER_FILES,  # MLC
    "mlc-chat-config.json": _OTHER_FILES,
    "openvino_*": _OTHER_FILES,
    "genai_config.json": _OTHER_FILES,  # ONNX Runtime
    # transformers' Trainer (trainer.py, 5.24)
    **dict.fromkeys(("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"), _TRAINING),
    "rng_state*.pth": _TRAINING,
    **dict.fromkeys(
        ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.distcp"),
        "",  # weights: converted, or another rendering of them
    ),
}
#: Files that stay behind where they have something under a key, and why.
_LEFT_BY_CONTENT: Final = {PARAMS_FILE: ("quantization", _QUANTIZED)}
#: A tokenizer is at most some 20 MB; anything much larger is not a small file.
_MAX_BYTES: Final = 256 << 20


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer: transformers' own, SentencePiece's, or Mistral's tekken."""
    return "tokenizer" in name or name.startswith("tekken")


def has_tokenizer(directory: Path) -> bool:
    """Whether the files of a tokenizer lie directly in ``directory``."""
    return any(is_tokenizer_file(path.name) and path.is_file() for path in directory.iterdir())


def folders_beside(directory: Path) -> tuple[Path, ...]:
    """The folders of small files that came with the checkpoint in an iteration's ``directory``; the first counts most.

    Links out of the checkpoint are none of them, and a warning names them.
    """
    parent = directory.resolve().parent
    places = [(directory, ASSETS_FOLDER), (directory, _TOKENIZER_FOLDER), *((parent, name) for name in _NEMO_FOLDERS)]
    there = [(top, top / name) for top, name in places if (top / name).is_dir()]
    return tuple(folder for top, folder in there if _is_inside(folder, top))


def belongs_to_model(place: Path) -> bool:
    """Whether ``place``, relative to an iteration's directory, lies in a folder of the small files of its model."""
    return place.parts[0] in {ASSETS_FOLDER, _TOKENIZER_FOLDER}


def why_left_behind(name: str) -> str | None:
    """Why a file of this name does not travel with weights, as a predicate; empty if nobody need be told.

    None if it travels.
    """
    return next((why for pattern, why in _LEFT_BEHIND.items() if fnmatchcase(name, pattern)), None)


def small_files(directory: Path) -> dict[str, Path]:
    """The files in ``directory`` that travel with the model: where they lie, by name; sorted.

    Names may begin with the folder that tokenizers have. Warnings name the files that stay behind.
    """
    found = {}
    for path in _entries(directory):
        why = why_left_behind(path.name)
        if why is None:
            why = _why_this_stays(path, directory)
        if why is None:
            found[path.relative_to(directory).as_posix()] = path
        elif why:
            _LOG.warning("%s %s: it stays behind", path, why)
    too_large = [name for name, path in found.items() if path.stat().st_size > _MAX_BYTES]
    if too_large:
        _LOG.warning("too large to travel inside the checkpoint, left behind: %s", ", ".join(too_large))
    return {name: path for name, path in found.items() if name not in too_large}


def other_folders(directory: Path) -> list[str]:
    """The folders in ``directory`` that do not travel, by name; not the hidden ones."""
    names = (path.name for path in sorted(directory.iterdir()) if path.is_dir())
    return [name for name in names if name != _OWNED_FOLDER and not name.startswith(".")]


def _entries(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        is_owned = path.name == _OWNED_FOLDER and path.is_dir() and not paths.leads_outside(path, directory)
        yield from sorted(path.iterdir()) if is_owned else [path]


def _why_this_stays(path: Path, directory: Path) -> str | None:
    """The same as ``why_left_behind``, by what lies at ``path``."""
    if path.is_dir() and path.name != _OWNED_FOLDER:
        return ""
    if (path.is_file() or path.is_dir()) and paths.leads_outside(path, directory):
        return "is a link out of its directory"
    if not path.is_file():
        return "is no file"
    if documents.is_lfs_pointer(path):
        return "is a pointer of Git LFS, not the file itself (git lfs pull gets that)"
    key, why = _LEFT_BY_CONTENT.get(path.name, ("", None))
    return why if why and documents.read_json(path).get(key) else None


def _is_inside(folder: Path, directory: Path) -> bool:
    if paths.leads_outside(folder, directory):
        _LOG.warning("%s is a link out of the checkpoint: what it holds stays behind", folder)
        return False
    return True


def gathered(places: Sequence[Path]) -> dict[str, Path]:
    """The small files of a model: those of the first of ``places``, and of the first that has a tokenizer.

    Of a name that both have the first counts. A line says where the tokenizer is from, or that there is none.
    """
    first = small_files(places[0]) if places else {}
    for place in places:
        files = first if place == places[0] else small_files(place)
        if any(map(is_tokenizer_file, files)):
            _LOG.info("tokenizer: %s", place)
            return files | first
    _LOG.warning("no tokenizer came with the checkpoint: give a Hugging Face directory with --config to add one")
    return first


def write_small_files(directory: Path, files: Mapping[str, Path], texts: Mapping[str, bytes | None]) -> None:
    """Copy ``files`` into ``directory``, but write ``texts`` in place of those of the same names; None is no file."""
    copy_files({name: path for name, path in files.items() if name not in texts}, directory)
    for name, text in texts.items():
        if text is not None:
            documents.write_bytes(directory / name, text)


def copy_files(files: Mapping[str, Path], directory: Path) -> None:
    """Copy files into ``directory`` by their names there, which may begin with folders."""
    for name, path in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        documents.copy_file(path, directory / name)
