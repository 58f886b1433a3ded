"""A .metadata that contradicts itself, the files or the configuration is refused with the tensor and the value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from spoilable import FC1, NORM, entry_of, set_entry
from torch_reading import edited_metadata

FC2 = "decoder.layers.mlp.linear_fc2.weight"


def test_missing_and_unknown_tensors_are_all_listed(genuine: Path, tmp_path: Path) -> None:
    """Two tensors gone, one under another name, one too many: one line names the four."""
    with edited_metadata(genuine) as metadata:
        described = metadata.state_dict_metadata
        del described["output_layer.weight"], described["decoder.layers.mlp.linear_fc2.weight"]
        described["decoder.layers.mlp.linear_fc9.weight"] = described.pop(FC1)
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == FC1:
                metadata.storage_data[type(index)("decoder.layers.mlp.linear_fc9.weight", index.offset)] = info
            if index.fqn not in described:
                del metadata.storage_data[index]
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert f"3 tensors are missing: {FC1}, decoder.layers.mlp.linear_fc2.weight, output_layer.weight" in line
    assert "1 tensor is unknown to the table: decoder.layers.mlp.linear_fc9.weight [4, 192, 64]" in line


def drop_chunk(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Leave one chunk out of the description and of the storage."""
    chunk = metadata.state_dict_metadata[FC1].chunks.pop(3)
    metadata.storage_data = {
        index: info
        for index, info in metadata.storage_data.items()
        if (index.fqn, index.offset) != (FC1, chunk.offsets)
    }


def drop_storage(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Describe a chunk and say nowhere where it is."""
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != NORM}


def double_chunk(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Describe a chunk twice."""
    metadata.state_dict_metadata[FC1].chunks.append(metadata.state_dict_metadata[FC1].chunks[0])


def move_chunk(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Let a chunk begin one row too early: it overlaps its neighbour, and leaves a gap behind itself."""
    chunk = next(chunk for chunk in metadata.state_dict_metadata[FC1].chunks if chunk.offsets[1] == 48)
    index, info = next(
        (index, info)
        for index, info in metadata.storage_data.items()
        if (index.fqn, index.offset) == (FC1, chunk.offsets)
    )
    del metadata.storage_data[index]
    chunk.offsets = torch.Size([chunk.offsets[0], 47, 0])
    metadata.storage_data[type(index)(FC1, chunk.offsets)] = info


def move_outside(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Let the tensor end before its last chunk does."""
    metadata.state_dict_metadata[NORM].size = torch.Size([64])
    metadata.state_dict_metadata[NORM].chunks[0].offsets = torch.Size([1])
    info = entry_of(metadata, NORM)
    index = next(index for index in metadata.storage_data if index.fqn == NORM)
    del metadata.storage_data[index]
    metadata.storage_data[type(index)(NORM, torch.Size([1]))] = info


def swap_entries(metadata: Any) -> None:  # noqa: ANN401  (torch's record)
    """Let a chunk point to the archive of another."""
    entry_of(metadata, NORM).__dict__.update(vars(entry_of(metadata, FC1)))


def set_size(size: object) -> Callable[[Any], None]:
    """An edit of the shape of the final norm."""
    return lambda metadata: setattr(metadata.state_dict_metadata[NORM], "size", size)


def set_dtype(dtype: torch.dtype) -> Callable[[Any], None]:
    """An edit of the dtype of the final norm."""
    return lambda metadata: setattr(metadata.state_dict_metadata[NORM].properties, "dtype", dtype)


def test_all_chunks_that_are_wrong_are_listed(genuine: Path, tmp_path: Path) -> None:
    """One line tells of gaps and overlaps in several tensors, or of chunks stored nowhere and described twice."""
    whole = (genuine / ".metadata").read_bytes()
    arguments = ("to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    with edited_metadata(genuine) as metadata:
        gone = [metadata.state_dict_metadata[FC2].chunks.pop(number).offsets for number in (5, 2)]
        metadata.storage_data = {
            index: info
            for index, info in metadata.storage_data.items()
            if (index.fqn, index.offset) not in {(FC2, offset) for offset in gone}
        }
        move_chunk(metadata)
    line = refusal(tmp_path, *arguments)
    assert all(repr(key) in line for key in (FC1, FC2))
    assert line.count("nothing is stored for") == 3
    assert line.count("2 boxes overlap") == 1
    (genuine / ".metadata").write_bytes(whole)
    with edited_metadata(genuine) as metadata:
        drop_storage(metadata)
        double_chunk(metadata)
        metadata.state_dict_metadata[FC1].chunks.append(metadata.state_dict_metadata[FC1].chunks[1])
        first, second = (list(chunk.offsets) for chunk in metadata.state_dict_metadata[FC1].chunks[:2])
    line = refusal(tmp_path, *arguments)
    assert f"chunks of {NORM!r}: 1 stored nowhere, at [0]" in line
    assert f"chunks of {FC1!r}: 2 described more than once, at {first}, {second}" in line


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (drop_chunk, (repr(FC1), "nothing is stored for [")),
        (drop_storage, (repr(NORM), "stored nowhere")),
        (double_chunk, (repr(FC1), "1 described more than once, at [")),
        (move_chunk, (repr(FC1), "47:48", "overlap")),
        (move_outside, (repr(NORM), "[1:65] lies outside the tensor of shape [64]")),
        (swap_entries, (repr(NORM), "__", "expected float32 [64], got bfloat16 [1, 48, 64]")),
        (set_entry(relative_path="../__0_0.distcp"), ("'../__0_0.distcp'", "expected the plain name of a file")),
        (set_entry(relative_path="/etc/passwd"), ("'/etc/passwd'", "expected the plain name of a file")),
        (set_entry(relative_path=".."), ("'..'", "expected the plain name of a file")),
        (set_entry(relative_path=""), ("''", "expected the plain name of a file")),
        (set_entry(relative_path=7), ("file 7:", "expected the plain name of a file")),
        (set_entry(relative_path="nul\0name"), ("error: ",)),
        (set_entry(offset=-1), (".metadata", "-1")),
        (set_entry(offset=True), (".metadata", "True")),
        (set_entry(offset=2**58), ("truncated", "expected at least 2882303761517")),
        (set_entry(offset=2**62), (".metadata", "it places an archive at 46116860184")),
        (set_entry(length=0), (repr(NORM), "truncated")),
        (set_entry(length=100), (repr(NORM), "not a torch.save archive, or it is truncated")),
        (set_entry(offset=64), (repr(NORM), "at byte 64 of")),
        (set_entry(transform_descriptors=["zstd"]), ("transformed data (['zstd'])", "not supported")),
        (set_size(torch.Size([65])), (NORM, "expected [64], got [65]")),
        (set_size(torch.Size([64, 1])), (repr(NORM), "a chunk", "has 1 axes, the tensor has 2")),
        (set_size([64]), (".metadata", "expected sizes, got [64]")),
        (set_size((64.0,)), (".metadata", "expected sizes, got (64.0,)")),
        (set_size(None), (".metadata", "expected sizes, got None")),
        (set_dtype(torch.complex64), (repr(NORM), "unknown dtype", "got 'complex64'")),
        (set_dtype(torch.float16), (repr(NORM), "expected float16 [64], got float32 [64]")),
        (lambda metadata: setattr(metadata, "storage_data", []), (".metadata",)),
        (lambda metadata: delattr(metadata, "state_dict_metadata"), (".metadata",)),
    ],
)
def test_damaged_metadata(
    edit: Callable[[Any], None], expected: tuple[str, ...], genuine: Path, tmp_path: Path
) -> None:
    """Chunks that are missing, doubled, moved, misplaced or of another type: refused, with the tensor or the value."""
    with edited_metadata(genuine) as metadata:
        edit(metadata)
    line = refusal(tmp_path, "to-hf", genuine, tmp_path / "out", "--config", tmp_path / "config.json")
    assert [text for text in expected if text not in line] == [], line
