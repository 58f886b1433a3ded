"""checksums.json, and integrity.json where asked for, beside all outputs: right for others, complete, never stale."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from genuine import folder, shards
from hf_models import random_model, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import contents
from rank_threads import on_ranks
from safetensors.torch import load_file

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.gather.digest import digest
from dist_ckpt_mistral.gather.execute import Effort
from dist_ckpt_mistral.storage import local, sources
from dist_ckpt_mistral.storage.local import Span
from dist_ckpt_mistral.storage.sources import Sources

MANIFEST = "integrity.json"
CHECKSUMS = "checksums.json"
HASHED = dcm.Output(sha256=True)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf`` as transformers saves it in several files with a small file more, its import, and the export of that."""
    where = tmp_path_factory.mktemp("outputs")
    saved(random_model(), where / "hf", max_shard_size=4000)
    (where / "hf" / "tokenizer.json").write_text("{}")
    dcm.from_hf(where / "hf", where / "ckpt", tp=2, pp=2, output=HASHED)
    dcm.to_hf(where / "ckpt", where / "export", output=HASHED)
    dcm.reshard(where / "ckpt", where / "cut", dcm.ParallelLayout(tp=4), output=HASHED)
    return where


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest in a directory."""
    content: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
    return content


def everything_in(directory: Path) -> dict[str, bytes]:
    """The content of all files in a directory but integrity.json, by name."""
    own = {CHECKSUMS: (directory / CHECKSUMS).read_bytes()} if (directory / CHECKSUMS).exists() else {}
    return contents(directory) | own


def sha256(files: dict[str, bytes]) -> dict[str, str]:
    """What hashlib says of contents, by name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@pytest.mark.parametrize("output", ["ckpt/release", "cut/release", "export"])
def test_every_file_is_listed(output: str, outputs: Path) -> None:
    """The manifest tells of every file but itself, in folders too, what hashlib says of it."""
    manifest = manifest_of(outputs / output)
    assert manifest["algorithm"] == "sha256"
    assert manifest["files"] == sha256(everything_in(outputs / output))
    small = {"config.json", "tokenizer.json"} if output == "export" else {"hf/tokenizer.json", ".metadata", "common.pt"}
    assert small < set(manifest["files"])


@pytest.mark.parametrize("output", ["ckpt/release", "cut/release", "export"])
def test_every_file_has_a_crc32(output: str, outputs: Path) -> None:
    """checksums.json has size and CRC-32, as zlib computes it, of all files but itself and integrity.json."""
    told = json.loads((outputs / output / CHECKSUMS).read_bytes())
    assert told["algorithm"] == "crc32"
    assert told["files"] == {
        name: {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        for name, content in contents(outputs / output).items()
    }


def test_every_tensor_of_an_export_has_a_crc32(outputs: Path) -> None:
    """An export also tells the CRC-32 of every tensor, as zlib computes it from what safetensors loads."""
    files = [load_file(path) for path in (outputs / "export").glob("*.safetensors")]
    assert json.loads((outputs / "export" / CHECKSUMS).read_bytes())["tensors"] == {
        name: f"{zlib.crc32(tensor.view(torch.uint8).numpy().tobytes()):08x}"
        for file in files
        for name, tensor in file.items()
    }


def test_files_are_not_read_again_for_a_crc32(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --sha256 no data file of the output is opened to be read."""
    opened: list[Path] = []

    def open_to_read(path: Path, *arguments: Sources | None) -> int:
        opened.append(path)
        return local_open(path, *arguments)

    local_open = sources.open_to_read
    monkeypatch.setattr(local, "open_to_read", open_to_read)
    dcm.to_hf(outputs / "ckpt", tmp_path / "export")
    dcm.from_hf(outputs / "hf", tmp_path / "ckpt")
    written = [path.name for path in opened if tmp_path in path.parents]
    assert {"config.json", ".metadata"} < set(written)
    assert not [name for name in written if name.endswith((".safetensors", ".distcp"))]


def test_a_changed_digit_of_its_own_is_found(outputs: Path, tmp_path: Path) -> None:
    """Any changed byte of checksums.json is a finding about that file, and about no other."""
    copy = shutil.copytree(outputs / "export", tmp_path / "export", ignore=shutil.ignore_patterns(MANIFEST))
    content = (copy / CHECKSUMS).read_bytes()
    digits = [match.start() for match in re.finditer(rb'[0-9a-f]"', content)]
    for at in (0, 40, content.index(b" "), *digits[:3], digits[-1], len(content) - 1):
        changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (copy / CHECKSUMS).write_bytes(changed)
        findings = dcm.check(copy).findings
        assert len(findings) == 1
        assert CHECKSUMS in str(findings[0])


@pytest.mark.megatron
@pytest.mark.parametrize("root", ["ckpt", "cut"])
def test_megatron_verifies_it(root: str, outputs: Path, tmp_path: Path) -> None:
    """megatron-core's own verification accepts a new checkpoint, and refuses it once any listed file has changed."""
    validation = pytest.importorskip("megatron.core.dist_checkpointing.validation")
    if not hasattr(validation, "verify_integrity_manifest"):
        pytest.skip("this megatron-core knows no integrity.json")
    dcm.reshard(outputs / root, tmp_path / "copy", dcm.ParallelLayout(tp=2), output=HASHED)
    step = tmp_path / "copy" / "release"
    validation.verify_integrity_manifest(str(step))
    for name in ("hf/config.json", "__1_0.distcp", ".metadata"):
        content = (step / name).read_bytes()
        (step / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(Exception, match=f"failed for 1 file.*\n *{name}: hash mismatch"):
            validation.verify_integrity_manifest(str(step))
        (step / name).write_bytes(content)


def test_it_has_the_form_of_megatrons_own(outputs: Path) -> None:
    """The manifest of a checkpoint has the keys of a genuine one and nothing else."""
    genuine = manifest_of(shards("common_0192"))
    assert manifest_of(outputs / "ckpt" / "release").keys() == genuine.keys()


def test_none_is_carried_on(outputs: Path, tmp_path: Path) -> None:
    """The manifest of an export tells of nothing else: import, --config and reshard leave the old one behind."""
    altered = tmp_path / "altered"
    dcm.to_hf(outputs / "ckpt", altered, output=dcm.Output(max_file_bytes=10**6, sha256=True))
    (altered / "tokenizer.json").write_text("[]")  # so its manifest is stale now
    dcm.from_hf(altered, tmp_path / "ckpt")
    assert not [*(tmp_path / "ckpt" / "release" / "hf").glob(MANIFEST), *(tmp_path / "ckpt").glob(f"*/hf/{CHECKSUMS}")]
    for more in ([], ["--config", altered]):
        assert run("to-hf", tmp_path / "ckpt", tmp_path / "out", *more, "--overwrite", "--sha256").code == 0
        own = {CHECKSUMS: (tmp_path / "out" / CHECKSUMS).read_bytes()}
        assert manifest_of(tmp_path / "out")["files"] == sha256(contents(altered) | own)
    dcm.reshard(
        shards("common_0192"), tmp_path / "cut", dcm.ParallelLayout(), config=folder("common_0192"), output=HASHED
    )
    assert manifest_of(tmp_path / "cut")["files"] == sha256(everything_in(tmp_path / "cut"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file beside the shards whose name is no text is listed, found again, and named when it is gone."""
    step = shutil.copytree(shards("td_0161"), tmp_path / "old")
    name = os.fsdecode(b"caf\xe9")
    (step / name).write_text("of Latin-1 times")
    dcm.reshard(step, tmp_path / "new", dcm.ParallelLayout(), config=folder("td_0161"), output=HASHED)
    assert manifest_of(tmp_path / "new")["files"] == sha256(everything_in(tmp_path / "new"))
    (tmp_path / "new" / name).unlink()
    outcome = run("verify", tmp_path / "new", "--config", folder("td_0161"))
    message = r"caf\udce9: it is missing, but checksums.json names it"
    assert (outcome.code, outcome.out[0]) == (3, message)


def test_it_can_be_left_out(outputs: Path, tmp_path: Path) -> None:
    """With --no-checksums no command writes any, also where the source has some; all else is the same."""
    without = {
        "ckpt": ["from-hf", outputs / "hf", tmp_path / "ckpt", "--tp", "2", "--pp", "2"],
        "export": ["to-hf", outputs / "ckpt", tmp_path / "export"],
        "cut": ["reshard", outputs / "ckpt", tmp_path / "cut", "--tp", "4"],
    }
    for name, command in without.items():
        assert run(*command, "--no-checksums").code == 0
        assert contents(tmp_path / name) == contents(outputs / name)
        assert [*(tmp_path / name).rglob(MANIFEST), *(tmp_path / name).rglob(CHECKSUMS)] == []


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_write_the_same(outputs: Path, tmp_path: Path, world_size: int) -> None:
    """However many ranks share the copying and the reading, the checksums are those of one process, byte for byte."""
    export, ckpt = tmp_path / "export", tmp_path / "ckpt"
    on_ranks(world_size, lambda ranks: dcm.to_hf(outputs / "ckpt", export, ranks=ranks, output=HASHED))
    on_ranks(world_size, lambda ranks: dcm.from_hf(outputs / "hf", ckpt, tp=2, pp=2, ranks=ranks, output=HASHED))
    for name in ("export", "ckpt/release"):
        for file in (MANIFEST, CHECKSUMS):
            assert (tmp_path / name / file).read_bytes() == (outputs / name / file).read_bytes()


@settings(max_examples=30)
@given(st.lists(st.integers(0, 100_000), max_size=12), st.integers(0, 3))
def test_digests_are_those_of_hashlib_and_zlib(sizes: list[int], gap: int) -> None:
    """Whatever spans of a file are asked for, also across many blocks of 64 KiB, empty or apart, sums are right."""
    content = random_bytes(sum(sizes) + gap * len(sizes) + 70_000)
    ends = [*itertools.accumulate(size + gap for size in sizes)]
    spans = [Span(end - size, size) for end, size in zip(ends, sizes, strict=True)]
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        effort = Effort(workers=1, memory_bytes=1)
        assert effort.band_bytes() == 64 << 10
        found = digest(Path(file.name), spans, sha256=True, effort=effort)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.crc32 == zlib.crc32(content)
    assert found.spans == tuple(zlib.crc32(content[low : low + size]) for low, size in spans)
    assert found.num_bytes == len(content)


def random_bytes(count: int) -> bytes:
    """Bytes that differ from place to place."""
    return (
        torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    )
