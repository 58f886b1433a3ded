"""``verify`` of one checkpoint or directory: a changed byte is found wherever it lies, and what it belongs to named.

Where bytes belong is asked of others: torch reads ``.metadata``, zipfile the archives, safetensors its own headers.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from command_line import run
from consolidated_models import DENSE, model_of, save_consolidated
from flipped_bytes import damaged, flip, some
from genuine import GENUINE, folder, shards, truth
from hf_models import megatron_tensors, random_model, saved
from plain_models import SIZES, contents
from safetensors import safe_open
from safetensors.torch import load_file
from torch_reading import hf_tensors, read_metadata

import dist_ckpt_mistral as dcm

MANIFEST: Final = "integrity.json"
CHECKSUMS: Final = "checksums.json"
#: Cases whose weights are stacked over layers, as ``megatron_tensors`` makes them.
STACKED: Final = ("td_0123", "td_0161", "td_0192", "common_0192", "fullpar_0192", "tied_tp2pp2_0161", "opt_fr_0192")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf`` in several files with a tokenizer, ``import`` of it, ``export`` of that."""
    where = tmp_path_factory.mktemp("pristine")
    saved(random_model(), where / "hf", max_shard_size=4000)
    (where / "hf" / "tokenizer.json").write_text('{"version": "1.0"}')
    dcm.from_hf(where / "hf", where / "import", tp=2, pp=2)
    dcm.to_hf(where / "import", where / "export")
    return where


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One chunk or object as torch describes it: where its archive lies, and its box if it is a chunk."""

    key: str
    file: str
    begin: int
    end: int
    box: tuple[slice, ...] | None

    def records(self, directory: Path) -> dict[str, zipfile.ZipInfo]:
        """The records of the archive, as zipfile lists them."""
        with zipfile.ZipFile(io.BytesIO((directory / self.file).read_bytes()[self.begin : self.end])) as archive:
            return {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def data(self, directory: Path) -> range:
        """The bytes of the file that are the tensor's data, or the object's pickle."""
        info = self.records(directory)["data.pkl" if self.box is None else "data/0"]
        header = (directory / self.file).read_bytes()[self.begin + info.header_offset :]
        begin = (
            self.begin + info.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        )
        return range(begin, begin + info.file_size)


def stored(directory: Path) -> list[Stored]:
    """Everything in a checkpoint."""
    metadata: Any = read_metadata(directory)
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in metadata.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    }
    return [
        Stored(
            key=index.fqn,
            file=at.relative_path,
            begin=at.offset,
            end=at.offset + at.length,
            box=None
            if index.offset is None
            else tuple(
                slice(low, low + size)
                for low, size in zip(index.offset, sizes[index.fqn, tuple(index.offset)], strict=True)
            ),
        )
        for index, at in metadata.storage_data.items()
    ]


def owners(hf: dict[str, torch.Tensor], sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Megatron's tensors, every element of which is the number of the Hugging Face tensor that it is from."""
    numbered = {name: torch.full(tensor.shape, float(number)) for number, (name, tensor) in enumerate(hf.items())}
    return megatron_tensors(numbered, sizes)


# What is sound


@pytest.mark.parametrize("case", GENUINE)
def test_genuine_checkpoints_are_sound(case: str) -> None:
    """Nothing is found in what Megatron wrote; with its own manifest, and where there is none that is said."""
    outcome = run("verify", folder(case) / "checkpoint", "--config", folder(case))
    assert (outcome.code, outcome.err) == (0, [])
    described: Any = read_metadata(shards(case)).state_dict_metadata
    count = sum(hasattr(entry, "chunks") and "optimizer" not in key for key, entry in described.items())
    assert f"checked: that all {count} tensors of the model are there" in outcome.out
    archives = {(each.file, each.begin): each for each in stored(shards(case))}.values()
    records = sum(len(each.records(shards(case))) for each in archives)
    common = shards(case) / "common.pt"
    records += len(zipfile.ZipFile(common).infolist()) if common.exists() else 0
    assert f"checked: {records} parts of files by their CRC-32" in outcome.out
    if case == "common_0192":
        assert "checked: 6 files by their SHA-256 in integrity.json" in outcome.out
    else:
        assert "not checked: all other bytes, for want of a sound checksums.json or integrity.json" in outcome.out
    assert outcome.out[-1] == f"no damage found: {shards(case)}"


def test_outputs_are_sound(pristine: Path) -> None:
    """Import and export are sound and checked in full; of the original it is said that nothing tells of its bytes."""
    for name, checked, count in (("import", "import/release", 9), ("export", "export", 21)):
        outcome = run("verify", pristine / name)
        assert (outcome.code, outcome.err) == (0, [])
        assert f"checked: that all {count} tensors of the model are there" in outcome.out
        assert f"checked: {len(contents(pristine / checked))} files by their CRC-32 in checksums.json" in outcome.out
        assert not any(line.startswith("not checked") for line in outcome.out)
    outcome = run("verify", pristine / "hf", "--json")
    told = json.loads("\n".join(outcome.out))
    assert (outcome.code, told["sound"], told["findings"]) == (0, True, [])
    assert told["not_checked"][-1] == "all other bytes, for want of a sound checksums.json or integrity.json"


# One byte


@pytest.mark.parametrize("case", [case for case in GENUINE if case != "common_0192"])
def test_data_of_genuine_checkpoints(case: str, tmp_path: Path) -> None:
    """Without any manifest, a changed byte of a tensor's or object's data is found and the tensor named."""
    directory = shutil.copytree(shards(case), tmp_path / "copy")
    for each in some(stored(directory), 8):
        data = each.data(directory)
        found = damaged(directory, each.file, data[len(data) // 3])
        assert each.key in found[-1]["tensor"]
        assert len(found) == 1 or (each.key, len(found)) == ("common_state/shard_0_1", 2)  # it cannot be read either


@pytest.mark.parametrize("case", STACKED)
def test_hugging_face_names(case: str, tmp_path: Path) -> None:
    """The Hugging Face tensors that the damaged chunk holds rows of are named, all of them and no others."""
    directory, hf = shutil.copytree(shards(case), tmp_path / "copy"), truth(case)
    config = json.loads((folder(case) / "config.json").read_bytes())
    by_key, names = owners(hf, SIZES | config), list(hf)
    for each in some([each for each in stored(directory) if each.key in by_key], 9):
        assert each.box is not None
        found = damaged(directory, each.file, each.data(directory)[-1], config=folder(case))
        expected = {names[int(number)] for number in set(by_key[each.key][each.box].flatten().tolist())}
        assert found[0]["tensor"] == each.key
        assert set(found[0]["hf_names"]) == expected


@pytest.mark.parametrize("case", ["moe_seq_0192", "te_moe_0192", "mistral4_0192", "singleton_0161", "nonhomog_0192"])
def test_names_are_those_that_a_comparison_finds(case: str, tmp_path: Path) -> None:
    """For experts, latent attention and other spellings: what then differs from the true tensors is what was named."""
    directory = shutil.copytree(shards(case), tmp_path / "copy")
    dcm.to_hf(directory, tmp_path / "hf", config=folder(case))
    weights = [each for each in stored(directory) if each.box is not None and "optimizer" not in each.key]
    for each in some(weights, 6):
        data = each.data(directory)
        [finding] = damaged(directory, each.file, data[0], config=folder(case))
        flip(directory / each.file, data[0])
        differences = dcm.compare(directory, tmp_path / "hf", config=folder(case)).differences
        flip(directory / each.file, data[0])
        assert finding["tensor"] == each.key
        assert {difference.name for difference in differences} <= set(finding["hf_names"])
        assert len(differences) == 1


def test_optimizer_state_goes_by_its_parameter(tmp_path: Path) -> None:
    """Damaged optimizer state is named with the Hugging Face tensors whose state it is."""
    directory = shutil.copytree(shards("opt_fr_0192"), tmp_path / "copy")
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    [each] = [each for each in stored(directory) if each.key == key]
    [finding] = damaged(directory, each.file, each.data(directory)[0], config=folder("opt_fr_0192"))
    assert (finding["tensor"], finding["hf_names"]) == (key, ("model.norm.weight",))


def test_every_region_of_an_import(pristine: Path, tmp_path: Path) -> None:
    """One byte of any file of an import: of data, headers, pickles, directories, metadata, config or tokenizer."""
    root = shutil.copytree(pristine / "import", tmp_path / "import")
    directory = root / "release"
    hf = hf_tensors(pristine / "hf")
    by_key, names = owners(hf, SIZES), list(hf)
    chunks = [each for each in stored(directory) if each.box is not None]
    for each in some(chunks, 12):
        found = damaged(directory, each.file, each.data(directory)[7])
        assert each.box is not None
        expected = {names[int(number)] for number in set(by_key[each.key][each.box].flatten().tolist())}
        assert (found[0]["tensor"], set(found[0]["hf_names"])) == (each.key, expected)
    heads = [
        each.begin + info.header_offset + at for info in chunks[0].records(directory).values() for at in (0, 14, 28)
    ]
    ends = [chunks[0].end - at for at in (1, 10, 22, 60, 100, 200)]
    for position in (*heads, *ends):
        damaged(directory, chunks[0].file, position)
    for name, content in contents(directory).items():
        for position in some(range(len(content)), 12):
            damaged(directory, name, position)
    for position in some(range((directory / CHECKSUMS).stat().st_size), 40):
        assert CHECKSUMS in damaged(directory, CHECKSUMS, position)[0]["what"]
    for position in range(len("release")):
        assert (
            "latest_checkpointed_iteration.txt"
            in damaged(root, "latest_checkpointed_iteration.txt", position)[0]["what"]
        )
    assert dcm.check(root).is_sound


def test_every_region_of_an_export(pristine: Path, tmp_path: Path) -> None:
    """One byte of any file of an export: of headers, data, index, config or tokenizer; of data, the tensor is named."""
    directory = shutil.copytree(pristine / "export", tmp_path / "export")
    for path in directory.glob("*.safetensors"):
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        with safe_open(path, "pt") as file:
            spans = {name: json.loads(content[8:begin])[name]["data_offsets"] for name in file.keys()}  # noqa: SIM118
        for name, (low, high) in spans.items():
            for position in (begin + low, begin + high - 1):
                found = damaged(directory, path.name, position)
                assert [finding["tensor"] for finding in found] == [name, None]
                assert found[0]["hf_names"] == (name,)
        for position in some(range(begin), 20):
            assert all(finding["tensor"] is None for finding in damaged(directory, path.name, position))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json", CHECKSUMS):
        for position in some(range((directory / name).stat().st_size), 40):
            damaged(directory, name, position)
    assert dcm.check(directory).is_sound


def test_what_is_said_of_a_damaged_byte(pristine: Path, tmp_path: Path) -> None:
    """File, Megatron's and Hugging Face's name, and sums stand in one line; the exit code is 3, in JSON too."""
    root = shutil.copytree(pristine / "import", tmp_path / "import")
    [each] = [each for each in stored(root / "release") if each.key == "decoder.final_layernorm.weight"]
    data = each.data(root / "release")
    flip(root / "release" / each.file, data[0])
    outcome = run("verify", root)
    assert (outcome.code, outcome.err) == (3, [])
    where = f"{each.file}: {each.key} (model.norm.weight): bytes {data[0]} to {data[-1] + 1} have the CRC-32 "
    assert outcome.out[0].startswith(where)
    assert outcome.out[1].startswith(f"{each.file}: CRC-32 ")
    assert outcome.out[-1] == f"DAMAGED, 2 findings: {root / 'release'}"
    outcome = run("verify", root, "--json")
    told = json.loads("\n".join(outcome.out))
    assert (outcome.code, told["sound"], len(told["findings"])) == (3, False, 2)
    assert told["findings"][0]["hf_names"] == ["model.norm.weight"]
    flip(root / "release" / each.file, data[0])
    flip(root / "release" / each.file, each.begin + 5)  # the flags of a local header
    [line] = [line for line in run("verify", root).out if line.startswith("__")]
    assert line.endswith("(checksums.json); the data of all tensors in it are as they were")


# More than a byte


def test_missing_short_and_unlisted_files(pristine: Path, tmp_path: Path) -> None:
    """Files that are gone or cut short are named with what they held; files that nothing tells of are mentioned."""
    root = shutil.copytree(pristine / "import", tmp_path / "import")
    directory = root / "release"
    held = [each.key for each in stored(directory) if each.file == "__3_0.distcp"]
    (directory / "__2_0.distcp").unlink()
    (directory / "hf" / "tokenizer.json").unlink()
    with (directory / "__3_0.distcp").open("r+b") as file:
        file.truncate(1)
    (directory / "notes.txt").write_text("mine")
    outcome = run("verify", root)
    assert outcome.code == 3
    for name in ("__2_0.distcp", "hf/tokenizer.json"):
        assert f"{name}: it is missing, but checksums.json names it" in outcome.out
    [truncated] = [line for line in outcome.out if line.startswith("__3_0.distcp: ") and "is truncated" in line]
    assert {*truncated.removeprefix("__3_0.distcp: ").partition(" (")[0].split(", ")} == {*held}
    assert truncated.endswith(f"got 1 ({len(held)} pieces)")
    assert "not checked: files that checksums.json does not list: notes.txt" in outcome.out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": "md5"}, "algorithm in {path}: expected 'sha256', got 'md5'"),
        ({"files": ["config.json"]}, "{path} is damaged: expected names with a SHA-256 under 'files'"),
        ({"files": {"config.json": "00"}}, "{path} is damaged"),
        ({"files": {"../hf/config.json": "0" * 64}}, "{path} names '../hf/config.json': expected files beside it"),
        ({"files": {"/etc/passwd": "0" * 64}}, "{path} names '/etc/passwd': expected files beside it"),
        ({"crc32": {"model.norm.weight": 5}}, "{path} is damaged"),
        ({"files": {"x" * 5000: "0" * 64}}, "xxx: it is missing, but integrity.json names it"),
        ({"files": {"\ud800\n": "0" * 64}}, "\\ud800 : it is missing, but integrity.json names it"),
        ({"crc32": {"model.norm.bias": "0" * 8}}, "integrity.json: model.norm.bias: no file holds it"),
    ],
)
def test_a_manifest_that_is_none(changes: dict[str, object], expected: str, pristine: Path, tmp_path: Path) -> None:
    """A manifest that says anything else than what one can say is a finding, and nothing outside is opened."""
    directory = tmp_path / "export"
    dcm.to_hf(pristine / "import", directory, output=dcm.Output(checksums=False, sha256=True))
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))
    outcome = run("verify", directory)
    assert outcome.code == 3
    assert any(expected.replace("{path}", str(path)) in line for line in outcome.out), outcome


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": "md5"}, "algorithm in {path}: expected 'crc32', got 'md5'"),
        ({"files": ["config.json"]}, "{path} is damaged: expected objects under 'files' and 'tensors'"),
        ({"files": {"config.json": "00000000"}}, "{path} is damaged: expected 'bytes' and 'crc32' of every file"),
        ({"files": {"config.json": {"bytes": True, "crc32": "0" * 8}}}, "{path} is damaged: expected 'bytes' and"),
        ({"files": {"config.json": {"bytes": 5, "crc32": "0"}}}, "{path} is damaged: expected a CRC-32 of eight"),
        (
            {"files": {"../hf/config.json": {"bytes": 5, "crc32": "0" * 8}}},
            "{path} names '../hf/config.json': expected",
        ),
        ({"tensors": {"model.norm.bias": "0" * 8}}, "checksums.json: model.norm.bias: no file holds it"),
        ({"tensors": {"model.norm.weight": 5}}, "{path} is damaged: expected a CRC-32 of eight hexadecimal digits"),
        ({"files": {"x" * 500: {"bytes": 0, "crc32": "0" * 8}}}, "xxx: it is missing, but checksums.json names it"),
    ],
)
def test_checksums_that_are_none(changes: dict[str, object], expected: str, pristine: Path, tmp_path: Path) -> None:
    """A list of checksums that says anything else than what one can say is a finding, though its own sum is right."""
    directory = shutil.copytree(pristine / "export", tmp_path / "export")
    path = directory / CHECKSUMS
    text = json.dumps(json.loads(path.read_bytes()) | changes | {"crc32_of_this_file": "0" * 8}).encode()
    own = f'{zlib.crc32(text):08x}"}}'.encode()
    path.write_bytes(text[: -len(own)] + own)
    outcome = run("verify", directory)
    assert outcome.code == 3
    assert any(expected.replace("{path}", str(path)) in line for line in outcome.out), outcome


def test_both_lists_agree(pristine: Path, tmp_path: Path) -> None:
    """A damaged byte contradicts both lists of checksums, and what each says stands in one line."""
    dcm.to_hf(pristine / "import", tmp_path / "export", output=dcm.Output(sha256=True))
    assert dcm.check(tmp_path / "export").is_sound
    found = damaged(tmp_path / "export", "config.json", 5)
    assert len(found) == 1 or "invalid JSON" in found[0]["what"]
    assert re.fullmatch(
        r"CRC-32 .{8}: expected .{8} \(checksums.json\); SHA-256 .{16}\.\.\.: expected .{16}\.\.\. \(integrity.json\)",
        found[-1]["what"],
    )


def test_one_model_has_no_logits_to_compare(pristine: Path) -> None:
    """``--logits`` needs two models."""
    outcome = run("verify", pristine / "hf", "--logits")
    assert outcome.code == 2
    assert outcome.err[-1].endswith("--logits compares two models: give B")


def test_mistrals_own_files(tmp_path: Path) -> None:
    """Mistral AI's own rendering is checked in the same way, and damage named in both renderings' names."""
    save_consolidated(model_of(DENSE), tmp_path / "hf", tmp_path / "own")
    assert run("verify", tmp_path / "own").code == 0
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "own").iterdir()}
    name = "layers.1.attention.wq.weight"
    crc32 = zlib.crc32(
        load_file(tmp_path / "own" / "consolidated.safetensors")[name].view(torch.uint8).numpy().tobytes()
    )
    manifest = {"algorithm": "sha256", "files": files, "crc32": {name: f"{crc32:08x}"}}
    (tmp_path / "own" / MANIFEST).write_text(json.dumps(manifest))
    assert run("verify", tmp_path / "own").code == 0
    manifest["crc32"] = {name: f"{crc32 ^ 1:08x}"}
    (tmp_path / "own" / MANIFEST).write_text(json.dumps(manifest))
    outcome = run("verify", tmp_path / "own")
    assert outcome.code == 3
    assert f"consolidated.safetensors: {name} (model.layers.1.self_attn.q_proj.weight): bytes " in outcome.out[0]
