"""Torch tensors of random bits, of any dtype and shape."""

from __future__ import annotations

import math

import torch


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits."""
    generator = torch.Generator().manual_seed(seed)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    most = 2 if dtype == "bool" else 256
    raw = torch.randint(0, most, (math.prod(shape) * torch_dtype.itemsize,), generator=generator).to(torch.uint8)
    return raw.view(torch_dtype).reshape(shape)
