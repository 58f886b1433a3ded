"""What a rank does in tests of live models: export their weights, wrapped as in training, and compare them."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gpt_optimizer import on_cpu
from gpt_stage import HfTensors, Stage
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from remote_folders import files_of, get_folder
from safetensors.torch import load_file

from dist_ckpt_mistral.convert.output import Output
from dist_ckpt_mistral.errors import DistCkptMistralError, OutputError
from dist_ckpt_mistral.megatron.export_weights import export_weights
from dist_ckpt_mistral.megatron.live_model import AnyModel
from dist_ckpt_mistral.megatron.save_hf import save_hf
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout
from dist_ckpt_mistral.storage.local import TargetFile
from dist_ckpt_mistral.storage.memory import MemoryStore


def _filled(
    config: MistralConfig, layout: dict[str, Any], hf: str, *, grouped: bool = False
) -> tuple[Stage, HfTensors]:
    """A rank's real model that holds the tensors of the directory ``hf``, and these."""
    stage = Stage(config, ParallelLayout(**layout), grouped=grouped)
    tensors = {name: tensor for path in Path(hf).glob("*.safetensors") for name, tensor in load_file(path).items()}
    stage.fill(tensors)
    return stage, tensors


def _wrapped(stage: Stage, wrapping: str) -> AnyModel:
    """The model of a rank, bare or as training has it: Float16Modules, in Megatron's DDP with its buffers."""
    if wrapping == "bare":
        return stage.chunks[0] if len(stage.chunks) == 1 else stage.chunks
    modules = [Float16Module(chunk.config, chunk) for chunk in stage.chunks]
    if wrapping == "float16":
        return modules
    with on_cpu():
        return [DistributedDataParallel(each.config, DistributedDataParallelConfig(), each) for each in modules]


def export_live(
    *,
    config: dict[str, Any],
    layout: dict[str, Any],
    hf: str,
    wrapping: str = "bare",
    grouped: bool = False,
    **options: Any,  # noqa: ANN401  (of export_weights)
) -> dict[str, Any]:
    """Names of the tensors that this rank gets, in order, and of those that are not as in the directory ``hf``."""
    model_config = MistralConfig.from_hf(config)
    stage, tensors = _filled(model_config, layout, hf, grouped=grouped)
    names, wrong = [], []
    for name, tensor in export_weights(_wrapped(stage, wrapping), model_config, **options):
        names.append(name)
        expected = tensors[name].to(getattr(torch, options.get("dtype", "bfloat16")))
        is_own = tensor.untyped_storage().nbytes() == tensor.nbytes and not tensor.requires_grad
        if not is_own or tensor.dtype != expected.dtype or not torch.equal(tensor, expected):
            wrong.append(name)
    return {"names": names, "wrong": wrong}


def refuse_live(*, config: dict[str, Any], layout: dict[str, Any], hf: str) -> dict[str, str]:
    """What this rank says to exports that must fail on every rank."""
    right = MistralConfig.from_hf(config)
    stage, _ = _filled(right, layout, hf)
    rank = dist.get_rank()

    def said(config: MistralConfig = right, *, takes: int = 10**9, **options: Any) -> str:  # noqa: ANN401
        try:
            _take(export_weights(stage.chunks, config, **options), takes)
        except DistCkptMistralError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    changes: dict[str, dict[str, Any]] = {
        "other model": {"intermediate_size": 28, "num_hidden_layers": 9},
        "other config": {"rms_norm_eps": 1e-4} if rank == 2 else {},
    }
    answers = {
        **{name: said(MistralConfig.from_hf(config | changed)) for name, changed in changes.items()},
        "small bucket": said(bucket_bytes=15999),
        "no rank": said(to=4),
        "other arguments": said(to=0 if rank == 1 else "all"),
        "int8": said(dtype="int8"),
    }
    answers |= {"disagreeing": _with_entry(stage, 1, "global_shape", (251, 32), said)}
    answers |= {"overlapping": _with_entry(stage, 3, "replica_id", (0, 0, 0), said)}
    answers |= {"missing": _with_entry(stage, 0, "replica_id", (0, 0, 1), said)}
    answers["stops"] = said(takes=1 if rank == 1 else 10**9, bucket_bytes=16000, timeout=timedelta(seconds=3))
    dist.barrier()
    if rank == 2:
        time.sleep(5)
    answers["late"] = said(timeout=timedelta(seconds=2))
    return answers


def save_live(*, config: dict[str, Any], layout: dict[str, Any], hf: str, to: str) -> dict[str, Any]:
    """Save a real model as a Hugging Face directory, and in a store; then where either is full, and too narrow."""
    stage, _ = _filled(MistralConfig.from_hf(config), layout, hf)
    small: dict[str, Any] = {"bucket_bytes": 16000, "output": Output(max_file_bytes=40000)}
    done = save_hf(_wrapped(stage, "float16"), hf, to, **small)
    answers: dict[str, Any] = {"written": sorted(done.files)}
    url = f"memory://bucket/{Path(to).name}"  # of each process, and the first rank writes
    save_hf(_wrapped(stage, "float16"), hf, url, **small)
    answers["store"] = get_folder(url) == (files_of(Path(to)) if dist.get_rank() == 0 else {})
    real, calls = TargetFile.write, itertools.count()

    def full(file: TargetFile, position: int, data: memoryview | bytes) -> None:
        if next(calls) == 20:
            raise OSError(errno.ENOSPC, "No space left on device", str(file.path))
        real(file, position, data)

    def said(name: str, **options: Any) -> str:  # noqa: ANN401
        try:
            save_hf(stage.chunks, hf, f"{url}-{name}" if name == "store" else f"{to}-{name}", **small, **options)
        except DistCkptMistralError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    with mock.patch.object(TargetFile, "write", full):
        answers["full"] = said("full")
    with mock.patch.object(MemoryStore, "upload", mock.Mock(side_effect=OutputError("the store is full"))):
        answers["full store"] = said("store"), get_folder(f"{url}-store")
    with torch.no_grad():
        for name, parameter, _ in stage.parameters():
            if name == "decoder.final_layernorm.weight":
                parameter[0] = 1e6
    answers["narrow"] = said("narrow", dtype="float16")
    return answers


def measure_export(*, config: dict[str, Any], layout: dict[str, Any], buckets: dict[str, int | None]) -> dict[str, Any]:
    """By how many bytes exports to all ranks raise the highest resident memory of this rank, which keeps no tensor.

    ``buckets`` names the exports, and says the size of their buffers. Memory is that of the kernel, which counts what
    torch and the collectives allocate too.
    """
    model_config = MistralConfig.from_hf(config)
    stage = Stage(model_config, ParallelLayout(**layout))
    stage.fill_alike()
    told: dict[str, Any] = {"model": sum(parameter.nbytes for _, parameter, _ in stage.parameters())}
    for name, bucket_bytes in buckets.items():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        for _ in export_weights(stage.chunks, model_config, bucket_bytes=bucket_bytes):
            pass
        told[name] = _resident("VmHWM") - before
    return told


def _resident(field: str) -> int:
    """Bytes of resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) << 10


def _take(tensors: Iterator[tuple[str, torch.Tensor]], number: int) -> None:
    for _, _ in zip(range(number), tensors, strict=False):
        pass


def _with_entry(stage: Stage, rank: int, field: str, value: object, said: Any) -> str:  # noqa: ANN401
    """What an export says if on ``rank`` an entry of the embedding, or of the norm, has another ``value``."""
    chunk = stage.chunks[0]
    original = chunk.sharded_state_dict

    def changed(*arguments: Any, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        entries: dict[str, Any] = original(*arguments, **named)
        if dist.get_rank() == rank:
            name = "embedding.word_embeddings.weight" if rank < 2 else "decoder.final_layernorm.weight"
            setattr(entries[name], field, value)
        return entries

    chunk.sharded_state_dict = changed
    try:
        answer: str = said()
    finally:
        del chunk.sharded_state_dict
    return answer
