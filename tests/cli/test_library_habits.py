"""What users of the library bring from others: short reprs, bars in notebooks, names that agree, one logger, errors."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from absent_modules import WITHOUT
from plain_models import save_model

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.gather import progress

ROOT: Final = Path(dcm.__file__).parent
#: Name of a parameter of public functions -> the annotations that it has there.
PARAMETERS: Final = {
    # What is looked at; what tensors are read from; a Megatron checkpoint; a Hugging Face directory; what is written.
    "path": {"str | Path"},
    "source": {"str | Path", "str | Path | None"},
    "checkpoint": {"str | Path"},
    "hf": {"str | Path", "str | Path | None"},
    "root": {"str | Path"},
    "target": {"str | Path"},
    "a": {"str | Path"},
    "b": {"str | Path"},
    "kerchunk": {"str | Path | None"},
    # The configuration of a model in memory, or for what has lost its own; the model of an adapter.
    "config": {"MistralConfig", "GivenConfig | None", "GivenConfig"},
    "base": {"GivenConfig | None", "str | Path | None"},
    # Layouts.
    "layout": {"ParallelLayout", "ParallelLayout | None"},
    "tp": {"int"},
    "pp": {"int"},
    "ep": {"int"},
    "rank": {"int"},
    "padded_vocab_size": {"int | None"},
    "style": {"KeyStyle"},
    "spec": {"LayerSpec"},
    # Values. Where torch is not needed, a dtype is its name.
    "dtype": {"str | None", "torch.dtype | str | None"},
    "allow_lossy": {"bool"},
    "weights": {"str"},
    "weights_only": {"bool"},
    "iteration": {"int | None"},
    "merge_adapter": {"bool"},
    "lora_alpha": {"float | None"},
    "data": {"Mapping[str, Any] | Supplier | None", "Mapping[str, Mapping[str, Any] | Supplier] | None"},
    "distributed": {"bool"},
    # How.
    "output": {"Output"},
    "effort": {"Effort"},
    "ranks": {"Ranks"},
    # Live models.
    "model": {"AnyModel", "Given"},
    "sharded_state_dict": {"ShardedStateDict"},
    "device": {"torch.device | str | None"},
    "transformer_config": {"Mapping[str, Any]"},
    "perform_initialization": {"bool"},
    "to": {"Literal['all'] | int | Collection[int]"},
    "bucket_bytes": {"int | None"},
    "timeout": {"timedelta"},
    "seed": {"int"},
    "max_file_bytes": {"int"},
}
#: Public classes that users make of what functions take as well.
MADE: Final = ("HfFileSystem", "HfNamedReader", "LoadStrategy")


def public_functions() -> Iterator[tuple[str, ast.arguments]]:
    """Name and arguments of every public function, and of the classes in ``MADE``; nothing is imported for it."""
    stub = (ROOT / "__init__.pyi").read_text()
    for module, name in re.findall(r"^from \.([\w.]+) import (\w+) as \2$", stub, re.MULTILINE):
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                yield name, node.args
            if isinstance(node, ast.ClassDef) and node.name == name in MADE:
                (made,) = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
                yield name, made.args


def test_parameters_have_one_name_for_one_thing() -> None:
    """The table above has every parameter of the public functions with its annotations, and no others."""
    found: dict[str, set[str]] = defaultdict(set)
    functions = [*public_functions()]
    for _, arguments in functions:
        for argument in (*arguments.args, *arguments.kwonlyargs):
            if argument.arg != "self":
                found[argument.arg].add("" if argument.annotation is None else ast.unparse(argument.annotation))
    assert len(functions) > 25
    assert dict(found) == PARAMETERS


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many files, and its checkpoint."""
    where = tmp_path_factory.mktemp("library")
    dcm.from_hf(save_model(where / "hf", max_shard_size=1500), where / "ckpt")
    return where


def test_reprs_are_one_short_line(where: Path) -> None:
    """What a notebook shows of results, configurations, plans and open checkpoints; defaults are left out."""
    done = dcm.to_hf(where / "ckpt", where / "out")
    config = dcm.MistralConfig.from_hf(where / "hf")
    plan = dcm.plan_reading(where / "ckpt", dcm.ParallelLayout(tp=2))
    report = dcm.inspect(where / "ckpt")
    with dcm.open_checkpoint(where / "ckpt") as checkpoint:
        lazy = (checkpoint, checkpoint.lazy("model.norm.weight") if hasattr(checkpoint, "lazy") else None)
    results = [done, config, plan, plan.chunks, plan.groups, plan.total, report, report.tensors[0], *lazy]
    results += [dcm.check(where / "ckpt"), dcm.compare(where / "hf", where / "ckpt"), dcm.write_index(where / "ckpt")]
    results += [dcm.megatron_args(where / "ckpt"), dcm.Output(overwrite=True), dcm.Effort(workers=2)]
    for result in results:
        assert len(repr(result)) < 900, repr(result)
        assert "\n" not in repr(result)
    assert len(done.files) > 8
    assert f"files=<{len(done.files)} entries>" in repr(done)
    assert f"num_bytes={done.num_bytes}" in repr(done)
    assert repr(dcm.Output(overwrite=True)) == "Output(overwrite=True)"
    assert repr(dcm.Effort()) == "Effort()"
    assert repr(dcm.ParallelLayout(tp=2, pp=4)) == "ParallelLayout(tp=2, pp=4)"
    assert "sliding_window" not in repr(config)
    assert f"vocab_size={config.vocab_size}" in repr(config)


class Bar:
    """Stands for tqdm: notes what it was made with and what it was told."""

    made: Final[list[Bar]] = []

    def __init__(self, *, desc: str, total: int, **_: Any) -> None:  # noqa: ANN401
        """Begin with nothing."""
        self.desc, self.total, self.n, self.closed = desc, total, 0, False
        self.made.append(self)

    def update(self, num_bytes: int) -> None:
        """Add bytes."""
        self.n += num_bytes

    def close(self) -> None:
        """End."""
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """All bars that are shown from now on."""
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    Bar.made.clear()
    return Bar.made


def test_bars_in_a_notebook(bars: list[Bar], where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library call shows nothing in a script, and one bar for each phase in a notebook, which ends with its bytes."""
    dcm.to_hf(where / "ckpt", tmp_path / "quiet")
    assert bars == []
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress.in_notebook()
    done = dcm.to_hf(where / "ckpt", tmp_path / "out")
    copy = bars[0]
    assert (copy.desc, copy.total, copy.n) == ("copy", done.num_bytes, done.num_bytes)
    assert all(bar.closed and bar.n == bar.total for bar in bars)
    bars.clear()
    dcm.compare(where / "hf", where / "ckpt", effort=dcm.Effort(progress=dcm.Progress()))
    assert bars == []


def test_bars_where_they_are_asked_for(bars: list[Bar], where: Path) -> None:
    """``ProgressBar`` shows the phases anywhere; a phase that failed is closed by the next one."""
    assert dcm.compare(where / "hf", where / "ckpt", effort=dcm.Effort(progress=dcm.ProgressBar())).is_equal
    assert [(bar.desc, bar.closed) for bar in bars] == [("compare", True)]
    bar = dcm.ProgressBar()
    bar.phase("copy", 10)
    bar.phase("sync", 5)
    bar.advance(5)
    bar.advance(1)  # of a thread that comes late
    assert [(bar.desc, bar.closed, bar.n) for bar in bars[1:]] == [("copy", True, 0), ("sync", True, 5)]


#: What needs an optional package -> the package that its error names.
OPTIONAL: Final = {
    "dcm.export_weights": "torch",
    "dcm.sharded_state_dict": "torch",
    "dcm.HfNamedReader": "torch",
    "dcm.open_checkpoint(sys.argv[3])['model.norm.weight']": "torch",
    "ranks._in_process_group(0, 2, kind='rank')": "torch",
    "dcm.zarr_store": "zarr",
    "dcm.HfFileSystem": "fsspec",
    "dcm.inspect('gs://bucket/ckpt')": "obstore",
    "picture.require_matplotlib()": "matplotlib",
    "main.main(['generate', sys.argv[3], '--prompt', 'a', '--debug'])": "torch, megatron-core, transformers",
    "main.main(['verify', 'a', 'b', '--logits', '--debug'])": "torch, megatron-core, transformers",
}


def test_optional_packages_are_named_with_the_command_that_installs_them(where: Path) -> None:
    """Where a package is missing, everything that needs it raises our error, which is an ImportError too."""
    script = WITHOUT.partition("from dist_ckpt_mistral.cli.main")[0] + (
        "import dist_ckpt_mistral as dcm\n"
        "from dist_ckpt_mistral.analysis.picture import picture\n"
        "from dist_ckpt_mistral.cli import main\n"
        "from dist_ckpt_mistral.convert import ranks\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        eval(line)\n"
        "    except dcm.MissingLibraryError as error:\n"
        "        assert isinstance(error, ImportError)\n"
        "        print(error)\n"
        "    else:\n"
        "        print('no error:', line)\n"
    )
    absent = ["torch", "megatron", "transformers", "matplotlib", "obstore", "zarr", "fsspec"]
    arguments = [json.dumps([*OPTIONAL]), json.dumps(absent), str(where / "ckpt")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for (line, packages), said in zip(OPTIONAL.items(), done.stdout.splitlines(), strict=True):
        assert re.search(rf" needs {packages}(, [\w-]+)*, not installed here\. Run: .*\[[a-z0-9]+\]", said), (
            line,
            said,
        )


def test_one_logger() -> None:
    """Every module logs under its own name, below ``dist_ckpt_mistral``; none warns or prints past it."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                of_root = called in {f"logging.{name}" for name in ("debug", "info", "warning", "error", "exception")}
                if of_root or called == "warnings.warn" or ast.unparse(node) == "logging.getLogger()":
                    wrong.append(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert wrong == []


def test_notes_of_a_library_call_go_to_that_logger(
    where: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A call logs below ``dist_ckpt_mistral`` and writes to no stream; the root logger is left alone."""
    handlers = [*logging.getLogger().handlers]
    with caplog.at_level(logging.INFO, logger="dist_ckpt_mistral"):
        dcm.to_hf(where / "ckpt", tmp_path / "out")
    assert caplog.records
    assert {record.name.partition(".")[0] for record in caplog.records} == {"dist_ckpt_mistral"}
    assert tuple(capfd.readouterr()) == ("", "")
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dcm.Effort(workers=1.5),  # type: ignore[arg-type]
            "workers: expected a whole number from 0 to 4096 (threads; 0 is one per core), got 1.5",
        ),
        (
            lambda: dcm.Effort(workers=-1),
            "workers: expected a whole number from 0 to 4096 (threads; 0 is one per core), got -1",
        ),
        (
            lambda: dcm.Effort(memory_bytes="1GB"),  # type: ignore[arg-type]
            "memory_bytes: expected a whole number of at least 0 (bytes; 0 is the default), got '1GB'",
        ),
        (
            lambda: dcm.Effort(memory_bytes=-1),
            "memory_bytes: expected a whole number of at least 0 (bytes; 0 is the default), got -1",
        ),
        (
            lambda: dcm.Output(max_file_bytes="5GB"),  # type: ignore[arg-type]
            "max_file_bytes: expected a whole number of at least 1 (bytes), got '5GB'",
        ),
        (
            lambda: dcm.Output(max_file_bytes=True),
            "max_file_bytes: expected a whole number of at least 1 (bytes), got True",
        ),
        (
            lambda: dcm.ParallelLayout(tp=None),  # type: ignore[arg-type]
            "tp must be a whole number of at least 1, got None",
        ),
    ],
)
def test_numbers_are_whole_numbers(make: Callable[[], object], message: str) -> None:
    """Options that count something refuse anything else by name, before anything is started."""
    with pytest.raises(dcm.DistCkptMistralError, match=f"^{re.escape(message)}$"):
        make()
