"""Natural mistakes of newcomers: each gets one true line, which says what to do next, and the exit code of its kind."""

from __future__ import annotations

import json
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Final

import pytest
from command_line import run, tree
from plain_models import save_model

#: What is typed -> the exit code, and what the last line on standard error must say.
MISTAKES: Final = {
    # Arguments in the wrong order, of the wrong kind, or of something else.
    "from-hf ckpt new": (1, "it is a Megatron checkpoint. to-hf makes a Hugging Face directory of it"),
    "to-hf hf new": (1, "it is a Hugging Face directory. from-hf makes a checkpoint of it."),
    "plan hf --tp 2": (1, "it is a Hugging Face directory. from-hf makes a checkpoint of it."),
    "index hf": (1, "it is a Hugging Face directory. from-hf makes a checkpoint of it."),
    "describe ckpt hf": (1, "hf is not a Megatron checkpoint that can be read: it is a Hugging Face directory."),
    "migrate ckpt new": (1, "expected one in zarr, torch or an FSDP format."),
    "from-hf hf/config.json new": (1, "it is a configuration, which --config takes. Give the directory around it, hf."),
    "from-hf hf/model.safetensors new": (1, "it is one file of a model. Give the directory around it, hf."),
    "to-hf ckpt/release/__0_0.distcp new": (1, "it is one file of a checkpoint. Give the directory around it"),
    "inspect ckpt/latest_checkpointed_iteration.txt": (1, "Give the directory around it, ckpt."),
    "inspect notes.txt": (1, "it is a file. Give a directory."),
    "to-hf ckpt/iter_0000999 new": (1, "there is no such directory. ckpt holds release."),
    "inspect nowhere": (1, "there is no such directory. Check the name."),
    "inspect hff": (1, "there is no such directory. Did you mean hf?"),
    "verify hf nowhere": (1, "there is no such directory. Check the name."),
    "inspect empty": (1, "it is empty. Give the directory that has the files."),
    "from-hf empty new": (1, "it is empty. Give the directory that has the files."),
    # Models and checkpoints that others made.
    "from-hf pickled new": (1, "(pytorch_model.bin). Get the model's safetensors, or save it anew with transformers"),
    "from-hf gptq new": (1, "Start from the unquantized release"),
    "from-hf llama new": (1, "model_type 'llama' in llama/config.json is not supported"),
    "from-hf hf.tar.gz new": (1, "it is an archive. Unpack it and give the directory that was in it."),
    "inspect model.nemo": (1, "it is an archive. Unpack it and give the directory that was in it."),
    "to-hf legacy new": (1, "model_optim_rng.pt is not a torch.save archive, or it is truncated"),
    "from-hf mistralai/Mistral-7B-v0.33 new": (1, "is neither a directory nor a model that the hub provides"),
    "inspect ftp://host/ckpt": (1, "these are read: s3://, gs://, az://, abfs://, msc://, http://, https://."),
    # Outputs.
    "to-hf ckpt hf": (1, "the output hf exists. Choose another name or give --overwrite."),
    "from-hf hf ckpt": (1, "the output ckpt exists. Choose another name or give --overwrite."),
    "to-hf ckpt ckpt": (1, "the output ckpt and the input ckpt must lie apart. Choose another output."),
    "to-hf ckpt ckpt/out": (1, "the output ckpt/out and the input ckpt must lie apart. Choose another output."),
    "from-hf hf hf/new": (1, "the output hf/new and the input hf must lie apart. Choose another output."),
    "from-hf hf notes.txt/new": (1, "notes.txt"),
    "demo --keep hf": (1, "hf is not an empty directory. Give --keep the name of a new one."),
    "to-hf ckpt new --config nowhere/config.json": (1, "Get that file, or give a directory that has it."),
    # Layouts.
    "from-hf hf new --tp 3": (1, "num_attention_heads=4 is not divisible by tp=3"),
    "plan ckpt --tp 3": (1, "Choose a layout that fits."),
    "reshard ckpt new --pp 3 -q": (1, "num_hidden_layers=2 is not divisible by 3 pipeline stages. Choose a layout"),
    "megatron-args ckpt --ep 2": (1, "ep=2 needs experts, and a dense model has none. Choose a layout that fits."),
    "from-hf hf new --tp 0": (2, "argument --tp: expected a whole number of at least 1, got '0'"),
    "from-hf hf new --tp two": (2, "argument --tp: expected a whole number, got 'two'"),
    "from-hf hf new --tp -1": (2, "argument --tp: expected a whole number, got '-1'"),
    # Values.
    "to-hf ckpt -": (2, "argument HF: expected a path, got '-': no command reads or writes a stream"),
    "plan ckpt --svg -": (2, "argument --svg: expected a path, got '-'"),
    "to-hf ckpt new --max-file-size 5": (2, "expected a size with its unit, such as 5GB or 5B, got '5'"),
    "to-hf ckpt new --memory lots": (2, "expected a size such as 5GB or 500MB, got 'lots'"),
    "to-hf ckpt new --dtype fp8": (2, "invalid choice: 'fp8' (choose from "),
    "to-hf ckpt new --dtype bf16": (2, "Did you mean bfloat16?"),
    "to-hf ckpt new --workers 0.5": (2, "argument --workers: expected a whole number, got '0.5'"),
    "to-hf ckpt ''": (2, "argument HF: expected a path, got an empty text"),
    # What no shell has expanded.
    "to-hf ckpt '~/new'": (2, "got '~/new', in which no shell has expanded the ~. Write the directory out, or ./~/new"),
    "to-hf ckpt new --config=~someone/hf": (2, "argument --config: expected a path, got '~someone/hf', in which no"),
    "demo --keep=~": (2, "argument --keep: expected a path, got '~'"),
    # Commands and options.
    "to_hf ckpt new": (2, "Did you mean to-hf?"),
    "tohf ckpt new": (2, "Did you mean to-hf?"),
    "convert ckpt new": (2, "Did you mean from-hf or to-hf?"),
    "export ckpt new": (2, "Did you mean to-hf?"),
    "to-hf": (2, "the following arguments are required: CKPT, HF"),
    "to-hf ckpt": (2, "the following arguments are required: HF"),
    "to-hf ckpt new more": (2, "unrecognized arguments: more"),
    "from-hf hf new --tensor-parallel 2": (2, "Did you mean --tp?"),
    "from-hf hf new --tensor-model-parallel-size 2": (2, "Did you mean --tp?"),
    "from-hf hf new --force": (2, "Did you mean --overwrite?"),
    "to-hf ckpt new --max-shard-size 5GB": (2, "Did you mean --max-file-size?"),
    "verify hf --stored": (2, "--stored compares two checkpoints: give B"),
    "verify hf --logits": (2, "--logits compares two models: give B"),
    "verify hf ckpt --prompt x": (2, "--prompt and --tokenizer need --logits"),
    "generate ckpt": (2, "the following arguments are required: --prompt"),
    "": (2, "the following arguments are required: COMMAND"),
}


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, its checkpoint, and much else that people have lying around."""
    where = tmp_path_factory.mktemp("mistakes")
    hf = save_model(where / "hf")
    assert run("from-hf", hf, where / "ckpt", "-q").code == 0
    (where / "empty").mkdir()
    (where / "notes.txt").write_text("to do")
    (where / "model.nemo").write_text("")
    with tarfile.open(where / "hf.tar.gz", "w:gz") as archive:
        archive.add(hf, "hf")
    config = json.loads((hf / "config.json").read_text())
    for name, changes in (
        ("pickled", {}),
        ("llama", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ):
        (where / name).mkdir()
        (where / name / "config.json").write_text(json.dumps(config | changes))
    (where / "pickled" / "pytorch_model.bin").write_text("")
    shutil.copy(hf / "model.safetensors", where / "llama")
    _save_packed(where / "gptq")
    rank = where / "legacy" / "iter_0000005" / "mp_rank_00"
    rank.mkdir(parents=True)
    (rank / "model_optim_rng.pt").write_text("")
    (where / "legacy" / "latest_checkpointed_iteration.txt").write_text("5")
    return where


def _save_packed(directory: Path) -> None:
    """Save a matrix as GPTQ does: packed whole numbers, zeros and scales."""
    import numpy as np  # noqa: PLC0415
    from safetensors.numpy import save_file  # noqa: PLC0415

    name = "model.layers.0.self_attn.q_proj"
    parts = {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}
    tensors = {f"{name}.{part}": np.zeros((4, 4), dtype) for part, dtype in parts.items()}
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes(typed: str, where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, below a line of usage if the words are wrong; nothing is a result, and nothing is written."""
    monkeypatch.chdir(where)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, says = MISTAKES[typed]
    before = tree(where)
    outcome = run(*shlex.split(typed))
    assert (outcome.code, outcome.out, len(outcome.err)) == (code, [], code), outcome
    assert says in outcome.err[-1]
    assert len(outcome.err[0]) < 480
    assert outcome.err[0].startswith("error: " if code == 1 else "usage: dist-ckpt-mistral ")
    assert tree(where) == before
