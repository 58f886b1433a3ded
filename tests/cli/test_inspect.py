"""``inspect`` as JSON, as a table and as a page: what is stored, what is wrong, and every name whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

from command_line import run
from genuine import folder, shards, truth
from hf_models import random_model, saved
from pages import Page
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch_reading import hf_tensors, read_metadata

from dist_ckpt_mistral.analysis.report import inspect
from dist_ckpt_mistral.analysis.report_table import render


def test_inspection_of_a_checkpoint_as_json() -> None:
    """The JSON has these keys and no others; shapes, chunks, sizes and names are those of the genuine checkpoint."""
    outcome = run("inspect", folder("td_0192") / "checkpoint", "--config", folder("td_0192"), "--json")
    assert (outcome.code, outcome.err) == (0, [])
    told = json.loads("\n".join(outcome.out))
    assert list(told) == [
        "json_version",
        "path",
        "kind",
        "format",
        "config_from",
        "config",
        "tensors",
        "objects",
        "files",
        "problems",
        "iterations",
        "saved_at",
        "warnings",
    ]
    assert (told["json_version"], told["kind"], told["problems"]) == (1, "Megatron torch_dist checkpoint", [])
    assert "megatron-core 0.17 and newer" in told["format"]
    assert (told["config"]["vocab_size"], told["config"]["sliding_window"]) == (250, None)
    stored = read_metadata(shards("td_0192")).state_dict_metadata
    keys = {"name", "dtype", "shape", "num_chunks", "num_bytes", "hf_names", "ignored", "kind", "cut", "files"}
    assert all(set(tensor) == keys for tensor in told["tensors"])
    for tensor in told["tensors"]:
        described_as = stored[tensor["name"]]
        assert not isinstance(described_as, bytes)
        properties, size, chunks = (getattr(described_as, name) for name in ("properties", "size", "chunks"))
        assert (tensor["shape"], tensor["num_chunks"]) == (list(size), len(chunks))
        assert f"torch.{tensor['dtype']}" == str(properties.dtype)
        assert tensor["num_bytes"] == size.numel() * properties.dtype.itemsize
    names = [name for tensor in told["tensors"] for name in tensor["hf_names"]]
    assert sorted(names) == sorted(truth("td_0192"))
    assert {each["name"] for each in told["objects"]} | {each["name"] for each in told["tensors"]} == set(stored)
    assert {each["ignored"] for each in told["objects"]} == {
        "Transformer Engine extra state",
        "common state, read on its own",
    }
    assert told["files"] == {path.name: path.stat().st_size for path in shards("td_0192").glob("*.distcp")}


def test_inspection_of_a_hugging_face_directory_as_json(tmp_path: Path) -> None:
    """The same keys for a Hugging Face directory: its tensors under their own names, one chunk each, and its files."""
    hf = saved(random_model(tie_word_embeddings=True), tmp_path / "hf", max_shard_size=4000)
    told = json.loads("\n".join(run("inspect", hf, "--json").out))
    assert (told["json_version"], told["kind"], told["problems"]) == (1, "Hugging Face directory", [])
    tensors = hf_tensors(hf)
    assert {(t["name"], t["dtype"], *t["shape"]) for t in told["tensors"]} == {
        (name, "bfloat16", *tensor.shape) for name, tensor in tensors.items()
    }
    assert all((t["num_chunks"], t["hf_names"], t["ignored"]) == (1, [t["name"]], None) for t in told["tensors"])
    assert told["files"] == {path.name: path.stat().st_size for path in hf.glob("*.safetensors")}


def test_inspection_tells_problems_and_exits_with_one(tmp_path: Path) -> None:
    """What is wrong is told in all three forms, on stdout, with exit code 1; what could be read is told anyway."""
    hf = saved(random_model(), tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors["odd [/red] :smile: <b>name</b>"] = tensors.pop("model.norm.weight")
    save_file(tensors, hf / "model.safetensors")
    plain, as_json, as_html = (
        run("inspect", hf, *more) for more in ((), ("--json",), ("--html", tmp_path / "page.html"))
    )
    for outcome in (plain, as_json, as_html):
        assert (outcome.code, outcome.err) == (1, [])
    problem = "1 tensor is unknown to the table: odd [/red] :smile: <b>name</b> [24]"
    assert problem in json.loads("\n".join(as_json.out))["problems"][0]
    assert any("model.layers.0.mlp.down_proj.weight" in line for line in plain.out)
    assert problem in " ".join(" ".join(plain.out).split())
    assert problem in " ".join(Page(tmp_path / "page.html").text.split())


def test_tables_of_many_tensors_stay_short(tmp_path: Path) -> None:
    """More than a hundred rows become one for each kind of tensor, with sums; the JSON still has every tensor."""
    hf = saved(random_model(num_hidden_layers=11), tmp_path / "hf")
    told = json.loads("\n".join(run("inspect", hf, "--json").out))
    assert len(told["tensors"]) == 11 * 9 + 3
    lines = [line.split() for line in run("inspect", hf).out]
    table = {words[0]: words[1:] for words in lines[[words[:1] for words in lines].index(["tensor"]) + 1 :]}
    assert len(table) == 9 + 3
    assert all(f"model.layers.{{0-10}}.{name}.weight" in table for name in ("mlp.down_proj", "input_layernorm"))
    down = [tensor for tensor in told["tensors"] if tensor["name"].endswith("mlp.down_proj.weight")]
    row = table["model.layers.{0-10}.mlp.down_proj.weight"]
    assert (row[0], row[1:4]) == ("bfloat16", [str(down[0]["shape"][0]), "x", str(down[0]["shape"][1])])
    assert row[4] == "11"
    assert float(row[5]) == round(sum(tensor["num_bytes"] for tensor in down) / 1000, 1)
    assert row[6:] == ["kB", down[0]["name"], "and", "10", "more"]


def test_names_are_never_cut() -> None:
    """In a narrow terminal names have lines of their own, and what goes into a file or a pipe has each on one line."""
    case = folder("opt_fr_0192")
    names = [tensor.name for tensor in inspect(case / "checkpoint", config=case).tensors if tensor.ignored is None]
    lines = run("inspect", case / "checkpoint", "--config", case).out
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in names)
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(render(inspect(case / "checkpoint", config=case)))
    narrow = console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    assert set(names) <= {*narrow.splitlines()}


def test_inspection_as_a_page(tmp_path: Path) -> None:
    """--html writes one page that needs nothing else, with every stored tensor and its first Hugging Face name."""
    page = tmp_path / "page.html"
    outcome = run("inspect", folder("td_0161") / "checkpoint", "--config", folder("td_0161"), "--html", page)
    assert (outcome.code, outcome.out, outcome.err) == (0, [f"wrote {page}"], [])
    parsed = Page(page)
    assert parsed.addresses == []
    for text in (
        "decoder.layers.mlp.linear_fc1.weight",
        "model.layers.0.mlp.gate_proj.weight and 7 more",
        "4 x 192 x 64",
    ):
        assert text in parsed.text
    outcome = run("inspect", folder("td_0161") / "checkpoint", "--html", tmp_path / "no" / "page.html")
    assert (outcome.code, outcome.out) == (1, [])
    assert outcome.err == [f"error: cannot write {tmp_path / 'no' / 'page.html'}: No such file or directory"]
