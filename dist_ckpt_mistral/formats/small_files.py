"""The small files beside the weights of a model: which ones are copied with it, and why others stay behind."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from dist_ckpt_mistral.errors import ConfigError
from dist_ckpt_mistral.formats.checkpoint_directory import iteration_name, root_of
from dist_ckpt_mistral.formats.checksums import CHECKSUMS_FILE
from dist_ckpt_mistral.formats.integrity import MANIFEST_FILE
from dist_ckpt_mistral.formats.kinds import CONFIG_FILE, INDEX_FILE, PARAMS_FILE
from dist_ckpt_mistral.storage import documents, hub, paths
from dist_ckpt_mistral.storage.remote_path import RemotePath

_LOG = logging.getLogger(__name__)

#: Folders beside the shards of a checkpoint: the small files that ``from_hf`` copied, and the tokenizer that
#: Megatron-Bridge saves (``save_tokenizer_assets`` in training/checkpointing.py, 0.6.2; later Megatron-LM, too). The
#: first also has a place in the root of a checkpoint, where it belongs to every iteration.
ASSETS_FOLDER: Final = "hf"
#: The record of the imported model in such a folder of a root: the JSON of what is else stored in the checkpoint.
RECORD_FILE: Final = "dist_ckpt_mistral.json"
#: The vision tower and projector of a multimodal model in such a folder.
VISION_FILE: Final = "vision.safetensors"
_TOKENIZER_FOLDER: Final = "tokenizer"
#: verl's folder of the shards, and that of Hugging Face files beside it: in ``actor`` to 0.7, in ``actor/model`` since
#: (utils/checkpoint/megatron_checkpoint_manager.py, utils/megatron_utils.py, 0.9.1).
_VERL_SHARDS: Final = "dist_ckpt"
_VERL_FOLDER: Final = "huggingface"
#: NeMo 2's folders of the tokenizer, beside the folder ``weights`` that holds the shards.
_NEMO_FOLDERS: Final = ("context/tokenizer", "context/nemo_tokenizer")
#: The folder of further chat templates of a tokenizer or processor. They have no other folder (transformers 5.24,
#: CHAT_TEMPLATE_DIR in utils/hub.py).
_TEMPLATES_FOLDER: Final = "additional_chat_templates"
#: Where peft is installed, transformers applies the adapter that this file describes to the model beside it
#: (integrations/peft.py, 5.24).
ADAPTER_FILE: Final = "adapter_config.json"

#: The files of a tokenizer, and those that say how a model is run. Of a directory that is known only by the path in a
#: checkpoint, nothing else is copied: it may hold anything.
_OF_TOKENIZERS: Final = (
    *("tokenizer*", "tekken*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", f"{_TEMPLATES_FOLDER}/*"),
)
_OF_MODELS: Final = (CONFIG_FILE, "generation_config.json", "processor_config.json", "preprocessor_config.json")

_QUANTIZED: Final = "describes quantized weights, and those that are written are not quantized"
_OTHER_FILES: Final = "describes weights in other files or another format"
_TRAINING: Final = "is training state, which is no part of the model"
_ADAPTER: Final = "belongs to an adapter, which is no part of the model"
#: Pattern of names -> why such a file stays behind: a predicate, empty where nothing is logged, None where the file is
#: copied after all. The first pattern that matches counts. What is written is never quantized, and always safetensors.
_LEFT_BEHIND: Final[Mapping[str, str | None]] = {
    INDEX_FILE: None,  # its text is kept where it still describes the files
    ".*": "",  # git's, and of tools
    CHECKSUMS_FILE: "",  # the output gets its own
    MANIFEST_FILE: "",  # likewise
    RECORD_FILE: "",  # it describes the files of a checkpoint's root
    ADAPTER_FILE: _ADAPTER,
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
#: JSON file -> the key that keeps it behind where the file has a value there, and why.
_LEFT_BY_CONTENT: Final = {PARAMS_FILE: ("quantization", _QUANTIZED)}
#: A tokenizer has at most some 20 MB; what is much larger is not a small file.
_MAX_BYTES: Final = 256 << 20


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer: of transformers, SentencePiece, or Mistral's tekken."""
    return "tokenizer" in name or name.startswith("tekken")


def has_tokenizer(directory: Path) -> bool:
    """Whether ``directory`` itself holds a file of a tokenizer."""
    return any(is_tokenizer_file(path.name) and path.is_file() for path in directory.iterdir())


def tokenizer_directories(tokenizer: str | Path | None, *others: Path | None) -> list[Path]:
    """The directories to search for a tokenizer: only ``tokenizer`` if given, else ``others`` in this order.

    Raises ConfigError if ``tokenizer`` is given and is not a directory.
    """
    if tokenizer is None:
        return [directory for directory in others if directory is not None]
    directory = hub.model_directory(str(tokenizer))
    if not directory.is_dir():
        raise ConfigError(f"the tokenizer {tokenizer} is not a directory. Give the one that holds its files.")
    return [directory]


def tokenizer_directory(places: Iterable[Path]) -> Path:
    """The first of the directories ``places`` that has a tokenizer. Raises ConfigError if none has."""
    searched = list(places)
    for directory in searched:
        if has_tokenizer(directory):
            return directory
    where = ", ".join(map(str, searched)) or "the checkpoint"
    raise ConfigError(f"no tokenizer in {where}. Give the Hugging Face directory that has it with --tokenizer.")


def hf_folders(directory: Path) -> tuple[Path, ...]:
    """The folders of Hugging Face files that describe the iteration in ``directory``, its own first.

    The next is that of the root, which describes all iterations, then that of a release beside; of a checkpoint of verl
    it is the folder beside its shards. A folder that is a link out of the checkpoint is left out, with a warning.
    """
    root, parent = root_of(directory), directory.resolve().parent
    shared = [] if root is None else [root, root / iteration_name(None)]
    tops = [directory, *(top for top in shared if top != directory.resolve())]
    verl = [(parent, _VERL_FOLDER)] if directory.resolve().name == _VERL_SHARDS else []
    return tuple(_folders_inside([*((top, ASSETS_FOLDER) for top in tops), *verl]))


def description_of_root(directory: Path) -> dict[str, Path]:
    """The files of the root's folder ``hf`` around an iteration's ``directory``: relative name -> path."""
    root = root_of(directory)
    folder = next((folder for folder in hf_folders(directory) if folder.parent == root), None)
    if folder is None:
        return {}
    ours = {name: folder / name for name in (RECORD_FILE, VISION_FILE)}
    return small_files(folder) | {
        name: path for name, path in ours.items() if path.is_file() and not paths.leads_outside(path, folder)
    }


def folders_beside(directory: Path) -> tuple[Path, ...]:
    """The folders of small files that came with the checkpoint in an iteration's ``directory``, most important first.

    A folder that is a link out of the checkpoint is left out, with a warning.
    """
    parent = directory.resolve().parent
    places = [(directory, _TOKENIZER_FOLDER), *((parent, name) for name in _NEMO_FOLDERS)]
    return (*hf_folders(directory), *_folders_inside(places))


def _folders_inside(places: Iterable[tuple[Path, str]]) -> Iterator[Path]:
    """Yield the folders that exist, of pairs (directory, name), without links out of the directory."""
    for top, name in places:
        if (top / name).is_dir() and paths.leads_outside(top / name, top):
            _LOG.warning("%s is a link out of the checkpoint: what it holds stays behind", top / name)
        elif (top / name).is_dir():
            yield top / name


def belongs_to_model(place: Path) -> bool:
    """Whether ``place``, relative to an iteration's directory, is in a folder of small files."""
    return place.parts[0] in {ASSETS_FOLDER, _TOKENIZER_FOLDER}


def why_left_behind(name: str) -> str | None:
    """Why a file of this name stays behind, as a predicate; empty where nothing is logged, None if it is copied."""
    return next((why for pattern, why in _LEFT_BEHIND.items() if _matches(name, pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern. One without ``*`` is compared: ``fnmatch`` compiles what it is given."""
    return fnmatchcase(name, pattern) if "*" in pattern else name == pattern


def small_files(directory: Path, *, of_adapter: bool = False) -> dict[str, Path]:
    """The files in ``directory`` that are copied with the model: relative name -> path, sorted by name.

    Names may begin with the folder of chat templates. Warnings name the files that stay behind, except the files of an
    adapter where that is what is copied.
    """
    files = {}
    for path in _entries(directory):
        why = why_left_behind(path.name)
        if why == _ADAPTER and of_adapter:
            continue
        if why is None:
            why = _why_left_by_content(path, directory)
        if why is None:
            files[path.relative_to(directory).as_posix()] = path
        elif why:
            _LOG.warning("%s %s: it stays behind", path, why)
    too_large = [name for name, path in files.items() if path.stat().st_size > _MAX_BYTES]
    if too_large:
        _LOG.warning("too large to travel inside the checkpoint, left behind: %s", ", ".join(too_large))
    return {name: path for name, path in files.items() if name not in too_large}


def other_folders(directory: Path) -> list[str]:
    """The names of the folders in ``directory`` that are not copied, without hidden ones."""
    names = (path.name for path in sorted(directory.iterdir()) if path.is_dir())
    return [name for name in names if name != _TEMPLATES_FOLDER and not name.startswith(".")]


def _entries(directory: Path) -> Iterator[Path]:
    """Yield what is in ``directory``, and in place of the folder of chat templates what is in that."""
    for path in sorted(directory.iterdir()):
        is_templates = path.name == _TEMPLATES_FOLDER and path.is_dir() and not paths.leads_outside(path, directory)
        yield from sorted(path.iterdir()) if is_templates else [path]


def _why_left_by_content(path: Path, directory: Path) -> str | None:
    """Why what is at ``path`` stays behind although its name allows to copy it; values as of ``why_left_behind``."""
    if path.is_dir() and path.name != _TEMPLATES_FOLDER:
        return ""
    if (path.is_file() or path.is_dir()) and paths.leads_outside(path, directory):
        return "is a link out of its directory"
    if not path.is_file():
        return "is no file"
    if documents.is_lfs_pointer(path):
        return "is a pointer of Git LFS, not the file itself (git lfs pull gets that)"
    key, why = _LEFT_BY_CONTENT.get(path.name, ("", None))
    return why if why and documents.read_json(path).get(key) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTokenizer:
    """A directory with a tokenizer, of which a checkpoint has only the path. It may hold anything else besides.

    ``is_of_model`` says whether its config.json describes the model in the checkpoint.
    """

    directory: Path
    is_of_model: bool

    def files(self) -> dict[str, Path]:
        """The small files of the tokenizer, and those that say how the model is run if it is the same model."""
        patterns = (*_OF_TOKENIZERS, *(_OF_MODELS if self.is_of_model else ()))
        files = small_files(self.directory).items()
        return {name: path for name, path in files if any(fnmatchcase(name, pattern) for pattern in patterns)}


def gathered(places: Sequence[Path], named: NamedTokenizer | None = None) -> dict[str, Path]:
    """The small files of a model: those of the first of ``places``, and those of the first place with a tokenizer.

    The last place for a tokenizer is ``named``. Where two places have a name, the first counts. The log says where the
    tokenizer comes from, or that there is none.
    """
    first = small_files(places[0]) if places else {}
    for place in places:
        files = first if place == places[0] else small_files(place)
        if any(map(is_tokenizer_file, files)):
            _LOG.info("tokenizer: %s", place)
            return files | first
    if named is not None:
        _LOG.info("tokenizer: %s, which tokenizer_model in the checkpoint's args names", named.directory)
        return named.files() | first
    _LOG.warning("no tokenizer came with the checkpoint: give a Hugging Face directory with --config to add one")
    return first


def write_small_files(directory: Path, files: Mapping[str, Path], texts: Mapping[str, bytes | None]) -> None:
    """Copy ``files`` into ``directory``; a name in ``texts`` gets that text instead, or no file where that is None."""
    copy_files({name: path for name, path in files.items() if name not in texts}, directory)
    for name, text in texts.items():
        if text is not None:
            documents.write_bytes(directory / name, text)


def copy_files(files: Mapping[str, Path], directory: Path) -> None:
    """Copy ``files`` (name in ``directory`` -> path) into ``directory``; names may begin with folders."""
    for name, path in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        documents.copy_file(path, directory / name)


@contextlib.contextmanager
def local_copy(directory: Path) -> Iterator[Path]:
    """The small files of ``directory`` where other libraries find them: there, or of a URL in a copy meanwhile."""
    if not isinstance(directory, RemotePath):
        yield directory
        return
    import tempfile  # noqa: PLC0415  (slow; only this needs it)

    with tempfile.TemporaryDirectory(prefix="dist-ckpt-mistral-") as folder:
        copy_files(small_files(directory), Path(folder))
        yield Path(folder)
