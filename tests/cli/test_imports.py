"""What commands import and need, and how soon they begin: nothing that only others use."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from absent_modules import WITHOUT, without
from genuine import folder, truth
from plain_models import contents
from safetensors.torch import load_file
from torch_reading import described

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
