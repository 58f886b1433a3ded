"""What is given by mistake: every command says in one line what it is, and what to do instead."""

from __future__ import annotations

import json
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import torch
from command_line import refusal, run
from consolidated_models import save_consolidated
from genuine import folder, shards
from hf_models import random_model, saved
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_saver
from transformers import MistralForCausalLM

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.formats.kinds import Kind
from dist_ckpt_mistral.formats.places import what_is

TRACKER = "latest_checkpointed_iteration.txt"
CKPT = shards("td_0161")
#: Every command that reads, with ``{}`` for what it reads and ``{out}`` for an output.
CHECKPOINT_COMMANDS = (
    ("to-hf", "{}", "{out}"),
    ("reshard", "{}", "{out}"),
    ("migrate", "{}", "{out}"),
    ("plan", "{}"),
    ("verify", "--stored", "{}", "{}"),
)
MODEL_COMMANDS = (
    ("inspect", "{}"),
    ("inspect", "{}", "--json"),
    ("verify", "{}"),
    ("verify", "{}", str(CKPT)),
    ("verify", str(CKPT), "{}"),
    ("megatron-args", "{}"),
)
COMMANDS = (("from-hf", "{}", "{out}"), *CHECKPOINT_COMMANDS, *MODEL_COMMANDS)
IDS = [" ".join(command).replace(str(CKPT), "ckpt") for command in COMMANDS]


def refused(around: Path, path: object, command: tuple[str, ...]) -> str:
    """The line with which a command refuses ``path``."""
    out = around.with_name("out")
    return refusal(around, *(word.replace("{out}", str(out)).replace("{}", str(path)) for word in command))


#: Files of a directory -> what it is, and what to do.
MISTAKEN = {
    "adapter": (
        {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.bin": ""},
        ("it holds an adapter of PEFT, such as LoRA", "merge_and_unload"),
    ),
    "adapter and checkpoint of ms-swift": (
        {"adapter_config.json": "{}", "adapter_model.safetensors": "", "latest_checkpointed_iteration.txt": "5"},
        ("it holds an adapter of PEFT and a checkpoint", "Give the directory of one iteration"),
    ),
    "adapter within its model": (
        {"adapter_config.json": "{}", "config.json": "{}", "model.safetensors": ""},
        ("it holds an adapter of PEFT, such as LoRA (adapter_config.json)", "Merge it into its model first"),
    ),
    "shard": (
        {"config.json": "{}", "model-00001-of-00002.safetensors": ""},
        ("but other files (model-00001-of-00002.safetensors)", "Get the index of these files too"),
    ),
    "own pickles": (
        {"params.json": "{}", "consolidated.00.pth": "", "consolidated.01.pth": ""},
        ("(consolidated.00.pth, consolidated.01.pth)", "Get the model's safetensors"),
    ),
    "pickles": (
        {"config.json": "{}", "pytorch_model.bin": ""},
        ("in a format that is not read (pytorch_model.bin)", "Get the model's safetensors"),
    ),
    "gguf": ({"model-Q4_K_M.gguf": ""}, ("GGUF files, of quantized weights", "Give the directory of the original")),
    "nemo 1": (
        {"tp_rank_00_pp_rank_000/model_weights.ckpt": "", "model_config.yaml": ""},
        ("it is a checkpoint of NeMo 1", "(tp_rank_00_pp_rank_000/)", "Convert it with the NeMo that can load it"),
    ),
    "deepspeed": ({"zero_to_fp32.py": "", "latest": "global_step5"}, ("it is a DeepSpeed checkpoint", "zero_to_fp32")),
    "two renderings": (
        {"params.json": "{}", "model.safetensors": "", "consolidated.safetensors": ""},
        ("two renderings of a model (consolidated.safetensors, model.safetensors) and no config.json",),
    ),
    "model and checkpoint": (
        {TRACKER: "5", "model.safetensors": "", "config.json": "{}"},
        (f"it holds a model and a checkpoint ({TRACKER}, model.safetensors)",),
    ),
    "ms-swift": (
        {TRACKER: "5", "args.json": "{}", "model.safetensors": "", "config.json": "{}"},
        ("it is a checkpoint of ms-swift that holds the model twice", "Give the directory of its iteration, or copy"),
    ),
    "verl": (
        {"ckpt_contents.json": "{}", "transformer_config.json": "{}"},
        ("it is a checkpoint of verl, whose weights lie in its folder model", "Give model/dist_ckpt, or"),
    ),
    "weights that are gone, but not their checksums": (
        {"checksums.json": "{}", "config.json": "{}"},
        ("it holds checksums.json, but not the weights", "Copy all files again"),
    ),
    "weights that are gone": (
        {"integrity.json": "{}", "config.json": "{}"},
        ("it holds integrity.json, but not the weights", "Copy all files again"),
    ),
    "no models": ({"a/b": "", "readme.md": ""}, ("it holds no model itself, but a/, readme.md", "None of its folders")),
}


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
@pytest.mark.parametrize("case", MISTAKEN)
def test_directories(case: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """The answer is the same from every command, and touches nothing."""
    contents, expected = MISTAKEN[case]
    path = tmp_path / "given" / "it"
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    if command == ("verify", "{}") and what_is(path).kind is Kind.BROKEN:
        assert run("verify", path).code == 3
        return
    line = refused(tmp_path / "given", path, command)
    if command[0] == "megatron-args" and what_is(path).kind is Kind.WEIGHTLESS:
        return  # for which a configuration is enough; here it is empty, or absent
    assert line.startswith(f"error: {path}")
    assert all(part in line for part in expected), line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model-Q4_K_M.gguf", "it is a GGUF file, of quantized weights. Give the directory of the original release"),
        ("model.safetensors", "it is one file of a model. Give the directory around it, {parent}"),
        ("model.safetensors.index.json", "it is one file of a model. Give the directory around it, {parent}"),
        ("config.json", "it is a configuration, which --config takes. Give the directory around it, {parent}"),
        ("__0_0.distcp", "it is one file of a checkpoint. Give the directory around it, {parent}"),
        (TRACKER, "it is one file of a checkpoint. Give the directory around it, {parent}"),
        ("mistral.nemo", "it is an archive. Unpack it"),
        ("mistral.tar.gz", "it is an archive. Unpack it"),
        ("pytorch_model.bin", "it is a file of torch.save"),
        ("notes.txt", "it is a file. Give a directory"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_files(name: str, expected: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """A file is told by its name, and what is around it is named."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / name).write_text("")
    line = refused(tmp_path / "given", tmp_path / "given" / name, command)
    assert expected.format(parent=tmp_path / "given") in line


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ftp://host/run/ckpt", "error: ftp://host/run/ckpt is not {wanted}: it is a URL. Of URLs, these are read: s3"),
        ("hdfs://host/a/b/c", "error: hdfs://host/a/b/c is not {wanted}: it is a URL. Of URLs, these are read: s3"),
        ("memory://bucket/ckpt", "error: memory://bucket/ckpt is not {wanted}: there is nothing of this name, and"),
        ("/no/such/place", "error: /no/such/place is not {wanted}: there is no such directory"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_names_that_are_no_paths(path: str, expected: str, command: tuple[str, ...], tmp_path: Path) -> None:
    """A URL is called that, as it was given; of a store that is read, an empty place in it."""
    kinds = ["a Hugging Face model directory", "a Megatron checkpoint that can be read"]
    wanted = kinds[:1] if command[0] == "from-hf" else kinds[1:] if command in CHECKPOINT_COMMANDS else kinds
    assert refused(tmp_path, path, command).startswith(expected.format(wanted=" or ".join(wanted)))


@pytest.mark.parametrize(
    ("folders", "given", "expected"),
    [
        (("weights", "context/"), "", "it is the root of a NeMo 2 checkpoint, whose weights lie in a folder of it. {}"),
        (("dist_ckpt", "huggingface/"), "", "it is a checkpoint of verl, whose weights lie in a folder of it. {}"),
        (("global_step_5/actor/dist_ckpt", "global_step_5/actor/huggingface/"), "", "itself, but global_step_5/. {}"),
        (("iter_0000005", "iter_0000010/"), "", f"neither {TRACKER} nor metadata.json, but iterations. {{}}"),
    ],
)
def test_the_folder_is_named(folders: tuple[str, str], given: str, expected: str, tmp_path: Path) -> None:
    """Where a folder of what was given is meant, the error names it; and that folder is read."""
    root = tmp_path / "root"
    shutil.copytree(CKPT, root / folders[0])
    (root / folders[1]).mkdir(parents=True)
    for command in CHECKPOINT_COMMANDS:
        line = refused(root, root / given, command)
        assert expected.format(f"Give its folder {folders[0]}.") in line, line
    assert run("to-hf", root / folders[0], tmp_path / "hf", "--config", folder("td_0161")).code == 0
    line = refused(root, root, ("from-hf", "{}", "{out}"))
    assert f"What can be read is {folders[0]}: it is a Megatron checkpoint. to-hf makes" in line


def test_iterations_that_are_not_there(tmp_path: Path) -> None:
    """A wrong iteration, and a root whose latest one was never finished: those that can be read are named."""
    root = tmp_path / "root"
    for name in ("iter_0000100", "iter_0000200"):
        shutil.copytree(CKPT, root / name)
    (root / "iter_0000300").mkdir()
    (root / TRACKER).write_text("300")
    whole = f"{root} holds iter_0000100, iter_0000200."
    for command in (*CHECKPOINT_COMMANDS, ("inspect", "{}"), ("megatron-args", "{}")):
        for name in ("iter_0000123", "iter_123", "release"):
            line = refused(root, root / name, command)
            assert line.startswith(f"error: {root / name} is not ")
            assert line.endswith(f": there is no such directory. {whole}")
        for path in (root, root / "iter_0000300"):
            line = refused(root, path, command)
            assert line.startswith(f"error: {root / 'iter_0000300'} is not ")
            assert line.endswith(
                f": metadata.json is missing, as where a save was interrupted or still runs. {whole}"
            ), line
    outcome = run("verify", root)
    assert (outcome.code, outcome.out[-1]) == (3, f"DAMAGED, 1 finding: {root / 'iter_0000300'}")


def test_an_iteration_that_is_a_link(tmp_path: Path) -> None:
    """A tracker whose iteration is a link out of the root is not followed; the error names its target."""
    shutil.copytree(CKPT, tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    (root / "iter_0000005").symlink_to(tmp_path / "elsewhere")
    (root / TRACKER).write_text("5")
    line = refused(root, root, ("to-hf", "{}", "{out}"))
    assert (
        f"names iter_0000005, a link out of {root}. Give its target if you trust it: {tmp_path / 'elsewhere'}" in line
    )


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ((".metadata", "metadata.json"), "but .metadata and metadata.json are missing, which Megatron writes last"),
        (("metadata.json",), "metadata.json is missing, which Megatron writes last"),
    ],
)
def test_a_save_that_has_not_finished(lacking: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    """What Megatron has not written yet is named; verify calls it damage, all others refuse."""
    path = shutil.copytree(CKPT, tmp_path / "it")
    for name in lacking:
        (path / name).unlink()
    for command in CHECKPOINT_COMMANDS:
        assert expected in refused(tmp_path, path, command)
    outcome = run("verify", path)
    assert (outcome.code, expected in outcome.out[0]) == (3, True), outcome


def test_dcp_of_torch_itself(tmp_path: Path) -> None:
    """What torch.distributed.checkpoint saves is told apart from what Megatron saves by it."""
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        state_dict_saver.save({"weight": torch.zeros(4)}, checkpoint_id=tmp_path / "it", no_dist=True)
    for command in COMMANDS:
        assert "it was saved by torch.distributed.checkpoint (DCP) and not by Megatron's" in refused(
            tmp_path / "it", tmp_path / "it", command
        )


def test_swapped_arguments(tmp_path: Path) -> None:
    """Where the output is what the source should be, and the source is not, that is said; with --overwrite too."""
    hf, new = saved(random_model(), tmp_path / "hf"), tmp_path / "new"
    swapped = [(new, hf, "from-hf"), *((new, CKPT, command) for command in ("to-hf", "reshard", "migrate"))]
    for given, source, command in [*swapped, (CKPT, hf, "from-hf"), (hf, CKPT, "to-hf"), (hf, CKPT, "reshard")]:
        for more in ((), ("--overwrite",)):
            line = refusal(tmp_path, command, given, source, *more)
            assert line.startswith(f"error: {given} is not a ")
            assert line.endswith(f"; but the output {source} is one. Give the source first, then the output.")


def test_a_level_too_deep(tmp_path: Path) -> None:
    """A folder of a checkpoint or model is answered with what is around it; nothing is said of folders not there."""
    root, hf = tmp_path / "root", saved(random_model(), tmp_path / "hf")
    assert run("from-hf", hf, root).code == 0
    inside = root / "release" / "hf"
    for command in (*CHECKPOINT_COMMANDS, *MODEL_COMMANDS[:4]):
        assert refused(tmp_path, inside, command).endswith(f". Give the directory around it, {inside.parent}.")
    assert refusal(tmp_path, "from-hf", inside, "out").endswith(
        "a configuration alone (config.json). Get the weights too."
    )
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "a.jinja").write_text("")
    assert refusal(tmp_path, "from-hf", hf / "additional_chat_templates", "out").endswith(f"around it, {hf}.")


def test_nothing_given(tmp_path: Path) -> None:
    """An empty text, as of a variable that is not set, does not mean the current directory."""
    for command in (*COMMANDS, ("to-hf", str(CKPT), "{}"), ("plan", str(CKPT), "--config", "{}")):
        outcome = run(*(word.replace("{out}", str(tmp_path / "out")).replace("{}", "") for word in command))
        assert outcome.code == 2
        assert outcome.err[-1].endswith("expected a path, got an empty text")


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    """A clone without Git LFS has pointers: of weights they are refused by name, of small files they stay behind."""
    hf = saved(random_model(), tmp_path / "hf")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 14483464192\n"
    (hf / "tokenizer.json").write_text(pointer)
    outcome = run("from-hf", hf, tmp_path / "ckpt")
    assert f"{hf / 'tokenizer.json'} is a pointer of Git LFS, not the file itself" in outcome.err[0]
    assert not (tmp_path / "ckpt" / "release" / "hf" / "tokenizer.json").exists()
    (hf / "model.safetensors").write_text(pointer)
    for command in (("from-hf", "{}", "{out}"), ("inspect", "{}"), ("verify", "{}", str(CKPT))):
        line = refused(hf, hf, command)
        assert line == (
            f"error: {hf / 'model.safetensors'} is a pointer of Git LFS, not the file itself. "
            f"Get that with: git -C {hf} lfs pull"
        )


def test_names_that_are_near(tmp_path: Path) -> None:
    """A mistyped name is answered with one that there is."""
    saved(random_model(), tmp_path / "mistral-7b")
    line = refusal(tmp_path, "inspect", tmp_path / "mistral7b")
    assert line.endswith(f"there is no such directory. Did you mean {tmp_path / 'mistral-7b'}?")
    (tmp_path / "link").symlink_to("nowhere")
    assert "it is a link to nowhere, which does not exist" in refusal(tmp_path, "to-hf", tmp_path / "link", "out")


def test_the_library_answers_alike(tmp_path: Path) -> None:
    """Every function that takes a path raises the same FormatError, not one of Python's."""
    (tmp_path / "adapter_config.json").write_text("{}")
    one_rank = dcm.ParallelLayout()
    for call in (
        lambda: dcm.open_checkpoint(tmp_path),
        lambda: dcm.inspect(str(tmp_path)),
        lambda: dcm.check(tmp_path),
        lambda: dcm.compare(tmp_path, CKPT),
        lambda: dcm.compare_stored(CKPT, tmp_path),
        lambda: dcm.megatron_args(tmp_path),
        lambda: dcm.plan_reading(tmp_path, one_rank),
        lambda: dcm.from_hf(tmp_path, tmp_path.with_name("out")),
        lambda: dcm.to_hf(tmp_path, tmp_path.with_name("out")),
        lambda: dcm.reshard(tmp_path, tmp_path.with_name("out"), one_rank),
        lambda: dcm.migrate(tmp_path, tmp_path.with_name("out")),
    ):
        with pytest.raises(FormatError, match="it holds an adapter of PEFT"):
            call()
    with pytest.raises(dcm.ConfigError, match=r"there is no config\.json at .* \(it holds an adapter of PEFT"):
        dcm.MistralConfig.from_hf(tmp_path)


def other_model(path: Path) -> Path:
    """Save a model of the same sizes with other weights, in several files."""
    model = random_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return saved(model, path, max_shard_size=4000)


def test_a_single_file_beside_an_index(tmp_path: Path) -> None:
    """Two whole models are an error that names both; the single file counts if those of the index are gone."""
    hf, other = saved(random_model(), tmp_path / "hf"), other_model(tmp_path / "other")
    expected = load_file(hf / "model.safetensors")
    shutil.copytree(other, hf, dirs_exist_ok=True)
    loaded = MistralForCausalLM.from_pretrained(hf).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    for command in (("from-hf", hf, tmp_path / "out"), ("inspect", hf)):
        line = refusal(tmp_path, *command)
        assert "holds two models: model.safetensors, which transformers loads, and model-00001-of-" in line
    for shard in hf.glob("model-*.safetensors"):
        shard.unlink()
    loaded = MistralForCausalLM.from_pretrained(hf).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    outcome = run("from-hf", hf, tmp_path / "ckpt")
    assert (outcome.code, len(outcome.err)) == (0, 1), outcome
    assert "names files that are absent: model.safetensors is read" in outcome.err[0]
    assert run("to-hf", tmp_path / "ckpt", tmp_path / "out").code == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_an_index_of_the_single_file(tmp_path: Path) -> None:
    """An index that names model.safetensors alone says nothing else than the file."""
    hf = saved(random_model(), tmp_path / "hf")
    names = load_file(hf / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("from-hf", hf, tmp_path / "ckpt").err == []


def test_other_weights_are_named(tmp_path: Path) -> None:
    """Beside the model's own files others may lie, such as another rendering: they are not read, and that is said."""
    save_consolidated(random_model(), tmp_path / "hf", tmp_path / "own")
    for name in ("consolidated.safetensors", "params.json"):
        shutil.copy(tmp_path / "own" / name, tmp_path / "hf")
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "model-00003-of-00005.safetensors")
    note = (
        f"{tmp_path / 'hf'} holds weights beside those of the model, which are not read: "
        "consolidated.safetensors, model-00003-of-00005.safetensors"
    )
    for command in (("from-hf", tmp_path / "hf", tmp_path / "ckpt"), ("inspect", tmp_path / "hf")):
        outcome = run(*command)
        assert (outcome.code, outcome.err) == (0, [note])
    assert what_is(tmp_path / "hf").kind is Kind.HF
    assert what_is(tmp_path / "own").kind is Kind.CONSOLIDATED


def test_weights_under_another_name(tmp_path: Path) -> None:
    """Transformers loads what transformers_weights names first: another file than the one that is read is an error."""
    hf = saved(random_model(), tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    for named, code in (("other.safetensors", 1), ("model.safetensors", 0)):
        (hf / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
        outcome = run("inspect", hf)
        assert outcome.code == code, outcome
        lines = [line for line in outcome.err if "expected 'model.safetensors' or nothing, got 'oth" in line]
        assert len(lines) == code


def test_an_archive_is_unpacked_first(tmp_path: Path) -> None:
    """After what the error says, it works."""
    with tarfile.open(tmp_path / "ckpt.tar", "w") as archive:
        archive.add(CKPT, "ckpt")
    assert "Unpack it" in refusal(tmp_path, "inspect", tmp_path / "ckpt.tar")
    with tarfile.open(tmp_path / "ckpt.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    assert run("inspect", tmp_path / "ckpt", "--config", folder("td_0161")).code == 0
