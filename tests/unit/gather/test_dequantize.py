"""Quantized tensors as the gather reads them, against the operations of transformers itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from dist_ckpt_mistral.errors import FormatError
from dist_ckpt_mistral.gather.bands import BandReader
from dist_ckpt_mistral.gather.dequantize import dequantized, scaled_tensor
from dist_ckpt_mistral.gather.index import IndexedTensor, TensorIndex
from dist_ckpt_mistral.gather.links import Link
from dist_ckpt_mistral.gather.plan import plan_gather
from dist_ckpt_mistral.storage.local import SourceFiles

FP8 = torch.float8_e4m3fn
DTYPES = st.sampled_from(["bfloat16", "float16", "float32"])


def index_of(folder: Path, weight: torch.Tensor, scales: torch.Tensor) -> TensorIndex:
    """A file with a few bytes, the weight and its scales, one behind the other."""
    pieces = [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in (weight, scales)]
    (folder / "file").write_bytes(b"123" + b"".join(pieces))
    names = {"weight": (weight, 3), "scales": (scales, 3 + len(pieces[0]))}
    tensors = {
        name: IndexedTensor.whole(
            name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), file=0, position=position
        )
        for name, (tensor, position) in names.items()
    }
    return TensorIndex(files=(folder / "file",), tensors=tensors)


def values(
    folder: Path,
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    block_size: tuple[int, int] | None = None,
    dtype: str = "bfloat16",
) -> TensorIndex:
    """The index that has the weight's values."""
    scaled = scaled_tensor("weight", tuple(weight.shape), "scales", tuple(scales.shape), block_size)
    assert scaled is not None
    return dequantized(index_of(folder, weight, scales), [scaled], dtype)


def read(index: TensorIndex, cuts: list[int]) -> torch.Tensor:
    """The weight's values, read in pieces that end at these elements."""
    tensor = index.tensors["weight"]
    whole = torch.empty(tensor.global_shape, dtype=getattr(torch, tensor.dtype))
    data = whole.view(-1).view(torch.uint8).numpy().data
    ends = [cut * whole.itemsize for cut in (0, *sorted(cuts), whole.numel())]
    with SourceFiles(index.files, index.derived) as files:
        for start, end in itertools.pairwise(ends):
            files.read_into(int(tensor.files[0]), start, data[start:end])
    return whole


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all numbers have the same bits, and NaN stands where NaN stands."""
    nan = a.isnan()
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(nan, b.isnan()) and torch.equal(a.view(bits)[~nan], b.view(bits)[~nan])


@given(data=st.data(), dtype=DTYPES, scale_dtype=DTYPES)
def test_every_piece_has_the_values_of_transformers(
    data: st.DataObject, dtype: str, scale_dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Matrices and stacks of them, every byte, any even blocks and any pieces: the bits of Fp8Dequantize."""
    lead = data.draw(st.sampled_from([(), (1,), (3,)]))
    grid = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    block = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    shape = (*lead, grid[0] * block[0], grid[1] * block[1])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    weight = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(FP8)
    exponents = torch.randint(-14, 14, (*lead, *grid), generator=generator)
    scales = (torch.rand((*lead, *grid), generator=generator) * 2.0**exponents).to(getattr(torch, scale_dtype))
    cuts = data.draw(st.lists(st.integers(0, weight.numel()), max_size=4))
    found = read(values(tmp_path_factory.mktemp("fp8"), weight, scales, dtype=dtype), cuts)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=getattr(torch, dtype))  # noqa: SLF001
    assert same_bits(found, expected)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("shape", [[], [1], [1, 1], [1, 1, 1], [2], [2, 1, 1]])
def test_shapes_of_scales(lead: tuple[int, ...], shape: list[int], tmp_path: Path) -> None:
    """One scale in any shape is for the whole tensor; a row of them for its matrices, as transformers has it."""
    weight = torch.arange(256, dtype=torch.uint8)[: 96 * math.prod(lead)].view(*lead, 8, 12).view(FP8)
    scales = torch.arange(2, 2 + math.prod(shape)).float().reshape(shape) / 7
    if math.prod(shape) > 1 and not lead:
        assert scaled_tensor("weight", (8, 12), "scales", tuple(shape), None) is None
        return
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.bfloat16)  # noqa: SLF001
    assert same_bits(read(values(tmp_path, weight, scales), [5]), expected)


def test_all_numbers_at_extreme_scales(tmp_path: Path) -> None:
    """Zeros of both signs, subnormal results, infinite ones and NaN are those of transformers."""
    weight = torch.arange(256, dtype=torch.uint8).expand(6, 256).contiguous().view(FP8)
    scales = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 1e36, 3e38])[:, None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=dtype)  # noqa: SLF001
        assert expected.isinf().any()
        assert expected.isnan().any()
        found = read(values(tmp_path, weight, scales, dtype=str(dtype).removeprefix("torch.")), [])
        assert same_bits(found, expected)


@pytest.mark.parametrize(("rows", "columns"), [(10, 12), (12, 10), (9, 11), (3, 2), (6, 8)])
def test_blocks_that_are_cut(rows: int, columns: int, tmp_path: Path) -> None:
    """Where blocks of the size that config.json tells do not fit evenly, the last is cut, as in transformers' kernels.

    6 rows in 2 blocks of 4 are such a case: 4 and 2 rows. Equal blocks of 3 are what Fp8Dequantize would take them for.
    """
    block_size = (4, 4)
    grid = -(-rows // 4), -(-columns // 4)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(FP8)
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(2))
    expected = _dequantize_fp8_weight(weight, scales, list(block_size), torch.float32)
    found = read(values(tmp_path, weight, scales, block_size=block_size, dtype="float32"), [columns + 1])
    assert same_bits(found, expected)
    if (rows, columns) == (6, 8):
        assert not same_bits(found, Fp8Dequantize(None)._dequantize_one(weight, scales))  # noqa: SLF001


@pytest.mark.parametrize(
    ("shape", "scales", "block_size"),
    [
        ((8, 12), (3, 4), None),  # 8 rows in 3 equal blocks
        ((8, 12), (3, 4), (4, 4)),  # 2 blocks of 4, not 3
        ((8, 12), (2, 5), (4, 4)),
        ((8, 12), (4, 3), (4, 4)),  # even blocks, of another size
        ((8, 12), (1, 3), (4, 4)),
        ((8, 12), (2, 3, 1), (4, 4)),
        ((8, 12), (1, 2, 3), (4, 4)),
        ((8, 12), (8,), None),
        ((8, 12), (0, 3), None),
        ((3, 8, 12), (2, 2, 3), (4, 4)),
        ((3, 8, 12), (3, 2), (4, 4)),
        ((3, 8, 12), (2, 3), (4, 4)),
        ((12,), (3,), None),
        ((12,), (1,), None),
        ((), (), None),
    ],
)
def test_grids_that_do_not_fit(
    shape: tuple[int, ...], scales: tuple[int, ...], block_size: tuple[int, int] | None
) -> None:
    """Scales that cannot be laid over the tensor in one way are not laid over it at all."""
    assert scaled_tensor("weight", shape, "scales", scales, block_size) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5])
def test_scales_that_are_none(bad: float, tmp_path: Path) -> None:
    """A scale that is negative or no finite number is refused by name, wherever it lies."""
    scales = torch.ones(2, 3)
    scales[1, 1] = bad
    with pytest.raises(FormatError, match=rf"bad scale of 'weight': .* got {bad} in 'scales' of {tmp_path}/file"):
        values(tmp_path, torch.zeros(8, 12, dtype=FP8), scales)


@given(data=st.data())
def test_a_gather_brings_every_value_to_its_place(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Boxes of a quantized tensor that change places, read in bands, are the boxes of its values."""
    rows, columns, at = 30, 24, data.draw(st.integers(1, 23))
    weight = torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(at)).to(torch.uint8)
    weight[(weight & 127) == 127] = 0  # no NaN
    scales = torch.rand(5, 6, generator=torch.Generator().manual_seed(at))
    folder = tmp_path_factory.mktemp("fp8")
    index = values(folder, weight.view(FP8), scales)
    target = TensorIndex(
        files=(folder / "target",),
        tensors={"out": IndexedTensor.whole("out", "bfloat16", (rows, columns), file=0, position=0)},
    )
    links = [
        Link(source="weight", source_offset=(0, low), target="out", target_offset=(0, to), shape=(rows, size))
        for low, to, size in ((0, columns - at, at), (at, 0, columns - at))
    ]
    plan = plan_gather(index, target, links)
    with SourceFiles(plan.source_files, plan.derived_files) as files:
        bands = BandReader(files, data.draw(st.sampled_from([64, 256, 4096]))).bands(plan.segments[0])
        found = torch.frombuffer(bytearray(b"".join(map(bytes, bands))), dtype=torch.bfloat16).reshape(rows, columns)
    expected = Fp8Dequantize(None)._dequantize_one(weight.view(FP8), scales, output_dtype=torch.bfloat16)  # noqa: SLF001
    assert same_bits(found, torch.cat([expected[:, at:], expected[:, :at]], 1))


def test_scales_are_all_that_is_kept(tmp_path: Path) -> None:
    """Opening reads the scales, and nothing of the weight: only the file says what that is when it is read."""
    weight, scales = torch.ones(8, 12).to(FP8), torch.full((2, 3), 0.5)
    index = values(tmp_path, weight, scales, dtype="float32")
    content = bytearray((tmp_path / "file").read_bytes())
    content[3] = int((2 * torch.ones(1)).to(FP8).view(torch.uint8))
    (tmp_path / "file").write_bytes(content)
    expected = np.full((8, 12), 0.5, np.float32)
    expected[0, 0] = 1
    assert np.array_equal(read(index, []).numpy(), expected)
