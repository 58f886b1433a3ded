"""Libraries that are not installed: one error of this package's own, with the command that installs them, truly."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest
from command_line import run
from genuine import folder
from packaging.requirements import Requirement

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral import libraries

#: Uses every public name, and what only works with a library; prints what was raised, where modules are absent.
PROBE: Final = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in json.loads(sys.argv[1])):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.analysis.picture import picture

case = Path(sys.argv[2])
ckpt = dict(config=case)

def read():
    with dcm.open_checkpoint(case / "checkpoint", **ckpt) as checkpoint:
        return [checkpoint[name] for name in checkpoint]

def draw():
    picture.save_picture(dcm.plan_reading(case / "checkpoint", dcm.ParallelLayout(), **ckpt), Path("plan.svg"))

names = json.loads(sys.argv[3])
uses = {name: lambda name=name: getattr(dcm, name) for name in names} | {"tensors": read, "picture": draw}
found = {}
for name, use in uses.items():
    try:
        use()
    except dcm.MissingLibraryError as error:
        assert isinstance(error, ImportError) and isinstance(error, dcm.DistCkptMistralError)
        found[name] = str(error)
print(json.dumps([found, dir(dcm), dcm.__all__]))
"""
#: What help() does with a module, and what a star means.
ALL: Final = """
import pydoc
import dist_ckpt_mistral as dcm
print(pydoc.render_doc(dcm, renderer=pydoc.plaintext))
from dist_ckpt_mistral import *
"""
MEGATRON: Final = {
    *("add_hf_metadata", "build_model", "export_weights", "initialize_megatron", "load_model", "load_weights"),
    *("load", "LoadStrategy"),
    *("optimizer_state_dict", "save_hf", "sharded_state_dict"),
}


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        (["torch", "megatron", "transformers", "matplotlib"], MEGATRON | {"tensors", "picture", "HfNamedReader"}),
        pytest.param(["megatron.core"], MEGATRON, marks=pytest.mark.megatron),
        pytest.param(["matplotlib"], {"picture"}, marks=pytest.mark.megatron),
        pytest.param(["megatron.core.parallel_state"], MEGATRON, marks=pytest.mark.megatron),
    ],
    ids=["plain install", "no megatron-core", "no matplotlib", "half of megatron-core"],
)
def test_the_library_in_a_plain_install(absent: list[str], expected: set[str], tmp_path: Path) -> None:
    """What needs an absent library says so, by our own class, with the command; all else works, and is listed."""
    names = [*public_names()]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(absent), folder("td_0192"), json.dumps(names)],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, listed, starred = json.loads(done.stdout)
    zarr = {"zarr_store", "ZarrStore"} if find_spec("zarr") is None else set()
    assert set(found) == expected | zarr
    if absent != ["megatron.core.parallel_state"]:  # of a library that is installed, only the import tells
        assert listed == starred == sorted(set(names) - set(found))
    if "torch" in absent:
        assert found["HfNamedReader"].startswith("dist_ckpt_mistral.HfNamedReader needs torch, not installed here.")
        assert found["load"].startswith("dist_ckpt_mistral.load needs torch, megatron-core, not installed here.")
    for name, message in found.items():
        extra = "plot" if name == "picture" else "views" if name in zarr else "megatron"
        assert message.partition(" needs ")[0].removeprefix("dist_ckpt_mistral.") in {
            name,
            "reading a tensor",
            "a picture",
        }
        assert f"[{extra}]" in message.partition("not installed here. Run: ")[2]


def public_names() -> list[str]:
    """All names of the stub."""
    stub = Path(dcm.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    return re.findall(r" as (\w+)$", stub, re.MULTILINE)


def test_all_of_it_in_a_plain_install() -> None:
    """``help`` and ``import *`` do not fail for want of a library that the user may not need."""
    absent = "import sys; sys.modules |= dict.fromkeys(('torch', 'megatron', 'zarr', 'transformers'))"
    done = subprocess.run(
        [sys.executable, "-c", absent + ALL], capture_output=True, text=True, check=False, timeout=120
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "open_checkpoint(source: 'str | Path'" in done.stdout
    assert "load_model(" not in done.stdout.partition("FUNCTIONS")[2]


def test_what_a_library_needs_in_turn() -> None:
    """A module that a library itself lacks is named, and chained; what is no import goes its own way."""
    with (
        pytest.raises(
            dcm.MissingLibraryError, match=r"^this needs no_such_module, not installed here\. Run: "
        ) as caught,
        libraries.needed("this", "json", extra="plot"),
    ):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401, PLC0415
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(KeyError), libraries.needed("this", extra="plot"):
        raise KeyError


@pytest.mark.parametrize("command", [["generate", "x", "--prompt", "a"], ["verify", "a", "b", "--logits"]])
def test_the_command_line(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands say all that is missing at once, before they look at anything else."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    outcome = run(*command)
    assert (outcome.code, outcome.out, len(outcome.err)) == (1, [], 1)
    assert "needs torch, megatron-core, transformers" in outcome.err[0]


WHEEL: Final = "file:///home/a%20b/dist_ckpt_mistral-0.1.0-py3-none-any.whl"
RECORD: Final = "dist_ckpt_mistral-0.1.0.dist-info"
GIT: Final = {"vcs": "git", "requested_revision": "main", "commit_id": "0123abc"}


@pytest.fixture(scope="module")
def package_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this package, which the first process that imports it there compiles for all."""
    site = tmp_path_factory.mktemp("libraries") / "site"
    shutil.copytree(Path(str(dcm.__file__)).parent, site / "dist_ckpt_mistral", ignore=shutil.ignore_patterns("__pyc*"))
    return site


@pytest.fixture
def site(package_alone: Path) -> Iterator[Path]:
    """The same with an empty record of its installation."""
    (package_alone / RECORD).mkdir()
    yield package_alone
    shutil.rmtree(package_alone / RECORD)


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        (None, None),
        ({"url": WHEEL, "archive_info": {"hashes": {"sha256": "00"}}}, WHEEL),
        ({"url": "https://example.org/x.tar.gz", "archive_info": {}}, "https://example.org/x.tar.gz"),
        ({"url": "https://example.org/x.git", "vcs_info": GIT}, "git+https://example.org/x.git@0123abc"),
        (
            {"url": "ssh://git@example.org/x", "vcs_info": GIT, "subdirectory": "a/b"},
            "git+ssh://git@example.org/x@0123abc#subdirectory=a/b",
        ),
        ({"url": "file:///home/x", "dir_info": {}}, "file:///home/x"),
    ],
)
@pytest.mark.parametrize("installer", ["pip\n", "uv", None])
def test_the_command_that_installs(
    origin: dict[str, object] | None, url: str | None, installer: str | None, site: Path
) -> None:
    """By the record of the installer (PEP 610): an index, a wheel, an archive, a repository, a directory."""
    record = site / RECORD
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: dist-ckpt-mistral\nVersion: 0.1.0\n")
    if origin is not None:
        (record / "direct_url.json").write_text(json.dumps(origin))
    if installer is not None:
        (record / "INSTALLER").write_text(installer)
    words = installed_by(site)
    program = [sys.executable, "-m", "pip", "install"]
    assert words[:-1] == (["uv", "pip", "install", "--python", sys.executable] if installer == "uv" else program)
    requirement = Requirement(words[-1])
    assert (requirement.name, requirement.extras, requirement.url) == ("dist-ckpt-mistral", {"plot"}, url)


def test_the_command_that_installs_in_a_checkout(tmp_path: Path) -> None:
    """A checkout, installed or only on the path, is installed from where it lies; another project's folder is not."""
    checkout = tmp_path / "a b"
    shutil.copytree(Path(str(dcm.__file__)).parent, checkout / "dist_ckpt_mistral")
    shutil.copy(Path(__file__).parents[3] / "pyproject.toml", checkout)
    assert installed_by(checkout) == [sys.executable, "-m", "pip", "install", "-e", f"{checkout}[plot]"]
    (checkout / "pyproject.toml").write_text('[project]\nname = "something-else"\n')
    assert str(checkout) not in " ".join(installed_by(checkout))


def installed_by(site: Path) -> list[str]:
    """The words of the command that the package in ``site`` tells for matplotlib."""
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.modules['matplotlib'] = None\n"
        "from dist_ckpt_mistral.analysis.picture import picture; picture.require_matplotlib()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=site, timeout=60
    )
    line = done.stderr.splitlines()[-1]
    assert "a picture needs matplotlib, not installed here. Run: " in line
    return shlex.split(line.partition("Run: ")[2])
