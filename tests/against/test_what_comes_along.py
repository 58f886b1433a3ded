"""Tokenizers, configurations and other small files that come along with the weights, also from the hub."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import mistral_common
import pytest
import torch
from genuine import folder
from hf_models import random_model, saved
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from plain_models import contents
from transformers import AutoModelForCausalLM

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import FormatError


def test_the_tokenizer_of_mistral_common_comes_along(tmp_path: Path) -> None:
    """Mistral's own tokenizer files arrive byte for byte, say the same tokens, and the model the same to them."""
    data = Path(mistral_common.__file__).with_name("data")
    original = saved(random_model(vocab_size=131_072, hidden_size=8), tmp_path / "original")
    shutil.copy(data / "tekken_240911.json", original / "tekken.json")
    shutil.copy(data / "mistral_instruct_tokenizer_241114.model.v7", original / "tokenizer.model.v7")
    from_hf(original, tmp_path / "ckpt")
    to_hf(tmp_path / "ckpt", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(original)
    text = "Le mistral est un vent; c'est aussi 7 milliards de paramètres."
    told = []
    for directory in (original, tmp_path / "exported"):
        tokenizer = MistralTokenizer.from_file(str(directory / "tekken.json")).instruct_tokenizer.tokenizer
        tokens = tokenizer.encode(text, bos=True, eos=False)
        model = AutoModelForCausalLM.from_pretrained(directory)
        told.append((tokens, model(torch.tensor([tokens])).logits))
    assert told[0][0] == told[1][0]
    assert len(told[0][0]) > 10
    assert torch.equal(told[0][1], told[1][1])


def test_small_files_come_from_the_config_directory(tmp_path: Path) -> None:
    """With --config DIR its tokenizer and other small files are exported; weights of other formats are not."""
    trained = shutil.copytree(folder("td_0161") / "checkpoint", tmp_path / "trained")
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(folder("td_0161") / "config.json", given)
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "README.md"):
        (given / name).write_text(f"content of {name}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "old.gguf", ".gitattributes"):
        (given / name).write_text("weights")
    to_hf(trained, tmp_path / "exported", config=given)
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "checksums.json",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
    ]
    assert (tmp_path / "exported" / "tokenizer.json").read_text() == "content of tokenizer.json"


def test_what_is_too_large_to_travel_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of more than 256 MiB beside the weights stays behind, and a warning says which."""
    original = saved(random_model(), tmp_path / "original")
    (original / "tokenizer.json").write_text("{}")
    (original / "huge.dat").touch()
    os.truncate(original / "huge.dat", (256 << 20) + 1)
    from_hf(original, tmp_path / "ckpt")
    assert "too large to travel inside the checkpoint, left behind: huge.dat" in caplog.text
    carried = [path.name for path in (tmp_path / "ckpt" / "release" / "hf").iterdir()]
    assert sorted(carried) == ["config.json", "generation_config.json", "tokenizer.json"]


def test_a_given_config_wins_over_the_remembered_one(tmp_path: Path) -> None:
    """With --config FILE that is what is exported, and the checkpoint's other small files still come along."""
    original = saved(random_model(), tmp_path / "original")
    from_hf(original, tmp_path / "ckpt")
    given = json.loads((original / "config.json").read_bytes()) | {"rms_norm_eps": 0.125}
    (tmp_path / "given.json").write_text(json.dumps(given))
    done = to_hf(tmp_path / "ckpt", tmp_path / "exported", config=tmp_path / "given.json")
    assert done.config_from == f"the given configuration {tmp_path / 'given.json'}"
    assert json.loads((tmp_path / "exported" / "config.json").read_bytes()) == given
    assert {name: content for name, content in contents(tmp_path / "exported").items() if name != "config.json"} == {
        name: content for name, content in contents(original).items() if name != "config.json"
    }


def test_a_hub_id_goes_through_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no path is asked of huggingface_hub, for its small files alone; weights that lie there are read there."""
    original = saved(random_model(), tmp_path / "original")
    asked = []

    def download(repo_id: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert revision is None
        asked.append((repo_id, ignore_patterns))
        return str(original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    from_hf("mistralai/Mistral-7B-v0.3", tmp_path / "ckpt")
    ((repo_id, ignored),) = asked
    assert repo_id == "mistralai/Mistral-7B-v0.3"
    wanted = [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "config.json",
        "tokenizer.model.v3",
        "tekken.json",
    ]
    left = ["consolidated.safetensors", "pytorch_model-00001-of-00002.bin", "model.gguf"]
    filtered = filter_repo_objects([*wanted, *left], ignore_patterns=ignored)
    assert list(filtered) == wanted[2:]
    to_hf(tmp_path / "ckpt", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(original)


def test_an_unknown_hub_id_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no directory and not on the hub is refused with what the hub says; other names never leave."""

    def download(repo_id: str, **_: object) -> str:
        raise LocalEntryNotFoundError(f"no {repo_id} in the cache\nand more to read")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    says = r"^nobody/nothing is neither a directory nor .*: no nobody/nothing in the cache and more to read$"
    with pytest.raises(FormatError, match=says):
        from_hf("nobody/nothing", tmp_path / "ckpt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FormatError, match="there is no such directory"):
        from_hf("no/such/directory", tmp_path / "ckpt")
    with pytest.raises(FormatError, match=r"it is empty\. Give the directory that has the files\.$"):
        from_hf(tmp_path, tmp_path.parent / "ckpt")
