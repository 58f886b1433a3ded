"""How an import lies on disk: its root, tracker and iterations, its chunks in the files of ranks, who may read it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from genuine import folder, shards
from hf_models import random_model, saved
from plain_models import contents
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch_reading import described, hf_tensors, read_metadata

from dist_ckpt_mistral.convert.from_hf import from_hf
from dist_ckpt_mistral.convert.to_hf import to_hf
from dist_ckpt_mistral.errors import ConfigError, LayoutError
from dist_ckpt_mistral.model.layout.layout import ParallelLayout


def boxes(directory: Path, vocabulary: int) -> dict[str, set[tuple[tuple[int, ...], tuple[int, ...], str]]]:
    """Per tensor: offset, size (without rows beyond the vocabulary) and rank of every chunk."""
    metadata: Any = read_metadata(directory)
    result: dict[str, set[tuple[tuple[int, ...], tuple[int, ...], str]]] = {}
    for index, at in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            sizes = next(tuple(chunk.sizes) for chunk in entry.chunks if chunk.offsets == index.offset)
            if len(sizes) == 2 and index.fqn in ("embedding.word_embeddings.weight", "output_layer.weight"):
                sizes = (min(sizes[0], vocabulary - index.offset[0]), sizes[1])
            rank = re.match(r"__(\d+)_", at.relative_path)
            assert rank is not None
            result.setdefault(index.fqn, set()).add((tuple(index.offset), sizes, rank[1]))
    return result


@pytest.mark.parametrize("case", ["td_0161", "tied_tp2pp2_0161"])
def test_chunks_are_cut_as_megatron_cuts_them(case: str, tmp_path: Path) -> None:
    """The truth of a genuine TP2 x PP2 checkpoint, imported for TP2 x PP2: same chunks, on the same ranks."""
    (tmp_path / "hf").mkdir()
    shutil.copy(folder(case) / "config.json", tmp_path / "hf")
    shutil.copy(folder(case) / "truth.safetensors", tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "ckpt", tp=2, pp=2)
    imported = tmp_path / "ckpt" / "release"
    assert boxes(imported, 250) == boxes(shards(case), 250)
    objects = [
        {key for key in read_metadata(each).state_dict_metadata if "_extra_state" in key}
        for each in (shards(case), imported)
    ]
    assert len(objects[0]) == 16
    assert objects[0] < objects[1]


@pytest.mark.parametrize(("iteration", "tracker", "step"), [(None, "release", "release"), (70, "70", "iter_0000070")])
def test_a_root_is_written_as_megatron_lm_reads_it(
    iteration: int | None, tracker: str, step: str, tmp_path: Path
) -> None:
    """The tracker file names the one step; root and step both open, with the iteration in the common state."""
    original = saved(random_model(), tmp_path / "original")
    from_hf(original, tmp_path / "ckpt", iteration=iteration)
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir() if not path.is_symlink()) == sorted(
        ["hf", "latest_checkpointed_iteration.txt", step]
    )
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == tracker
    assert torch.load(tmp_path / "ckpt" / step / "common.pt", weights_only=False)["iteration"] == (iteration or 0)
    assert json.loads((tmp_path / "ckpt" / step / "metadata.json").read_bytes()) == json.loads(
        (shards("td_0161") / "metadata.json").read_bytes()
    )
    for number, path in enumerate((tmp_path / "ckpt", tmp_path / "ckpt" / step)):
        to_hf(path, tmp_path / f"exported{number}")
        assert contents(tmp_path / f"exported{number}") == contents(original)


@pytest.mark.parametrize("iteration", [-5, 10**18, True, 1.0])
def test_iterations_that_no_tracker_can_name(iteration: Any, tmp_path: Path) -> None:  # noqa: ANN401  (wrong types)
    """What could not be opened again is not written: the library refuses it, and so does the command."""
    original = saved(random_model(), tmp_path / "original")
    with pytest.raises(ConfigError, match=rf"^iteration.*(from 0 to {10**18 - 1}|int or None), got {iteration}$"):
        from_hf(original, tmp_path / "ckpt", iteration=iteration)
    assert not (tmp_path / "ckpt").exists()


def test_the_last_iteration_can_be_reopened(tmp_path: Path) -> None:
    """The largest number that is accepted is found again through its tracker; one more is refused on the way in."""
    original = saved(random_model(), tmp_path / "original")
    from_hf(original, tmp_path / "ckpt", iteration=10**18 - 1)
    to_hf(tmp_path / "ckpt", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(original)
    refusal(tmp_path, "from-hf", original, tmp_path / "more", "--iteration", 10**18)


def test_an_older_step_of_a_root_can_be_named(tmp_path: Path) -> None:
    """Of several steps in a root the tracker's is taken, unless one is named."""
    older, newer = (
        saved(random_model(dtype), tmp_path / name) for dtype, name in ((torch.half, "a"), (torch.float, "b"))
    )
    from_hf(older, tmp_path / "ckpt", iteration=1)
    from_hf(newer, tmp_path / "more", iteration=2)
    (tmp_path / "more" / "iter_0000002").rename(tmp_path / "ckpt" / "iter_0000002")
    (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").write_text("2\n")
    to_hf(tmp_path / "ckpt", tmp_path / "latest")
    to_hf(tmp_path / "ckpt" / "iter_0000001", tmp_path / "first")
    assert contents(tmp_path / "latest") == contents(newer)
    assert contents(tmp_path / "first") == contents(older)


def test_outputs_are_as_open_to_others_as_any_file(tmp_path: Path) -> None:
    """Files and directories have the modes that the umask gives, not those of temporary files."""
    original = saved(random_model(), tmp_path / "original")
    before = os.umask(0o027)
    try:
        from_hf(original, tmp_path / "new" / "ckpt")
        to_hf(tmp_path / "new" / "ckpt", tmp_path / "new" / "hf")
    finally:
        os.umask(before)
    modes = {(path.is_dir(), path.stat().st_mode & 0o777) for path in (tmp_path / "new").rglob("*")}
    assert modes == {(True, 0o750), (False, 0o640)}


def test_copies_of_ranks_get_no_file(tmp_path: Path) -> None:
    """Data parallelism adds no files to an import, and changes no tensor's bits."""
    hf = saved(random_model(), tmp_path / "hf")
    done = from_hf(hf, tmp_path / "ckpt", layout=ParallelLayout(tp=2, pp=2, dp=2))
    assert [*done.files] == [f"release/__{number}_0.distcp" for number in range(4)]
    assert min(done.files.values()) > 0
    assert min(path.stat().st_size for path in (tmp_path / "ckpt" / "release").glob("*.distcp")) > 0
    to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert described(hf_tensors(tmp_path / "back")) == described(hf_tensors(hf))
    with pytest.raises(LayoutError, match="either a layout, or tp, pp and ep"):
        from_hf(hf, tmp_path / "both", tp=2, layout=ParallelLayout(tp=2))
