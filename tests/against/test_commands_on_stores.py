"""Whatever a command prints and writes for a directory, it does for its URL: checkpoints of every kind of writer.

In memory, which goes the way that buckets go; some conversions then on servers for S3, GCS and Azure.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path

import genuine
import pytest
from command_line import run
from emulators import Emulator, azurite, gcs, moto
from object_servers import environment
from remote_folders import files_of, get_folder, put_folder

from dist_ckpt_mistral.storage.remote_path import forget_stores

pytestmark = pytest.mark.usefixtures("empty_stores")

#: One of each kind of writer and format: torch_dist, MoE, latent attention, zarr, legacy torch, DCP, a multimodal model
#: of Megatron-Bridge, and an adapter.
_CASES = (
    *("td_0123", "moe_grouped_0161", "mistral4_0192", "optzarr_0123", "legacy_moe_0192", "dcp_0192"),
    *("bridge_ministral3_0062", "lora_0062"),
)
_OLD_FORMATS = {*genuine.ZARR, *genuine.LEGACY, *genuine.FSDP}
#: What differs on purpose: times, the next command (other libraries open no URLs), and links, which stores do not have.
_TIMES = re.compile(r"[0-9.]+ s\b( \([^)]*/s\))?")
_LEFT_OUT = re.compile(r"[\w ]+ it with: |.* is a link, which a store does not have")


class Twins:
    """A genuine checkpoint in a directory and in a store, and what commands make of both."""

    def __init__(self, case: str, folder: Path, url: str) -> None:
        """Put the checkpoint into the store."""
        source = genuine.folder(case)
        config = source / "config.json"
        self._config = ["--config", str(config)] if config.exists() and case not in genuine.ADAPTERS else []
        self._places = (
            {"CKPT": str(source / "checkpoint"), "OUT": str(folder)},
            {"CKPT": put_folder(source / "checkpoint", f"{url}/{case}/checkpoint"), "OUT": f"{url}/made"},
        )
        self._folder, self._url = folder, f"{url}/made"

    def agree(self, *words: str, reads: str = "CKPT") -> int:
        """Run a command on both. What they print, and the files that they write, are the same. Returns their code."""
        told = []
        config = self._config if reads == "CKPT" else []
        for places in self._places:
            done = run(*(self._named(word, places) for word in words), *config)
            lines = [_TIMES.sub("T", line) for line in done.out + done.err if not _LEFT_OUT.match(line)]
            told.append((done.code, [self._hidden(line, places) for line in lines]))
        assert told[0] == told[1]
        assert get_folder(self._url) == files_of(self._folder)
        code: int = told[0][0]
        return code

    @staticmethod
    def _named(word: str, places: dict[str, str]) -> str:
        for name, place in places.items():
            word = re.sub(rf"^{name}\b", place, word)
        return word

    @staticmethod
    def _hidden(line: str, places: dict[str, str]) -> str:
        for name, place in places.items():
            line = line.replace(place, name)
        return line


@pytest.mark.parametrize("case", _CASES)
def test_every_command(case: str, tmp_path: Path) -> None:
    """Questions are answered, and models and checkpoints written, in the same words and the same bytes."""
    twins = Twins(case, tmp_path, "memory://bucket")
    for question in (("inspect", "CKPT"), ("verify", "CKPT"), ("plan", "CKPT", "--tp", "2"), ("megatron-args", "CKPT")):
        twins.agree(*question)
    if case in _OLD_FORMATS:
        assert twins.agree("migrate", "CKPT", "OUT/migrated") == 0
    assert twins.agree("to-hf", "CKPT", "OUT/hf") == 0
    assert twins.agree("verify", "OUT/hf", "CKPT") == 0
    twins.agree("from-hf", "OUT/hf", "OUT/back", "--tp", "2", "--pp", "2", reads="OUT")
    twins.agree("reshard", "CKPT", "OUT/cut", "--tp", "4")


def _server(kind: str, folder: Path) -> AbstractContextManager[Emulator]:
    return {"s3": lambda: moto("models3"), "gs": lambda: gcs("modelsgs"), "az": lambda: azurite("models", folder)}[
        kind
    ]()


@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
def test_conversions_on_servers(kind: str, tmp_path: Path) -> None:
    """Clients find the server by its usual variables, and what they write is, byte for byte, that of directories."""
    pytest.importorskip("obstore")
    (tmp_path / "out").mkdir()
    with _server(kind, tmp_path) as server, environment(server.environment, without=("AWS_PROFILE",)):
        forget_stores()
        assert server.url.startswith(f"{kind}://")
        twins = Twins("opt_fsms_0140", tmp_path / "out", server.url)
        assert twins.agree("to-hf", "CKPT", "OUT/hf") == 0
        assert twins.agree("from-hf", "OUT/hf", "OUT/back", "--tp", "2", "--pp", "2", reads="OUT") == 0
        assert twins.agree("reshard", "CKPT", "OUT/cut", "--tp", "2") == 0
        assert twins.agree("verify", "OUT/hf", "OUT/back", reads="OUT") == 0
