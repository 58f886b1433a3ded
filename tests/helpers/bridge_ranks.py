"""What one rank does in tests of Megatron-Bridge itself: ``python bridge_ranks.py``, as in megatron_ranks.py.

Models, loading, saving and exports are those of ``megatron.bridge`` 0.6.2, without CUDA. Of the package only
``export_weights`` and ``load_weights`` have a part in it, where a result says so. Stand-ins take the place of what
Bridge imports and these tasks do not use, and of those layers of Transformer Engine whose parameters Bridge knows by
name: they hold weights, and compute nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import forked_ranks
import torch
import torch.distributed as dist
from gpt_optimizer import Optimizer
from gpt_stage import set_parallel_state
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.rerun_state_machine import destroy_rerun_state_machine, initialize_rerun_state_machine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron_lm_ranks import _CudaIsCpu, _pretend_more_cuda
from megatron_ranks import _hf_tensors
from safetensors.torch import save_file

from dist_ckpt_mistral.megatron.export_weights import export_weights
from dist_ckpt_mistral.megatron.load_weights import load_weights
from dist_ckpt_mistral.model.config.mistral_config import MistralConfig
from dist_ckpt_mistral.model.layout.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

#: What Bridge 0.6.2 imports at once. Megatron is imported above, so that it knows that Transformer Engine is absent.
_ABSENT: Final = (
    *("transformer_engine", "transformer_engine_torch", "wandb", "nvidia_resiliency_ext", "flashinfer", "mlflow"),
    *("comet_ml", "causal_conv1d", "mamba_ssm", "fla", "qwen_vl_utils", "fast_hadamard_transform", "diffusers"),
    *("modelopt", "nvtx", "torchvision", "decord", "open_clip", "nv_one_logger", "timm", "peft"),
    *("megatron.energon", "webdataset", "datasets", "tensorboard"),
)


class _AnyClass(type):
    """A class whose every attribute is a class like it."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {"__init__": lambda *_, **__: None})


class _Module(types.ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # noqa: RUF012  (what makes it a package)
    __version__ = "2.9.0"
    __file__ = "stand-in"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "Version":
            raise AttributeError(name)
        return _AnyClass(name, (), {"__init__": lambda *_, **__: None})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent, and nothing else."""

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """Say where a module is from."""
        absent = f"{fullname}.".startswith(tuple(f"{name}." for name in _ABSENT))
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Make it."""
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it as it is."""


class TELayerNormColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]  # megatron is untyped
    """A norm and the matrix behind it, by Transformer Engine's names; Bridge looks for this name of a class."""

    def __init__(self, *args: Any, name: object = None, **options: Any) -> None:  # noqa: ANN401, ARG002
        """Have a norm besides."""
        super().__init__(*args, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(args[0], dtype=self.config.params_dtype))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Sequence[Any] = (), **_: object) -> Any:  # noqa: ANN401
        """Cut the matrix, and not the norm."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def _spec(config: object) -> ModuleSpec:
    """What ``transformer_engine_layer_spec`` gives with Transformer Engine, for a model without experts."""
    del config
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.sharded_state_dict_keys_map = {}
    layer.self_attention.submodules.linear_qkv = TELayerNormColumnParallelLinear
    mlp = layer.mlp.keywords["submodules"] if hasattr(layer.mlp, "keywords") else layer.mlp.submodules
    mlp.linear_fc1 = TELayerNormColumnParallelLinear
    return spec


def _bridge(module: str = "") -> Any:  # noqa: ANN401  (Bridge may be absent where this is checked)
    """A module of Megatron-Bridge."""
    return importlib.import_module(f"megatron.bridge{module}")


def import_bridge() -> None:
    """Have Megatron-Bridge in memory, as it is on a machine with CUDA and Transformer Engine."""
    _pretend_more_cuda()
    sys.meta_path.append(_StandIns())
    for name in ("torch.utils.tensorboard", "torch.utils.tensorboard.writer"):  # these are there, and want tensorboard
        sys.modules[name] = _Module(name)
    with _CudaIsCpu():
        _bridge()
        _bridge(".models.gpt_provider").transformer_engine_layer_spec = _spec
        _bridge(".models.ministral3.ministral3_provider").MinistralTEDotProductAttention = DotProductAttention


def _auto(hf: str) -> Any:  # noqa: ANN401
    """Bridge's idea of the model in a Hugging Face directory."""
    return _bridge().AutoBridge.from_hf_pretrained(hf)


def on_cpu() -> contextlib.AbstractContextManager[object]:
    """Within the block what Bridge asks of CUDA is the processor's."""
    return _CudaIsCpu()


def take_place(layout: ParallelLayout) -> None:
    """Set up what Bridge's models need of Megatron before they are built."""
    set_parallel_state(layout)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def built(hf: str, layout: Mapping[str, Any], *, frozen: Sequence[str] = (), load: bool = True) -> tuple[Any, Any]:
    """AutoBridge and its model of this rank, filled with the weights in ``hf``; ``frozen`` as its provider says."""
    auto = _auto(hf)
    provider = auto.to_megatron_provider(load_weights=load)
    provider.tensor_model_parallel_size = layout.get("tp", 1)
    provider.pipeline_model_parallel_size = layout.get("pp", 1)
    provider.virtual_pipeline_model_parallel_size = layout.get("vpp")
    provider.pipeline_dtype = provider.params_dtype
    provider.gradient_accumulation_fusion = False
    for name in frozen:
        setattr(provider, name, True)
    provider.finalize()
    return auto, provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def load(*, hf: str, root: str, layout: dict[str, Any], out: str) -> None:
    """Open a checkpoint with ``AutoBridge`` as it finds it at a layout, and export the model to the file ``out``."""
    auto = _auto(hf)
    overrides = {f"{axis}_model_parallel_size": layout.get(axis[0] + "p", 1) for axis in ("tensor", "pipeline")}
    model = auto.load_megatron_model(root, mp_overrides=overrides, wrap_with_ddp=False)
    _keep(auto.export_hf_weights(model, cpu=True, show_progress=False), out)


def save(
    *,
    hf: str,
    layout: dict[str, Any],
    root: str,
    out: str,
    frozen: Sequence[str] = (),
    optimizer: bool = False,
    sidecar: bool = False,
) -> None:
    """Save a model of ``hf`` with Bridge as iteration 7, and what Bridge exports of the same model as ``out``.

    With ``optimizer``, the model is trained for a step, and its optimizer is saved. With ``sidecar`` Bridge leaves its
    own export beside the shards (``also_save_hf_checkpoint``).
    """
    auto, models = built(hf, layout, frozen=frozen)
    trained = None
    if optimizer:
        trained = Optimizer(SimpleNamespace(chunks=models), distributed=True)  # type: ignore[arg-type]
        models = trained.models
    config, checkpointing = _bridge(".training.config"), _bridge(".training.checkpointing")
    core_config = _bridge(".models.model_provider").get_model_config(models[0])
    state = _bridge(".training.state").GlobalState()
    state.cfg = config.ConfigContainer(
        model=core_config,
        train=None,
        optimizer=config.OptimizerConfig(use_distributed_optimizer=optimizer),
        ddp=None,
        scheduler=None,
        dataset=None,
        logger=config.LoggerConfig(),
        tokenizer=None,
        checkpoint=config.CheckpointConfig(
            save=root,
            save_optim=optimizer,
            save_rng=optimizer,
            dist_ckpt_optim_fully_reshardable=True,
            also_save_hf_checkpoint=sidecar,
            hf_source_path=hf,
        ),
        dist=None,
    )
    state.train_state.step = 7
    destroy_rerun_state_machine()
    initialize_rerun_state_machine()
    checkpointing.save_checkpoint(
        state=state,
        model=models,
        optimizer=trained and trained.own,
        opt_param_scheduler=None,
        num_floating_point_operations_so_far=0,
        callback_manager=None,
    )
    _keep(auto.export_hf_weights(models, cpu=True, show_progress=False), out)


def _keep(weights: Any, out: str) -> None:  # noqa: ANN401  (what Bridge yields)
    """Write what Bridge exports, on the first rank."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in weights}
    if dist.get_rank() == 0:
        save_file(tensors, out)


def stream(*, hf: str, layout: dict[str, Any]) -> dict[str, Any]:
    """What ``export_weights`` and Bridge yield of Bridge's own model, and what it holds after ``load_weights``.

    ``wrong`` are the names whose tensors differ from what Bridge exports in the same run, ``lost`` those that differ
    from the files of ``hf``, and ``unfilled`` those that Bridge exports otherwise of an emptied and refilled model.
    """
    auto, models = built(hf, layout)
    config, stored = MistralConfig.from_hf(hf), _hf_tensors(hf)
    ours = dict(export_weights(models, config))
    theirs = dict(auto.export_hf_weights(models, cpu=True, show_progress=False))
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    load_weights(models, hf)
    refilled = dict(auto.export_hf_weights(models, cpu=True, show_progress=False))
    return {
        "names": [*ours],
        "wrong": _different(ours, theirs),
        "lost": _different(ours, stored),
        "unfilled": _different(refilled, stored),
    }


def _different(found: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> list[str]:
    """The names that one side lacks, or whose tensors are not the same bit for bit."""
    both = [name for name in found if name in true]
    unequal = [
        name for name in both if found[name].dtype != true[name].dtype or not torch.equal(found[name], true[name])
    ]
    return sorted({*found} ^ {*true}) + unequal


_TASKS: Final[Mapping[str, Callable[..., Any]]] = {task.__name__: task for task in (load, save, stream)}


def main(folder: Path) -> None:
    """Run the jobs in FOLDER/jobs.json, each under the parallel state of its layout."""
    dist.init_process_group("gloo")
    results = {}
    with _CudaIsCpu():
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            print("job", name, flush=True)  # noqa: T201  (into the rank's log, which a failure shows)
            take_place(ParallelLayout(**job["layout"]))
            results[name] = _TASKS[job.pop("task")](**job)
            parallel_state.destroy_model_parallel()
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # Megatron's writers would hold up an ordinary exit


if __name__ == "__main__":
    import_bridge()
    forked_ranks.serve(main)
