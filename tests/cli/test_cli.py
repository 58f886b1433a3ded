"""The command line as a user meets it: what it prints, what it needs, what it leaves alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from absent_modules import WITHOUT, without
from command_line import Outcome, refusal, run, tree, without_time
from genuine import folder, shards, truth
from hf_models import random_model, saved
from pages import Page
from plain_models import contents
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch_reading import described, hf_tensors, read_metadata

from dist_ckpt_mistral.analysis.report import inspect
from dist_ckpt_mistral.analysis.report_table import render
from dist_ckpt_mistral.cli.main import main
from dist_ckpt_mistral.convert import migrate
from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.messages import human_bytes

HEAVY = [
    *("numpy", "torch", "megatron", "rich", "transformers", "safetensors", "huggingface_hub", "tqdm", "ml_dtypes"),
    "matplotlib",
]
COMMANDS = [
    *("from-hf", "to-hf", "describe", "plan", "reshard", "migrate", "inspect", "verify", "generate", "megatron-args"),
    "demo",
]


def test_help_imports_nothing_heavy() -> None:
    """No --help waits for numpy, torch, rich or the like; each says what it is about. The first needs even less."""
    commands = [["--help"], *([command, "--help"] for command in COMMANDS)]
    done = without([], commands)
    assert [code for code, _, _ in done] == [0] * len(commands)
    for (command, *_), (_, out, modules) in zip(commands, done, strict=True):
        assert modules.isdisjoint(HEAVY)
        assert out.startswith("usage: dist-ckpt-mistral" + ("" if command == "--help" else f" {command}"))
    assert all(command in done[0][1] for command in COMMANDS)
    assert done[0][2].isdisjoint({"ast", "dataclasses", "lazy_loader", "logging", "pathlib", "tomllib"})


#: What only copying needs, and what only converted values, Megatron-Bridge's files and tables need.
COPYING = {"concurrent", "hashlib"} | {
    f"dist_ckpt_mistral.{module}" for module in ("convert.output", "gather.execute", "formats.torch_dist.writer")
}
RARE = {"ml_dtypes", "yaml", "lazy_loader", "tomllib", "difflib", "tempfile"} | {
    f"dist_ckpt_mistral.formats.{module}" for module in ("legacy_torch", "legacy_zarr", "rank_optimizer", "torch_dcp")
}


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        (["inspect", "CKPT"], COPYING | RARE),
        (["inspect", "CKPT", "--json"], COPYING | RARE | {"rich"}),
        (["plan", "CKPT", "--tp", "2", "--json"], {"dist_ckpt_mistral.gather.execute", *RARE, "rich"}),
        (["to-hf", "CKPT", "OUT", "--dry-run"], RARE | {"rich"}),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_commands_import_what_they_use(command: list[str], unused: set[str], tmp_path: Path) -> None:
    """Quick commands do not wait for the import of libraries and rooms that others need."""
    places = {"CKPT": str(folder("td_0192") / "checkpoint"), "OUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in command]
    ((code, _, modules),) = without([], [[*arguments, "--config", str(folder("td_0192"))]])
    assert code == 0
    assert modules.isdisjoint(unused | {*HEAVY} - {"numpy", "rich", "ml_dtypes"})


def test_importing_the_package_imports_nothing_heavy() -> None:
    """``import dist_ckpt_mistral`` costs nothing; every public name is there, those of Megatron's side aside."""
    script = "import sys, json, dist_ckpt_mistral as d; print(json.dumps([list(sys.modules), d.__all__, dir(d)]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    modules, public, listed = json.loads(done.stdout)
    assert set(HEAVY).isdisjoint(modules)
    assert {"from_hf", "to_hf", "open_checkpoint", "MistralConfig", "sharded_state_dict"} <= set(public) <= set(listed)
    on_megatrons_side = {"sharded_state_dict", "optimizer_state_dict", "add_hf_metadata"}
    on_megatrons_side |= {"build_model", "load_model", "load_weights", "initialize_megatron"}
    on_megatrons_side |= {"export_weights", "save_hf", "load", "LoadStrategy"}
    names = [name for name in public if name not in on_megatrons_side]
    script = f"import dist_ckpt_mistral as d; [getattr(d, name).__doc__ for name in {names}]"
    subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, check=True, timeout=60)


def test_help_is_quick() -> None:
    """A process for --help takes less than 0.3 s of processor time, whatever else the machine is doing."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "dist_ckpt_mistral", "--help"], capture_output=True, check=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.3


def test_numpy_starts_no_threads() -> None:
    """Commands import numpy without OpenBLAS's threads, and leave the environment as it was; a given number holds."""
    script = "import os; from dist_ckpt_mistral.libraries import import_numpy; before = dict(os.environ); "
    script += "import_numpy(); print(len(os.listdir('/proc/self/task')), before == dict(os.environ))"
    unset = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    threads = {}
    for given in ({}, {"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_NUM_THREADS": "2"}):
        done = subprocess.run(
            [sys.executable, "-c", script], env=unset | given, capture_output=True, text=True, check=True, timeout=60
        )
        threads[given.get("OPENBLAS_NUM_THREADS")], same = done.stdout.split()
        assert same == "True"
    assert threads == {None: "1", "1": "1", "2": str(min(2, len(os.sched_getaffinity(0))))}


def test_conversions_need_neither_torch_nor_megatron(tmp_path: Path) -> None:
    """Import, export, conversion, comparison and inspection run where torch, megatron and transformers are absent."""
    ckpt, config = str(folder("td_0192") / "checkpoint"), str(folder("td_0192"))
    hf, again, back, half, cut = (str(tmp_path / name) for name in ("hf", "again", "back", "half", "cut"))
    zarr, migrated = str(folder("zarr_ckpt") / "checkpoint"), str(tmp_path / "migrated")
    (tmp_path / "root").mkdir()
    commands = [
        ["to-hf", ckpt, hf, "--config", config],
        ["describe", hf, str(tmp_path / "root")],
        ["from-hf", hf, again, "--tp", "2"],
        ["to-hf", again, back],
        ["to-hf", again, half, "--dtype", "float16"],
        ["reshard", again, cut, "--tp", "4"],
        ["verify", ckpt, cut],
        ["verify", ckpt, back],
        ["verify", cut],
        ["verify", back],
        ["inspect", ckpt, "--config", config, "--json"],
        ["migrate", zarr, migrated],
        ["verify", zarr, migrated, "--config", config],
        ["inspect", zarr, "--config", config, "--json"],
        ["inspect", hf, "--html", str(tmp_path / "page.html")],
    ]
    absent = ["torch", "megatron", "transformers", "safetensors", "mistral_common", "tensorstore", "zarr"]
    done = without(absent, commands)
    assert [code for code, _, _ in done] == [0] * len(commands)
    assert contents(Path(back)) == contents(Path(hf))
    assert described(load_file(Path(hf) / "model.safetensors")) == described(truth("td_0192"))
    halves = {name: tensor.half() for name, tensor in truth("td_0192").items()}
    assert described(load_file(Path(half) / "model.safetensors")) == described(halves)


def test_what_is_absent_is_really_absent() -> None:
    """The test above means something: there, torch cannot be imported."""
    script = WITHOUT.replace("for command in", "import torch\nfor command in")
    done = subprocess.run(
        [sys.executable, "-c", script, "[]", '["torch"]'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr


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


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("tohf", "a", "b"), "Did you mean to-hf?"),
        (("to-hf", "a", "b", "--memroy=3"), "unrecognized arguments: --memroy=3. Did you mean --memory?"),
        (("to-hf", "a", "b", "--foo"), "unrecognized arguments: --foo"),
        (("to-hf", "a", "b", "--dtype", "bfloat61"), "Did you mean bfloat16?"),
        (("to-hf", "a", "b", "--max-file-size", "5"), "expected a size with its unit, such as 5GB or 5B, got '5'"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(
    words: tuple[str, ...], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown commands, options and values get the nearest one there is, and the usage of their command."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    usage, *_, last = capsys.readouterr().err.splitlines()
    assert (ended.value.code, last[-len(answer) :]) == (2, answer)
    assert ("to-hf" in usage) == (words[0] == "to-hf")


def test_common_options_may_stand_first(capsys: pytest.CaptureFixture[str]) -> None:
    """``--debug`` and ``-q`` work before the command as behind it, and -V shows the version."""
    for words in (("--debug", "-q", "inspect", "nowhere"), ("inspect", "nowhere", "-q", "--debug")):
        with pytest.raises(FormatError, match="there is no such directory"):
            main(words)
    with pytest.raises(SystemExit):
        main(["-V"])
    assert capsys.readouterr().out.startswith("dist-ckpt-mistral ")


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


def test_a_dry_run_writes_nothing_and_tells_everything(tmp_path: Path) -> None:
    """--dry-run leaves the disk alone and tells the very files and sizes that the real run then writes."""
    case = shutil.copytree(folder("td_0192"), tmp_path / "case")
    before = tree(tmp_path)
    arguments = ("to-hf", case / "checkpoint", tmp_path / "hf", "--config", case, "--max-file-size", "100kB")
    dry = run(*arguments, "--dry-run")
    assert dry.code == 0
    assert tree(tmp_path) == before
    wet = run(*arguments)
    assert wet.code == 0
    assert dry.out[0] == without_time(wet.out[0]).replace("wrote", "would write")
    assert without_time(wet.out[0]) == (
        f"wrote 39 tensors (410.4 kB) in 5 files to {tmp_path / 'hf'}; "
        "17 stored entries are not weights and stayed behind; "
        "dropped embedding.word_embeddings.weight[250:256], output_layer.weight[250:256]: rows that pad the vocabulary"
    )
    written = {path.name: path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")}
    assert dry.out[1:] == [f"  {name}  {human_bytes(size)}" for name, size in sorted(written.items())]
    assert json.loads("\n".join(run(*arguments[:2], tmp_path / "new", *arguments[3:], "--dry-run", "--json").out))[
        "files"
    ] == dict(sorted(written.items()))
    (tmp_path / "hf" / "precious").touch()
    assert "exists" in refusal(tmp_path, *arguments, "--dry-run")
    assert run(*arguments, "--dry-run", "--overwrite").code == 0
    assert (tmp_path / "hf" / "precious").exists()


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("4000B", 4000),
        ("4kB", 4000),
        ("4KiB", 4096),
        ("4.5 k", 4500),
        ("0.0045MB", 4500),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_told_in_any_unit(size: str, num_bytes: int, tmp_path: Path) -> None:
    """Decimal and binary units, with and without B: files are cut as transformers cuts them at so many bytes."""
    from_hf(saved(random_model(torch.float32), tmp_path / "original"), tmp_path / "ckpt")
    arguments = ("to-hf", tmp_path / "ckpt", tmp_path / "hf", "--dtype", "bfloat16", "--max-file-size", size)
    assert run(*arguments, "--workers", 3, "--memory", "1MiB", "--no-sync").code == 0
    expected = saved(random_model(), tmp_path / "expected", max_shard_size=num_bytes)
    assert contents(tmp_path / "hf") == contents(expected)


def test_what_the_operating_system_refuses_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path and reason, not Python's numbers; what was added on the way is a sentence of its own."""
    line = run("inspect", "x" * 300).err[-1]
    assert re.fullmatch(r"error: cannot use x{300}\S*: File name too long", line)

    def fail(*_: object, **__: object) -> None:
        error = FormatError("cannot open it: Permission denied")
        error.add_note("Nothing was published.")
        raise error

    monkeypatch.setattr(migrate, "migrate", fail)
    line = run("migrate", tmp_path, tmp_path / "new").err[-1]
    assert line == "error: cannot open it: Permission denied. Nothing was published."


def test_urls_are_not_taken_for_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL of another kind than stores' is refused, rather than written into a new directory called ``ftp:``."""
    monkeypatch.chdir(tmp_path)
    zarr = shards("zarr_ckpt")
    for command in (("migrate", zarr), ("to-hf", zarr, "--config", folder("zarr_ckpt"))):
        outcome = run(*command[:2], "ftp://host/out", *command[2:])
        assert outcome.code == 1
        assert "the output ftp://host/out is a URL of a kind that cannot be written" in outcome.err[-1]
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "ftp:").mkdir()
    assert run("migrate", zarr, "ftp:/out").code == 0


def test_the_version_is_told() -> None:
    """--version is the one that pyproject.toml finds in the code, and that of the package where it is installed."""
    root = Path(__file__).parents[2]
    source = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    (version,) = re.findall(source["pattern"], (root / source["path"]).read_text())
    assert run("--version") == Outcome(code=0, out=[f"dist-ckpt-mistral {version}"], err=[])
    with contextlib.suppress(metadata.PackageNotFoundError):
        assert metadata.version("dist-ckpt-mistral") == version


@pytest.mark.parametrize("command", [["inspect"], ["plan"], ["verify", "ckpt"], ["megatron-args"]])
def test_one_rank_speaks(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun the first rank alone answers, and its lines end without blanks; the others are silent."""
    monkeypatch.chdir(tmp_path)
    from_hf(saved(random_model(), tmp_path / "hf"), tmp_path / "ckpt")
    first = run(*command, "ckpt")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    second = run(*command, "ckpt")
    assert (first.code, second) == (0, Outcome(code=0, out=[], err=[]))
    assert first.out
    assert [line for line in first.out if line != line.rstrip()] == []


def test_notes_go_to_stderr_and_results_to_stdout(tmp_path: Path) -> None:
    """Which configuration was used, and that no tokenizer came along, are notes; with -q one sentence is all."""
    outcome = run("to-hf", folder("td_0161") / "checkpoint", tmp_path / "hf", "--config", folder("td_0161"))
    assert outcome.err == [
        f"configuration: the given configuration {folder('td_0161') / 'config.json'}",
        "no tokenizer came with the checkpoint: give a Hugging Face directory with --config to add one",
    ]
    assert without_time(outcome.out[0]).startswith(f"wrote 39 tensors (410.4 kB) in 1 file to {tmp_path / 'hf'}; ")
    outcome = run("from-hf", tmp_path / "hf", tmp_path / "ckpt", "--iteration", 3, "-q")
    assert (outcome.code, outcome.err) == (0, [])
    assert [*map(without_time, outcome.out)] == [f"wrote 39 tensors (410.4 kB) in 1 file to {tmp_path / 'ckpt'}"]


def test_a_process_ends_with_the_exit_code(tmp_path: Path) -> None:
    """``python -m dist_ckpt_mistral`` hands on the exit code; stderr is one line, without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "dist_ckpt_mistral", "inspect", tmp_path / "none"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none'} is not ")
    assert done.stderr.endswith(": there is no such directory. Check the name.\n")
    assert done.stderr.count("\n") == 1


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """Many small files are written under a limit of open files that can be raised, and read under one that cannot."""
    original = saved(random_model(num_hidden_layers=64), tmp_path / "original")
    script = (
        "import resource, sys; from dist_ckpt_mistral.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, int(sys.argv[1]))); "
        "sys.exit(main(sys.argv[2:]))"
    )
    ckpt, back = tmp_path / "ckpt", tmp_path / "back"
    commands: list[list[str | Path]] = [
        ["1000", "from-hf", original, ckpt, "--tp", "2", "--pp", "64"],
        ["48", "to-hf", ckpt, back],
        ["48", "verify", ckpt, ckpt],
    ]
    for arguments in commands:
        subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True, timeout=120)
    assert len(list((ckpt / "release").glob("*.distcp"))) == 128
    assert contents(back) == contents(original)


#: Exports, but stops for ever at the fifth write. Shells have what they run in the background ignore interrupts.
STALLED = """
import signal, sys, time
from dist_ckpt_mistral.cli import main as cli; from dist_ckpt_mistral.storage import local
signal.signal(signal.SIGINT, signal.default_int_handler)
write, calls = local.TargetFile.write, []
def stalling(*arguments):
    calls.append(arguments)
    if len(calls) == 5:
        print("stalled", flush=True)
        for _ in range(600):  # a signal that comes just before one sleep is noticed after it
            time.sleep(0.1)
    write(*arguments)
local.TargetFile.write = stalling
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_stopped_can_be_resumed(number: signal.Signals, tmp_path: Path) -> None:
    """Terminated or interrupted in the middle of writing, it says how to go on and exits with 130; that works."""
    case = shutil.copytree(folder("td_0161"), tmp_path / "case")
    before = tree(tmp_path)
    paths: list[str | Path] = [case / "checkpoint", tmp_path / "hf", "--config", case]
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, "to-hf", *paths, "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stalled\n"
        assert len(tree(tmp_path)) > len(before)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = f"--resume continues what is kept in {tmp_path / '.hf.incomplete'}."
    assert err.splitlines()[-1] == f"interrupted: Nothing was published. {kept}"
    assert {name: each for name, each in tree(tmp_path).items() if not name.startswith(".hf")} == before
    assert run("to-hf", *paths, "--resume").code == 0
    assert run("to-hf", *paths[:1], tmp_path / "expected", *paths[2:]).code == 0
    assert contents(tmp_path / "hf") == contents(tmp_path / "expected")
    assert not (tmp_path / ".hf.incomplete").exists()
