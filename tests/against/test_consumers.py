"""Who reads what of a checkpoint that from_hf writes: one row a consumer, with its versions and sources.

Each row is held against what from_hf wrote of a dense model, of Mixtral and of Mistral 4, and, where the consumer is
installed, against its sources. Which fields of ``args`` each reads has a table of its own: test_readers_of_args.py.
TensorRT-LLM (1.2, ``examples/models/core/llama/convert_checkpoint.py``) and vLLM read Hugging Face directories, which
``to_hf`` writes: nothing of a checkpoint. NeMo 2 (2.5, nemo/lightning/io/api.py) reads its own ``context/io.json``
before any weight: it reads nothing that is not its own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from family_models import family_model
from hf_models import random_model, saved

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.formats.stored_checkpoint import open_stored


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """What a consumer reads of a checkpoint root.

    Args:
        versions: The versions whose sources were read.
        sources: The files of its sources that say so.
        root: Files in the root. A tuple of them are alternatives: the first is read that is there.
        iteration: Files in the directory of an iteration. The first in a tuple that is there is read.
        common: Keys of the common state, without which it fails.
        optional: Keys of the common state that it reads where they are there.
        takes_release: Whether it finds a release. If not, from_hf must be given ``iteration``.
        reads_all: Whether it reads every tensor that is stored, also those of which its model has nothing.
    """

    versions: str
    sources: tuple[str, ...]
    root: tuple[tuple[str, ...], ...] = ()
    iteration: tuple[tuple[str, ...], ...] = ()
    common: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    takes_release: bool = True
    reads_all: bool = False


_TRACKER: Final = "latest_checkpointed_iteration.txt"
#: What dist_checkpointing.load opens, whoever calls it (mcore dist_checkpointing/core.py, serialization.py and
#: strategies/torch.py, common.py, 0.12 to 0.19).
_OF_MCORE: Final = ((".metadata",), ("metadata.json",), ("common.pt",))

CONSUMERS: Final = {
    "megatron-core": Consumer(
        versions="0.12 to 0.19",
        sources=("core/dist_checkpointing/core.py", "serialization.py", "strategies/torch.py", "strategies/common.py"),
        iteration=_OF_MCORE,
        optional=("content_metadata",),
    ),
    "Megatron-LM": Consumer(
        versions="0.16 to 0.20 (main)",
        sources=("training/checkpointing.py",),
        root=((_TRACKER,),),
        iteration=_OF_MCORE,
        common=("args", "iteration"),
        optional=("checkpoint_version", "content_metadata"),
    ),
    "Megatron-Bridge, training": Consumer(
        versions="0.6.2",
        sources=("bridge/training/checkpointing.py", "bridge/training/utils/checkpoint_utils.py"),
        root=(("latest_train_state.pt", _TRACKER),),
        iteration=(*_OF_MCORE, ("train_state.pt",), ("run_config.yaml",)),
        optional=("iteration", "checkpoint_version", "content_metadata"),
    ),
    "Megatron-Bridge, AutoBridge": Consumer(
        versions="0.6.2",
        sources=("bridge/models/conversion/auto_bridge.py", "bridge/training/model_load_save.py"),
        root=(("iter_0000000", "iter_0000007"),),
        iteration=(*_OF_MCORE, ("run_config.yaml",)),
        optional=("args", "content_metadata"),
    ),
    "slime and miles, training": Consumer(
        versions="2026-08 (624b824)",
        sources=("slime/backends/megatron_utils/checkpoint.py",),  # Megatron-LM's load_checkpoint
        root=((_TRACKER,),),
        iteration=_OF_MCORE,
        common=("args", "iteration"),
    ),
    "slime and miles, convert_torch_dist_to_hf.py": Consumer(
        versions="2026-08 (624b824)",
        sources=("tools/convert_torch_dist_to_hf.py", "slime/backends/megatron_utils/megatron_to_hf/llama.py"),
        iteration=((".metadata",), ("common.pt",)),
        common=("args",),
        reads_all=True,
    ),
    "verl, dist_checkpointing_path": Consumer(
        versions="0.7 to 0.9.1",
        sources=("verl/utils/model.py",),  # load_mcore_dist_weights, given the directory of an iteration
        iteration=_OF_MCORE,
    ),
    "ms-swift, mcore_model": Consumer(
        versions="4.6.0",
        sources=("swift/megatron/utils/megatron_lm_utils.py", "swift/megatron/trainers/base.py"),
        root=((_TRACKER,),),
        iteration=_OF_MCORE,
        common=("args",),
        optional=("content_metadata",),
        takes_release=False,  # _load_iteration: int(f.read())
    ),
}
#: Attributes of ``args`` that ms-swift reads without a default, and others that it takes where they are there.
SWIFT_ARGS: Final = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
#: The tensors that slime's converter knows, without ``decoder.layers.``; others end it (megatron_to_hf/llama.py).
#: It leaves out what has "optimizer" or "_state" in its name.
SLIME_KEYS: Final = (
    *("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"),
    *("self_attention.linear_proj.weight", "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"),
    *("mlp.linear_fc2.weight", "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    "pre_mlp_layernorm.weight",
)

MODELS: Final = ("dense", "mixtral", "mistral4")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """What from_hf writes of every model, as a release, and as an iteration."""
    folder, found = tmp_path_factory.mktemp("consumers"), {}
    for model in MODELS:
        made = random_model() if model == "dense" else family_model(model)
        hf = saved(made, folder / model)
        for is_release in (True, False):
            found[model, is_release] = folder / f"{model}-{is_release}"
            dcm.from_hf(hf, found[model, is_release], tp=2, pp=2, iteration=None if is_release else 7)
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_all_that_a_consumer_reads_is_there(name: str, model: str, roots: dict[tuple[str, bool], Path]) -> None:
    """Its files, in the root and in the iteration, and its keys of the common state, as release and as iteration."""
    consumer = CONSUMERS[name]
    for is_release in (True, False) if consumer.takes_release else (False,):
        root = roots[model, is_release]
        iteration = root / ("release" if is_release else "iter_0000007")
        for where, files in ((root, consumer.root), (iteration, consumer.iteration)):
            for alternatives in files:
                assert any((where / each).exists() for each in alternatives), (where, alternatives)
        common = torch.load(iteration / "common.pt", weights_only=False)
        assert set(consumer.common) <= common.keys()
        assert set(consumer.optional) <= common.keys()


@pytest.mark.parametrize("model", MODELS)
def test_content_metadata_says_nothing_that_changes_entries(model: str, roots: dict[tuple[str, bool], Path]) -> None:
    """Readers hand it to ``sharded_state_dict``: besides our record it has the flags of Megatron-LM and Bridge."""
    common = torch.load(roots[model, True] / "release" / "common.pt", weights_only=False)
    flags = {name: value for name, value in common["content_metadata"].items() if name != "dist_ckpt_mistral"}
    assert flags == {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def test_trackers_and_backends_as_readers_parse_them(roots: dict[tuple[str, bool], Path]) -> None:
    """Megatron-LM takes a number or ``release``, ms-swift a number alone; megatron-core wants both backends named."""
    assert (roots["dense", True] / _TRACKER).read_text() == "release"
    assert int((roots["dense", False] / _TRACKER).read_text()) == 7
    with pytest.raises(ValueError, match="release"):  # what ms-swift 4.6.0 does with a release
        int((roots["dense", True] / _TRACKER).read_text())
    backends = json.loads((roots["dense", True] / "release" / "metadata.json").read_text())
    assert backends == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


@pytest.mark.parametrize("model", MODELS)
def test_ms_swift_knows_the_layout_of_the_args(model: str, roots: dict[tuple[str, bool], Path]) -> None:
    """It compares them with its own, without a default (``load_mcore_checkpoint``, 4.6.0)."""
    args = torch.load(roots[model, False] / "iter_0000007" / "common.pt", weights_only=False)["args"]
    assert [getattr(args, name) for name in SWIFT_ARGS] == [2, 2]


def test_slimes_converter_knows_every_tensor(roots: dict[tuple[str, bool], Path]) -> None:
    """It reads all that is stored, and ends at a name that it does not know: of a dense model there is none."""
    stored = open_stored(roots["dense", True] / "release")
    kept = [name for name in stored.tensors if "optimizer" not in name and "_state" not in name]
    assert {name.removeprefix("decoder.layers.") for name in kept} <= {*SLIME_KEYS}
    assert {name for name in stored.objects if "_state" not in name} == set()


@pytest.mark.megatron
def test_the_table_has_all_that_megatron_lm_reads() -> None:
    """Held against the installed Megatron-LM: the keys of the common state that it takes without a default."""
    spec = importlib.util.find_spec("megatron.training")
    if spec is None or spec.origin is None:
        pytest.skip("megatron-core up to 0.18 ships no megatron.training")
    tree = ast.parse(Path(spec.origin).with_name("checkpointing.py").read_text())
    functions = {node.name: ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    read = {
        key
        for name in ("load_args_from_checkpoint", "load_checkpoint")
        for key in re.findall(r"state_dict\['(\w+)'\](?! =)", functions[name])
    }
    #: Of the model, of training state that a release has not, and of other formats.
    elsewhere = {"model", "optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine"}
    elsewhere |= {"total_iters", *(f"{kind}_rng_state" for kind in ("random", "np", "torch", "cuda"))}
    elsewhere |= {"rng_tracker_states"}
    assert read - elsewhere == set(CONSUMERS["Megatron-LM"].common)


@pytest.mark.megatron
def test_the_table_has_all_that_bridge_reads() -> None:
    """Held against the installed Megatron-Bridge: the files that it names in the directory of an iteration."""
    spec = importlib.util.find_spec("megatron.bridge") if importlib.util.find_spec("megatron") else None
    if spec is None or spec.origin is None:
        pytest.skip("Megatron-Bridge is not installed")
    training = Path(spec.origin).parent / "training"
    constants = {
        ast.literal_eval(node.value)
        for node in ast.parse((training / "utils" / "checkpoint_utils.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    files = {name for names in CONSUMERS["Megatron-Bridge, training"].iteration for name in names}
    named = {name for name in constants if name.endswith((".pt", ".yaml", ".txt", ".json"))}
    assert named == {"train_state.pt", "run_config.yaml"}
    assert named <= files
