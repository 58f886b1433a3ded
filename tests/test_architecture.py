"""The rules of the house, read off the syntax trees of the package: who may import whom, and what stands where."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

import dist_ckpt_mistral
from dist_ckpt_mistral.model.config import MistralConfig
from dist_ckpt_mistral.model.tensor_table import OLD_EXTRA_STATES, tensor_table
from dist_ckpt_mistral.model.vision import Vision

ROOT: Final = Path(dist_ckpt_mistral.__file__).parent
_MODULES: Final = """
errors shell amounts shapes name_ranges dtypes strict_json local_ranks ranks rank_processes hub package_version
stamps storage paths staging strict_yaml libraries
formats.pickle_opcodes formats.pickle_reading formats.pickle_records formats.tensor_pickle formats.read_ahead
formats.torch_archive formats.torch_archive_writer formats.train_state formats.checkpoint_directory formats.integrity
formats.places
model.checks model.yarn model.experts model.latent_attention model.quantization model.vision model.hf_families
model.hf_config
model.params_json model.config model.agreement
model.tensor_rules model.vision_table model.layer_table model.tensor_table model.stored_entries
model.pipeline_layout model.rank_grid model.held_tensors model.parallel_layout
model.megatron_fields model.megatron_vocabulary model.attention_args model.expert_args model.megatron_args
model.bridge_config model.pretrain_flags
gather.boxes gather.links gather.scales gather.tensor_index gather.flat_ranges gather.casts gather.dequantize
gather.plan gather.bands gather.executor gather.digests gather.chunk_reads
formats.common_state formats.stored_metadata formats.metadata_records formats.metadata_pickle
formats.stored_checkpoint formats.torch_dist formats.legacy_objects formats.legacy_zarr formats.backends
formats.torch_dist_writer
formats.archive_checksums formats.safetensors formats.hf_directory formats.small_files
formats.quantized
own_links mapping matching embedded checkpoint_config model_source manifest losses journal writing verify
stored_comparison file_checks checking
chunking conversion new_hf_directory new_checkpoint convert rewriting resharding migration
pretrain_command sheet report report_page lazy_checkpoint rank_plan hf_inference
reading.plan reading.planner reading.table reading.style reading.ribbons reading.matrix reading.picture
megatron.hf_metadata megatron.sharded_state_dict megatron.optimizer_state megatron.load_check
megatron.runtime megatron.local_layers megatron.model_config megatron.build_model megatron.load_model
megatron.inference megatron.generate megatron.logits
demo
commands.output
commands.options commands.from_hf commands.to_hf commands.plan commands.reshard commands.migrate commands.inspect
commands.verify commands.generate commands.megatron_args commands.demo
cli __main__
"""
#: Every module; each imports only from those before it.
DOWNWARDS: Final = tuple(_MODULES.split())
#: Where ``read_bytes`` is an amount, and not Path's method.
AMOUNTS: Final = ("gather.chunk_reads", *(name for name in DOWNWARDS if name.startswith("reading.")))
#: What works on columns of numbers outside gather/: imported at the top only by each other, else at use.
IN_COLUMNS: Final = ("verify", "journal", "reading.plan", "reading.planner")
#: Where names of tensors stand: the tables, and what tells its keys from other entries of a checkpoint.
NAMING: Final = ("model.vision_table", "model.layer_table", "model.tensor_table", "model.stored_entries")
#: Packages that are nothing but their docstring; the topmost one only points to where its names live.
PACKAGES: Final = (
    "__init__",
    "model.__init__",
    "gather.__init__",
    "formats.__init__",
    "megatron.__init__",
    "reading.__init__",
    "commands.__init__",
)


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Every module that is imported, and whether that happens when the importing module itself is imported."""
    at_once = {id(node) for node in tree_of(module).body}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {module}"
            for alias in node.names:
                path = Path(f"{node.module}.{alias.name}".replace(".", "/"))
                is_module = (ROOT.parent / path).with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module), id(node) in at_once


def strings(module: str) -> Iterator[str]:
    """Every string of a module that is not a docstring."""
    docstrings = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstrings |= {id(statement.value) for statement in node.body[:1] if isinstance(statement, ast.Expr)}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_every_module_has_its_place() -> None:
    """The list above names all modules that there are, each once."""
    found = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")]
    assert sorted(found) == sorted([*DOWNWARDS, *PACKAGES])


@pytest.mark.parametrize("module", DOWNWARDS)
def test_imports_go_downwards(module: str) -> None:
    """A module imports, at its top, in functions and for annotations, only what stands before it."""
    own = {name.removeprefix("dist_ckpt_mistral").lstrip(".") for name, _ in imports(module) if "dist_ckpt" in name}
    before = DOWNWARDS[: DOWNWARDS.index(module)]
    assert own <= {*before, ""}
    assert "" not in own or module == "demo"  # the package's own path


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_packages_hold_nothing(package: str) -> None:
    """Subpackages run nothing when imported: there is only their docstring."""
    assert [type(node) for node in tree_of(package).body] == [ast.Expr]


@pytest.mark.parametrize("module", DOWNWARDS)
def test_who_needs_what(module: str) -> None:
    """Megatron and torch are imported by megatron/ alone, numpy where bytes move; all else waits for its use."""
    foreign = [
        (name.partition(".")[0], at_once)
        for name, at_once in imports(module)
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "dist_ckpt_mistral"}
    ]
    if module.startswith("megatron."):
        assert {name for name, _ in foreign} <= {"megatron", "torch", "safetensors"}
        return
    assert {name for name, at_once in foreign if at_once} <= (
        {"numpy", "zlib_ng"} if "gather." in module or module in IN_COLUMNS else set()
    )
    assert "megatron" not in {name for name, _ in foreign}


def names_of_tensors() -> set[str]:
    """What the names of tensors consist of, in both worlds, without words that mean other things too."""
    config = MistralConfig(
        vocab_size=1,
        hidden_size=1,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        vision=Vision(
            hidden_size=1,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_channels=1,
            patch_size=1,
            merged_patches=1,
            feature_layers=1,
            projector_bias=True,
        ),
    )
    table = tensor_table(config)
    names = [*table.hf_tensors(), *OLD_EXTRA_STATES]
    for rule in table.rules:
        names += [
            *rule.keys,
            *(name for module in (rule.local, rule.te) for name in (module.name, *(module.extra_state or ()))),
        ]
    words = {word for name in names for word in name.split(".")}
    other_meanings = {"weight", "bias", "model", "decoder", "transformer", "attention", "layers", "norm", "embedding"}
    return words - other_meanings - {"{layer}", "0"}


@pytest.mark.parametrize("module", [each for each in DOWNWARDS if each not in NAMING])
def test_tensor_names_stand_in_the_table_alone(module: str) -> None:
    """No string outside the tables contains a word that tensor names are made of."""
    words = names_of_tensors()
    assert {"q_proj", "linear_qkv", "mlp", "self_attn", "lm_head", "_extra_state"} <= words
    assert {"vision_tower", "multi_modal_projector", "language_model", "patch_conv"} <= words
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words)))})\b")
    assert [text for text in strings(module) if pattern.search(text)] == []


@pytest.mark.parametrize("module", [*DOWNWARDS, *PACKAGES])
def test_what_only_one_room_does(module: str) -> None:
    """Only the command line prints; only pickle_reading unpickles, nothing evaluates; only few open or make files."""
    names = {node.id for node in ast.walk(tree_of(module)) if isinstance(node, ast.Name)}
    attributes = {
        (node.value.id if isinstance(node.value, ast.Name) else "", node.attr)
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute)
    }
    assert names.isdisjoint({"eval", "exec", "compile", "__import__"})
    assert "print" not in names or module == "commands.output"
    unpicklers = {("pickle", name) for name in ("load", "loads", "Unpickler")} | {("torch", "load")}
    assert attributes.isdisjoint(unpicklers) or module == "formats.pickle_reading"
    touching = {"open", "read_bytes", "read_text", "write_bytes", "write_text", "unlink", "rename", "rmtree"}
    touched = {attribute for owner, attribute in attributes if owner != "storage"} | names
    calls = {node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    if "read_bytes" not in {node.attr for node in calls if isinstance(node, ast.Attribute)}:
        touched -= {"read_bytes"} if module in AMOUNTS else set()
    own_reports = ("demo", "rank_processes", "megatron.load_check", "commands.output")
    assert touched.isdisjoint(touching) or module in ("storage", "staging", "journal", "libraries", *own_reports)


def test_asserts_check_no_data() -> None:
    """``python -O`` drops them: the package has none."""
    found = [module for module in DOWNWARDS for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert)]
    assert found == []
