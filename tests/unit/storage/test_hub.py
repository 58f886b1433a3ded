"""Models on the hub: every command that takes a Hugging Face directory takes a hub id, and fetches what it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import run
from consolidated_models import save_consolidated
from fake_hub import FakeHub
from hf_models import random_model, saved
from plain_models import contents
from safetensors.torch import load_file

from dist_ckpt_mistral.storage import hub as hub_module
from dist_ckpt_mistral.storage.remote_path import RemotePath

SMALL = {"config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """Repositories: a model in two revisions, in both renderings, in Mistral AI's alone, an adapter, and GGUF files."""
    folder = tmp_path_factory.mktemp("hub")
    saved(random_model(), folder / "main")
    saved(random_model(num_hidden_layers=1), folder / "v1")
    (folder / "main" / "pytorch_model.bin").write_bytes(b"never")
    save_consolidated(random_model(), folder / "both", folder / "own")
    for name in ("consolidated.safetensors", "params.json"):
        shutil.copy(folder / "own" / name, folder / "both")
    for name in ("adapter", "gguf"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter" / "adapter_model.bin")
    (folder / "gguf" / "config.json").write_text("{}")
    (folder / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    repositories = {name: {"main": folder / name} for name in ("both", "own", "adapter", "gguf")}
    repositories["plain"] = {"main": folder / "main", "v1": folder / "v1"}
    with FakeHub(repositories={f"org/{name}": each for name, each in repositories.items()}).serving() as serving:
        yield serving


@pytest.mark.parametrize(
    ("name", "revision", "weights"),
    [
        ("org/plain", "main", {"model.safetensors"}),
        ("org/plain@v1", "v1", {"model.safetensors"}),
        ("https://huggingface.co/org/plain", "main", {"model.safetensors"}),
        ("https://huggingface.co/org/plain/tree/v1", "v1", {"model.safetensors"}),
        ("org/both", "main", {"model.safetensors"}),
        ("org/own", "main", {"consolidated.safetensors"}),
    ],
)
def test_what_is_fetched(name: str, revision: str, weights: set[str], hub: FakeHub, tmp_path: Path) -> None:
    """Of the weights one rendering, transformers' own if there is one, by ranges and without a copy in the cache.

    The small files are downloaded, and the model is that of the revision.
    """
    done = hub.run(tmp_path / "home", "from-hf", name, tmp_path / "ckpt")
    assert done.returncode == 0, done.stderr
    original = hub.repositories[f"org/{name.split('org/')[1].split('@', maxsplit=1)[0].split('/', maxsplit=1)[0]}"][
        revision
    ]
    large = {"pytorch_model.bin", "consolidated.safetensors", "model.safetensors"}
    assert sorted(hub.downloaded) == sorted({file.name for file in original.iterdir()} - large)
    assert {name for name, _ in hub.ranges} == weights
    fetched, num_bytes = sum(size for _, size in hub.ranges), sum((original / name).stat().st_size for name in weights)
    assert fetched < num_bytes + (300 << 10)  # and what small reads fetch around the headers
    assert not [*(tmp_path / "home").rglob("*.safetensors")]
    assert run("to-hf", tmp_path / "ckpt", tmp_path / "out").code == 0
    true = original if "model.safetensors" in weights else original.parent / "both"
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, value in load_file(true / "model.safetensors").items():
        assert torch.equal(exported[tensor], value), tensor


def test_every_command_takes_a_hub_id(hub: FakeHub, tmp_path: Path) -> None:
    """Looking, comparing, checking, exporting and asking for flags: a hub id is as good as the directory."""
    original, home = hub.repositories["org/plain"]["main"], tmp_path / "home"
    assert run("from-hf", original, tmp_path / "ckpt").code == 0
    by_id = hub.run(home, "megatron-args", "org/plain")
    assert (by_id.returncode, by_id.stdout.splitlines()) == (0, run("megatron-args", original).out)
    assert {*hub.downloaded} == SMALL  # config.json tells the dtype
    equal = hub.run(home, "verify", "org/plain", tmp_path / "ckpt")
    assert (equal.returncode, equal.stdout[:5]) == (0, "equal")
    assert not hub.downloaded
    assert {name for name, _ in hub.ranges} == {"model.safetensors"}
    assert "no damage found" in hub.run(home, "verify", "org/plain").stdout
    told = json.loads(hub.run(home, "inspect", "org/plain", "--json").stdout)
    assert {each["name"] for each in told["tensors"]} == {*load_file(original / "model.safetensors")}
    exported = hub.run(tmp_path / "other", "to-hf", tmp_path / "ckpt", tmp_path / "out", "--config", "org/plain")
    assert exported.returncode == 0, exported.stderr
    assert {*hub.downloaded} == SMALL
    names = {"model.safetensors", *SMALL}
    assert {name: data for name, data in contents(original).items() if name in names} == contents(tmp_path / "out")


def test_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """Offline the cache has what was downloaded by ``hf download``, and the rest is refused in one line.

    Online it is read from the cache, too, and the weights are not fetched.
    """
    home = tmp_path / "home"
    for name, out in (("org/both", "ckpt"), ("org/own", "own")):
        hub.download(home, name)
        assert hub.run(home, "from-hf", name, tmp_path / out).returncode == 0
        assert (hub.downloaded, hub.ranges) == ([], [])
        again = hub.run(home, "verify", name, tmp_path / out, offline=True)
        assert (again.returncode, again.stdout[:5], hub.downloaded) == (0, "equal", []), again.stderr
    refused = hub.run(home, "inspect", "org/plain", offline=True)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("error: org/plain is neither a directory nor a model that the hub provides: ")


def test_addresses_that_expire_and_the_token(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address of weights is asked for again when it is too old, and the token is told to the hub alone."""
    monkeypatch.setattr(hub, "uses_of_an_address", 1)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for tokens in hub.tokens.values():
        tokens.clear()
    done = hub.run(tmp_path / "home", "verify", "org/plain", hub.repositories["org/plain"]["main"])
    assert (done.returncode, done.stdout[:5]) == (0, "equal"), done.stderr
    assert len(hub.ranges) > 1
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "weights": {None}}


def test_flags_name_the_tokenizer_on_the_hub() -> None:
    """Megatron gets a hub id, which it can open, and no URL."""
    assert hub_module.name_for_libraries(RemotePath("hf:", "org", "name@0123")) == "org/name"
    assert hub_module.name_for_libraries(Path("a/b")) == "a/b"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/adapter", "it holds an adapter of PEFT"),
        ("org/gguf", "GGUF files, of quantized weights (model-Q4_K_M.gguf)"),
        ("org/none", "org/none is neither a directory nor a model that the hub provides: "),
        ("org/none", "If you are trying to access a private or gated repo, make sure you are authenticated"),
        ("org/plain@v2", "org/plain@v2 is neither a directory nor a model that the hub provides: "),
        ("org/plain@v2", "Revision Not Found"),
    ],
)
def test_what_the_hub_has_not(name: str, expected: str, hub: FakeHub, tmp_path: Path) -> None:
    """A repository of another kind is refused by its list of files, before any weights are downloaded."""
    refused = hub.run(tmp_path / "home", "from-hf", name, tmp_path / "ckpt")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert expected in refused.stderr
    assert {*hub.downloaded} <= {"adapter_config.json", "config.json"}


@pytest.mark.parametrize(
    "name",
    ["ckpt/iter_0000012", "ckpt/release", "hf/config.json", "hf/model.safetensors", "../hf", "a/b/c", "a", "a/b@"],
)
def test_paths_are_no_hub_ids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path is not asked of the hub where it shows that it is one."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert hub_module.model_directory(name) == Path(name)
